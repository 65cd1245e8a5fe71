"""Runs that limits or failing rows stop, and that go on from their output folder alone."""

import json
import shutil
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from moebeam.jobs.commands.cli import run_command
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.transforms.durable.journal_file import read_journal
from moebeam.transforms.read import input_scan
from tests.support.disturbances.disturbed_runs import Tables, Work, problems_of, tables_of

pytestmark = pytest.mark.integration

NUM_ROWS = 120


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Work:
    return Work(tmp_path_factory.mktemp("stopped"), tiny_checkpoint, NUM_ROWS, max_shard_rows=20).write()


@pytest.fixture(scope="module")
def undisturbed(work: Work) -> Tables:
    output = work.folder / "undisturbed"
    assert run_command(["run", str(work.write_job_file(output)), "--quiet"]) == 3
    return tables_of(output)


@pytest.fixture
def output(work: Work, request: pytest.FixtureRequest) -> Path:
    name: str = request.node.name.replace("[", "-").strip("]")
    return work.folder / f"out-{name}"


def spoken(capsys: pytest.CaptureFixture[str], *args: str | Path) -> tuple[int, dict[str, Any]]:
    """Exit code and JSON line of a command."""
    capsys.readouterr()
    options = [] if args[0] in ("status", "clean") else ["--quiet"]
    exit_code = run_command([*map(str, args), "--json", *options])
    captured = capsys.readouterr()
    return exit_code, json.loads(captured.out)


def started(capsys: pytest.CaptureFixture[str], work: Work, output: Path, *sets: str) -> tuple[int, dict[str, Any]]:
    options = [part for value in sets for part in ("--set", value)]
    return spoken(capsys, "run", work.write_job_file(output), *options)


def manifest_of(output: Path) -> dict[str, Any]:
    return json.loads((output / "manifest.json").read_text())


def num_asked(output: Path) -> int:
    """How many answers a stopped run holds, in its tables and in its journals."""
    layout = RunLayout(str(output))
    committed = {path.stem for path in (output / "_moebeam" / "commits").glob("*.json")}
    journals = {path.name for path in (output / "_moebeam" / "journal").glob("*")} - committed
    in_tables = manifest_of(output)["totals"]["num_attempts"]
    return in_tables + sum(len(read_journal(layout, shard).entries) for shard in journals)


def without_waste(tables: Tables) -> Tables:
    return {**tables, "ledger": [line for line in tables["ledger"] if line["outcome"] != "wasted"]}


def assert_like(output: Path, undisturbed: Tables) -> None:
    found = without_waste(tables_of(output))
    for name, rows in undisturbed.items():
        assert found[name] == rows, name


def test_a_run_stops_at_its_most_requests_and_goes_on_with_more(
    work: Work, undisturbed: Tables, output: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    code, summary = started(capsys, work, output, "limits.max_requests=50")
    assert (code, summary["status"], summary["reason"]) == (4, "incomplete", "max_requests")
    manifest = manifest_of(output)
    assert (manifest["status"], manifest["reason"]) == ("incomplete", "max_requests")
    assert num_asked(output) == 50
    assert manifest["wasted"]["num_attempts"] == 0

    code, status = spoken(capsys, "status", output)
    assert (code, status["state"], status["reason"], status["is_alive"]) == (0, "incomplete", "max_requests", False)
    assert status["limits"] == {"max_requests": 50}

    code, summary = spoken(capsys, "resume", output)
    assert (code, summary["reason"]) == (4, "max_requests"), "the limit counts earlier attempts too"

    def refuse(*unused: object) -> None:
        raise AssertionError("resume reads the input again")

    monkeypatch.setattr(input_scan, "_scan_parquet_file", refuse)
    code, summary = spoken(capsys, "resume", output, "--set", "limits.max_requests=1000")
    assert (code, summary["status"]) == (3, "succeeded")
    assert problems_of(output, work, None) == []
    assert_like(output, undisturbed)
    assert manifest_of(output)["reason"] is None
    code, summary = spoken(capsys, "resume", output)
    assert (code, summary["status"]) == (3, "already_done")


def test_what_was_paid_within_a_shard_is_kept_and_not_paid_again(
    work: Work, undisturbed: Tables, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    total = sum((line["cost"] for line in undisturbed["ledger"]), Decimal(0))
    most = total * Decimal("0.45")
    code, summary = started(capsys, work, output, f'limits.max_cost="{most}"')
    assert (code, summary["reason"]) == (4, "max_cost")
    spent = Decimal(summary["cost_paid"])
    dearest = max(line["cost"] for line in undisturbed["ledger"])
    assert most <= spent <= most + dearest, "one engine that answers one by one passes by one answer"

    code, status = spoken(capsys, "status", output)
    assert Decimal(status["cost"]) == spent

    code, summary = spoken(capsys, "resume", output, "--set", "limits.max_cost=1000")
    assert (code, summary["status"], summary["cost_wasted"]) == (3, "succeeded", None)
    assert_like(output, undisturbed)
    manifest = manifest_of(output)
    assert manifest["totals"]["num_attempts"] == len(undisturbed["ledger"]), "nothing was asked twice"
    named = {file["path"] for files in manifest["files"].values() for file in files}
    assert {str(path.relative_to(output)) for path in output.rglob("*.parquet")} == named


@pytest.mark.parametrize(
    ("limit", "reason"),
    [("max_input_tokens=3000", "max_input_tokens"), ("max_output_tokens=900", "max_output_tokens")],
)
def test_tokens_are_limited(
    work: Work, undisturbed: Tables, output: Path, capsys: pytest.CaptureFixture[str], limit: str, reason: str
) -> None:
    code, summary = started(capsys, work, output, f"limits.{limit}")
    assert (code, summary["reason"]) == (4, reason)
    most = int(limit.partition("=")[2])
    name = "prompt_tokens" if reason == "max_input_tokens" else "completion_tokens"
    longest = max(row[name] for row in undisturbed["results"])
    assert most <= summary[name] <= most + longest, "one engine that answers one by one passes by one answer"
    code, _ = spoken(capsys, "resume", output, "--set", f"limits.{reason}=1000000")
    assert code == 3
    assert_like(output, undisturbed)


def test_a_deadline_stops_a_run(work: Work, output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    started(capsys, work, output, "limits.max_requests=30")
    code, summary = spoken(
        capsys, "resume", output, "--set", "limits.deadline=0.0001", "--set", "limits.max_requests=1000"
    )
    assert (code, summary["reason"]) == (4, "deadline")
    code, summary = spoken(capsys, "resume", output)
    assert (code, summary["reason"]) == (4, "deadline"), "what one attempt sets, the next one keeps"
    code, summary = spoken(capsys, "resume", output, "--set", "limits.deadline=60")
    assert (code, summary["status"]) == (3, "succeeded")
    code, summary = spoken(capsys, "resume", output, "--set", 'limits.deadline="2020-01-01T00:00:00Z"')
    assert (code, summary["status"]) == (3, "already_done")


def test_a_row_that_must_not_fail_stops_the_run_and_is_asked_again(
    work: Work, undisturbed: Tables, output: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    script = work.folder / "script.json"
    before = script.read_text()
    code, answer = started(capsys, work, output, 'failures.on_error="fail"')
    assert code == 1
    assert "engine_failed: scripted" in answer["error"] and "trouble" not in answer["error"]
    assert manifest_of(output)["reason"] == "on_error"
    code, status = spoken(capsys, "status", output)
    assert (status["state"], status["reason"]) == ("failed", "on_error")
    assert status["message"] in answer["error"]
    assert script.read_text() == before
    code, summary = spoken(capsys, "resume", output, "--set", "failures.on_error=reject")
    assert (code, summary["status"]) == (3, "succeeded")
    assert_like(output, undisturbed)


def test_input_that_changed_is_named_and_the_run_is_left_alone(
    work: Work, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = work.folder / "in"
    keep = work.folder / "in-kept"
    shutil.copytree(folder, keep)
    started(capsys, work, output, "limits.max_requests=30")
    before = manifest_of(output)
    try:
        (folder / "d.parquet").write_bytes((folder / "a.parquet").read_bytes())
        (folder / "b.parquet").write_bytes((folder / "a.parquet").read_bytes())
        code, answer = spoken(capsys, "resume", output)
        assert code == 2
        assert "input files (changed: b.parquet; new: d.parquet)" in answer["error"]
    finally:
        for path in (folder / "b.parquet", folder / "d.parquet"):
            path.unlink()
        shutil.copy2(keep / "b.parquet", folder / "b.parquet")
    assert manifest_of(output) == before


def test_what_else_changed_is_named(work: Work, output: Path, capsys: pytest.CaptureFixture[str]) -> None:
    started(capsys, work, output, "limits.max_requests=30")
    schema = work.folder / "schema.json"
    before = schema.read_text()
    try:
        schema.write_text(json.dumps({"type": "object"}))
        code, answer = spoken(capsys, "resume", output)
    finally:
        schema.write_text(before)
    assert code == 2
    assert "different: [output] schema" in answer["error"]


def test_a_moved_output_goes_on_where_it_lies(
    work: Work, undisturbed: Tables, output: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    started(capsys, work, output, "limits.max_requests=50")
    moved = output.with_name("moved elsewhere")
    output.rename(moved)
    code, summary = spoken(capsys, "resume", moved, "--set", "limits.max_requests=1000")
    assert (code, summary["output"]) == (3, str(moved))
    assert problems_of(moved, work, None) == []
    assert_like(moved, undisturbed)
    assert not output.exists()


@pytest.mark.parametrize(
    "key", ["sampling.max_tokens=9", "repair.max_attempts=3", "prompt.template=x", "plan.merge=never"]
)
def test_a_key_that_shapes_answers_cannot_change(
    work: Work, capsys: pytest.CaptureFixture[str], key: str, undisturbed: Tables
) -> None:
    code, answer = spoken(capsys, "resume", work.folder / "undisturbed", "--set", key)
    assert code == 2
    assert f"--set {key.partition('=')[0]}: shapes answers" in answer["error"]
    assert "limits.*" in answer["error"]
