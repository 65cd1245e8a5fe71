"""The costs of one request's attempts: by currency, as a bill to allocate, and as the shares of its rows.

Part of *answer*, between `account.py`, which priced each attempt, and `transforms/answer/shard_tables.py`, whose rows
carry the sums. Amounts in two currencies have no sum.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from decimal import Decimal
from typing import Any, TypeAlias

from moebeam.schemas.answers import AccountedAnswer
from moebeam.schemas.prices import EXACT
from moebeam.transforms.money.allocate import Allocation, Bill, bill_charge, to_units

_ZERO = Decimal(0)

Attempts: TypeAlias = Sequence[AccountedAnswer]
"""All attempts of one request, in order; the last decides."""


def bill_attempts(attempts: Attempts, num_rows: int) -> Bill | None:
    """A request's bill in its first currency: the first attempt by the prefix tree, later ones as its own cost."""
    currency = find_currency(attempts)
    if currency is None:
        return None
    first, later_units = attempts[0].charge, to_units(_sum_later_costs(attempts))
    if first is None:
        return Bill(currency, 0, 0, 0, 0, later_units, num_rows)
    bill = bill_charge(first, num_rows)
    return replace(bill, own_units=bill.own_units + later_units)


def find_currency(attempts: Attempts) -> str | None:
    """Currency of the first attempt that has a price."""
    return next((attempt.charge.line.currency for attempt in attempts if attempt.charge is not None), None)


def _sum_later_costs(attempts: Attempts) -> Decimal:
    """Cost of the attempts after the first, in the request's first currency."""
    return sum_costs(attempts[1:]).get(find_currency(attempts) or "", _ZERO)


def sum_costs(attempts: Attempts) -> dict[str, Decimal]:
    """Cost of attempts by currency, in order of first price; empty if none has one."""
    costs: dict[str, Decimal] = {}
    for attempt in attempts:
        if attempt.charge is not None:
            currency = attempt.charge.line.currency
            costs[currency] = EXACT.add(costs.get(currency, _ZERO), attempt.charge.cost)
    return costs


def find_basis(attempts: Attempts) -> str | None:
    """How certain the cost is: `partial` if some attempt has no price, `upper_bound` if some attempt's cost is one.

    `mixed_currency` if there is no sum.
    """
    bases = [attempt.charge and attempt.charge.basis for attempt in attempts]
    known = [basis for basis in bases if basis is not None]
    if len(sum_costs(attempts)) > 1:
        return "mixed_currency"
    return "partial" if known and len(known) < len(bases) else max(known, default=None)


def split_mixed_costs(costs: Mapping[str, Decimal], shares: Sequence[Decimal | None]) -> list[list[dict[str, Any]]]:
    """Costs of each row of a group whose attempts were priced in several currencies; the asked row comes first.

    Args:
        shares: each row's share in the first currency, the only one in the prefix tree.
    """
    first, *others = costs
    by_row = [[{"currency": first, "cost": _ZERO, "cost_allocated": share}] for share in shares]
    for currency in others:
        units = to_units(costs[currency])
        even = Allocation(units // len(shares), units % len(shares), len(shares)).rows
        for amounts, share in zip(by_row, even, strict=True):
            amounts.append({"currency": currency, "cost": _ZERO, "cost_allocated": share})
    for amount in by_row[0]:
        amount["cost"] = costs[str(amount["currency"])]
    return [list(amounts) for amounts in by_row]


def share_costs(attempts: Attempts, allocation: Allocation | None) -> list[Decimal | None]:
    """Allocated cost of each attempt: the first with a price carries what is left of the request's share.

    The others carry their own cost, as do those in another currency, which take no part in the allocation.
    """
    shares = [attempt.charge and attempt.charge.cost for attempt in attempts]
    if allocation is None:
        return shares
    first = next(place for place, share in enumerate(shares) if share is not None)
    rest = sum_costs(attempts[first + 1 :]).get(find_currency(attempts) or "", _ZERO)
    shares[first] = EXACT.subtract(allocation.total, rest)
    return shares
