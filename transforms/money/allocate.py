"""Allocate: spreads a shard's bill evenly over those who used it.

Part of *answer*, between account and commit, once a shard is complete. `cost` is what was billed in execution order:
the first request of a shared prefix pays its misses, the others its hits. `cost_allocated` is the same money
independent of that order: what the users of a span of tokens were billed for it together, divided by their number; a
request that answers for several merged rows counts as that many users.

Money is counted in integer units of 10^-12, so the parts add up to the bill to the last unit.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Context, Decimal, Inexact
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from moebeam.model_runner.prefix_tree import Span, shared_spans
from moebeam.schemas.prices import Charge

Lcps: TypeAlias = npt.NDArray[np.int64]

_EXACT = Context(prec=76, traps=[Inexact])
_FRACTION_BITS = 128
"""Shares are kept in 2^-128 of a unit until the end: rounding down in every span loses less than one unit in total."""


@dataclass(frozen=True, slots=True)
class Bill:
    """What one request was billed, in units of 10^-12 of its currency.

    The first `cached_tokens` of `prompt_tokens` cost `hit_units` each, the others `miss_units`. `own_units` is what the
    request shares with nobody: its output. `num_rows` counts its merged rows, itself included.
    """

    currency: str
    prompt_tokens: int
    cached_tokens: int
    hit_units: int
    miss_units: int
    own_units: int
    num_rows: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.cached_tokens <= self.prompt_tokens or self.num_rows < 1:
            raise ValueError(f"expected 0 <= cached <= prompt tokens and at least one row, found {self}")

    def input_units(self, num_tokens: int) -> int:
        """Cost of the first `num_tokens` tokens of the prompt."""
        num_hits = min(num_tokens, self.cached_tokens)
        return num_hits * self.hit_units + (min(num_tokens, self.prompt_tokens) - num_hits) * self.miss_units

    def rate(self, position: int) -> int:
        """Cost of the token at a position."""
        if position < self.cached_tokens:
            return self.hit_units
        return self.miss_units if position < self.prompt_tokens else 0

    @property
    def steps(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """Positions where the cost of a token changes, and by how much."""
        return (self.cached_tokens, self.miss_units - self.hit_units), (self.prompt_tokens, -self.miss_units)

    @property
    def total_units(self) -> int:
        return self.input_units(self.prompt_tokens) + self.own_units


@dataclass(frozen=True, slots=True)
class Allocation:
    """A request's share of the shard's cost, in units, split evenly over its rows.

    The first `num_extra` of `num_rows` rows carry `row_units + 1`, the others `row_units`.
    """

    row_units: int
    num_extra: int
    num_rows: int

    @property
    def total_units(self) -> int:
        return self.row_units * self.num_rows + self.num_extra

    @property
    def total(self) -> Decimal:
        """The request's whole share."""
        return from_units(self.total_units)

    @property
    def rows(self) -> list[Decimal]:
        """Share of each merged row, the primary first."""
        return [from_units(self.row_units + (row < self.num_extra)) for row in range(self.num_rows)]


def to_units(amount: Decimal) -> int:
    """Convert an amount of money to units of 10^-12.

    Raises:
        ValueError: the amount has more than 12 decimal places.
    """
    units = _EXACT.scaleb(amount, 12)
    if units != int(units):
        raise ValueError(f"expected an amount of at most 12 decimal places, found {amount}")
    return int(units)


def from_units(units: int) -> Decimal:
    """Convert units of 10^-12 to an exact amount of money."""
    return _EXACT.scaleb(Decimal(units), -12)


def bill_charge(charge: Charge, num_rows: int) -> Bill:
    """Build a request's bill from its charge; all costs have the places that the price book allows."""
    cached = charge.cache_hit_tokens or 0
    line = charge.line
    made = Bill(
        currency=line.currency,
        prompt_tokens=cached + charge.cache_miss_tokens,
        cached_tokens=cached,
        hit_units=_units_a_token(line.cache_miss if line.cache_hit is None else line.cache_hit),
        miss_units=_units_a_token(line.cache_miss),
        own_units=to_units(charge.output_cost),
        num_rows=num_rows,
    )
    assert made.total_units == to_units(charge.input_cost) + made.own_units, (made, charge)
    return made


def _units_a_token(price: Decimal) -> int:
    # Prices are per 10^6 tokens, so a token costs price x 10^6 units of 10^-12.
    return to_units(_EXACT.scaleb(price, -6))


def allocate(lengths: Sequence[int], lcps: Lcps, bills: Sequence[Bill | None]) -> list[Allocation | None]:
    """Spread the cost of requests in token order over those who used it.

    Args:
        lengths: prompt tokens of each request; shape (num_requests,).
        lcps: `moebeam.model_runner.prefix_tree.common_prefix_lengths` of the same requests.
        bills: what each request was billed; None takes no part. Billed tokens beyond the length are its own.
    Returns:
        One allocation per bill, None for None. For each currency the totals add up to the bills exactly.
    Raises:
        ValueError: the arrays differ in length, or the prefix lengths contradict each other.
    """
    if not len(lengths) == len(lcps) == len(bills):
        raise ValueError(f"expected arrays of one length, found {len(lengths)}, {len(lcps)} and {len(bills)}")
    spans = sorted(shared_spans(lengths, lcps), key=lambda span: (span.first_row, span.start_token))
    allocations: list[Allocation | None] = [None] * len(bills)
    for currency in sorted({bill.currency for bill in bills if bill is not None}):
        members = [bill if bill is not None and bill.currency == currency else None for bill in bills]
        quotas = _quotas(spans, lengths, members)
        for row, allocation in _round(quotas, members).items():
            allocations[row] = allocation
    return allocations


def _quotas(spans: Sequence[Span], lengths: Sequence[int], bills: Sequence[Bill | None]) -> list[int]:
    """What each user of a request owes, in 2^-128 of a unit, rounded down; shape (num_requests,).

    A prompt's price per token is a step function of the position, so on the path from leaf to root it changes in at
    most two spans. Each request adds its price at its leaf and corrects it in those two; summing up the tree then gives
    every span's bill without visiting each request on each of its spans.

    Args:
        spans: the prefix tree's nodes, parents before children.
    """
    parents: list[int] = []
    leaves: list[int] = []
    rates = [0] * len(spans)  # units per token of all requests below; until summed up, this node's part only
    corrections = [0] * len(spans)  # units
    num_users = [0] * len(spans)
    path: list[int] = []
    path_starts: list[int] = []
    for row, bill in enumerate(bills):
        while path and spans[path[-1]].end_row <= row:
            path.pop()
            path_starts.pop()
        while len(parents) < len(spans) and spans[len(parents)].first_row == row:
            parents.append(path[-1] if path else -1)
            path.append(len(parents) - 1)
            path_starts.append(spans[path[-1]].start_token)
        leaves.append(path[-1] if path else -1)
        if bill is None or not path:
            continue
        num_users[path[-1]] += bill.num_rows
        rates[path[-1]] += bill.rate(lengths[row] - 1)
        stepped: set[int] = set()
        for position, step in bill.steps:
            if position < lengths[row]:
                node = path[bisect_right(path_starts, position) - 1]
                stepped.add(node)
                if parents[node] >= 0:
                    rates[parents[node]] -= step
        for node in stepped:
            start, end = spans[node].start_token, spans[node].end_token
            billed = bill.input_units(end) - bill.input_units(start)
            corrections[node] += billed - (end - start) * bill.rate(end - 1)
    for node in reversed(range(len(spans))):
        if parents[node] >= 0:
            rates[parents[node]] += rates[node]
            num_users[parents[node]] += num_users[node]
    owed = [0] * len(spans)  # per user of a node, for all tokens from the root to the node's end
    for node, span in enumerate(spans):
        if num_users[node]:
            billed = span.num_tokens * rates[node] + corrections[node]
            above = owed[parents[node]] if parents[node] >= 0 else 0
            owed[node] = above + (billed << _FRACTION_BITS) // num_users[node]
    return [
        0 if bill is None else (owed[leaf] if leaf >= 0 else 0) + _own_quota(bill, num_tokens)
        for bill, leaf, num_tokens in zip(bills, leaves, lengths, strict=True)
    ]


def _own_quota(bill: Bill, num_tokens: int) -> int:
    beyond = bill.input_units(bill.prompt_tokens) - bill.input_units(num_tokens)
    return ((bill.own_units + beyond) << _FRACTION_BITS) // bill.num_rows


def _round(quotas: Sequence[int], bills: Sequence[Bill | None]) -> dict[int, Allocation]:
    """Whole units for every row: rounded down, then the largest remainders get what is missing, ties in order."""
    fraction = (1 << _FRACTION_BITS) - 1
    members = [(row, bill) for row, bill in enumerate(bills) if bill is not None]
    missing = sum(bill.total_units - (quotas[row] >> _FRACTION_BITS) * bill.num_rows for row, bill in members)
    assert 0 <= missing <= sum(bill.num_rows for _, bill in members), missing
    allocations: dict[int, Allocation] = {}
    for row, bill in sorted(members, key=lambda member: (-(quotas[member[0]] & fraction), member[0])):
        num_extra = min(missing, bill.num_rows)
        missing -= num_extra
        allocations[row] = Allocation(quotas[row] >> _FRACTION_BITS, num_extra, bill.num_rows)
    return allocations
