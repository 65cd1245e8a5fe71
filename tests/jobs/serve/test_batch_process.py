"""A batch's run: its files, and what becomes of lines that nothing answered."""

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest

from moebeam.jobs.serve.batch_process import BatchOrder, RunEnd, run_batch
from moebeam.jobs.serve.batch_queue import MAX_FAILURES, judge_end
from moebeam.jobs.serve.records import Batch, BatchStatus

LINE = {"method": "POST", "url": "/v1/chat/completions", "body": {"messages": [{"role": "user", "content": "Hello"}]}}


@pytest.fixture
def order(tmp_path: Path) -> BatchOrder:
    (tmp_path / "job.toml").write_text('[output]\npath = "x"\n[model]\nengine = "fake"\nname = "m"\n')
    lines = [json.dumps({"custom_id": name, **LINE}) for name in ("a", "b")]
    (tmp_path / "in.jsonl").write_text("\n".join([*lines, "not JSON", ""]))
    return BatchOrder(
        job=str(tmp_path / "job.toml"),
        input=str(tmp_path / "in.jsonl"),
        output=str(tmp_path / "run"),
        made=str(tmp_path / "made"),
        tenant="acme",
        batch_id="batch_1",
        expires_at=int(time.time()) + 3600,
    )


def read(order: BatchOrder, name: str) -> list[dict[str, object]]:
    return [json.loads(line) for line in (Path(order.made) / f"{name}.jsonl").read_text().splitlines()]


def test_every_line_is_in_one_of_the_files_and_the_ledger_names_the_tenant(order: BatchOrder) -> None:
    import pyarrow.parquet as pq

    end = run_batch(order)
    assert (end.kind, end.num_completed, end.num_failed, end.model) == ("complete", 2, 1, "m")
    assert {line["custom_id"] for line in read(order, "output")} == {"a", "b"}
    assert [line["error"]["code"] for line in read(order, "error")] == ["invalid_id"]  # type: ignore[index]
    assert set(pq.read_table(f"{order.output}/ledger")["tenant"].to_pylist()) == {"acme"}
    assert end.usage is not None
    assert end.usage.prompt_tokens > 0
    assert run_batch(order).num_completed == 2  # as after a kill


@pytest.mark.parametrize(
    ("is_cancelled", "kind", "code"), [(True, "stopped", "batch_cancelled"), (False, "deadline", "batch_expired")]
)
def test_lines_that_nothing_answered_are_errors(order: BatchOrder, is_cancelled: bool, kind: str, code: str) -> None:
    end = run_batch(replace(order, is_cancelled=is_cancelled, expires_at=0))
    assert (end.kind, end.num_completed, end.num_failed) == (kind, 0, 3)
    errors = read(order, "error")
    assert [line["custom_id"] for line in errors] == ["a", "b", None]
    assert {line["error"]["code"] for line in errors} == {code}  # type: ignore[index]


def test_a_job_that_cannot_run_is_refused_in_words(order: BatchOrder) -> None:
    end = run_batch(replace(order, job=order.job + ".missing"))
    assert (end.kind, "there is no such job file" in end.message) == ("refused", True)


@pytest.mark.parametrize(
    ("kind", "status", "num_failures", "becomes"),
    [
        ("complete", "in_progress", 0, "completed"),
        ("complete", "cancelling", 0, "completed"),
        ("deadline", "in_progress", 0, "expired"),
        ("stopped", "cancelling", 0, "cancelled"),
        ("stopped", "in_progress", MAX_FAILURES, None),
        ("failed", "in_progress", 0, None),
        ("failed", "in_progress", MAX_FAILURES - 1, "failed"),
        ("refused", "in_progress", 0, "failed"),
    ],
)
def test_only_an_end_in_order_ends_a_batch(
    kind: str, status: BatchStatus, num_failures: int, becomes: BatchStatus | None
) -> None:
    batch = Batch(
        batch_id="batch_1",
        tenant="t",
        input_file_id="file-1",
        endpoint="",
        completion_window="24h",
        created_at=0,
        expires_at=0,
        status=status,
        num_failures=num_failures,
    )
    assert judge_end(batch, RunEnd(kind=kind)) == becomes  # type: ignore[arg-type]
