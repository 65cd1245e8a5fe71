"""Budgets: what a run may spend, held against everything that was spent."""

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moebeam.model_runner.openai_engine.options import FallbackSection
from moebeam.model_runner.protocol import ModelRunner
from moebeam.schemas.answers import AccountedAnswer, ValidatedAnswer
from moebeam.schemas.errors import EngineFailed, EngineUnavailable, RequestGivenUp
from moebeam.schemas.job.sections import LimitsSection
from moebeam.schemas.records import Completion, Request, Sampling, Usage
from moebeam.transforms.answer.budget import BudgetedRunner, BudgetEnded, ShardBudget, SpendingLimits
from moebeam.transforms.answer.expectation import Ceiling
from moebeam.transforms.answer.spending import Spending, Spent
from moebeam.transforms.durable.stop import BY_SIGNAL
from moebeam.transforms.money.account import Accounting
from moebeam.transforms.money.price_book import PriceBook
from tests.support.engines.engine_configs import engine_config

NOW = 1_000_000.0


def request(name: int) -> Request:
    return Request(str(name), np.zeros(10, np.int32), (), Sampling(max_tokens=5))


def answer(num_output_tokens: int) -> AccountedAnswer:
    usage = Usage(prompt_tokens=10, completion_tokens=num_output_tokens, cached_tokens=0)
    completion = Completion("0", "", "stop", usage, datetime.now(UTC), 0.0, "fake", "m", "r")
    return AccountedAnswer(ValidatedAnswer(completion, None, None), None)


@pytest.mark.parametrize(
    ("limits", "spent", "kind"),
    [
        (SpendingLimits(), Spent(10**9, 10**9, 10**9, Decimal(10**9)), None),
        (SpendingLimits(max_requests=5), Spent(num_requests=4), None),
        (SpendingLimits(max_requests=5), Spent(num_requests=5), "max_requests"),
        (SpendingLimits(max_input_tokens=5), Spent(input_tokens=5), "max_input_tokens"),
        (SpendingLimits(max_output_tokens=5), Spent(output_tokens=6), "max_output_tokens"),
        (SpendingLimits(max_cost=Decimal("0.10")), Spent(cost=Decimal("0.099999999999")), None),
        (SpendingLimits(max_cost=Decimal("0.10")), Spent(cost=Decimal("0.1")), "max_cost"),
        (SpendingLimits(deadline_at=NOW + 1), Spent(), None),
        (SpendingLimits(deadline_at=NOW), Spent(), "deadline"),
    ],
)
def test_a_limit_is_reached_when_nothing_is_left_of_it(limits: SpendingLimits, spent: Spent, kind: str | None) -> None:
    reason = limits.find_reached(spent, NOW)
    assert (reason and reason.kind) == kind
    assert reason is None or reason.message.startswith(f"[limits] {kind}: ")


def test_a_deadline_is_minutes_from_the_start_or_an_instant() -> None:
    assert SpendingLimits.from_section(LimitsSection(deadline=1.5), NOW).deadline_at == NOW + 90
    assert SpendingLimits.from_section(LimitsSection(deadline="1970-01-01T01:00:00+00:00"), NOW).deadline_at == 3600
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


def answers_within(shard: ShardBudget, engine: ModelRunner, num: int) -> tuple[list[str], bool]:
    """Ids of the requests that were answered, and whether the budget ended before all of them."""
    answered: list[str] = []
    try:
        for completion in BudgetedRunner(engine, shard).generate(map(request, range(num))):
            answered.append(completion.request_id)
    except BudgetEnded:
        return answered, True
    return answered, False


@given(num=st.integers(0, 30), window=st.integers(1, 7), most=st.integers(1, 40))
def test_requests_are_handed_out_up_to_the_limit_and_those_under_way_are_finished(
    num: int, window: int, most: int
) -> None:
    engine = Engine(window)
    shard = ShardBudget(SpendingLimits(max_requests=most))
    answered, is_ended = answers_within(shard, engine, num)
    assert answered == engine.pulled == [str(name) for name in range(min(num, most))]
    assert is_ended == (shard.stop is not None) == (num > most)


@given(num=st.integers(1, 40), window=st.integers(1, 7), most=st.integers(1, 40))
def test_output_passes_its_limit_by_no_more_than_what_was_under_way(num: int, window: int, most: int) -> None:
    engine = Engine(window)
    shard = ShardBudget(SpendingLimits(max_output_tokens=most))
    with contextlib.suppress(BudgetEnded):
        assert list(BudgetedRunner(engine, shard).generate([request(name) for name in range(num)]))
    # Once one has arrived, the others are expected to take as much; only the last one passes the limit.
    assert shard.own.output_tokens == 3 * len(engine.pulled) < most + 3


def test_what_others_spend_counts() -> None:
    class Others(Spending):
        def refresh(self) -> None:
            self.others += Spent(num_requests=1)

    shard = ShardBudget(SpendingLimits(max_requests=5), Others())
    # Looked at before each request: two of five are left when the third one is to be sent.
    assert answers_within(shard, Engine(1), 9) == (["0", "1"], True)


@given(num=st.integers(0, 20), most=st.integers(1, 30))
def test_shards_that_one_process_answers_at_a_time_count_together(num: int, most: int) -> None:
    spending = Spending()
    shards = [ShardBudget(SpendingLimits(max_requests=most), spending, shard=name) for name in ("a", "b")]
    sent = [shard.admit(request(name)) for name in range(num) for shard in shards]
    assert sent.count("send") == min(2 * num, most)
    assert spending.own == shards[0].own + shards[1].own


def test_after_a_signal_nothing_leaves_and_nothing_is_tried_again() -> None:
    shard = ShardBudget(SpendingLimits(max_requests=2))
    assert [shard.admit(request(name)) for name in (0, 1, 2)] == ["send", "send", "stop"]
    assert shard.admit(request(0)) == "send", "a limit of spending has counted it: it may be tried again"
    shard = ShardBudget(SpendingLimits(max_requests=2))
    assert shard.admit(request(0)) == "send"
    shard.end(BY_SIGNAL)
    assert [shard.admit(request(name)) for name in (0, 1)] == ["stop", "stop"]
    assert not shard.may_ask()
    shard.sleep(3600)


def test_a_request_that_was_given_up_is_no_answer() -> None:
    class GivesUp:
        def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
            for each in requests:
                shard.end(BY_SIGNAL)
                yield Completion.from_error(each.request_id, RequestGivenUp("stopped"))

    shard = ShardBudget()
    assert answers_within(shard, GivesUp(), 3) == ([], True)


def test_an_engine_that_gives_up_unasked_ends_the_run_and_rejects_no_row() -> None:
    class GivesUp:
        def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
            for each in requests:
                yield Completion.from_error(each.request_id, RequestGivenUp("why not"))

    with pytest.raises(EngineUnavailable):
        list(BudgetedRunner(GivesUp(), ShardBudget()).generate(map(request, range(2))))


def test_an_answer_without_a_price_ends_a_run_with_a_budget_of_money() -> None:
    shard = ShardBudget(SpendingLimits(max_cost=Decimal(1)))
    shard.note_answer(answer(1))
    assert shard.stop is not None and shard.stop.kind == "max_cost"
    assert not shard.may_ask()


def test_prompts_that_were_estimated_are_counted_as_the_provider_reports_them() -> None:
    class Provider:
        def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
            for each in requests:
                usage = Usage(prompt_tokens=25 if each.request_id == "0" else 0, completion_tokens=0)
                yield replace(answer(0).answer.completion, request_id=each.request_id, usage=usage)

    shard = ShardBudget(SpendingLimits(max_input_tokens=100))
    assert answers_within(shard, Provider(), 2) == (["0", "1"], False)
    # The second one failed without a count: what was expected of it, after the first one, stays counted.
    assert shard.own.input_tokens == 25 + 25


MAX_TOKENS, PRICE = 5, Decimal("0.00001")
"""`request` asks for 10 prompt tokens and at most 5 of output, at 10 USD a million of either."""
MOST = 15 * PRICE
BOOK = b"""\
provider,model,effective_from_utc,effective_to_utc,window_utc,currency,cache_hit_per_mtok,cache_miss_per_mtok,\
output_per_mtok,evidence,note
fake,m,2020-01-01T00:00:00Z,,,USD,10,10,10,made up,
"""


def priced(limits: SpendingLimits) -> ShardBudget:
    accounting = Accounting("run", PriceBook.parse(BOOK, "prices.csv"))
    return ShardBudget(limits, ceiling=Ceiling(accounting, (("fake", "m"),)))


def arrived(name: int, num_output_tokens: int) -> Completion:
    return replace(answer(num_output_tokens).answer.completion, request_id=str(name))


def test_a_request_waits_while_what_is_on_its_way_may_reach_the_limit_and_stops_once_it_has() -> None:
    shard = priced(SpendingLimits(max_cost=2 * MOST))
    assert [shard.admit(request(name)) for name in (0, 1, 2)] == ["send", "send", "wait"]
    assert shard.admit(request(1)) == "send", "it is on its way already"
    # It took two thirds of what it might, and so will the other one: a third one fits in.
    shard.settle(arrived(0, 0))
    assert [shard.admit(request(name)) for name in (2, 3)] == ["send", "wait"]
    shard.settle(arrived(1, 5))
    shard.settle(arrived(2, 5))
    assert shard.own == Spent(3, 30, 10, 40 * PRICE)
    assert shard.admit(request(3)) == "stop"
    assert shard.stop is not None and shard.stop.kind == "max_cost"


def test_a_wait_ends_where_nothing_is_on_its_way() -> None:
    shard = priced(SpendingLimits(max_cost=MOST / 2))
    assert [shard.admit(request(name)) for name in (0, 1)] == ["send", "wait"]
    failed = Completion.from_error("0", EngineFailed("broke"))
    shard.settle(failed)
    assert shard.admit(request(1)) == "send"


@given(st.lists(st.integers(0, MAX_TOKENS), max_size=40), st.integers(1, 7), st.integers(1, 600))
def test_money_passes_its_limit_by_no_more_than_a_window_at_its_maximal_price(
    outputs: list[int], window: int, num_affordable_tokens: int
) -> None:
    class Varying(Engine):
        def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
            for completion in super().generate(requests):
                yield arrived(int(completion.request_id), outputs[int(completion.request_id)])

    engine, most = Varying(window), num_affordable_tokens * PRICE
    shard = priced(SpendingLimits(max_cost=most))
    with contextlib.suppress(BudgetEnded):
        for _ in BudgetedRunner(engine, shard).generate([request(name) for name in range(len(outputs))]):
            pass
    spent = sum((10 + outputs[int(name)] for name in engine.pulled), 0) * PRICE
    assert shard.own.cost == spent < most + window * MOST
    # What is only expected stops nothing: it ends where the limit is reached, or where nothing is left to ask.
    assert spent >= most or len(engine.pulled) == len(outputs)


def test_an_engine_that_loses_requests_does_not_make_the_rest_wait_for_ever() -> None:
    class Losing:
        def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
            for each in requests:
                if int(each.request_id) % 2:
                    yield arrived(int(each.request_id), 0)

    shard = priced(SpendingLimits(max_cost=MOST * 3))
    found = list(BudgetedRunner(Losing(), shard).generate(map(request, range(6))))
    assert [completion.request_id for completion in found] == ["1", "3", "5"]


def test_the_ceiling_is_the_dearest_of_those_who_may_answer() -> None:
    lines = [
        f"{name},m,2020-01-01T00:00:00Z,,,USD,1,{miss},10,made up,".encode() for name, miss in (("a", 1), ("b", 9))
    ]
    book = PriceBook.parse(b"\n".join([BOOK.splitlines()[0], *lines]), "prices.csv")
    engine = engine_config(
        "openai",
        "",
        "m",
        "r",
        provider="a",
        fallbacks=(FallbackSection(provider="b"), FallbackSection(provider="c", name="other")),
    )
    ceiling = Ceiling.from_engine(Accounting("run", book), engine)
    assert ceiling.candidates == (("a", "m"), ("b", "m"), ("c", "other"))
    assert ceiling.most(request(0)) == Spent(1, 10, 5, (10 * 9 + 5 * 10) * Decimal("0.000001"))
    assert Ceiling.from_engine(Accounting("run", book, "p", "q"), engine).candidates == (("p", "q"),)
