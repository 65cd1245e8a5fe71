"""The price book: dated prices of providers and models, read once and looked up for every attempt.

`transforms/money/account.py` looks up the price at each completion's start; quotes and value chains read the same file.
`transforms/money/price_file.py` parses it into lines.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from itertools import combinations

from moebeam.schemas.errors import JobFileError
from moebeam.schemas.prices import PriceLine, PriceMode
from moebeam.schemas.providers import name_provider
from moebeam.schemas.store.storage import read_bytes
from moebeam.transforms.money.price_calendar import HOLIDAY_FILE, Holidays, is_on_days, parse_holidays
from moebeam.transforms.money.price_file import COLUMNS, MINUTES_A_DAY, format_instant, parse_price_file

__all__ = ["COLUMNS", "PriceBook"]


@dataclass(frozen=True, slots=True)
class _Timeline:
    """Price lines of one provider's model, split wherever one of them begins or ends.

    `candidates[i]` are valid from `starts[i]` (inclusive) to `starts[i + 1]`, restricted lines first.
    """

    starts: tuple[datetime, ...]
    candidates: tuple[tuple[PriceLine, ...], ...]


@dataclass(frozen=True, slots=True)
class PriceBook:
    """Dated prices; immutable and picklable.

    Attributes:
        version: file name and the first 12 digits of the content's SHA-256, such as `prices.csv@0123456789ab`; if a
            line names a calendar, the content includes the file of holidays.
        lines: in file order; a line's id is its line number in a CSV file.
        holidays: days off by calendar.
    """

    version: str
    lines: tuple[PriceLine, ...]
    timelines: Mapping[tuple[str, str], _Timeline]
    holidays: Holidays = field(default_factory=dict[str, frozenset[date]])

    @classmethod
    def load(cls, path: str) -> "PriceBook":
        """Read a price book, and the file of holidays beside it if a line needs one.

        Raises:
            JobFileError: a file cannot be read, or a line is wrong; names file, line, column, expected and found.
        """
        content = _read(path, "the price book")
        beside = f"{path.rpartition('/')[0]}/{HOLIDAY_FILE}" if "/" in path else HOLIDAY_FILE
        lines = parse_price_file(content, path)
        holidays = _read(beside, "the holidays of its calendars") if any(_calendar(line) for line in lines) else None
        return cls.parse(content, path, holidays)

    @classmethod
    def parse(cls, content: bytes, source: str, holidays: bytes | None = None) -> "PriceBook":
        """Parse the bytes of a price book; errors name `source` as its path.

        Args:
            holidays: content of the file of holidays.
        Raises:
            JobFileError: as `load`.
        """
        lines = tuple(parse_price_file(content, source))
        if not lines:
            raise JobFileError(f"{source}: expected at least one price line, found none")
        groups: dict[tuple[str, str], list[PriceLine]] = {}
        for line in lines:
            groups.setdefault((line.provider, line.model), []).append(line)
        for group in groups.values():
            _refuse_overlaps(group, source)
        name = source.replace("\\", "/").rstrip("/").rpartition("/")[2]
        days = parse_holidays(holidays, HOLIDAY_FILE) if holidays is not None else {}
        for line in lines:
            if (calendar := _calendar(line)) and calendar not in days:
                raise JobFileError(
                    f"{source}: line {line.line_id}, column days: expected a calendar of {HOLIDAY_FILE} beside the "
                    f"book, found {calendar!r}, of which it has no day"
                )
        digest = hashlib.sha256(content)
        if any(_calendar(line) for line in lines):
            digest.update(holidays or b"")
        version = f"{name}@{digest.hexdigest()[:12]}"
        return cls.from_lines(version, lines, days)

    @classmethod
    def from_lines(cls, version: str, lines: Iterable[PriceLine], holidays: Holidays) -> "PriceBook":
        """A book of lines that were parsed before."""
        groups: dict[tuple[str, str], list[PriceLine]] = {}
        kept = tuple(lines)
        for line in kept:
            groups.setdefault((line.provider, line.model), []).append(line)
        return cls(version, kept, {key: _timeline(group) for key, group in groups.items()}, holidays)

    def find(
        self, provider: str, model: str, at: datetime, *, prompt_tokens: int = 0, mode: PriceMode = "online"
    ) -> PriceLine | None:
        """The price in force at an instant; None if the book has none.

        Args:
            provider: by any of its names; lines have its first one.
            at: any time zone; intervals and windows are half-open, in UTC.
            prompt_tokens: selects the tier, if the book has tiers.
        Raises:
            ValueError: `at` has no time zone.
        """
        if at.tzinfo is None:
            raise ValueError(f"expected an instant with a time zone, found {at.isoformat()}")
        timeline = self.timelines.get((name_provider(provider), model))
        if timeline is None:
            return None
        position = bisect_right(timeline.starts, at) - 1
        if position < 0:
            return None
        in_utc = at.astimezone(UTC)
        for line in timeline.candidates[position]:
            if line.mode == mode and _is_in_tier(line, prompt_tokens) and is_at_time(line, in_utc, self.holidays):
                return line
        return None

    def edges(self, provider: str, model: str) -> tuple[datetime, ...]:
        """Instants at which an interval of the model's lines begins or ends, in order."""
        timeline = self.timelines.get((name_provider(provider), model))
        return timeline.starts if timeline is not None else ()


def is_at_time(line: PriceLine, in_utc: datetime, holidays: Holidays) -> bool:
    """Whether an instant within a line's interval is in its windows and on its days."""
    if line.windows and not _is_in_window(line, in_utc.hour * 60 + in_utc.minute):
        return False
    return line.days is None or is_on_days(line.days, in_utc, holidays)


def _is_in_window(line: PriceLine, minute: int) -> bool:
    return any(start <= minute < end if start < end else minute >= start or minute < end for start, end in line.windows)


def _is_in_tier(line: PriceLine, prompt_tokens: int) -> bool:
    return line.min_prompt_tokens <= prompt_tokens and (
        line.max_prompt_tokens is None or prompt_tokens <= line.max_prompt_tokens
    )


def _calendar(line: PriceLine) -> str:
    return line.days.calendar if line.days is not None else ""


def _read(path: str, what: str) -> bytes:
    try:
        return read_bytes(path)
    except (OSError, ValueError, ImportError) as error:
        raise JobFileError(f"{path}: {what} cannot be read: {error}") from error


def _timeline(lines: Sequence[PriceLine]) -> _Timeline:
    edges = {line.effective_from for line in lines} | {line.effective_to for line in lines if line.effective_to}
    starts = tuple(sorted(edges))
    by_rank = sorted(lines, key=lambda line: not line.is_restricted)
    return _Timeline(starts, tuple(tuple(line for line in by_rank if _holds(line, start)) for start in starts))


def _holds(line: PriceLine, at: datetime) -> bool:
    return line.effective_from <= at and (line.effective_to is None or at < line.effective_to)


def _refuse_overlaps(lines: Iterable[PriceLine], source: str) -> None:
    for one, other in combinations(lines, 2):
        if not _are_alike(one, other):
            continue
        at = next(_common_instants(one, other), None)
        if at is not None:
            raise JobFileError(
                f"{source}: line {other.line_id}, column effective_from_utc: expected one price of {other.provider} "
                f"{other.model} at any instant, found another on line {one.line_id} that also holds at "
                f"{format_instant(at)}"
            )


def _are_alike(one: PriceLine, other: PriceLine) -> bool:
    """Whether two lines can apply to one request with neither taking precedence."""
    lowest = max(one.min_prompt_tokens, other.min_prompt_tokens)
    highest = [line.max_prompt_tokens for line in (one, other) if line.max_prompt_tokens is not None]
    return (
        one.is_restricted == other.is_restricted and one.mode == other.mode and (not highest or lowest <= min(highest))
    )


def _common_instants(one: PriceLine, other: PriceLine) -> Iterator[datetime]:
    """Instants at which both lines are in force, earliest first; holidays are ignored, since they may change.

    An overlap begins at the start of an interval, a window or a day, so only those instants are tried.
    """
    start = max(one.effective_from, other.effective_from)
    ends = [line.effective_to for line in (one, other) if line.effective_to is not None]
    end = min(ends, default=start + timedelta(days=9))
    minutes = {0}
    for line in (one, other):
        minutes |= {begin for begin, _ in line.windows}
        if line.days is not None:
            minutes.add(-line.days.utc_offset_minutes % MINUTES_A_DAY)
    midnight = start.replace(hour=0, minute=0, second=0, microsecond=0)
    instants = [midnight + timedelta(days=day, minutes=minute) for day in range(9) for minute in sorted(minutes)]
    for at in (start, *(instant for instant in instants if instant > start)):
        if at < end and is_at_time(one, at, {}) and is_at_time(other, at, {}):
            yield at
