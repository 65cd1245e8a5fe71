"""Budgets: what a run may spend, held against everything that was spent."""

import itertools
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.job import LimitsSection
from schemas.layout import RunLayout
from schemas.records import Completion, Request, Sampling, Usage
from tests.transforms.test_commit import LINE, ROW, tables
from transforms import budget
from transforms.account import AccountedAnswer
from transforms.budget import BudgetedRunner, JournaledSpending, Limits, RunSpending, ShardBudget, Spent
from transforms.commit import commit_shard
from transforms.heartbeat import Beat, Heartbeat
from transforms.journal_file import JournalWriter
from transforms.plan import PlannedShard
from transforms.validate import ValidatedAnswer

NOW = 1_000_000.0
SHARD = PlannedShard("s1", num_rows=9, num_requests=8, num_rejects=1, num_prompt_tokens=80, num_tree_tokens=40)


def request(name: int) -> Request:
    return Request(str(name), np.zeros(10, np.int32), (), Sampling(max_tokens=5))


def answer(num_output_tokens: int) -> AccountedAnswer:
    usage = Usage(prompt_tokens=10, completion_tokens=num_output_tokens, cached_tokens=0)
    completion = Completion("0", "", "stop", usage, datetime.now(UTC), 0.0, "fake", "m", "r")
    return AccountedAnswer(ValidatedAnswer(completion, None, None), None)


@pytest.mark.parametrize(
    ("limits", "spent", "kind"),
    [
        (Limits(), Spent(10**9, 10**9, 10**9, Decimal(10**9)), None),
        (Limits(max_requests=5), Spent(num_requests=4), None),
        (Limits(max_requests=5), Spent(num_requests=5), "max_requests"),
        (Limits(max_input_tokens=5), Spent(input_tokens=5), "max_input_tokens"),
        (Limits(max_output_tokens=5), Spent(output_tokens=6), "max_output_tokens"),
        (Limits(max_cost=Decimal("0.10")), Spent(cost=Decimal("0.099999999999")), None),
        (Limits(max_cost=Decimal("0.10")), Spent(cost=Decimal("0.1")), "max_cost"),
        (Limits(deadline_at=NOW + 1), Spent(), None),
        (Limits(deadline_at=NOW), Spent(), "deadline"),
    ],
)
def test_a_limit_is_reached_when_nothing_is_left_of_it(limits: Limits, spent: Spent, kind: str | None) -> None:
    reason = limits.reached(spent, NOW)
    assert (reason and reason.kind) == kind
    assert reason is None or reason.message.startswith(f"[limits] {kind}: ")


def test_a_shard_that_cannot_be_finished_is_not_begun() -> None:
    assert Limits(max_requests=10).refused(Spent(num_requests=2), SHARD) is None
    reason = Limits(max_requests=10).refused(Spent(num_requests=3), SHARD)
    assert reason is not None
    assert reason.message == "[limits] max_requests: 10 allowed, 3 spent, and shard s1 needs at least 8"
    assert Limits(max_input_tokens=80).refused(Spent(), SHARD) is None
    reason = Limits(max_input_tokens=79).refused(Spent(), SHARD)
    assert reason is not None and reason.kind == "max_input_tokens"


def test_what_output_a_shard_will_take_is_not_guessed() -> None:
    assert Limits(max_output_tokens=1, max_cost=Decimal("0.000001")).refused(Spent(), SHARD) is None


def test_a_deadline_is_minutes_from_the_start_or_an_instant() -> None:
    assert Limits.of(LimitsSection(deadline=1.5), NOW).deadline_at == NOW + 90
    assert Limits.of(LimitsSection(deadline="1970-01-01T01:00:00+00:00"), NOW).deadline_at == 3600
    for wrong in ("tomorrow", "2026-10-01T06:00:00", 0, -1):
        with pytest.raises(ValueError, match="deadline"):
            LimitsSection(deadline=wrong)


class Engine:
    """Pulls requests in windows, and answers a window once it has it."""

    def __init__(self, window: int) -> None:
        self.window = window
        self.pulled: list[str] = []

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        source = iter(requests)
        while asked := list(itertools.islice(source, self.window)):
            self.pulled += [one.request_id for one in asked]
            for one in asked:
                yield replace(answer(3).answer.completion, request_id=one.request_id)


@given(num=st.integers(0, 30), window=st.integers(1, 7), most=st.integers(1, 40))
def test_requests_are_handed_out_up_to_the_limit_and_those_under_way_are_finished(
    num: int, window: int, most: int
) -> None:
    engine = Engine(window)
    shard = ShardBudget(Limits(max_requests=most), Spent)
    given_out = [request(name) for name in range(num)]
    answered = [one.request_id for one in BudgetedRunner(engine, shard).generate(given_out)]
    assert answered == engine.pulled == [str(name) for name in range(min(num, most))]
    assert (shard.stop is None) == (num < most)


@given(num=st.integers(1, 40), window=st.integers(1, 7), most=st.integers(1, 40))
def test_output_passes_its_limit_by_no_more_than_what_was_under_way(num: int, window: int, most: int) -> None:
    shard = ShardBudget(Limits(max_output_tokens=most), Spent)
    for _ in BudgetedRunner(Engine(window), shard).generate([request(name) for name in range(num)]):
        shard.note_answer(answer(3))
    assert shard.own.output_tokens < most + 3 * window


def test_what_others_spend_counts() -> None:
    others = iter([Spent(num_requests=1), Spent(num_requests=2), Spent(num_requests=4)])
    shard = ShardBudget(Limits(max_requests=5), lambda: next(others))
    assert len(list(BudgetedRunner(Engine(1), shard).generate(map(request, range(9))))) == 2


def test_an_answer_without_a_price_ends_a_run_with_a_budget_of_money() -> None:
    shard = ShardBudget(Limits(max_cost=Decimal(1)), Spent)
    shard.note_answer(answer(1))
    assert shard.stop is not None and shard.stop.kind == "max_cost"
    assert not shard.may_ask()


def test_spending_is_commits_and_shards_at_work_each_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = RunLayout(str(tmp_path))
    monkeypatch.setattr(budget, "REFRESH_S", 0.0)
    monkeypatch.setattr(budget, "_REFRESH_SHARE", 0)
    spending = RunSpending(layout)
    assert spending.outside("s0") == Spent()
    beats = Heartbeat(layout, "answer")
    for shard in ("s0", "s1", "s2"):
        beats.beat(shard, Beat(num_requests=1, prompt_tokens=10, completion_tokens=2, cost="0.25"))
    assert spending.outside("s0") == Spent(2, 20, 4, Decimal("0.5"))
    commit_shard(layout, "r", "s1", tables([ROW], [LINE]))
    assert spending.outside("s0") == Spent(1, 10, 2, Decimal("0.25")) + Spent(1, 10, 3, Decimal("0.5"))


def test_the_store_is_looked_at_no_more_often_than_it_is_worth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[float] = []

    def look(*unused: Any) -> dict[str, Beat]:
        looks.append(time.monotonic())
        return {}

    monkeypatch.setattr(budget, "read_beats", look)
    spending = RunSpending(RunLayout(str(tmp_path)))
    for _ in range(100):
        spending.outside("s0")
    assert len(looks) == 1
    spending.forget_look()
    spending.outside("s0")
    assert len(looks) == 2


def test_a_shard_counts_by_its_journal_or_its_heartbeat_but_not_by_both(tmp_path: Path) -> None:
    layout = RunLayout(str(tmp_path))
    for shard, num_answers in (("s1", 3), ("s2", 2), ("s3", 1), ("s4", 1)):
        writer = JournalWriter(layout, shard)
        for number in range(num_answers):
            writer.append(str(number), 1, answer(5).answer.completion)
        writer.close()
    heartbeat = Heartbeat(layout, "answer")
    heartbeat.beat("s2", Beat(num_requests=4, prompt_tokens=40, completion_tokens=20))
    heartbeat.beat("s4", Beat(num_requests=1, prompt_tokens=10, completion_tokens=5))
    commit_shard(layout, "r", "s4", tables([ROW], [LINE]))
    committed = RunSpending(layout).outside("s1").num_requests - 4
    spending = RunSpending(layout, JournaledSpending(layout, None, None, None))
    # s2 by its heartbeat, which says more; s3 by its journal; s4 by its commit; s1 is the one that asks.
    assert spending.outside("s1").num_requests == 4 + 1 + committed
    assert spending.outside("s9").num_requests == 3 + 4 + 1 + committed


def test_an_answer_that_was_counted_with_its_journal_is_not_counted_again() -> None:
    shard = ShardBudget(Limits(max_output_tokens=100), Spent)
    shard.note_answer(answer(7))
    shard.note_answer(answer(7), is_counted=True)
    assert shard.own.output_tokens == 7


def test_prompts_that_were_estimated_are_counted_as_the_provider_reports_them() -> None:
    class Provider:
        def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
            for each in requests:
                usage = Usage(prompt_tokens=25 if each.request_id == "0" else 0, completion_tokens=0)
                yield replace(answer(0).answer.completion, request_id=each.request_id, usage=usage)

    shard = ShardBudget(Limits(max_input_tokens=100), Spent)
    assert len(list(BudgetedRunner(Provider(), shard).generate(map(request, range(2))))) == 2
    # The second one failed without a count: what was estimated stays counted.
    assert shard.own.input_tokens == 25 + 10
