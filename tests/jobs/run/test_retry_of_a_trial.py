"""`retry-failed` on a run with `--limit`, and on all kinds of rejects at once."""

import json
from pathlib import Path
from typing import Any

import pytest

from moebeam.jobs.commands.cli import run_command
from moebeam.jobs.run.retry_failed import prepare_retry
from moebeam.schemas.errors import JobFileError
from tests.support.jobs.jobs_for_tests import column, fake_job, read_table, write_job_file, write_parquet, write_script

TEXTS = ["fine", None, "late", "late too", "long", "beyond the limit"]


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Path:
    """The output of a trial over five of six rows: one answer, one row without a prompt, three failures."""
    folder = tmp_path_factory.mktemp("trial")
    source = write_parquet(folder / "in.parquet", {"text": TEXTS})
    rules = [{"contains": "late", "failure": "engine_timeout"}, {"contains": "long", "failure": "engine_failed"}]
    write_script(folder / "script.json", {"default": {"text": "yes"}, "rules": rules})
    sections = {
        "model": {"script": str(folder / "script.json")},
        "output": {"max_reject_share": 1.0},
        "failures": {"max_retries": 0},
    }
    output = folder / "out"
    job_file = write_job_file(fake_job(source, output, tiny_checkpoint, **sections), folder / "job.toml")
    assert run_command(["run", str(job_file), "--quiet", "--limit", "5"]) == 0
    return output


def retried(capsys: pytest.CaptureFixture[str], output: Path, *options: object) -> tuple[int, dict[str, Any], str]:
    """Exit code, the line of `--json`, and what was said to people."""
    capsys.readouterr()
    code = run_command(["retry-failed", str(output), *(str(option) for option in options), "--json"])
    said = capsys.readouterr()
    return code, json.loads(said.out), said.err


def test_a_trial_is_retried_and_its_rows_alone(trial: Path, capsys: pytest.CaptureFixture[str]) -> None:
    new = trial.parent / "late again"
    code, summary, said = retried(capsys, trial, "--kinds", "engine_timeout", "--output", new)
    assert (code, summary["rejects_by_type"]) == (0, {"engine_timeout": 2}), said
    assert column(read_table(new, "rejects"), "source_row") == [2, 3]
    assert run_command(["resume", str(new), "--quiet"]) == 0


def test_all_kinds_are_those_with_a_prompt_and_the_others_are_named(
    trial: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = trial.parent / "all again"
    code, summary, said = retried(capsys, trial, "--kinds", "all", "--output", new)
    assert (code, summary["rejects_by_type"]) == (0, {"engine_failed": 1, "engine_timeout": 2}), said
    assert "not asked again: 1 null_value (stage render); they were rejected before the model was asked" in said
    manifest = json.loads((new / "manifest.json").read_text())
    assert manifest["retry_of"]["kinds"] == ["engine_failed", "engine_timeout"]
    code, summary, _ = retried(capsys, trial, "--kinds", "all,engine_failed", "--output", new)
    assert (code, summary["status"]) == (0, "already_done")


def test_all_of_a_run_without_such_rejects_is_refused(trial: Path) -> None:
    manifest = trial / "manifest.json"
    before = manifest.read_text()
    found = json.loads(before)
    try:
        for kinds, told in (({"null_value": 1}, r"not asked again: 1 null_value"), ({}, "no row was rejected")):
            found["totals"]["rejects_by_type"] = kinds
            manifest.write_text(json.dumps(found))
            with pytest.raises(JobFileError, match=f"--kinds all: {told}"):
                prepare_retry(str(trial), ("all",))
    finally:
        manifest.write_text(before)
