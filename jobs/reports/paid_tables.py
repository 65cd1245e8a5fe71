"""The tables of a report that say what was paid by state, and why rows were rejected.

Part of `moebeam report` (`jobs/reports/report.py`).
"""

from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any

from moebeam.jobs.console.report_table import Cell, Column, ReportTable
from moebeam.schemas.answers import Totals
from moebeam.transforms.publish.reject_messages import parse_commonest
from moebeam.transforms.publish.run_account import PAID_STATES, RunAccount

_COLUMNS = (
    Column("state", "text"),
    Column("currency", "text"),
    Column("attempts", "count"),
    Column("attempts_of_unknown_cost", "count"),
    Column("prompt_tokens", "count"),
    Column("cached_tokens", "count"),
    Column("completion_tokens", "count"),
    Column("reasoning_tokens", "count"),
    Column("cost", "money"),
    Column("lost_calls", "count"),
    Column("lost_cost_at_most", "money"),
)
_NOTE = (
    "committed: in the ledger of finished shards. journaled: answers of others, which the next launch takes over. "
    "wasted: answers that were not used. paid: all of them. What has no currency stands in the first row of a state."
)


def paid_table(account: RunAccount) -> ReportTable:
    """What was paid by state, and the sum; a row a currency."""
    states = (*((state, getattr(account, state)) for state in PAID_STATES), ("paid", account.paid))
    rows = tuple(row for state, totals in states if totals.num_attempts for row in _list_rows(state, totals))
    return ReportTable("paid", "Paid, by state", _COLUMNS, rows, _NOTE if rows else "Nothing.")


def _list_rows(state: str, totals: Totals) -> Iterator[tuple[Cell, ...]]:
    costs, lost = totals.costs or {}, totals.lost_costs_at_most or {}
    counts: tuple[Cell, ...] = (
        totals.num_attempts,
        totals.num_unpriced,
        totals.prompt_tokens,
        totals.cached_tokens,
        totals.completion_tokens,
        totals.reasoning_tokens,
    )
    currencies: list[str | None] = [*sorted({*costs, *lost})]
    for place, currency in enumerate(currencies or [None]):
        yield (
            state,
            currency,
            *(counts if place == 0 else (None,) * len(counts)),
            _find_amount(costs, currency),
            totals.num_lost_calls if place == 0 else None,
            _find_amount(lost, currency),
        )


def _find_amount(amounts: Mapping[str, str], currency: str | None) -> Decimal | None:
    return Decimal(amounts[currency]) if currency is not None and currency in amounts else None


def messages_table(manifest: Mapping[str, Any]) -> ReportTable:
    """The commonest messages of rejects."""
    counts = parse_commonest(manifest.get("rejects_by_message") or ())
    rows = tuple((count.error_type, count.message, count.num_rows) for count in counts)
    columns = (Column("error_type", "text"), Column("message", "text"), Column("rows", "count"))
    note = "The commonest, without what they quote of rows; rejects/ has them whole." if rows else "None."
    return ReportTable("messages", "Commonest messages of rejects", columns, rows, note)
