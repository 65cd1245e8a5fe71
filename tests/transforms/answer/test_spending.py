"""Spending: what a run has asked and paid, each part of it once."""

import time
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from moebeam.schemas.answers import Totals
from moebeam.schemas.records import Completion, Usage
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.transforms.answer import spending
from moebeam.transforms.answer.spending import RunSpending, Spent, share_spending
from moebeam.transforms.durable.commit import commit_shard
from moebeam.transforms.durable.journal_file import JournalWriter
from moebeam.transforms.durable.progress import ProgressWriter, ShardProgress
from moebeam.transforms.money.account import Accounting
from tests.transforms.durable.test_commit import LINE, ROW, tables


def completion(num_output_tokens: int) -> Completion:
    usage = Usage(prompt_tokens=10, completion_tokens=num_output_tokens, cached_tokens=0)
    return Completion("0", "", "stop", usage, datetime.now(UTC), 0.0, "fake", "m", "r")


def others_of(layout: RunLayout, *shards: str) -> Spent:
    """What is spent beside these shards, by a process that answers them and looks for the first time."""
    spending = RunSpending(layout, Accounting("run"))
    for shard in shards:
        spending.enter(shard)
    spending.refresh()
    return spending.others


def test_spending_is_commits_and_shards_at_work_each_once(tmp_path: Path) -> None:
    layout = RunLayout(str(tmp_path))
    assert others_of(layout, "s0") == Spent()
    progress = ProgressWriter(layout, "answer")
    for shard in ("s0", "s1", "s2"):
        progress.write(shard, ShardProgress(num_requests=1, prompt_tokens=10, completion_tokens=2, cost="0.25"))
    assert others_of(layout, "s0") == Spent(2, 20, 4, Decimal("0.5"))
    commit_shard(layout, "r", "s1", tables([ROW], [LINE]))
    assert others_of(layout, "s0") == Spent(1, 10, 2, Decimal("0.25")) + Spent(1, 10, 3, Decimal("0.5"))
    assert others_of(layout, "s0", "s2") == Spent(1, 10, 3, Decimal("0.5"))


def test_tokens_that_nobody_counted_count_by_their_estimate_and_cost_nothing_known(tmp_path: Path) -> None:
    usage = Usage(10, None).with_estimates(8, 3)
    spent = Spent.from_completions([replace(completion(1), usage=usage)], Accounting("run"))
    progress = ShardProgress(1, 1, prompt_tokens=10, num_unknown_usage=1, estimated_completion_tokens=3)
    totals = Totals(num_attempts=1, prompt_tokens=10, num_unknown_usage=1, estimated_completion_tokens=3)
    assert spent == Spent.from_progress(progress) == Spent.from_totals(totals) == Spent(1, 10, 3)


def test_the_store_is_looked_at_no_more_often_than_it_is_worth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[float] = []

    def look(*unused: Any) -> dict[str, ShardProgress]:
        looks.append(time.monotonic())
        return {}

    monkeypatch.setattr(spending, "read_progress", look)
    found = RunSpending(RunLayout(str(tmp_path)), Accounting("run"))
    for _ in range(100):
        found.refresh()
    assert len(looks) == 1
    found.invalidate()
    found.refresh()
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
    # s2 by its heartbeat, which says more; s3 by its journal; s4 by its commit; s1 is the one that asks.
    assert others_of(layout, "s1").num_requests == 4 + 1 + 1
    assert others_of(layout, "s9").num_requests == 3 + 4 + 1 + 1


def test_what_a_process_has_ended_itself_counts_before_the_store_says_it_and_once_after(tmp_path: Path) -> None:
    layout = RunLayout(str(tmp_path))
    writer = JournalWriter(layout, "s1")
    writer.append("key", 1, completion(3))
    writer.close()
    found = RunSpending(layout, Accounting("run"))
    found.refresh()
    assert found.total == Spent(1, 10, 3)
    # Answered here: it counts in memory, with what its journal held.
    found.enter("s1")
    assert found.total == Spent()
    found.own += (spent := Spent(2, 20, 6))
    found.leave("s1", spent)
    assert found.total == spent
    commit_shard(layout, "r", "s1", tables([ROW], [LINE]))
    found.invalidate()
    found.refresh()
    assert found.total.or_more(spent) == found.total
    assert (found.total.num_requests, found.total.output_tokens) == (2, 6), "the commit says less, and nothing twice"
    # Taken up again: what the attempt before spent is in the journal by now, and is counted by this one.
    found.enter("s1")
    assert (found.own, found.total) == (Spent(), Spent())


def test_the_threads_of_a_process_keep_one_account_for_each_attempt(tmp_path: Path) -> None:
    layout, accounting = RunLayout(str(tmp_path)), Accounting("run")
    one = share_spending("first", layout, accounting)
    assert share_spending("first", layout, accounting) is one
    assert share_spending("second", layout, accounting) is not one
