"""What a run tells while it is at work: metrics of every stage, and log events that name run, shard and request."""

import json
import logging
from pathlib import Path

import apache_beam as beam
import pytest
from apache_beam.runners.portability.fn_api_runner import FnApiRunner

from moebeam.jobs.check.preflight import check_job
from moebeam.jobs.run.main_job import make_main_job
from moebeam.pipelines.main_job import build
from moebeam.transforms.answer import shard_events
from moebeam.transforms.log_events import log_event
from tests.support.jobs.jobs_for_tests import fake_job, priced, write_parquet, write_script

NUM_ROWS = 30


def run(folder: Path, checkpoint: Path, num_broken: int = 3) -> tuple[dict[tuple[str, str], int], str]:
    """The counters of a run by stage and name, and its id; some rows cannot be rendered, others fail in the engine."""
    texts = [None, None, *(f"{'BREAK' if row < num_broken else 'fine'} {row}" for row in range(NUM_ROWS - 2))]
    write_parquet(folder / "in.parquet", {"text": texts})
    script = write_script(folder / "script.json", {"rules": [{"contains": "BREAK", "failure": "engine_failed"}]})
    output = {"max_reject_share": 1.0}
    checked = check_job(
        fake_job(
            folder / "in.parquet",
            folder / "out",
            checkpoint,
            model={"script": str(script)},
            output=output,
            accounting=priced(folder),
            plan={"max_shard_rows": 10},
        )
    )
    checked.claim_output()
    pipeline = beam.Pipeline(FnApiRunner())
    build(pipeline, make_main_job(checked, None))
    result = pipeline.run()
    result.wait_until_finish()
    counters = result.metrics().query()["counters"]
    found = {(counter.key.metric.namespace, counter.key.metric.name): counter.committed for counter in counters}
    return found, checked.identity.run_id


def test_every_stage_counts_what_passes_through_it(tmp_path: Path, tiny_checkpoint: Path) -> None:
    counted, _ = run(tmp_path, tiny_checkpoint)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    totals = manifest["totals"]
    assert counted["read", "num_rows"] == counted["render", "num_rows"] == counted["plan", "num_rows"] == NUM_ROWS
    assert counted["render", "num_rejects"] == 2
    assert counted["plan", "num_requests"] == NUM_ROWS - 2
    assert counted["plan", "num_shards"] == counted["publish", "num_shards"] >= 3
    assert counted["answer", "num_rows"] == NUM_ROWS
    for name in ("num_results", "num_rejects", "num_attempts", "prompt_tokens", "completion_tokens"):
        assert counted["answer", name] == totals[name] > 0
    assert counted["publish", "num_bytes"] == sum(
        file["num_bytes"] for files in manifest["files"].values() for file in files
    )


def test_events_name_run_shard_and_request(
    tmp_path: Path, tiny_checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="moebeam"):
        _, run_id = run(tmp_path, tiny_checkpoint)
    events = [record.__dict__["moebeam"] for record in caplog.records if record.name == "moebeam"]
    assert {event["run"] for event in events} == {run_id}
    begun, committed = (
        {e["shard"] for e in events if e["event"] == f"shard_{what}"} for what in ("begun", "committed")
    )
    assert begun == committed and len(begun) >= 3
    rejected = {event["request"]: event["error_type"] for event in events if event["event"] == "request_rejected"}
    assert sorted(rejected) == [f"in.parquet:{row}" for row in range(5)]
    assert [rejected[f"in.parquet:{row}"] for row in (2, 3, 4)] == ["engine_failed"] * 3
    assert f"request_rejected run={run_id} shard=" in caplog.text


def test_of_many_rejects_only_the_first_are_told(
    tmp_path: Path, tiny_checkpoint: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shard_events, "MAX_REJECT_EVENTS", 2)
    with caplog.at_level(logging.INFO, logger="moebeam"):
        run(tmp_path, tiny_checkpoint, num_broken=NUM_ROWS)
    by_shard: dict[str, list[str]] = {}
    for record in caplog.records:
        told = record.__dict__.get("moebeam", {})
        if told.get("event", "").startswith("request"):
            by_shard.setdefault(told["shard"], []).append(told["event"])
            told_more = told.get("num_more")
            assert told_more is None or told_more > 0
    assert max(map(len, by_shard.values())) == 3
    assert ["request_rejected", "request_rejected", "requests_rejected"] in by_shard.values()


def test_a_line_can_be_taken_apart_again(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="moebeam"):
        log_event("something", plain="a-b:1", spaced='x "y" = z', broken="a\nb", empty="", number=1.5, missing=None)
    assert caplog.messages == ['something plain=a-b:1 spaced="x \\"y\\" = z" broken="a\\nb" empty="" number=1.5']
