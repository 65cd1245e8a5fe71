"""Parses a price file, CSV or TOML, into price lines; errors name the line and column.

Part of the price book (`transforms/money/price_book.py`), which orders the lines in time.
"""

import csv
import io
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from decimal import Decimal
from typing import NoReturn, cast

from moebeam.schemas.errors import JobFileError
from moebeam.schemas.prices import PRICE_MODES, DayRule, PriceLine, PriceMode
from moebeam.schemas.providers import name_provider
from moebeam.transforms.money.price_calendar import DAY_RULE_FORM, parse_day_rule

COLUMNS = (
    "provider",
    "model",
    "effective_from_utc",
    "effective_to_utc",
    "window_utc",
    "currency",
    "cache_hit_per_mtok",
    "cache_miss_per_mtok",
    "output_per_mtok",
)
"""Columns that a price book must have, in any order."""

OPTIONAL_COLUMNS = ("days", "mode", "prompt_tokens", "batch_percent", "evidence")
"""Columns that a price book may have; any others are ignored.

`days`: see `price_calendar`. `mode`: one of `PRICE_MODES`; empty means online. `prompt_tokens`: the tier of prompt
lengths that the line is for, `0-128000` or `128001-`, both ends included. `batch_percent`: what the same tokens cost in
batch mode, in percent of the line's prices; it stands for another line of mode `batch`.
"""

MAX_PRICE_PLACES = 6
"""Most decimal places of a price per 1,000,000 tokens, so that every amount is exact in 12 places."""

MAX_PRICE_DIGITS = 12

MINUTES_A_DAY = 24 * 60

_PRICE = re.compile(r"(?P<whole>[0-9]+)(?:\.(?P<places>[0-9]+))?")
_WINDOW = re.compile(r"([0-9]{2}):([0-9]{2})-([0-9]{2}):([0-9]{2})")
_TIER = re.compile(r"([0-9]{1,12})-([0-9]{1,12})?")


def parse_price_file(content: bytes, source: str) -> Iterator[PriceLine]:
    """Parse the lines of a price file, in order; a file named `*.toml` is TOML, any other CSV.

    A line's id is its line number in a CSV file, and its place among the `[[price]]` tables of a TOML file.

    Raises:
        JobFileError: names file, line, column, expected and found.
    """
    rows = _toml_rows(content, source) if source.lower().endswith(".toml") else _csv_rows(content, source)
    for row in rows:
        line = _parse_line(row)
        yield line
        if row.get("batch_percent"):
            yield _batch_line(row, line)


def format_instant(at: datetime) -> str:
    """A UTC instant as price files write it."""
    return at.isoformat().replace("+00:00", "Z")


@dataclass(frozen=True, slots=True)
class _Row:
    """One line of the file; `refuse` raises an error that names its place."""

    source: str
    number: int
    cells: Mapping[str, str]
    kind: str = "line"

    def get(self, column: str) -> str:
        return self.cells.get(column, "")

    def refuse(self, column: str, expected: str) -> NoReturn:
        found = self.get(column)
        raise JobFileError(
            f"{self.source}: {self.kind} {self.number}, column {column}: expected {expected}, "
            f"found {repr(found[:80]) if found else 'nothing'}"
        )


def _csv_rows(content: bytes, source: str) -> Iterator[_Row]:
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise JobFileError(f"{source}: expected CSV in UTF-8, found other bytes at byte {error.start}") from error
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] = []
    number = 0
    try:
        for cells in reader:
            first, number = number + 1, reader.line_num
            if not any(cell.strip() for cell in cells):
                continue
            if not header:
                header = _check_header([cell.strip() for cell in cells], source, first)
                continue
            if len(cells) != len(header):
                raise JobFileError(
                    f"{source}: line {first}: expected {len(header)} columns, found {len(cells)}; "
                    "quote a cell that holds a comma"
                )
            yield _Row(source, first, dict(zip(header, map(str.strip, cells), strict=True)))
    except csv.Error as error:
        raise JobFileError(f"{source}: line {reader.line_num}: expected CSV, found: {error}") from error
    if not header:
        raise JobFileError(f"{source}: expected a header with {', '.join(COLUMNS)}, found an empty file")


def _toml_rows(content: bytes, source: str) -> Iterator[_Row]:
    """The `[[price]]` tables; numbers keep their digits as written."""
    try:
        document = tomllib.loads(content.decode("utf-8-sig"), parse_float=str)
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise JobFileError(f"{source}: expected TOML in UTF-8, found: {error}") from error
    tables: object = document.get("price")
    if not isinstance(tables, list) or sorted(document) != ["price"]:
        raise JobFileError(
            f"{source}: expected [[price]] tables and nothing else, found {', '.join(sorted(document)) or 'nothing'}"
        )
    for number, table in enumerate(cast("list[object]", tables), start=1):
        if not isinstance(table, dict):
            raise JobFileError(f"{source}: price {number}: expected a table, found {table!r}")
        cells: dict[str, str] = {}
        for key, value in cast("dict[str, object]", table).items():
            if isinstance(value, bool) or not isinstance(value, str | int | datetime):
                raise JobFileError(
                    f"{source}: price {number}, key {key}: expected text, a number or a time, found {value!r}"
                )
            cells[key] = format_instant(value) if isinstance(value, datetime) else str(value).strip()
        yield _Row(source, number, cells, kind="price")


def _check_header(header: list[str], source: str, number: int) -> list[str]:
    missing = [column for column in COLUMNS if column not in header]
    if missing:
        raise JobFileError(
            f"{source}: line {number}: expected the columns {', '.join(COLUMNS)}, found none named {', '.join(missing)}"
        )
    repeated = sorted({column for column in header if header.count(column) > 1})
    if repeated:
        raise JobFileError(f"{source}: line {number}: expected each column once, found {', '.join(repeated)} again")
    return header


def _parse_line(row: _Row) -> PriceLine:
    start = _parse_instant(row, "effective_from_utc")
    end = _parse_instant(row, "effective_to_utc") if row.get("effective_to_utc") else None
    if end is not None and end <= start:
        row.refuse("effective_to_utc", f"an instant after {format_instant(start)}")
    for column in ("provider", "model"):
        if not row.get(column):
            row.refuse(column, "a name")
    if not re.fullmatch("[A-Z]{3}", row.get("currency")):
        row.refuse("currency", "a code of three capital letters, such as USD")
    has_hit_price = row.get("cache_hit_per_mtok") != ""
    lowest, highest = _parse_tier(row)
    return PriceLine(
        line_id=str(row.number),
        provider=name_provider(row.get("provider")),
        model=row.get("model"),
        effective_from=start,
        effective_to=end,
        windows=_parse_windows(row),
        currency=row.get("currency"),
        cache_hit=_parse_price(row, "cache_hit_per_mtok") if has_hit_price else None,
        cache_miss=_parse_price(row, "cache_miss_per_mtok"),
        output=_parse_price(row, "output_per_mtok"),
        days=_parse_days(row),
        mode=_parse_mode(row),
        min_prompt_tokens=lowest,
        max_prompt_tokens=highest,
        evidence=row.get("evidence"),
    )


def _batch_line(row: _Row, line: PriceLine) -> PriceLine:
    """The line that `batch_percent` implies."""
    if line.mode != "online":
        row.refuse("batch_percent", f"nothing on a line that is itself of mode {line.mode}")
    percent = _parse_price(row, "batch_percent")
    if percent > 100:
        row.refuse("batch_percent", "a percentage from 0 to 100")
    prices = [
        None if price is None else price * percent / 100 for price in (line.cache_hit, line.cache_miss, line.output)
    ]
    if any(price is not None and price != round(price, MAX_PRICE_PLACES) for price in prices):
        row.refuse(
            "batch_percent",
            f"a share that gives prices of at most {MAX_PRICE_PLACES} decimal places (else write a line of mode batch)",
        )
    hit, miss, output = (None if price is None else price.normalize() + 0 for price in prices)
    assert miss is not None and output is not None
    return replace(line, line_id=f"{line.line_id}/batch", mode="batch", cache_hit=hit, cache_miss=miss, output=output)


def _parse_days(row: _Row) -> DayRule | None:
    if not row.get("days"):
        return None
    rule = parse_day_rule(row.get("days"))
    if rule is None:
        row.refuse("days", DAY_RULE_FORM)
    return rule


def _parse_mode(row: _Row) -> PriceMode:
    found = row.get("mode") or "online"
    for mode in PRICE_MODES:
        if found == mode:
            return mode
    row.refuse("mode", f"one of {', '.join(PRICE_MODES)}")


def _parse_tier(row: _Row) -> tuple[int, int | None]:
    if not row.get("prompt_tokens"):
        return 0, None
    found = _TIER.fullmatch(row.get("prompt_tokens"))
    if found is None:
        row.refuse("prompt_tokens", "prompt lengths such as 0-128000 or 128001-")
    lowest, highest = int(found[1]), int(found[2]) if found[2] else None
    if highest is not None and highest < lowest:
        row.refuse("prompt_tokens", f"an upper end of at least {lowest}")
    return lowest, highest


def _parse_instant(row: _Row, column: str) -> datetime:
    expected = "a UTC timestamp such as 2026-04-24T00:00:00Z"
    try:
        at = datetime.fromisoformat(row.get(column))
    except ValueError:
        row.refuse(column, expected)
    if at.tzinfo is None:
        row.refuse(column, f"{expected}, with its Z")
    return at.astimezone(UTC)


def _parse_windows(row: _Row) -> tuple[tuple[int, int], ...]:
    """Half-open minutes of the UTC day; `16:30-00:30` wraps midnight."""
    expected = "windows such as 16:30-00:30, separated by blanks"
    windows: list[tuple[int, int]] = []
    covered: set[int] = set()
    for word in row.get("window_utc").split():
        found = _WINDOW.fullmatch(word)
        if found is None:
            row.refuse("window_utc", expected)
        hour, minute, end_hour, end_minute = map(int, found.groups())
        start, end = hour * 60 + minute, end_hour * 60 + end_minute
        if minute > 59 or end_minute > 59 or start >= MINUTES_A_DAY or end > MINUTES_A_DAY:
            row.refuse("window_utc", "times from 00:00 to 24:00")
        if start == end % MINUTES_A_DAY:
            row.refuse("window_utc", "windows that end at another time than they begin (no window means all day)")
        minutes = set(range(start, end if start < end else end + MINUTES_A_DAY))
        minutes = {minute % MINUTES_A_DAY for minute in minutes}
        if covered & minutes:
            row.refuse("window_utc", "windows that do not overlap")
        covered |= minutes
        windows.append((start, end))
    return tuple(windows)


def _parse_price(row: _Row, column: str) -> Decimal:
    cell = row.get(column)
    found = _PRICE.fullmatch(cell)
    if found is None:
        row.refuse(column, "a price per 1,000,000 tokens, not negative, such as 0.28")
    if len((found["places"] or "").rstrip("0")) > MAX_PRICE_PLACES:
        row.refuse(column, f"a price of at most {MAX_PRICE_PLACES} decimal places, so that costs are exact in 12")
    if len(found["whole"].lstrip("0")) > MAX_PRICE_DIGITS:
        row.refuse(column, f"a price of at most {MAX_PRICE_DIGITS} digits before the point")
    return Decimal(cell)
