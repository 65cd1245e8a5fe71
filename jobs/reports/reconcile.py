"""`moebeam reconcile OUTPUT INVOICE.csv`: compares a run's ledger with a provider's bill, by day and model.

The bill is CSV with a header. Day, model and amount are required; currency and tokens by class are compared if present.
Bills count days in their own time zone, so an offset assigns ledger lines to days.
"""

import csv
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, date, timedelta
from decimal import Decimal, InvalidOperation
from typing import Any, Literal, TypeAlias

import pyarrow as pa

from moebeam.jobs.console.report_table import Cell, Column, ReportTable
from moebeam.schemas.arrow import list_values
from moebeam.schemas.errors import JobFileError
from moebeam.schemas.prices import EXACT
from moebeam.schemas.providers import name_provider
from moebeam.schemas.store import storage

Verdict: TypeAlias = Literal["matched", "different", "missing in the bill", "missing in the ledger"]
BillKey: TypeAlias = tuple[str, str, str]
"""Day (ISO), model, currency."""

COLUMNS = (
    "day",
    "model",
    "amount",
    "currency",
    "cache_hit_tokens",
    "cache_miss_tokens",
    "output_tokens",
)
"""Columns of a bill; `--columns amount=Cost` maps other names to them."""

_NEEDED = COLUMNS[:3]
_TOKENS = COLUMNS[4:]


@dataclass(frozen=True, slots=True)
class Billed:
    """One side's figures for a day and model; None means unknown tokens."""

    amount: Decimal = Decimal(0)
    tokens: Mapping[str, int | None] = field(default_factory=lambda: dict.fromkeys(_TOKENS, 0))

    def __add__(self, other: "Billed") -> "Billed":
        tokens = {
            name: None if (one := self.tokens[name]) is None or (two := other.tokens[name]) is None else one + two
            for name in _TOKENS
        }
        return Billed(EXACT.add(self.amount, other.amount), tokens)


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How far amounts and tokens may differ: by a share of the ledger's or by an amount, whichever is larger."""

    percent: Decimal = Decimal(0)
    amount: Decimal = Decimal(0)

    def allows(self, ledger: Decimal, bill: Decimal) -> bool:
        return abs(bill - ledger) <= max(self.amount, abs(ledger) * self.percent / 100)

    def allows_tokens(self, ledger: int, bill: int) -> bool:
        return abs(bill - ledger) <= abs(ledger) * self.percent / 100


@dataclass(frozen=True, slots=True)
class Comparison:
    """Both sides of a day and model; `tokens` names the classes that differ."""

    key: BillKey
    verdict: Verdict
    ledger: Billed | None
    bill: Billed | None
    tokens: tuple[str, ...] = ()

    @property
    def difference(self) -> Decimal:
        """The bill less the ledger."""
        zero = Decimal(0)
        return (self.bill.amount if self.bill else zero) - (self.ledger.amount if self.ledger else zero)


def parse_columns(text: str | None) -> dict[str, str]:
    """Parse `amount=Cost,day=Date` into our name -> the bill's name.

    Raises:
        JobFileError: unknown name.
    """
    names = {name: name for name in COLUMNS}
    for part in (text or "").split(","):
        if not part.strip():
            continue
        ours, equals, theirs = (word.strip() for word in part.partition("="))
        if not equals or ours not in COLUMNS or not theirs:
            raise JobFileError(f"--columns: expected one of {', '.join(COLUMNS)} = the bill's column, found {part!r}")
        names[ours] = theirs
    return names


def read_bill(path: str, columns: Mapping[str, str], currency: str | None) -> dict[BillKey, Billed]:
    """Read a provider's bill, summed by day, model and currency.

    Args:
        currency: for a bill without a currency column.
    Raises:
        JobFileError: names file, line, column, expected and found.
    """
    try:
        text = storage.read_bytes(path).decode("utf-8-sig")
    except FileNotFoundError as error:
        raise JobFileError(f"{path}: expected a bill in CSV, found no such file") from error
    except (OSError, ValueError) as error:
        raise JobFileError(f"{path}: expected a bill in CSV, UTF-8, found: {error}") from error
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    header = list(reader.fieldnames or ())
    missing = [columns[name] for name in _NEEDED if columns[name] not in header]
    if missing or (columns["currency"] not in header and currency is None):
        wanted = missing or [columns["currency"]]
        raise JobFileError(
            f"{path}: line 1: expected the columns {', '.join(wanted)}, found {', '.join(header) or 'none'}; "
            "--columns names the bill's own, --currency a currency that it does not name"
        )
    billed: dict[BillKey, Billed] = {}
    try:
        for row in reader:
            if any(value not in (None, "") for value in row.values()):
                key, one = _parse_bill_line(_Line(path, reader.line_num, row, columns), currency)
                billed[key] = billed[key] + one if key in billed else one
    except csv.Error as error:
        raise JobFileError(f"{path}: line {reader.line_num}: expected CSV, found: {error}") from error
    return billed


@dataclass(frozen=True, slots=True)
class _Line:
    """One line of a bill, with errors that name the cell."""

    source: str
    number: int
    cells: Mapping[str, Any]
    columns: Mapping[str, str]

    def text(self, name: str) -> str | None:
        """A cell; None if the bill has no such column."""
        found = self.cells.get(self.columns[name])
        return found.strip() if isinstance(found, str) else None

    def wrong(self, name: str, expected: str) -> JobFileError:
        found = self.text(name)
        return JobFileError(
            f"{self.source}: line {self.number}, column {self.columns[name]}: expected {expected}, "
            f"found {repr(found[:60]) if found else 'nothing'}"
        )


def _parse_bill_line(line: _Line, currency: str | None) -> tuple[BillKey, Billed]:
    try:
        day = date.fromisoformat((line.text("day") or "")[:10]).isoformat()
    except ValueError:
        raise line.wrong("day", "a day such as 2026-11-24") from None
    model = line.text("model")
    if not model:
        raise line.wrong("model", "a model")
    try:
        amount = Decimal(line.text("amount") or "")
    except InvalidOperation:
        raise line.wrong("amount", "an amount such as 12.34, without thousands separators") from None
    if not amount.is_finite():
        raise line.wrong("amount", "an amount such as 12.34")
    found_currency = line.text("currency") or currency
    if not found_currency:
        raise line.wrong("currency", "a currency such as USD")
    return (day, model, found_currency), Billed(amount, {name: _parse_tokens(line, name) for name in _TOKENS})


def _parse_tokens(line: _Line, name: str) -> int | None:
    text = line.text(name)
    if not text:
        return None
    if not text.isascii() or not text.isdecimal():
        raise line.wrong(name, "a whole number of tokens")
    return int(text)


def add_up_ledger(
    ledgers: Iterable[pa.Table], *, utc_offset: timedelta, provider: str | None = None, model: str | None = None
) -> tuple[dict[BillKey, Billed], int]:
    """Sum the ledger the way the bill does.

    Args:
        utc_offset: of the bill's days.
        provider: include only this provider's lines.
        model: the bill's name for the model, if the ledger has another.
    Returns:
        Sums by day, model and currency, and the number of lines left out for lack of a price.
    """
    names = ("provider", "model", "started_at", "currency", "cost", "cache_hit_tokens", "cache_miss_tokens")
    names = (*names, "visible_output_tokens", "reasoning_tokens")
    sums: dict[BillKey, Billed] = {}
    num_unpriced = 0
    for ledger in ledgers:
        for values in zip(*(list_values(ledger, name) for name in names), strict=True):
            line = dict(zip(names, values, strict=True))
            if provider is not None and line["provider"] != name_provider(provider):
                continue
            if line["currency"] is None:
                num_unpriced += 1
                continue
            day = (line["started_at"].astimezone(UTC) + utc_offset).date().isoformat()
            key = (day, model or line["model"], line["currency"])
            hits: int | None = line["cache_hit_tokens"]
            tokens = {
                "cache_hit_tokens": hits,
                "cache_miss_tokens": None if hits is None else line["cache_miss_tokens"],
                "output_tokens": line["visible_output_tokens"] + line["reasoning_tokens"],
            }
            sums[key] = sums.get(key, Billed()) + Billed(line["cost"], tokens)
    return sums, num_unpriced


def reconcile(
    ledger: Mapping[BillKey, Billed], bill: Mapping[BillKey, Billed], tolerance: Tolerance
) -> list[Comparison]:
    """Compare both sides, in order of day, model and currency."""
    return [_compare(key, ledger.get(key), bill.get(key), tolerance) for key in sorted({*ledger, *bill})]


def _compare(key: BillKey, ledger: Billed | None, bill: Billed | None, tolerance: Tolerance) -> Comparison:
    if ledger is None:
        return Comparison(key, "missing in the ledger", ledger, bill)
    if bill is None:
        return Comparison(key, "missing in the bill", ledger, bill)
    tokens = tuple(
        name
        for name in _TOKENS
        if (ours := ledger.tokens[name]) is not None
        and (theirs := bill.tokens[name]) is not None
        and not tolerance.allows_tokens(ours, theirs)
    )
    is_equal = tolerance.allows(ledger.amount, bill.amount) and not tokens
    return Comparison(key, "matched" if is_equal else "different", ledger, bill, tokens)


def comparison_table(found: Iterable[Comparison], num_unpriced: int) -> ReportTable:
    """Format the comparisons as a table."""
    columns = (
        Column("day", "text"),
        Column("model", "text"),
        Column("currency", "text"),
        Column("verdict", "text"),
        Column("ledger", "money"),
        Column("bill", "money"),
        Column("difference", "money"),
        Column("tokens_that_differ", "text"),
    )
    rows: tuple[tuple[Cell, ...], ...] = tuple(
        (
            *one.key,
            one.verdict,
            one.ledger and one.ledger.amount,
            one.bill and one.bill.amount,
            one.difference,
            ", ".join(_format_tokens(one, name) for name in one.tokens) or None,
        )
        for one in found
    )
    note = f"{num_unpriced:,} lines of the ledger have no price and are not compared." if num_unpriced else None
    return ReportTable("reconciliation", "Ledger and bill", columns, rows, note)


def _format_tokens(one: Comparison, name: str) -> str:
    assert one.ledger is not None and one.bill is not None
    return f"{name}: {one.ledger.tokens[name]:,} in the ledger, {one.bill.tokens[name]:,} in the bill"
