"""The price book: dated prices of providers and models, read once from CSV and asked for every attempt.

Stands beside the way of a row: `transforms/account.py` looks up the price of each completion's start. The same file
serves quotes and value chains.
"""

import csv
import hashlib
import io
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from itertools import combinations
from typing import NoReturn

from schemas.errors import JobFileError
from schemas.prices import PriceLine
from schemas.storage import read_bytes

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
"""Columns that a price book must have, in any order; others, such as evidence and notes, are for people."""

MAX_PRICE_PLACES = 6
"""Most decimal places of a price per 1,000,000 tokens, so that every amount is exact in 12 places."""

MAX_PRICE_DIGITS = 12

MINUTES_A_DAY = 24 * 60

_PRICE = re.compile(r"(?P<whole>[0-9]+)(?:\.(?P<places>[0-9]+))?")
_WINDOW = re.compile(r"([0-9]{2}):([0-9]{2})-([0-9]{2}):([0-9]{2})")


@dataclass(frozen=True, slots=True)
class _Timeline:
    """The lines of one provider's model, cut where any of them begins or ends.

    `candidates[i]` hold from `starts[i]` (inclusive) to `starts[i + 1]`, lines with a window first.
    """

    starts: tuple[datetime, ...]
    candidates: tuple[tuple[PriceLine, ...], ...]


@dataclass(frozen=True, slots=True)
class PriceBook:
    """Dated prices; immutable and picklable.

    Attributes:
        version: file name and the first 12 digits of the content's SHA-256, such as `prices.csv@0123456789ab`.
        lines: in the file's order; a line's id is its line number in the file.
    """

    version: str
    lines: tuple[PriceLine, ...]
    timelines: Mapping[tuple[str, str], _Timeline]

    @classmethod
    def load(cls, path: str) -> "PriceBook":
        """Read a price book.

        Raises:
            JobFileError: the file cannot be read, or a line is wrong; names file, line, column, expected and found.
        """
        try:
            content = read_bytes(path)
        except (OSError, ValueError, ImportError) as error:
            raise JobFileError(f"{path}: the price book cannot be read: {error}") from error
        return cls.parse(content, path)

    @classmethod
    def parse(cls, content: bytes, source: str) -> "PriceBook":
        """Read a price book from the bytes of a CSV file; `source` is its path, as errors name it.

        Raises:
            JobFileError: as `load`.
        """
        lines = tuple(_parse_lines(content, source))
        if not lines:
            raise JobFileError(f"{source}: expected at least one price line, found none")
        groups: dict[tuple[str, str], list[PriceLine]] = {}
        for line in lines:
            groups.setdefault((line.provider, line.model), []).append(line)
        for group in groups.values():
            _refuse_overlaps(group, source)
        name = source.replace("\\", "/").rstrip("/").rpartition("/")[2]
        version = f"{name}@{hashlib.sha256(content).hexdigest()[:12]}"
        return cls(version, lines, {key: _timeline(group) for key, group in groups.items()})

    def find(self, provider: str, model: str, at: datetime) -> PriceLine | None:
        """The price that holds at an instant; None if the book has none.

        Args:
            at: any time zone; intervals and windows are half-open, in UTC.
        Raises:
            ValueError: `at` has no time zone.
        """
        if at.tzinfo is None:
            raise ValueError(f"expected an instant with a time zone, found {at.isoformat()}")
        timeline = self.timelines.get((provider, model))
        if timeline is None:
            return None
        position = bisect_right(timeline.starts, at) - 1
        if position < 0:
            return None
        candidates = timeline.candidates[position]
        if len(candidates) == 1 and not candidates[0].windows:
            return candidates[0]
        in_utc = at.astimezone(UTC)
        minute = in_utc.hour * 60 + in_utc.minute
        return next((line for line in candidates if _is_in_window(line, minute)), None)


def _is_in_window(line: PriceLine, minute: int) -> bool:
    if not line.windows:
        return True
    return any(start <= minute < end if start < end else minute >= start or minute < end for start, end in line.windows)


def _timeline(lines: Sequence[PriceLine]) -> _Timeline:
    edges = {line.effective_from for line in lines} | {line.effective_to for line in lines if line.effective_to}
    starts = tuple(sorted(edges))
    by_rank = sorted(lines, key=lambda line: not line.windows)
    return _Timeline(starts, tuple(tuple(line for line in by_rank if _holds(line, start)) for start in starts))


def _holds(line: PriceLine, at: datetime) -> bool:
    return line.effective_from <= at and (line.effective_to is None or at < line.effective_to)


def _refuse_overlaps(lines: Iterable[PriceLine], source: str) -> None:
    for one, other in combinations(lines, 2):
        if bool(one.windows) == bool(other.windows) and (at := _common_instant(one, other)) is not None:
            raise JobFileError(
                f"{source}: line {other.line_id}, column effective_from_utc: expected one price of {other.provider} "
                f"{other.model} at any instant, found another on line {one.line_id} that also holds at "
                f"{_spell(at)}"
            )


def _common_instant(one: PriceLine, other: PriceLine) -> datetime | None:
    """The first minute at which two lines both hold."""
    start = max(one.effective_from, other.effective_from)
    ends = [line.effective_to for line in (one, other) if line.effective_to is not None]
    end = min(ends, default=start + timedelta(days=1))
    for minutes in range(MINUTES_A_DAY + 1):
        at = start if minutes == 0 else start.replace(second=0, microsecond=0) + timedelta(minutes=minutes)
        if at >= end:
            return None
        minute = at.hour * 60 + at.minute
        if _is_in_window(one, minute) and _is_in_window(other, minute):
            return at
    return None


def _spell(at: datetime) -> str:
    return at.isoformat().replace("+00:00", "Z")


@dataclass(frozen=True, slots=True)
class _Row:
    """One line of the file, able to say where it is wrong."""

    source: str
    number: int
    cells: Mapping[str, str]

    def refuse(self, column: str, expected: str) -> NoReturn:
        found = self.cells[column]
        raise JobFileError(
            f"{self.source}: line {self.number}, column {column}: expected {expected}, "
            f"found {repr(found[:80]) if found else 'nothing'}"
        )


def _parse_lines(content: bytes, source: str) -> Iterator[PriceLine]:
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
            yield _parse_line(_Row(source, first, dict(zip(header, map(str.strip, cells), strict=True))))
    except csv.Error as error:
        raise JobFileError(f"{source}: line {reader.line_num}: expected CSV, found: {error}") from error
    if not header:
        raise JobFileError(f"{source}: expected a header with {', '.join(COLUMNS)}, found an empty file")


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
    end = _parse_instant(row, "effective_to_utc") if row.cells["effective_to_utc"] else None
    if end is not None and end <= start:
        row.refuse("effective_to_utc", f"an instant after {_spell(start)}")
    for column in ("provider", "model"):
        if not row.cells[column]:
            row.refuse(column, "a name")
    if not re.fullmatch("[A-Z]{3}", row.cells["currency"]):
        row.refuse("currency", "a code of three capital letters, such as USD")
    has_hit_price = row.cells["cache_hit_per_mtok"] != ""
    return PriceLine(
        line_id=str(row.number),
        provider=row.cells["provider"],
        model=row.cells["model"],
        effective_from=start,
        effective_to=end,
        windows=_parse_windows(row),
        currency=row.cells["currency"],
        cache_hit=_parse_price(row, "cache_hit_per_mtok") if has_hit_price else None,
        cache_miss=_parse_price(row, "cache_miss_per_mtok"),
        output=_parse_price(row, "output_per_mtok"),
    )


def _parse_instant(row: _Row, column: str) -> datetime:
    expected = "a UTC timestamp such as 2026-04-24T00:00:00Z"
    try:
        at = datetime.fromisoformat(row.cells[column])
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
    for word in row.cells["window_utc"].split():
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
    cell = row.cells[column]
    found = _PRICE.fullmatch(cell)
    if found is None:
        row.refuse(column, "a price per 1,000,000 tokens, not negative, such as 0.28")
    if len((found["places"] or "").rstrip("0")) > MAX_PRICE_PLACES:
        row.refuse(column, f"a price of at most {MAX_PRICE_PLACES} decimal places, so that costs are exact in 12")
    if len(found["whole"].lstrip("0")) > MAX_PRICE_DIGITS:
        row.refuse(column, f"a price of at most {MAX_PRICE_DIGITS} digits before the point")
    return Decimal(cell)
