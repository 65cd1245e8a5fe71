"""What a failed run prints: its reason once, in our words, without Beam's name of the step."""

import json
from pathlib import Path
from typing import Any

import pytest

from moebeam.jobs.commands.cli import run_command
from moebeam.jobs.run import pipeline_thread
from moebeam.model_runner.fake_engine.runner import FakeRunner
from moebeam.schemas.job.sections import Job
from tests.support.jobs.jobs_for_tests import fake_job, write_job_file, write_parquet
from tests.support.jobs.remote_jobs import KEY, KEY_VARIABLE, remote_job, write_tickets
from tests.support.servers.fake_endpoint import FakeEndpoint, Reply


def run_job_file(job: Job, folder: Path, capsys: pytest.CaptureFixture[str], *options: str) -> tuple[int, str, str]:
    """Exit code, message of `--json`, and what was printed for people."""
    job_file = write_job_file(job, folder / "job.toml")
    capsys.readouterr()
    code = run_command(["run", str(job_file), "--json", *options])
    said = capsys.readouterr()
    return code, json.loads(said.out)["error"], said.err


def assert_said_once(told: str, error: str, said: str) -> None:
    assert told in error
    assert said.count(told) == 1, said
    assert [line for line in said.splitlines() if line.startswith("error: ")] == [f"error: {error}"]
    assert "while running" not in said + error
    assert "Traceback" not in said


def test_a_refused_key_is_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    write_tickets(tmp_path, 3)
    refusal = Reply({"error": {"message": "Authentication Fails"}}, status=401)
    with FakeEndpoint(lambda call: refusal) as endpoint:
        failures = {"max_outage_s": 0}
        job = remote_job(tmp_path, tmp_path / "out", endpoint, failures=failures)
        code, error, said = run_job_file(job, tmp_path, capsys)
    assert code == 1
    assert_said_once("Authentication Fails", error, said)


@pytest.mark.parametrize("has_record", [True, False])
def test_an_error_of_a_worker_is_said_once(
    tmp_path: Path,
    tiny_checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    has_record: bool,
) -> None:
    def fail(*unused: object) -> Any:
        raise RuntimeError("the engine's wheel came off")

    monkeypatch.setattr(FakeRunner, "generate", fail)
    if not has_record:
        monkeypatch.setattr(pipeline_thread, "read_failure", lambda layout: None)
    source = write_parquet(tmp_path / "in.parquet", {"text": ["one", "two"]})
    job = fake_job(source, tmp_path / "out", tiny_checkpoint)
    code, error, said = run_job_file(job, tmp_path, capsys)
    assert code == 1
    assert_said_once("the engine's wheel came off", error, said)
