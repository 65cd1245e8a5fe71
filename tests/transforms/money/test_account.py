from dataclasses import replace
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moebeam.schemas.answers import ValidatedAnswer
from moebeam.schemas.errors import EngineFailed
from moebeam.schemas.prices import PriceLine
from moebeam.schemas.records import Completion, LostCall, Usage
from moebeam.schemas.tables import MONEY
from moebeam.transforms.money.account import Accounting, account, charge, class_amounts
from moebeam.transforms.money.price_book import PriceBook
from moebeam.transforms.money.price_file import COLUMNS

NOON = datetime(2026, 11, 2, 12, tzinfo=UTC)


def line(hit: str | None = "0.028", miss: str = "0.14", output: str = "0.28") -> PriceLine:
    return PriceLine(
        line_id="2",
        provider="p",
        model="m",
        effective_from=datetime(2026, 1, 1, tzinfo=UTC),
        effective_to=None,
        windows=(),
        currency="USD",
        cache_hit=None if hit is None else Decimal(hit),
        cache_miss=Decimal(miss),
        output=Decimal(output),
    )


COUNTED = Usage(prompt_tokens=1000, completion_tokens=100, cached_tokens=600)


def answer(
    provider: str = "p", model: str = "m", at: datetime = NOON, error: Any = None, usage: Usage = COUNTED
) -> ValidatedAnswer:
    return ValidatedAnswer(Completion("r", "", "stop", usage, at, 1.0, provider, model, "1", error=error), None, error)


def book_of(*lines: str) -> PriceBook:
    return PriceBook.parse("\n".join([",".join(COLUMNS), *lines]).encode(), "b.csv")


BOOK = book_of(
    "p,m,2026-01-01T00:00:00Z,,,USD,0.1,1,2",
    "p,m,2026-01-01T00:00:00Z,,01:00-02:00,USD,0.2,2,4",
    "p,n,2026-01-01T00:00:00Z,,,USD,0.1,3,2",
    "q,m,2026-01-01T00:00:00Z,,,CNY,0.1,7,2",
)


def test_classes_are_disjoint_and_reasoning_is_part_of_the_output() -> None:
    made = charge(Usage(1000, 300, cached_tokens=600, reasoning_tokens=200), line())
    counts = (made.cache_hit_tokens, made.cache_miss_tokens, made.visible_output_tokens, made.reasoning_tokens)
    assert counts == (600, 400, 100, 200)
    assert made.input_cost == Decimal("0.0000728")
    assert made.output_cost == Decimal("0.000084")
    assert made.cost == Decimal("0.0001568")
    assert made.basis == "exact"


@pytest.mark.parametrize(
    ("cached", "hit", "basis", "input_cost"),
    [
        (None, "0.028", "upper_bound", "0.00014"),
        (None, None, "upper_bound", "0.00014"),
        (600, None, "upper_bound", "0.00014"),
        (0, None, "exact", "0.00014"),
        (0, "0.028", "exact", "0.00014"),
        (600, "0", "exact", "0.000056"),
        (1000, "0.028", "exact", "0.000028"),
    ],
)
def test_what_is_unknown_costs_the_miss_price_as_an_upper_bound(
    cached: int | None, hit: str | None, basis: str, input_cost: str
) -> None:
    made = charge(Usage(1000, 0, cached_tokens=cached), line(hit))
    assert (made.basis, made.input_cost) == (basis, Decimal(input_cost))
    assert made.cache_hit_tokens == cached
    assert made.cache_miss_tokens == 1000 - (cached or 0)


@pytest.mark.parametrize("usage", [Usage(None, None), Usage(10, None), Usage(None, 5), Usage(-1, 5), Usage(10, 10**26)])
def test_tokens_that_are_unknown_have_no_price(usage: Usage) -> None:
    with pytest.raises(ValueError, match="expected a usage with prompt and completion tokens"):
        charge(usage, line())
    (accounted,) = account([answer(usage=usage)], Accounting("run", BOOK))
    assert accounted.charge is None


@pytest.mark.parametrize(
    ("usage", "input_tokens", "output_tokens"),
    [(Usage(10, 5, 11), 21, 5), (Usage(10, 5, -1), 10, 5), (Usage(10, 5, 10, 6), 10, 11), (Usage(10, 5, 0, -1), 10, 5)],
)
def test_usage_that_contradicts_itself_costs_at_most_what_any_reading_of_it_says(
    usage: Usage, input_tokens: int, output_tokens: int
) -> None:
    made = charge(usage, line())
    assert made.basis == "upper_bound"
    assert (made.cache_hit_tokens or 0) + made.cache_miss_tokens == input_tokens
    assert made.visible_output_tokens + made.reasoning_tokens == output_tokens
    amounts = class_amounts(made)
    assert amounts.cache_hit + amounts.cache_miss + amounts.visible_output + amounts.reasoning == made.cost
    for prompt, cached in ((usage.prompt_tokens, 0), (usage.cached_tokens, usage.cached_tokens)):
        assert charge(Usage(prompt or 0, usage.reasoning_tokens, cached), line()).cost <= made.cost


def test_price_is_that_of_the_start() -> None:
    peak, off_peak = (answer(at=NOON.replace(hour=hour)) for hour in (1, 2))
    charges = [accounted.charge for accounted in account([peak, off_peak], Accounting("run", BOOK))]
    assert [made and made.line.line_id for made in charges] == ["3", "2"]


@pytest.mark.parametrize(
    ("provider", "model", "line_id"),
    [(None, None, "2"), (None, "n", "4"), ("q", None, "5"), ("q", "m", "5"), ("q", "n", None), ("x", None, None)],
)
def test_job_may_name_another_provider_and_model(provider: str | None, model: str | None, line_id: str | None) -> None:
    (accounted,) = account([answer()], Accounting("run", BOOK, provider, model))
    assert (accounted.charge and accounted.charge.line.line_id) == line_id


def test_no_price_is_no_charge_and_never_zero() -> None:
    made = [*account([answer()], Accounting("run")), *account([answer(model="unheard-of")], Accounting("run", BOOK))]
    assert [accounted.charge for accounted in made] == [None, None]


def test_free_line_is_a_charge_of_zero_not_none() -> None:
    (accounted,) = account([answer()], Accounting("run", book_of("p,m,2026-01-01T00:00:00Z,,,USD,0,0,0")))
    assert accounted.charge is not None
    assert accounted.charge.cost == 0


def test_failed_answer_is_charged_like_a_good_one() -> None:
    good, failed = account([answer(), answer(error=EngineFailed("broke"))], Accounting("run", BOOK))
    assert good.charge == failed.charge is not None
    assert isinstance(failed.answer.error, EngineFailed)


tokens = st.integers(0, 10**9)
prices = st.integers(0, 10**12).map(lambda micros: Decimal(micros).scaleb(-6))


@settings(deadline=None)
@given(tokens, tokens, tokens, tokens, prices, prices, prices, st.booleans())
def test_amounts_are_exact_and_fit_the_ledgers_type(
    hits: int, misses: int, visible: int, reasoning: int, hit: Decimal, miss: Decimal, output: Decimal, is_known: bool
) -> None:
    usage = Usage(hits + misses, visible + reasoning, hits if is_known else None, reasoning)
    made = charge(usage, line(str(hit), str(miss), str(output)))
    units = {price: int(price * 10**6) for price in (hit, miss, output)}
    expected = hits * units[hit if is_known else miss] + misses * units[miss] + (visible + reasoning) * units[output]
    stored = pa.array([made.cost, made.input_cost, made.output_cost], MONEY).to_pylist()
    assert int(stored[0].scaleb(12)) == expected
    assert stored[1] + stored[2] == stored[0]
    assert (made.cache_hit_tokens or 0) + made.cache_miss_tokens == usage.prompt_tokens
    assert made.visible_output_tokens + made.reasoning_tokens == usage.completion_tokens


def test_the_length_of_the_prompt_chooses_the_tier_of_its_price() -> None:
    header = ",".join((*COLUMNS, "prompt_tokens"))
    lines = ("p,m,2020-01-01T00:00:00Z,,,USD,,1,0,0-9", "p,m,2020-01-01T00:00:00Z,,,USD,,2,0,10-")
    book = PriceBook.parse("\n".join([header, *lines]).encode(), "book.csv")
    usages = [Usage(prompt_tokens=tokens, completion_tokens=0, cached_tokens=0) for tokens in (9, 10)]
    given = answer()
    answers = [replace(given, completion=replace(given.completion, usage=usage)) for usage in usages]
    ids = [
        accounted.charge.line.line_id
        for accounted in account(answers, Accounting("run", book, "p", "m"))
        if accounted.charge
    ]
    assert ids == ["2", "3"]


def lost(provider: str = "p", model: str = "m", at: datetime = NOON, prompt_tokens: int = 1500) -> LostCall:
    return LostCall(provider, model, "engine_timeout", at, prompt_tokens, 300)


@pytest.mark.parametrize(
    ("calls", "expected"),
    [
        ((), None),
        ((lost(),), "0.0021"),
        # The provider's own count of the prompt, where it is the larger one.
        ((lost(prompt_tokens=1),), "0.0016"),
        ((lost(), lost(model="n"), lost(at=NOON.replace(hour=1))), "0.0114"),
        ((lost(), lost(model="unknown")), None),
        ((lost(), lost(provider="q")), None),
    ],
)
def test_calls_without_a_usage_cost_at_most_a_missed_prompt_and_all_of_max_tokens(
    calls: tuple[LostCall, ...], expected: str | None
) -> None:
    one = answer()
    one = replace(one, completion=replace(one.completion, lost_calls=calls))
    (found,) = account([one], Accounting("run", BOOK))
    assert found.lost_cost_at_most == (None if expected is None else Decimal(expected))
    (plain,) = account([answer()], Accounting("run", BOOK))
    assert found.charge == plain.charge, "it is in no amount that was billed"
    (unpriced,) = account([one], Accounting("run"))
    assert unpriced.lost_cost_at_most is None
