"""Spending: what a run has asked and paid, each part of it once."""

import time
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from moebeam.schemas.records import Completion, Usage
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.transforms.answer import spending
from moebeam.transforms.answer.spending import JournaledSpending, RunSpending, Spent
from moebeam.transforms.durable.commit import commit_shard
from moebeam.transforms.durable.journal_file import JournalWriter
from moebeam.transforms.durable.progress import ProgressWriter, ShardProgress
from moebeam.transforms.money.account import Accounting
from tests.transforms.durable.test_commit import LINE, ROW, tables


def completion(num_output_tokens: int) -> Completion:
    usage = Usage(prompt_tokens=10, completion_tokens=num_output_tokens, cached_tokens=0)
    return Completion("0", "", "stop", usage, datetime.now(UTC), 0.0, "fake", "m", "r")


def test_spending_is_commits_and_shards_at_work_each_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = RunLayout(str(tmp_path))
    monkeypatch.setattr(spending, "REFRESH_S", 0.0)
    monkeypatch.setattr(spending, "_REFRESH_SHARE", 0)
    found = RunSpending(layout)
    assert found.spent_by_others("s0") == Spent()
    progress = ProgressWriter(layout, "answer")
    for shard in ("s0", "s1", "s2"):
        progress.write(shard, ShardProgress(num_requests=1, prompt_tokens=10, completion_tokens=2, cost="0.25"))
    assert found.spent_by_others("s0") == Spent(2, 20, 4, Decimal("0.5"))
    commit_shard(layout, "r", "s1", tables([ROW], [LINE]))
    assert found.spent_by_others("s0") == Spent(1, 10, 2, Decimal("0.25")) + Spent(1, 10, 3, Decimal("0.5"))


def test_the_store_is_looked_at_no_more_often_than_it_is_worth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[float] = []

    def look(*unused: Any) -> dict[str, ShardProgress]:
        looks.append(time.monotonic())
        return {}

    monkeypatch.setattr(spending, "read_progress", look)
    found = RunSpending(RunLayout(str(tmp_path)))
    for _ in range(100):
        found.spent_by_others("s0")
    assert len(looks) == 1
    found.invalidate()
    found.spent_by_others("s0")
    assert len(looks) == 2


def test_a_shard_counts_by_its_journal_or_its_heartbeat_but_not_by_both(tmp_path: Path) -> None:
    layout = RunLayout(str(tmp_path))
    for shard, num_answers in (("s1", 3), ("s2", 2), ("s3", 1), ("s4", 1)):
        writer = JournalWriter(layout, shard)
        for number in range(num_answers):
            writer.append(str(number), 1, completion(5))
        writer.close()
    progress = ProgressWriter(layout, "answer")
    progress.write("s2", ShardProgress(num_requests=4, prompt_tokens=40, completion_tokens=20))
    progress.write("s4", ShardProgress(num_requests=1, prompt_tokens=10, completion_tokens=5))
    commit_shard(layout, "r", "s4", tables([ROW], [LINE]))
    committed = RunSpending(layout).spent_by_others("s1").num_requests - 4
    found = RunSpending(layout, JournaledSpending(layout, Accounting("run")))
    # s2 by its heartbeat, which says more; s3 by its journal; s4 by its commit; s1 is the one that asks.
    assert found.spent_by_others("s1").num_requests == 4 + 1 + committed
    assert found.spent_by_others("s9").num_requests == 3 + 4 + 1 + committed
