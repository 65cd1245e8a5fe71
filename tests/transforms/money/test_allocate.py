from collections.abc import Sequence
from datetime import UTC, datetime
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moebeam.model_runner.prefix_tree import common_prefix_lengths, num_tokens_of, prefix_key
from moebeam.schemas.prices import PriceLine
from moebeam.schemas.records import Usage
from moebeam.transforms.money.account import charge
from moebeam.transforms.money.allocate import Allocation, Bill, allocate, bill_charge, from_units, to_units

Prompts = list[tuple[str, list[int]]]
"""(tenant, token ids), in any order."""


def sort_keys(prompts: Prompts) -> list[bytes]:
    return sorted(prefix_key(tenant, np.array(token_ids, dtype=np.int32)) for tenant, token_ids in prompts)


def allocate_keys(keys: list[bytes], bills: Sequence[Bill | None]) -> list[Allocation | None]:
    return allocate([num_tokens_of(key) for key in keys], common_prefix_lengths(keys), bills)


def make_bill(prompt: int, cached: int, own: int = 0, num_rows: int = 1, hit: int = 1, miss: int = 10) -> Bill:
    return Bill("USD", prompt, cached, hit, miss, own, num_rows)


def shared_tokens(one: bytes, other: bytes) -> int:
    return int(common_prefix_lengths([one, other])[1])


def exact_shares(keys: list[bytes], bills: Sequence[Bill | None]) -> list[Fraction | None]:
    """The rule by its letter, token for token: what a position's users paid for it, divided by their number."""
    shares: list[Fraction | None] = []
    for key, bill in zip(keys, bills, strict=True):
        if bill is None:
            shares.append(None)
            continue
        num_tokens = num_tokens_of(key)
        share = Fraction(bill.own_units + sum(map(bill.rate, range(num_tokens, bill.prompt_tokens))), bill.num_rows)
        for position in range(num_tokens):
            users = [
                user
                for other, user in zip(keys, bills, strict=True)
                if user is not None and user.currency == bill.currency and shared_tokens(key, other) > position
            ]
            share += Fraction(sum(user.rate(position) for user in users), sum(user.num_rows for user in users))
        shares.append(share)
    return shares


def served(keys: list[bytes], order: Sequence[int], drafts: Sequence[Bill]) -> list[Bill]:
    """What an ideal cache bills when requests are served in an order: only the first on a path pays its misses."""
    bills: dict[int, Bill] = {}
    for row in order:
        cached = max((shared_tokens(keys[row], keys[before]) for before in bills), default=0)
        draft = drafts[row]
        bills[row] = Bill("USD", num_tokens_of(keys[row]), cached, 3, 17, draft.own_units, draft.num_rows)
    return [bills[row] for row in range(len(keys))]


def row_units(allocation: Allocation) -> list[int]:
    return [to_units(amount) for amount in allocation.rows]


prompts = st.lists(
    st.tuples(st.sampled_from(["", "a"]), st.lists(st.integers(0, 2), max_size=6)), min_size=1, max_size=8
)


@st.composite
def billed(draw: st.DrawFn) -> tuple[list[bytes], list[Bill | None]]:
    keys = sort_keys(draw(prompts))
    bills: list[Bill | None] = []
    for _ in keys:
        prompt = draw(st.integers(0, 8))
        bill = Bill(
            currency=draw(st.sampled_from(["USD", "USD", "CNY"])),
            prompt_tokens=prompt,
            cached_tokens=draw(st.integers(0, prompt)),
            hit_units=draw(st.integers(0, 5)),
            miss_units=draw(st.integers(0, 1000)),
            own_units=draw(st.integers(0, 1000)),
            num_rows=draw(st.integers(1, 4)),
        )
        bills.append(draw(st.sampled_from([bill, bill, bill, None])))
    return keys, bills


def test_shared_prefix_costs_each_of_its_users_the_same() -> None:
    keys = sort_keys([("", [1, 1, 1, 1, 2]), ("", [1, 1, 1, 1, 3])])
    first_pays, other_pays = [make_bill(5, 0), make_bill(5, 4)], [make_bill(5, 4), make_bill(5, 0)]
    for bills in (first_pays, other_pays):
        allocations = allocate_keys(keys, bills)
        assert [made and made.total_units for made in allocations] == [32, 32]


def test_own_tokens_and_output_are_not_spread() -> None:
    keys = sort_keys([("", [1, 1]), ("", [1, 1, 5, 5])])
    allocations = allocate_keys(keys, [make_bill(2, 0, own=7), make_bill(4, 2, own=100)])
    assert [made and made.total_units for made in allocations] == [11 + 7, 11 + 20 + 100]


def test_merged_request_counts_as_many_users_as_it_has_rows() -> None:
    keys = sort_keys([("", [1, 1, 2]), ("", [1, 1, 3])])
    allocations = allocate_keys(keys, [make_bill(3, 0, own=30, num_rows=3), make_bill(3, 2)])
    merged, single = allocations
    assert merged is not None
    assert single is not None
    # 22 for the shared tokens over 4 users; 40 for what the merged request has alone, over its 3 rows.
    assert single.total_units in (15, 16)
    assert merged.total_units == 72 - single.total_units
    assert sum(row_units(merged)) == merged.total_units


def test_tenants_share_nothing() -> None:
    keys = sort_keys([("", [1, 1]), ("a", [1, 1])])
    allocations = allocate_keys(keys, [make_bill(2, 0), make_bill(2, 2)])
    assert [made and made.total_units for made in allocations] == [20, 2]


def test_request_without_a_charge_takes_no_part() -> None:
    keys = sort_keys([("", [1, 1]), ("", [1, 1]), ("", [1, 1])])
    allocations = allocate_keys(keys, [make_bill(2, 0), None, make_bill(2, 2)])
    assert [made and made.total_units for made in allocations] == [11, None, 11]
    assert allocate_keys(keys, [None, None, None]) == [None, None, None]
    assert allocate_keys([], []) == []


def test_currencies_are_never_mixed() -> None:
    keys = sort_keys([("", [1, 1]), ("", [1, 1]), ("", [1, 1])])
    yuan = Bill("CNY", 2, 0, 1, 50, 0)
    allocations = allocate_keys(keys, [make_bill(2, 0), yuan, make_bill(2, 2)])
    assert [made and made.total_units for made in allocations] == [11, 100, 11]


def test_tokens_billed_beyond_the_length_are_the_requests_own() -> None:
    keys = sort_keys([("", [1, 1]), ("", [1, 1])])
    allocations = allocate_keys(keys, [make_bill(5, 0), make_bill(5, 5)])
    assert [made and made.total_units for made in allocations] == [11 + 30, 11 + 3]


def test_what_cannot_be_divided_goes_to_the_first_in_order() -> None:
    keys = sort_keys([("", [1]), ("", [1]), ("", [1])])
    allocations = allocate_keys(keys, [make_bill(1, 0, miss=8), make_bill(1, 1, hit=0), make_bill(1, 1, hit=0)])
    assert [made and made.total_units for made in allocations] == [3, 3, 2]
    (merged,) = allocate_keys(keys[:1], [make_bill(1, 0, miss=8, num_rows=3)])
    assert merged is not None
    assert row_units(merged) == [3, 3, 2]


def test_arrays_of_different_length_are_refused() -> None:
    with pytest.raises(ValueError, match="arrays of one length"):
        allocate([1], np.zeros(1, dtype=np.int64), [])


def test_bill_that_contradicts_itself_is_refused() -> None:
    for prompt, cached, num_rows in ((5, 6, 1), (5, -1, 1), (5, 0, 0)):
        with pytest.raises(ValueError, match="expected 0 <= cached <= prompt"):
            make_bill(prompt, cached, num_rows=num_rows)


@settings(deadline=None)
@given(billed())
def test_allocations_add_up_to_the_bills_in_every_currency(case: tuple[list[bytes], list[Bill | None]]) -> None:
    keys, bills = case
    allocations = allocate_keys(keys, bills)
    for currency in ("USD", "CNY"):
        of_currency = [i for i, bill in enumerate(bills) if bill is not None and bill.currency == currency]
        allocated = sum(made.total_units for i in of_currency if (made := allocations[i]) is not None)
        assert allocated == sum(bill.total_units for i in of_currency if (bill := bills[i]) is not None)


@settings(deadline=None)
@given(billed())
def test_every_row_gets_its_exact_share_within_one_unit(case: tuple[list[bytes], list[Bill | None]]) -> None:
    keys, bills = case
    for made, share, bill in zip(allocate_keys(keys, bills), exact_shares(keys, bills), bills, strict=True):
        assert (made is None) == (share is None)
        if made is not None and share is not None and bill is not None:
            assert len(made.rows) == bill.num_rows
            assert sum(row_units(made)) == made.total_units == to_units(made.total)
            assert all(abs(units - share) <= 1 for units in row_units(made))


@settings(deadline=None)
@given(st.data(), prompts)
def test_who_was_served_first_does_not_change_what_anyone_is_allocated(data: st.DataObject, drawn: Prompts) -> None:
    keys = sort_keys(drawn)
    drafts = [make_bill(0, 0, data.draw(st.integers(0, 99)), data.draw(st.integers(1, 3))) for _ in keys]
    bills = [served(keys, data.draw(st.permutations(range(len(keys)))), drafts) for _ in range(2)]
    one, other = (allocate_keys(keys, run) for run in bills)
    assert sum(bill.total_units for bill in bills[0]) == sum(bill.total_units for bill in bills[1])
    for made, again in zip(one, other, strict=True):
        assert made is not None
        assert again is not None
        assert all(abs(a - b) <= 1 for a, b in zip(row_units(made), row_units(again), strict=True))


def test_long_chain_of_prefixes_agrees_with_the_rule() -> None:
    keys = sort_keys([("", [1] * num_tokens) for num_tokens in range(1, 40)])
    bills = [make_bill(row + 1, row // 2, num_rows=1 + row % 3) for row in range(len(keys))]
    for made, share in zip(allocate_keys(keys, bills), exact_shares(keys, bills), strict=True):
        assert made is not None
        assert share is not None
        assert all(abs(units - share) <= 1 for units in row_units(made))


@pytest.mark.parametrize(
    ("cached", "hit", "cached_of_bill", "hit_units"),
    [(600, "0.028", 600, 28_000), (600, None, 600, 140_000), (None, "0.028", 0, 28_000), (0, None, 0, 140_000)],
)
def test_bill_of_a_charge_costs_what_was_charged(
    cached: int | None, hit: str | None, cached_of_bill: int, hit_units: int
) -> None:
    line = PriceLine(
        line_id="2",
        provider="p",
        model="m",
        effective_from=datetime(2026, 1, 1, tzinfo=UTC),
        effective_to=None,
        windows=(),
        currency="USD",
        cache_hit=None if hit is None else Decimal(hit),
        cache_miss=Decimal("0.14"),
        output=Decimal("0.28"),
    )
    made = charge(Usage(1000, 100, cached, 50), line)
    bill = bill_charge(made, num_rows=2)
    assert bill == Bill("USD", 1000, cached_of_bill, hit_units, 140_000, 28_000_000, 2)
    assert from_units(bill.total_units) == made.cost


@given(st.integers(-(10**37), 10**37))
def test_units_and_amounts_are_the_same_money(units: int) -> None:
    assert to_units(from_units(units)) == units


def test_amount_finer_than_a_unit_is_refused() -> None:
    with pytest.raises(ValueError, match="at most 12 decimal places"):
        to_units(Decimal("0.0000000000001"))
