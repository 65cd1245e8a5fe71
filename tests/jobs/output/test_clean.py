"""What a cleaning removes, and what it never touches."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from moebeam.jobs.check.identity import JobIdentity
from moebeam.jobs.output.clean import clean, plan_cleaning
from moebeam.jobs.output.run_record import RunRecord, RunRequest, read_record
from moebeam.jobs.output.run_state import announce_presence
from moebeam.schemas.errors import OutputError
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.transforms.durable.commit import commit_shard
from moebeam.transforms.durable.lease import ShardLease
from moebeam.transforms.plan.build_shards import write_plan
from moebeam.transforms.plan.plan_record import PlannedShard
from tests.support.jobs.jobs_for_tests import fake_job
from tests.transforms.durable.test_commit import LINE, ROW, tables

MakeRun = Callable[..., RunRecord]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """A run with one committed shard of two and with leftovers of every kind; `ended_days_ago` finishes it."""

    def make(ended_days_ago: float | None = None) -> RunRecord:
        output = tmp_path / "out"
        layout = RunLayout(str(output))
        job = fake_job(tmp_path / "in", output, tmp_path / "checkpoint")
        kept = RunRequest(job).to_json(None)
        JobIdentity({"part": "digest"}).claim_output(layout, kept)
        write_plan([PlannedShard(name, 1, 1, 0, 10, 10) for name in ("s000000", "s000001")], layout)
        commit_shard(layout, "r", "s000000", tables([ROW], [LINE]))
        for path in (
            layout.shard_plan("s000000"),
            layout.sorted_run_file("000000-x"),
            layout.staged_file("s000001", "dead", "results"),
            layout.progress_file("answer", "s000001"),
            layout.published_file("results", "s000000"),
            f"{layout.commits}/.s000001.json.abc.tmp",
            f"{layout.output}/results/.part.parquet.abc.tmp",
        ):
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            Path(path).write_bytes(b"0123456789")
        if ended_days_ago is not None:
            Path(layout.manifest).write_text(json.dumps({"status": "complete"}))
            then = time.time() - ended_days_ago * 86_400
            os.utime(layout.manifest, (then, then))
        return read_record(layout.output)

    return make


def files_of(record: RunRecord) -> set[str]:
    root = Path(record.layout.output)
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


def test_what_an_unfinished_run_needs_stays_and_the_rest_goes(make_run: MakeRun) -> None:
    record = make_run()
    before = files_of(record)
    plan = plan_cleaning(record, 0)
    assert files_of(record) == before, "planning a cleaning removes nothing"
    clean(plan)
    gone = {path.replace("\\", "/") for path in before - files_of(record)}
    assert gone == {
        "_moebeam/plan/runs/000000-x.arrow",
        "_moebeam/staging/s000001.dead.results.parquet-staged",
        "_moebeam/progress/answer-s000001.json",
        "_moebeam/commits/.s000001.json.abc.tmp",
        "results/.part.parquet.abc.tmp",
    }
    assert plan.num_files == len(gone)
    assert plan.num_bytes == 10 * len(gone)
    assert "needs it to resume" in plan.kept[0]
    assert plan_cleaning(record).num_files == 0


def test_the_plan_of_a_finished_run_goes_after_its_time(make_run: MakeRun) -> None:
    record = make_run(ended_days_ago=10)
    young = plan_cleaning(record, 30)
    assert "ended 10 days ago, less than 30 days" in young.kept[0]
    assert "plans, which hold prompts" not in {removal.what for removal in young.removals}
    clean(plan_cleaning(record, 9))
    left = files_of(record)
    assert "_moebeam/plan/s000000.arrow" not in left
    assert {"_moebeam/plan/plan.json", "_moebeam/commits/s000000.json", "_moebeam/job.json"} <= left
    assert {"results/part-s000000.parquet", "manifest.json"} <= left


def test_journals_of_answers_stay_until_a_run_is_finished_and_then_go_with_its_plan(make_run: MakeRun) -> None:
    def journaled(record: RunRecord) -> RunRecord:
        path = Path(record.layout.shard_journal("s000000"), "a-000000.jsonl")
        path.parent.mkdir(parents=True)
        path.write_bytes(b"0123456789")
        return record

    record = journaled(make_run())
    plan = plan_cleaning(record, 0)
    assert plan.kept == (
        "the plan, with its prompts and the journals, with answers: the run is not finished and needs them to resume",
    )
    clean(plan)
    assert "_moebeam/journal/s000000/a-000000.jsonl" in files_of(record)
    Path(record.layout.manifest).write_text(json.dumps({"status": "complete"}))
    clean(plan_cleaning(record, 0))
    assert not Path(record.layout.journal).exists()


def test_a_run_at_work_is_not_cleaned(make_run: MakeRun) -> None:
    record = make_run()
    with announce_presence(record.layout), pytest.raises(OutputError, match=r"is at work .a launcher on .* .process"):
        plan_cleaning(record)
    with ShardLease(record.layout, "s000001").hold(), pytest.raises(OutputError, match="a worker at shard s000001"):
        plan_cleaning(record)
    assert plan_cleaning(record).num_files


def test_a_cleaning_can_be_repeated(make_run: MakeRun) -> None:
    plan = plan_cleaning(make_run())
    clean(plan)
    clean(plan)
