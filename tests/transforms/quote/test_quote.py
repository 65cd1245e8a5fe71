"""Forecasts and costs of a quote, on surveys made by hand."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moebeam.transforms.money.price_book import PriceBook
from moebeam.transforms.money.price_file import COLUMNS
from moebeam.transforms.quote.cache_rules import NONE, TREE, UNITS, UNKNOWN, CacheRule
from moebeam.transforms.quote.cheapest_start import (
    Offer,
    cheapest,
    cost_at,
    price_changes,
    spread_cost,
    starts,
    tier_starts,
)
from moebeam.transforms.quote.prompt_survey import PromptSurvey
from moebeam.transforms.quote.quote import CostRange, OutputForecast, RepairTerms, cost_range, demand, forecast_tokens
from tests.transforms.quote.test_cache_rules import Prompts, prompts_of_few_tokens, survey_of

HEADER = ",".join((*COLUMNS, "prompt_tokens"))
NEVER = RepairTerms(1, can_fail=False, context_length=100)
NIGHT = datetime(2026, 11, 24, tzinfo=UTC)


def book_of(*lines: str) -> PriceBook:
    return PriceBook.parse("\n".join([HEADER, *lines]).encode(), "book.csv")


PEAK = book_of(
    "p,m,2026-01-01T00:00:00Z,,,USD,0.1,1,2,",
    "p,m,2026-01-01T00:00:00Z,,01:00-04:00,USD,0.2,2,4,",
)


def cost_of(survey: PromptSurvey, rule: CacheRule = TREE, *, book: PriceBook = PEAK, **terms: object) -> CostRange:
    output, repair = OutputForecast(**terms), NEVER  # type: ignore[arg-type]
    tiers = tuple(
        demand(survey, forecast_tokens(survey), rule, output, repair, tier_starts=tier_starts(book, "p", "m"))
    )
    found = cost_at(book, Offer("p", "m", "online", tiers), NIGHT)
    assert found is not None
    return found[0]


def test_a_whole_survey_is_exact() -> None:
    tokens = forecast_tokens(survey_of([(1, 2, 3), (1, 2, 4), (5,)]))
    assert (tokens.prompt_tokens.low, tokens.prompt_tokens.high) == (7, 7)
    assert (tokens.tree_tokens.low, tokens.tree_tokens.high) == (5, 5)
    assert tokens.max_hit_rate == pytest.approx(2 / 7)


def test_costs_follow_hits_misses_and_outputs() -> None:
    cost = cost_of(survey_of([(1, 2, 3), (1, 2, 4)]), tokens_a_request=3.0)
    # 4 tokens of the tree are misses, 2 are hits; 6 output tokens are expected, 16 are the most.
    assert cost.low == Decimal("0.0000042")
    assert cost.expected == Decimal("0.0000162")
    assert cost.high == cost.high_without_repair == Decimal("0.000038")


@given(prompts_of_few_tokens, st.floats(0, 8))
@pytest.mark.parametrize("rule", [TREE, UNITS, NONE, UNKNOWN])
def test_the_expected_cost_lies_within_its_bounds(rule: CacheRule, prompts: Prompts, tokens: float) -> None:
    cost = cost_of(survey_of(prompts), rule, tokens_a_request=tokens)
    assert cost.high is not None
    assert cost.low <= cost.expected <= cost.high


@given(st.data())
def test_the_bounds_hold_a_sample_of_rows(data: st.DataObject) -> None:
    """Every sample's low bound is below the whole, and bounds never cross."""
    prompts = data.draw(
        st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6).map(tuple), min_size=3, max_size=30)
    )
    picked = data.draw(st.permutations(prompts).map(lambda mixed: mixed[: max(2, len(mixed) // 2)]))
    whole = forecast_tokens(survey_of(prompts))
    sample = forecast_tokens(survey_of(picked, num_rows=len(prompts)))
    for name in ("requests", "prompt_tokens", "tree_tokens", "max_output_tokens"):
        found, actual = getattr(sample, name), getattr(whole, name)
        assert found.low <= actual.expected
        assert found.low <= found.expected <= found.high


def test_a_sample_of_distinct_rows_expects_as_much_of_the_others() -> None:
    rng = np.random.default_rng(0)
    prompts: Prompts = [(1, 2, 3, *rng.integers(0, 10**6, 5).tolist()) for _ in range(1000)]
    whole = forecast_tokens(survey_of(prompts))
    sample = forecast_tokens(survey_of(prompts[:200], num_rows=1000))
    for name in ("prompt_tokens", "tree_tokens"):
        found, actual = getattr(sample, name), getattr(whole, name)
        assert found.low <= actual.expected <= found.high
        assert found.expected == pytest.approx(actual.expected, rel=0.01)


def test_repairs_are_in_the_upper_bound_alone() -> None:
    survey = survey_of([(1, 2, 3), (1, 2, 4)])
    repair = RepairTerms(3, can_fail=True, context_length=100)
    tiers = demand(survey, forecast_tokens(survey), TREE, OutputForecast(3.0), repair)
    found = cost_range(tiers, [PEAK.lines[0]])
    plain = cost_of(survey, tokens_a_request=3.0)
    assert (found.low, found.expected, found.high_without_repair) == (plain.low, plain.expected, plain.high)
    # Two later attempts of two requests, each with 92 tokens of prompt and 8 of answer at most.
    assert found.high == plain.high_without_repair + Decimal("0.000368") + Decimal("0.000064")


def test_repairs_without_a_known_context_have_no_bound() -> None:
    survey = survey_of([(1, 2, 3)])
    tiers = demand(survey, forecast_tokens(survey), TREE, OutputForecast(), RepairTerms(2, True, None))
    assert cost_range(tiers, [PEAK.lines[0]]).high is None


def test_each_tier_is_priced_by_its_own_line() -> None:
    book = book_of("p,m,2026-01-01T00:00:00Z,,,USD,,1,0,0-2", "p,m,2026-01-01T00:00:00Z,,,USD,,10,0,3-")
    cost = cost_of(survey_of([(1, 2), (3, 4, 5)]), NONE, book=book, tokens_a_request=0.0)
    assert cost.expected == Decimal("0.000032")


def offer_of(duration_s: float | None, book: PriceBook = PEAK) -> Offer:
    survey = survey_of([(1, 2, 3), (4, 5, 6)])
    tiers = demand(survey, forecast_tokens(survey), NONE, OutputForecast(1.0), NEVER)
    return Offer("p", "m", "online", tuple(tiers), duration_s)


def test_a_job_that_lasts_meets_the_prices_of_its_hours() -> None:
    full = Decimal("0.000010")
    assert spread_cost(PEAK, offer_of(None), NIGHT) == (full, "USD")
    # An hour before the peak begins, two hours long: half of it costs twice.
    assert spread_cost(PEAK, offer_of(7200.0), NIGHT) == (full * 3 / 2, "USD")
    assert spread_cost(PEAK, offer_of(7200.0), NIGHT + timedelta(hours=4)) == (full, "USD")


def test_the_cheapest_start_waits_for_the_end_of_the_peak() -> None:
    start = NIGHT + timedelta(hours=2)
    found = list(starts(PEAK, offer_of(3600.0), start, NIGHT + timedelta(hours=6)))
    plan = cheapest(found, lambda cost, _: cost)
    assert plan is not None
    assert plan.at == NIGHT + timedelta(hours=4)
    # Too late to wait: it has to be done at 04:30.
    rushed = cheapest(
        list(starts(PEAK, offer_of(3600.0), start, NIGHT + timedelta(hours=4, minutes=30))), lambda cost, _: cost
    )
    assert rushed is not None
    assert rushed.at == start
    assert list(starts(PEAK, offer_of(3600.0), start, start + timedelta(minutes=59))) == []


def test_costs_that_cannot_be_compared_are_left_out() -> None:
    found = list(starts(PEAK, offer_of(None), NIGHT, NIGHT + timedelta(hours=1)))
    assert cheapest(found, lambda cost, currency: None) is None
    dear = [replace(start, currency="CNY", cost=Decimal(0)) for start in found]
    plan = cheapest([*found, *dear], lambda cost, currency: cost if currency == "USD" else None)
    assert plan == found[0]


def test_prices_change_where_windows_and_days_begin_and_end() -> None:
    changes = price_changes(PEAK, offer_of(None), NIGHT, NIGHT + timedelta(days=1))
    assert changes == [NIGHT + timedelta(hours=1), NIGHT + timedelta(hours=4)]
