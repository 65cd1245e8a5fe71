"""Commands over an output folder: what they say of folders that are no run, or a damaged one."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from moebeam.jobs.check.identity import JobIdentity
from moebeam.jobs.commands.cli import run_command
from moebeam.jobs.output.run_record import RunRequest, find_secrets, read_record
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.transforms.durable.failure import record_failure
from moebeam.transforms.plan.build_shards import write_plan
from moebeam.transforms.plan.plan_record import PlannedShard
from tests.support.jobs.jobs_for_tests import fake_job

COMMANDS = (
    ("resume",),
    ("status",),
    ("clean", "--yes"),
    ("retry-failed", "--kinds", "engine_failed", "--output", "elsewhere"),
)


def make_claimed_output(output: Path) -> RunLayout:
    """An output folder that was claimed for a job, and nothing more."""
    job = fake_job(output.parent / "in", output, output.parent / "checkpoint")
    layout = RunLayout(str(output))
    kept = RunRequest(job, limit=7).to_json("USD")
    JobIdentity({"part": "digest"}).claim_output(layout, kept)
    return layout


def nothing(output: Path) -> None:
    pass


def empty(output: Path) -> None:
    output.mkdir()


def foreign(output: Path) -> None:
    output.mkdir()
    (output / "notes.txt").write_text("mine")


def without_record(output: Path) -> None:
    layout = make_claimed_output(output)
    write_plan([PlannedShard("s000000", 1, 1, 0, 10, 10)], layout)
    Path(layout.job).unlink()


def with_record(content: str) -> Callable[[Path], None]:
    def make(output: Path) -> None:
        Path(make_claimed_output(output).job).write_text(content)

    return make


def with_foreign_job(output: Path) -> None:
    layout = make_claimed_output(output)
    record = json.loads(Path(layout.job).read_text())
    record["job"]["input"]["colour"] = "red"
    Path(layout.job).write_text(json.dumps(record))


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
@pytest.mark.parametrize(
    ("make", "told"),
    [
        (nothing, "expected the output folder of a run, found no such folder"),
        (empty, "expected the output folder of a run, found no _moebeam/job.json in it"),
        (foreign, "expected the output folder of a run, found no _moebeam/job.json in it"),
        (without_record, "expected the record of a run, found no such file"),
        (with_record("{"), "found a damaged file"),
        (with_record("[]"), "found a damaged file"),
        (with_record('{"fingerprint": "f", "parts": {}}'), "written by an older version"),
        (with_record('{"fingerprint": "f", "parts": {}, "job": 5}'), "not one that this version understands"),
        (with_foreign_job, "not one that this version understands"),
    ],
)
def test_what_is_no_run_is_refused_and_left_alone(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    command: tuple[str, ...],
    make: Callable[[Path], None],
    told: str,
) -> None:
    output = tmp_path / "out"
    make(output)
    before = sorted(tmp_path.rglob("*"))
    code = run_command([command[0], str(output), *command[1:], "--json"])
    captured = capsys.readouterr()
    answer = json.loads(captured.out)
    assert (code, answer["exit_code"]) == (2, 2)
    assert told in answer["error"]
    assert "Traceback" not in captured.err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
def test_a_damaged_manifest_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: tuple[str, ...]
) -> None:
    layout = make_claimed_output(tmp_path / "out")
    Path(layout.manifest).write_text('{"status": ')
    code = run_command([command[0], layout.output, *command[1:], "--json"])
    assert code == 2
    assert "found a damaged file; remove it and resume" in json.loads(capsys.readouterr().out)["error"]


@pytest.mark.parametrize(
    ("args", "part"),
    [
        (["resume"], "Missing argument"),
        (["resume", "--runner", "direct", "out"], "found where an output folder belongs"),
        (["status", "out", "--runner=x"], "No such option"),
        (["retry-failed", "out", "--output", "new"], "Missing option"),
        (["clean", "out", "--older-than", "-1"], "greater than or equal to 0"),
    ],
)
def test_a_wrong_command_says_why(capsys: pytest.CaptureFixture[str], args: list[str], part: str) -> None:
    assert run_command(args) == 2
    assert part in capsys.readouterr().err


def test_a_claimed_output_shows_what_became_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layout = make_claimed_output(tmp_path / "out")

    def state() -> tuple[str, str | None]:
        assert run_command(["status", layout.output, "--json"]) == 0
        report = json.loads(capsys.readouterr().out)
        return report["state"], report["message"]

    assert state()[0] == "not started"
    write_plan([PlannedShard("s000000", 1, 1, 0, 10, 10)], layout)
    assert state() == ("stopped", "nobody is at work on it, and it did not say why")
    with pytest.raises(ValueError, match="boom"), record_failure(layout, "answer"):
        raise ValueError("boom")
    assert state() == ("failed", "ValueError: boom")
    Path(layout.manifest).write_text('{"status": "complete"}')
    assert state() == ("complete", None)


def test_a_person_reads_the_state_and_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layout = make_claimed_output(tmp_path / "out")
    write_plan([PlannedShard("s000000", 3, 3, 0, 10, 10)], layout)
    assert run_command(["status", layout.output]) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "stopped in stage answer: nobody is at work on it" in captured.err
    assert "0 of 3" in captured.err
    assert f"moebeam resume {layout.output}" in captured.err


def test_nothing_is_removed_without_a_yes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layout = make_claimed_output(tmp_path / "out")
    left = Path(layout.staged_file("s000000", "dead", "results"))
    left.parent.mkdir(parents=True)
    left.write_bytes(b"0123")
    assert run_command(["clean", layout.output]) == 2
    assert "add --yes" in capsys.readouterr().err
    assert run_command(["clean", layout.output, "--dry-run", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["status"], answer["num_files"], answer["num_bytes"]) == ("nothing removed", 1, 4)
    assert left.exists()
    assert run_command(["clean", layout.output, "--yes"]) == 0
    assert "1 file, 4 bytes: staged tables" in capsys.readouterr().err
    assert not left.exists()


def test_the_record_gives_back_the_job_with_its_folder(tmp_path: Path) -> None:
    job = fake_job(tmp_path / "in", tmp_path / "out", tmp_path / "c", limits={"max_cost": "0.10", "deadline": 5.0})
    job = job.in_folder(str(tmp_path))
    layout = RunLayout(str(tmp_path / "out"))
    kept = RunRequest(job, limit=7).to_json("USD")
    identity = JobIdentity({"part": "digest"})
    identity.claim_output(layout, kept)
    record = read_record(layout.output)
    assert (record.request.job, record.request.job.folder, record.request.limit) == (job, str(tmp_path), 7)
    assert (record.run_id, record.currency, record.request.retry_of) == (identity.run_id, "USD", None)
    other = job.model_copy(update={"limits": job.limits.model_copy(update={"max_requests": 3})})
    identity.claim_output(layout, RunRequest(other, limit=7).to_json("USD"))
    assert read_record(layout.output).request.job == other, "the last attempt's job is kept"


@pytest.mark.parametrize(
    ("url", "is_refused"),
    [
        ("s3://bucket/in/*.parquet", False),
        ("s3://key:hunter2@bucket/in", True),
        ("https://host/in?X-Amz-Signature=hunter2", True),
        ("plain/folder@home", False),
    ],
)
def test_a_path_that_carries_a_secret_is_refused_without_showing_it(tmp_path: Path, url: str, is_refused: bool) -> None:
    job = fake_job(Path("in"), tmp_path / "out", tmp_path / "c", input={"path": url})
    problems = [str(problem) for problem in find_secrets(job)]
    assert bool(problems) == is_refused
    assert "hunter2" not in "".join(problems)
