"""The accounts of a run must agree, and each that does not is named before there is a manifest."""

from dataclasses import replace
from decimal import Decimal
from typing import Any

import pytest

from moebeam.schemas.answers import Totals
from moebeam.schemas.errors import CommitError
from moebeam.transforms.publish.invariants import RowSums, check_invariants
from moebeam.transforms.publish.rollup import GroupSums, Rollup

SUMS = GroupSums(
    num_attempts=2,
    cache_hit_tokens=4,
    cache_miss_tokens=6,
    visible_output_tokens=2,
    reasoning_tokens=1,
    cache_hit_cost=Decimal("0.1"),
    cache_miss_cost=Decimal("0.2"),
    visible_output_cost=Decimal("0.15"),
    reasoning_cost=Decimal("0.05"),
    cost=Decimal("0.5"),
    cost_allocated=Decimal("0.5"),
)
ROWS = RowSums(10, 3, 1, {"USD": Decimal("0.5")}, {"USD": Decimal("0.5")})
TOTALS = Totals(
    num_attempts=2, prompt_tokens=10, cached_tokens=4, completion_tokens=3, reasoning_tokens=1, costs={"USD": "0.5"}
)
ENGINE = {
    "num_prompts": 2,
    "num_prompt_tokens": 10,
    "num_computed_prefill_tokens": 6,
    "num_decode_tokens": 1,
    "num_preemptions": 0,
}


def check(
    sums: GroupSums = SUMS,
    rows: RowSums = ROWS,
    totals: Totals = TOTALS,
    engine: dict[str, float] | None = None,
) -> Any:
    ledger = Rollup(("tenant",), ((("a", "USD"), sums),))
    return check_invariants(ledger, rows, totals, ENGINE if engine is None else engine)


def test_accounts_that_agree_are_said_to_be_equal() -> None:
    assert set(check().values()) == {"equal"}
    forced_at_the_end = {**ENGINE, "num_decode_tokens": 0, "num_uncomputed_answer_tokens": 3}
    assert set(check(engine=forced_at_the_end).values()) == {"equal"}


def test_tokens_of_a_doubtful_usage_are_not_compared_with_the_rows_but_its_costs_are() -> None:
    doubtful = replace(SUMS, num_doubtful_usage=1)
    rows = replace(ROWS, prompt_tokens=7)
    assert check(doubtful, rows)["ledger_and_rows"].startswith("costs equal; tokens not comparable: the usage of 1 ")
    with pytest.raises(CommitError, match="cost: "):
        check(doubtful, replace(rows, costs={"USD": Decimal("0.4")}))
    with pytest.raises(CommitError, match=r"attempts without a usage: .* found 1 in the ledger, 0 in the commits"):
        check(replace(doubtful, num_unknown_usage=1), rows)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        ({"rows": replace(ROWS, prompt_tokens=11)}, "prompt_tokens: .* found 10 in the ledger, 11 in the rows"),
        ({"rows": replace(ROWS, completion_tokens=2)}, "completion_tokens: .* 2 in the rows"),
        ({"rows": replace(ROWS, reasoning_tokens=0)}, "reasoning_tokens"),
        (
            {"rows": replace(ROWS, costs={"USD": Decimal("0.500000000001")})},
            r"cost: .* found 0\.5 USD in the ledger, 0\.500000000001 USD in the rows",
        ),
        ({"rows": replace(ROWS, costs_allocated={"CNY": Decimal("0.5")})}, "cost_allocated: .* CNY in the rows"),
        ({"totals": replace(TOTALS, prompt_tokens=9)}, "prompt_tokens: .* 9 in the usage in the commits"),
        ({"totals": replace(TOTALS, completion_tokens=4)}, "completion_tokens: .* 4 in the usage"),
        ({"totals": replace(TOTALS, num_attempts=3)}, "attempts: .* 3 in the commits"),
        ({"totals": replace(TOTALS, costs={"USD": "0.6"})}, r"cost: .* 0\.6 USD in the commits"),
        ({"sums": replace(SUMS, reasoning_cost=Decimal(0))}, r"cost: .* 0\.45 USD in its token classes"),
        ({"engine": {**ENGINE, "num_prompt_tokens": 9}}, "prompt tokens: .* found 10 in the ledger, 9 in the engine"),
        ({"engine": {**ENGINE, "num_computed_prefill_tokens": 5}}, "computed prompt tokens: .* 5 in the engine"),
        ({"engine": {**ENGINE, "num_decode_tokens": 2}}, "output tokens: .* found 3 in the ledger, 4 in the engine"),
    ],
)
def test_an_account_that_differs_is_named_with_both_figures(damage: dict[str, Any], expected: str) -> None:
    with pytest.raises(CommitError, match=expected):
        check(**damage)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"engine": {}}, "the engine does not count"),
        ({"engine": {**ENGINE, "num_prompts": 4}}, "counted 4 prompts for 2 attempts"),
        ({"engine": {**ENGINE, "num_preemptions": 1, "num_decode_tokens": 5}}, "1 prompts were computed twice"),
        ({"engine": {**ENGINE, "num_computed_prefill_tokens": 8}}, "2 shared tokens were computed again"),
        ({"sums": replace(SUMS, num_failed=1)}, "failed on 1 attempts"),
        ({"sums": replace(SUMS, num_unknown_hits=1)}, "cached tokens of 1 attempts are unknown"),
    ],
)
def test_what_cannot_be_compared_is_said(change: dict[str, Any], expected: str) -> None:
    found = check(**change)
    assert expected in found["ledger_and_engine"]
    assert found["ledger_and_rows"] == "equal"
