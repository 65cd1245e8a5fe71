"""Same input, same job: identical answers whatever the shards, the order or the crash; and sums that agree."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from decimal import Decimal
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import pyarrow.parquet as pq
import pytest

from moebeam.jobs.console.summary import ProgressSnapshot
from moebeam.jobs.notebook.run_job import run_job
from moebeam.jobs.run.launch import launch
from moebeam.schemas.errors import JobError
from tests.support.disturbances.disturbed_runs import tables_of
from tests.support.jobs.jobs_for_tests import (
    column,
    fake_job,
    priced,
    read_table,
    run_fake_job,
    write_parquet,
    write_script,
)
from tests.support.paths import ROOT

ANSWER_COLUMNS = (
    "custom_id",
    "status",
    "output_text",
    "output_json",
    "tool_calls",
    "finish_reason",
    "prompt_tokens",
    "completion_tokens",
    "error_type",
    "merged_into",
)
MEASURED = {"latency_ms"}


def tickets(folder: Path, num_rows: int = 60) -> Path:
    """Rows of two tenants with shared beginnings and some repeats, in two files."""
    rows = range(num_rows)
    columns = {
        "text": [f"{'printer' if row % 3 else 'invoice'} trouble number {row % 40}" for row in rows],
        "tenant": [("acme", "zeta")[row % 2] for row in rows],
        "n": list(rows),
    }
    half = num_rows // 2
    write_parquet(folder / "a.parquet", {name: values[:half] for name, values in columns.items()}, row_group_size=7)
    write_parquet(folder / "b.parquet", {name: values[half:] for name, values in columns.items()}, row_group_size=11)
    return folder


def answers(output: Path) -> list[dict[str, Any]]:
    rows = [*read_table(output, "results"), *read_table(output, "rejects")]
    rows.sort(key=lambda row: (row["source_file"], row["source_row"]))
    return [{name: row[name] for name in ANSWER_COLUMNS} for row in rows]


@pytest.mark.parametrize("engine", ["fake", "transformers"])
def test_answers_do_not_depend_on_the_number_of_shards(tmp_path: Path, tiny_checkpoint: Path, engine: str) -> None:
    source = tickets(tmp_path / "in", 24)
    model = {"engine": engine}
    sampling = {"max_tokens": 12}
    run_fake_job(source, tmp_path / "one", tiny_checkpoint, model=model, sampling=sampling)
    run_fake_job(source, tmp_path / "many", tiny_checkpoint, model=model, sampling=sampling, plan={"max_shard_rows": 3})
    assert len(list((tmp_path / "many" / "_moebeam" / "commits").iterdir())) >= 6
    assert len(list((tmp_path / "one" / "_moebeam" / "commits").iterdir())) == 1
    assert answers(tmp_path / "one") == answers(tmp_path / "many")
    assert len({row["output_text"] for row in answers(tmp_path / "one")}) > 5


def test_running_twice_gives_the_same_rows_in_every_column_but_measured_times(
    tmp_path: Path, tiny_checkpoint: Path
) -> None:
    source = tickets(tmp_path / "in")
    sections = {"accounting": priced(tmp_path), "input": {"tenant_column": "tenant", "passthrough": ["n"]}}
    tables = []
    for name in ("first", "second"):
        run_fake_job(source, tmp_path / name, tiny_checkpoint, **sections)
        rows = read_table(tmp_path / name, "results")
        tables.append([{key: value for key, value in row.items() if key not in MEASURED} for row in rows])
    assert tables[0] == tables[1]
    assert column(tables[0], "n") == list(range(60))


def test_identical_requests_are_answered_once_but_never_across_tenants(tmp_path: Path, tiny_checkpoint: Path) -> None:
    source = write_parquet(
        tmp_path / "in.parquet",
        {"text": ["same", "same", "same", "other", "same"], "who": ["a", "a", "b", "a", "a"]},
    )
    sections = {"input": {"tenant_column": "who"}, "accounting": priced(tmp_path)}
    summary = run_fake_job(source, tmp_path / "out", tiny_checkpoint, **sections)
    rows = read_table(tmp_path / "out", "results")
    assert column(rows, "merged_into") == [None, "in.parquet:0", None, None, "in.parquet:0"]
    assert len({rows[row]["output_text"] for row in (0, 1, 2, 4)}) == 1
    assert column(rows, "attempts") == [1, 0, 1, 1, 0]
    assert [row["cost"] == 0 for row in rows] == [False, True, False, False, True]
    assert all(row["cost_allocated"] > 0 for row in rows)
    ledger = read_table(tmp_path / "out", "ledger")
    assert len(ledger) == 3
    assert sum(row["cost"] for row in ledger) == summary.cost


def test_sampled_requests_are_not_merged_unless_the_job_says_so(tmp_path: Path, tiny_checkpoint: Path) -> None:
    source = write_parquet(tmp_path / "in.parquet", {"text": ["same", "same"]})
    hot = {"temperature": 1.0, "seed": 3}
    run_fake_job(source, tmp_path / "auto", tiny_checkpoint, sampling=hot)
    run_fake_job(source, tmp_path / "always", tiny_checkpoint, sampling=hot, plan={"merge": "always"})
    assert column(read_table(tmp_path / "auto", "results"), "merged_into") == [None, None]
    assert column(read_table(tmp_path / "always", "results"), "merged_into") == [None, "in.parquet:0"]


def test_the_ledger_sums_exactly_to_rows_and_manifest(tmp_path: Path, tiny_checkpoint: Path) -> None:
    source = tickets(tmp_path / "in")
    script = write_script(
        tmp_path / "script.json",
        {
            "default": {"text": "fine"},
            "rules": [
                {"contains": "number 7", "failure": "engine_failed", "message": "broke"},
                {"contains": "number 9", "text": "thought", "cached_tokens": None},
            ],
        },
    )
    summary = run_fake_job(
        source,
        tmp_path / "out",
        tiny_checkpoint,
        model={"script": str(script)},
        accounting=priced(tmp_path),
        input={"tenant_column": "tenant"},
        plan={"max_shard_rows": 9},
    )
    assert summary.num_results + summary.num_rejects == summary.rows_in == 60
    assert summary.cached_tokens is None
    assert summary.cost_basis == "upper_bound"
    out = tmp_path / "out"
    tables = {name: f"read_parquet('{out}/{name}/*.parquet')" for name in ("results", "rejects", "ledger")}
    rows_cost, rows_allocated, prompt, completion = duckdb.sql(
        f"select sum(cost), sum(cost_allocated), sum(prompt_tokens), sum(completion_tokens) "
        f"from (from {tables['results']} union all from {tables['rejects']})"
    ).fetchall()[0]
    ledger_cost, ledger_allocated, tokens, output = duckdb.sql(
        "select sum(cost), sum(cost_allocated), sum(coalesce(cache_hit_tokens, 0) + cache_miss_tokens), "
        f"sum(visible_output_tokens + reasoning_tokens) from {tables['ledger']}"
    ).fetchall()[0]
    assert rows_cost == ledger_cost == rows_allocated == ledger_allocated == summary.cost
    assert (prompt, completion) == (tokens, output) == (summary.prompt_tokens, summary.completion_tokens)
    manifest = json.loads((out / "manifest.json").read_text())
    assert Decimal(manifest["totals"]["costs"]["USD"]) == rows_cost
    recomputed = duckdb.sql(
        "select sum((coalesce(cache_hit_tokens, 0) * coalesce(cache_hit_price, cache_miss_price) "
        "+ cache_miss_tokens * cache_miss_price + (visible_output_tokens + reasoning_tokens) * output_price) / 1000000)"
        f" from {tables['ledger']} where cost_basis = 'exact'"
    ).fetchall()[0][0]
    exact = duckdb.sql(f"select sum(cost) from {tables['ledger']} where cost_basis = 'exact'").fetchall()[0][0]
    assert float(recomputed) == pytest.approx(float(exact), rel=1e-12)


def test_without_a_price_book_costs_are_null_and_tokens_are_counted(tmp_path: Path, tiny_checkpoint: Path) -> None:
    source = write_parquet(tmp_path / "in.parquet", {"text": ["a"]})
    summary = run_fake_job(source, tmp_path / "out", tiny_checkpoint)
    (row,) = read_table(tmp_path / "out", "results")
    assert (row["cost"], row["currency"], summary.cost) == (None, None, None)
    assert row["prompt_tokens"] > 0


def test_a_finished_job_does_nothing_again(tmp_path: Path, tiny_checkpoint: Path) -> None:
    source = write_parquet(tmp_path / "in.parquet", {"text": ["a", "b"]})
    run_fake_job(source, tmp_path / "out", tiny_checkpoint)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()}
    again = run_fake_job(source, tmp_path / "out", tiny_checkpoint)
    assert (again.status, again.exit_code, again.num_results) == ("already_done", 0, 2)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*") if path.is_file()} == before


@pytest.mark.integration
def test_stopping_drains_to_a_state_that_the_same_command_finishes(tmp_path: Path, tiny_checkpoint: Path) -> None:
    source = tickets(tmp_path / "in")
    script = write_script(tmp_path / "script.json", {"latency_ms": 20})
    sections = {"model": {"script": str(script)}, "plan": {"max_shard_rows": 5}}
    stop = threading.Event()

    def stop_after_the_first_shard(snapshot: ProgressSnapshot) -> None:
        if snapshot.stage == "answer" and snapshot.shards_done:
            stop.set()

    job = fake_job(source, tmp_path / "out", tiny_checkpoint, **sections)
    stopped = launch(job, stop=stop, progress=stop_after_the_first_shard)
    assert (stopped.status, stopped.exit_code) == ("incomplete", 4)
    assert 0 < stopped.num_results < 60
    assert pq.read_table(tmp_path / "out" / "results").num_rows == stopped.num_results
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["status"] == "incomplete"
    resumed = launch(job)
    assert (resumed.status, resumed.exit_code, resumed.num_results) == ("succeeded", 0, 60)
    run_fake_job(source, tmp_path / "undisturbed", tiny_checkpoint, **sections)
    after_stop, undisturbed = (tables_of(tmp_path / name) for name in ("out", "undisturbed"))
    assert after_stop == undisturbed


@pytest.mark.integration
def test_kill_9_in_mid_run_loses_nothing_and_leaves_only_whole_files(tmp_path: Path, tiny_checkpoint: Path) -> None:
    source = tickets(tmp_path / "in")
    script = write_script(tmp_path / "script.json", {"latency_ms": 50})
    job = fake_job(source, tmp_path / "out", tiny_checkpoint, model={"script": str(script)}, plan={"max_shard_rows": 5})
    (tmp_path / "job.json").write_text(job.model_dump_json(by_alias=True))
    code = (
        "import sys, pathlib; "
        "from moebeam.schemas.job.sections import Job; from moebeam.jobs.run.launch import launch; "
        "launch(Job.model_validate_json(pathlib.Path(sys.argv[1]).read_text()))"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "job.json")], cwd=ROOT)
    commits = tmp_path / "out" / "_moebeam" / "commits"
    deadline = time.monotonic() + 120
    while not (commits.is_dir() and len(list(commits.glob("*.json"))) >= 2):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done = len(list(commits.glob("*.json")))
    for path in (tmp_path / "out").rglob("*.parquet"):
        pq.read_table(path)
    assert not (tmp_path / "out" / "manifest.json").exists()
    before = {path: path.read_bytes() for path in commits.glob("*.json")}
    resumed = launch(job)
    assert (resumed.exit_code, resumed.num_results) == (0, 60)
    assert 2 <= done < len(list(commits.glob("*.json")))
    assert {path: path.read_bytes() for path in before} == before
    assert sorted(column(read_table(tmp_path / "out", "results"), "source_row")) == sorted([*range(30), *range(30)])


def test_a_failing_step_is_told_in_its_own_words_and_the_next_run_continues(
    tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tickets(tmp_path / "in")
    sections = {"plan": {"max_shard_rows": 20}}
    import moebeam.transforms.durable.commit as commit_module

    real = commit_module.storage.create_exclusive
    calls: list[str] = []

    def full_disk(path: str, content: bytes) -> bool:
        calls.append(path)
        if len(calls) == 2:
            raise OSError(28, "No space left on device", path)
        return real(path, content)

    monkeypatch.setattr(commit_module.storage, "create_exclusive", full_disk)
    with pytest.raises(JobError, match=r"answer: OSError: .*No space left on device"):
        run_fake_job(source, tmp_path / "out", tiny_checkpoint, **sections)
    monkeypatch.undo()
    assert run_fake_job(source, tmp_path / "out", tiny_checkpoint, **sections).num_results == 60


def test_run_job_takes_and_returns_dataframes(tmp_path: Path, tiny_checkpoint: Path) -> None:
    data = pd.DataFrame({"text": ["one", None, "three"], "label": ["x", "y", "z"]})
    job = {
        "prompt": {"template": "{{ text }}"},
        "model": {"engine": "fake", "path": str(tiny_checkpoint)},
        "input": {"passthrough": ["label"]},
        "sampling": {"max_tokens": 8},
    }
    answered = run_job(job, data=data)
    assert list(answered["status"]) == ["ok", "rejected", "ok"]
    assert list(answered["label"]) == ["x", "y", "z"]
    assert list(answered["source_row"]) == [0, 1, 2]
    kept = run_job({**job, "output": {"path": str(tmp_path / "kept")}}, data=data)
    assert (tmp_path / "kept" / "manifest.json").exists()
    assert list(kept["output_text"]) == list(answered["output_text"])
