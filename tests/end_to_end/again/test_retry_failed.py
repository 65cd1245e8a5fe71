"""Rejects of chosen kinds answered again, as a run of its own, from the plan of the first one."""

import json
import shutil
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from moebeam.jobs.commands.cli import run_command
from moebeam.transforms.read import input_scan
from tests.end_to_end.disturbed.test_stopped_runs import manifest_of, spoken
from tests.support.disturbances.disturbed_runs import Work
from tests.support.jobs.jobs_for_tests import read_table, write_script

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Work:
    return Work(tmp_path_factory.mktemp("retried"), tiny_checkpoint, 160, max_shard_rows=20).write()


@pytest.fixture(scope="module")
def first(work: Work) -> Path:
    """A finished run whose rejects are of many kinds."""
    output = work.folder / "first"
    rules = [
        {"contains": "trouble 1", "failure": "engine_timeout"},
        {"contains": "trouble 2", "text": "x" * 200},
        {"contains": "trouble 3", "failure": "engine_failed"},
    ]
    write_script(work.folder / "script.json", {"default": {"text": '{"category": "fine"}'}, "rules": rules})
    assert run_command(["run", str(work.write_job_file(output)), "--quiet", "--set", "repair.max_attempts=1"]) == 3
    return output


@pytest.fixture(autouse=True)
def input_is_not_read(first: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*unused: object) -> None:
        raise AssertionError("a retry reads the input")

    monkeypatch.setattr(input_scan, "_scan_parquet_file", refuse)


def files_of(output: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in output.rglob("*") if path.is_file()}


def rejected(output: Path, *kinds: str) -> list[dict[str, Any]]:
    return [row for row in read_table(output, "rejects") if row["error_type"] in kinds]


def test_exactly_the_rejects_of_the_kinds_are_answered_again(
    first: Path, work: Work, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files_of(first)
    new = work.folder / "again"
    wanted = rejected(first, "engine_timeout")
    code, summary = spoken(capsys, "retry-failed", first, "--kinds", "engine_timeout", "--output", new)
    assert (code, summary["rows_in"], summary["num_rejects"]) == (0, len(wanted), len(wanted))
    found = rejected(new, "engine_timeout")
    same = ("custom_id", "source_file", "source_row", "n", "merged_into", "output_text")
    assert [[row[name] for name in same] for row in found] == [[row[name] for name in same] for row in wanted]
    assert files_of(first) == before
    manifest = manifest_of(new)
    assert manifest["retry_of"] == {
        "output": str(first),
        "run_id": manifest_of(first)["run_id"],
        "kinds": ["engine_timeout"],
    }
    assert manifest["run_id"] != manifest_of(first)["run_id"]
    ledger = sum((line["cost"] for line in read_table(new, "ledger")), Decimal(0))
    assert ledger == Decimal(manifest["totals"]["costs"]["USD"])
    code, summary = spoken(capsys, "retry-failed", first, "--kinds", "engine_timeout", "--output", new)
    assert (code, summary["status"]) == (0, "already_done")
    code, status = spoken(capsys, "status", new)
    assert "answers rejects of" in status["retry_note"]


def test_a_retry_may_draw_answers_otherwise_and_stops_and_goes_on(
    first: Path, work: Work, capsys: pytest.CaptureFixture[str]
) -> None:
    new = work.folder / "longer"
    wanted = rejected(first, "truncated", "engine_failed")
    truncated = rejected(first, "truncated")
    assert truncated
    options = ["--set", "sampling.max_tokens=300", "--set", "limits.max_requests=20"]
    command = ["retry-failed", first, "--kinds", "truncated,engine_failed", "--output", new]
    code, summary = spoken(capsys, *command, *options)
    assert (code, summary["reason"]) == (4, "max_requests")
    code, summary = spoken(capsys, "resume", new, "--set", "limits.max_requests=1000")
    assert (code, summary["rows_in"]) == (0, len(wanted))
    assert {row["error_type"] for row in read_table(new, "rejects")} == {"not_json", "engine_failed"}
    assert sorted(row["n"] for row in read_table(new, "rejects")) == sorted(row["n"] for row in wanted)


def test_a_row_that_no_longer_fits_the_context_is_rejected_with_the_numbers(
    first: Path, work: Work, capsys: pytest.CaptureFixture[str]
) -> None:
    new = work.folder / "too long"
    config = json.loads((work.checkpoint / "config.json").read_text())
    most = config["max_position_embeddings"]
    command = [
        "retry-failed",
        first,
        "--kinds",
        "truncated",
        "--output",
        new,
        "--set",
        f"sampling.max_tokens={most - 1}",
    ]
    code, summary = spoken(capsys, *command)
    assert (code, summary["rejects_by_type"]) == (0, {"context_overflow": len(rejected(first, "truncated"))})
    assert f"context of {most} tokens" in read_table(new, "rejects")[0]["error_message"]


@pytest.mark.parametrize(
    ("kinds", "told"),
    [
        ("engine_timout", "unknown kind 'engine_timout'; there are "),
        ("duplicate_id", "duplicate_id is decided in stage plan, before the model is asked"),
        ("refused", "no row was rejected as refused; this run has engine_failed ("),
        (" , ", "expected kinds of rejects"),
    ],
)
def test_kinds_that_cannot_be_retried_are_refused_with_those_that_can(
    first: Path, work: Work, capsys: pytest.CaptureFixture[str], kinds: str, told: str
) -> None:
    new = work.folder / "never"
    code, answer = spoken(capsys, "retry-failed", first, "--kinds", kinds, "--output", new)
    assert code == 2
    assert told in answer["error"]
    assert "engine_timeout (" in answer["error"]
    assert not new.exists()


def test_a_retry_is_refused_what_it_cannot_do(first: Path, work: Work, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["retry-failed", first, "--kinds", "engine_timeout"]
    code, answer = spoken(capsys, *command, "--output", first)
    assert (code, "needs an output of its own" in answer["error"]) == (2, True)
    code, answer = spoken(capsys, *command, "--output", work.folder / "n", "--set", "prompt.template=x")
    assert (code, "--set prompt.template: shapes answers" in answer["error"]) == (2, True)
    assert "sampling.*, repair.*" in answer["error"]
    schema = work.folder / "schema.json"
    before = schema.read_text()
    try:
        schema.write_text(json.dumps({"type": "object"}))
        code, answer = spoken(capsys, *command, "--output", work.folder / "n")
    finally:
        schema.write_text(before)
    assert (code, "changed since: [output] schema" in answer["error"]) == (2, True)


def test_prompts_that_were_cleaned_cannot_be_asked_again(
    first: Path, work: Work, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = work.folder / "cleaned"
    shutil.copytree(first, copy)
    code, answer = spoken(capsys, "clean", copy, "--older-than", "0", "--yes")
    assert (code, answer["status"]) == (0, "cleaned")
    assert list(answer["removed"]) == ["plans, which hold prompts"]
    tables = {path: content for path, content in files_of(copy).items() if "_moebeam" not in path}
    assert len(tables) == len([path for path in files_of(first) if "_moebeam" not in path])
    command = ["retry-failed", copy, "--kinds", "engine_timeout", "--output", work.folder / "n2"]
    code, answer = spoken(capsys, *command)
    assert (code, "was cleaned" in answer["error"]) == (2, True)
    code, summary = spoken(capsys, "resume", copy)
    assert (code, summary["status"]) == (3, "already_done")
