"""What a run has paid, as one line, from the account that `--json` prints."""

from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any

from moebeam.jobs.console.formats import format_money


def format_paid(account: Mapping[str, Any]) -> str:
    """What was paid, how much of it for answers that are not in the tables yet, and what is not known of it.

    Args:
        account: as `RunAccount.by_state` gives it.
    """
    paid = account["paid"]
    if not paid["num_attempts"]:
        return "nothing was paid"
    parts = [f"paid {_format_costs(paid['costs']) or 'an unknown amount'}"]
    parts += _list_parts(account)
    line = ", of which ".join([parts[0], " and ".join(parts[1:])]) if parts[1:] else parts[0]
    if paid["costs"] and paid["num_unpriced"]:
        line += f"; the cost of {paid['num_unpriced']:,} attempts is unknown"
    return line


def _list_parts(account: Mapping[str, Any]) -> Iterator[str]:
    for state, where in (("journaled", "in the journal"), ("wasted", "for answers not used")):
        part = account[state]
        if part["num_attempts"]:
            unpriced = f"{part['num_attempts']:,} attempts"
            yield f"{_format_costs(part['costs']) or unpriced} {where}"


def _format_costs(costs: Mapping[str, str] | None) -> str:
    return " and ".join(format_money(Decimal(amount), currency) for currency, amount in (costs or {}).items())
