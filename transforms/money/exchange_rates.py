"""Dated exchange rates, for reports that compare or add up prices in several currencies.

A ledger is never converted: it holds what was billed, in the currency of the bill.
"""

import csv
import io
import re
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime
from decimal import ROUND_HALF_EVEN, Decimal, localcontext

from moebeam.schemas.errors import JobFileError
from moebeam.schemas.store.storage import read_bytes

RATE_COLUMNS = ("date", "base", "quote", "rate", "source")
"""Columns of a file of rates: on `date`, one unit of `base` was worth `rate` units of `quote`."""

PLACES = Decimal("0.000000000001")
"""Converted amounts are rounded half to even to 12 places, once, at the end."""

_RATE = re.compile(r"[0-9]{1,12}(?:\.[0-9]{1,12})?")
_CURRENCY = re.compile(r"[A-Z]{3}")


@dataclass(frozen=True, slots=True)
class Converted:
    """A converted amount, and the day of the rate; None if no rate was needed."""

    amount: Decimal
    rate_date: date | None


@dataclass(frozen=True, slots=True)
class ExchangeRates:
    """Rates by currency pair, sorted by day; a rate holds until the next day that has one."""

    rates: Mapping[tuple[str, str], tuple[tuple[date, Decimal], ...]]

    @classmethod
    def load(cls, path: str) -> "ExchangeRates":
        """Read a file of rates.

        Raises:
            JobFileError: the file cannot be read, or a line is wrong; names file, line, column, expected and found.
        """
        try:
            return cls.parse(read_bytes(path), path)
        except (OSError, ImportError) as error:
            raise JobFileError(f"{path}: the exchange rates cannot be read: {error}") from error

    @classmethod
    def parse(cls, content: bytes, source: str) -> "ExchangeRates":
        """Parse the bytes of a CSV file of rates; errors name `source` as its path.

        Raises:
            JobFileError: as `load`.
        """
        found: dict[tuple[str, str], dict[date, Decimal]] = {}
        try:
            rows = csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline=""), strict=True)
            if missing := [name for name in RATE_COLUMNS if name not in (rows.fieldnames or ())]:
                raise JobFileError(
                    f"{source}: line 1: expected the columns {', '.join(RATE_COLUMNS)}, found none named "
                    f"{', '.join(missing)}"
                )
            for row in rows:
                cells = {name: (row[name] or "").strip() for name in RATE_COLUMNS}
                pair, day, rate = _parse_row(cells, f"{source}: line {rows.line_num}")
                if day in found.setdefault(pair, {}):
                    raise JobFileError(
                        f"{source}: line {rows.line_num}: expected one rate of {pair[0]} in {pair[1]} on {day}, "
                        "found another"
                    )
                found[pair][day] = rate
        except (UnicodeDecodeError, csv.Error) as error:
            raise JobFileError(f"{source}: expected CSV in UTF-8, found: {error}") from error
        return cls({pair: tuple(sorted(days.items())) for pair, days in found.items()})

    def convert(self, amount: Decimal, currency: str, into: str, at: datetime) -> Converted | None:
        """Convert an amount at the last rate known at an instant; None if there is none.

        A rate serves both directions; two rates are never chained.
        """
        if currency == into:
            return Converted(amount, None)
        day = at.astimezone(UTC).date()
        forward, backward = self._rate(currency, into, day), self._rate(into, currency, day)
        # If both directions have a rate, the newer one.
        is_forward = forward is not None and (backward is None or forward[0] >= backward[0])
        chosen = forward if is_forward else backward
        if chosen is None:
            return None
        with localcontext(prec=60):
            converted = amount * chosen[1] if is_forward else amount / chosen[1]
            return Converted(converted.quantize(PLACES, ROUND_HALF_EVEN), chosen[0])

    def _rate(self, base: str, quote: str, day: date) -> tuple[date, Decimal] | None:
        rates = self.rates.get((base, quote), ())
        position = bisect_right(rates, day, key=lambda rate: rate[0]) - 1
        return rates[position] if position >= 0 else None


def _parse_row(cells: Mapping[str, str], where: str) -> tuple[tuple[str, str], date, Decimal]:
    try:
        day = date.fromisoformat(cells["date"])
    except ValueError as error:
        raise JobFileError(
            f"{where}, column date: expected a day such as 2026-10-01, found {cells['date']!r}"
        ) from error
    for column in ("base", "quote"):
        if not _CURRENCY.fullmatch(cells[column]):
            raise JobFileError(
                f"{where}, column {column}: expected a code of three capital letters, found {cells[column]!r}"
            )
    if cells["base"] == cells["quote"]:
        raise JobFileError(f"{where}, column quote: expected another currency than {cells['base']}, found the same")
    if not _RATE.fullmatch(cells["rate"]) or Decimal(cells["rate"]) == 0:
        raise JobFileError(
            f"{where}, column rate: expected a positive number of at most 12 decimal places, found {cells['rate']!r}"
        )
    if not cells["source"]:
        raise JobFileError(f"{where}, column source: expected where the rate comes from, found nothing")
    return (cells["base"], cells["quote"]), day, Decimal(cells["rate"])
