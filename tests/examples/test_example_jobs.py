"""Every example does what its page says, on a copy of the folder."""

import json
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from moebeam.jobs.commands.cli import run_command
from tests.support.paths import ROOT

SCHEMA = "jobs/demo/ticket.schema.json"


@pytest.fixture
def examples(tmp_path: Path) -> Path:
    """A copy of `examples/` in the place that it has in a clone."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples", ignore=shutil.ignore_patterns("output", "*.parquet"))
    (tmp_path / SCHEMA).parent.mkdir(parents=True)
    shutil.copyfile(ROOT / SCHEMA, tmp_path / SCHEMA)
    return tmp_path / "examples"


def run_program(monkeypatch: pytest.MonkeyPatch, path: Path, *args: str) -> dict[str, Any]:
    """Run a program as `python PATH ARGS` would; returns its globals."""
    monkeypatch.setattr(sys, "argv", [str(path), *args])
    monkeypatch.chdir(path.parent)
    return runpy.run_path(str(path), run_name="__main__")


def read_rows(output: Path, table: str) -> list[dict[str, Any]]:
    return pq.read_table(output / table).sort_by("custom_id").to_pylist()


@contextmanager
def example_server(path: Path) -> Iterator[str]:
    """The example's endpoint on a free port; yields its address."""
    with subprocess.Popen([sys.executable, str(path), "--port", "0"], stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().strip()
        finally:
            process.kill()


def test_reviews_are_sorted_by_their_schema(examples: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = examples / "reviews"
    run_program(monkeypatch, folder / "make_reviews.py", "40")
    assert run_command(["validate", "job.toml", "--quiet"]) == 0
    assert run_command(["run", "job.toml", "--quiet"]) == 0
    results, rejects = read_rows(folder / "output", "results"), read_rows(folder / "output", "rejects")
    assert [row["custom_id"] for row in rejects] == ["review-00019", "review-00039"]
    assert {row["error_type"] for row in rejects} == {"refused"}
    assert len(results) == 38 and all(row["cost"] is not None for row in results)
    assert {row["output"]["sentiment"] for row in results} == {"positive", "neutral", "negative"}
    assert run_command(["report", "output", "--by", "cost_center"]) == 0


def test_a_tool_call_that_breaks_its_schema_is_asked_again(examples: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = examples / "tools"
    run_program(monkeypatch, folder / "make_chats.py")
    assert run_command(["run", "job.toml", "--quiet"]) == 0
    rows = {row["custom_id"]: row for row in read_rows(folder / "output", "results")}
    assert json.loads(rows["chat-1"]["tool_calls"][0]["arguments"]) == {"order_number": 4711}
    assert rows["chat-2"]["tool_calls"][0]["name"] == "forecast"
    assert rows["chat-3"]["failed_attempts"][0]["error_type"] == "tool_arguments_invalid"
    assert rows["chat-3"]["output_text"].startswith("Please look up your order number")
    assert rows["chat-4"]["output_text"] == "You are welcome."


def test_the_endpoint_answers_a_batch_file(examples: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = examples / "api"
    run_program(monkeypatch, folder / "make_questions.py")
    with example_server(folder / "server.py") as address:
        assert run_command(["run", "job.toml", "--quiet", "--set", f"model.base_url={address}"]) == 0
    results = read_rows(folder / "output", "results")
    assert [row["output_text"] for row in results[:3]] == ["Paris", "Tokyo", "Tokyo"]
    assert sum(row["merged_into"] is None for row in results) == 3, "equal questions are asked once"
    assert run_command(["export", "output", "--openai-batch", "files"]) == 0
    assert len((folder / "files" / "output.jsonl").read_text().splitlines()) == 12


def test_the_notebook_answers_a_data_frame(examples: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = run_program(monkeypatch, examples / "notebook" / "sort_tickets.py")
    answers = cells["answers"]
    assert answers["custom_id"].tolist() == cells["tickets"]["ticket_id"].tolist()
    assert answers["status"].tolist() == ["ok"] * 4
    assert all(json.loads(text)["category"] for text in answers["output_json"])


def test_the_pipeline_answers_what_it_renders(examples: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = examples / "pipeline"
    run_program(monkeypatch, folder / "pipeline.py", "--rows", "2", "--output", str(folder / "answers"))
    lines = [line for path in folder.glob("answers-*") for line in path.read_text().splitlines()]
    answers = {answer["custom_id"]: answer for answer in map(json.loads, lines)}
    assert sorted(answers) == ["held_out-1-000000", "held_out-1-000001"]
    assert all(answer["error"] is None and json.loads(answer["text"])["category"] for answer in answers.values())
