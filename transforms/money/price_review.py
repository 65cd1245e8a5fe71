"""Reviews a price book: gaps, lines that ended, calendars that run out, and changes between two books.

Pure functions over `PriceBook`; `moebeam prices` prints what they find.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime, timedelta
from typing import Literal, TypeAlias

from moebeam.schemas.prices import PriceLine
from moebeam.transforms.money.price_book import PriceBook, is_at_time
from moebeam.transforms.money.price_calendar import format_day_rule
from moebeam.transforms.money.price_file import MINUTES_A_DAY, format_instant

FindingKind: TypeAlias = Literal["gap", "ended", "not_yet", "calendar_ends"]
ChangeKind: TypeAlias = Literal["added", "removed", "changed"]

_DAYS_LOOKED_AT = 9


@dataclass(frozen=True, slots=True)
class Finding:
    """Something about a model's prices that a person should look at; not an error."""

    kind: FindingKind
    provider: str
    model: str
    message: str


@dataclass(frozen=True, slots=True)
class Change:
    """A line that differs between two books; `before` or `after` is None if only one book has it."""

    kind: ChangeKind
    before: PriceLine | None
    after: PriceLine | None

    @property
    def line(self) -> PriceLine:
        found = self.after or self.before
        assert found is not None
        return found


def prices_at(book: PriceBook, at: datetime) -> list[PriceLine]:
    """Lines in force at an instant, for every provider, model, mode and tier, in the book's order."""
    in_utc = at.astimezone(UTC)
    decided: list[PriceLine] = []
    for line in book.lines:
        found = book.find(line.provider, line.model, in_utc, prompt_tokens=line.min_prompt_tokens, mode=line.mode)
        if found is line:
            decided.append(line)
    return decided


def review(book: PriceBook, at: datetime) -> Iterator[Finding]:
    """Find gaps between lines, prices that ended or have not begun, and calendars that end before their lines do."""
    for provider, model in book.timelines:
        lines = [line for line in book.lines if (line.provider, line.model) == (provider, model)]
        yield from _gaps(book, provider, model, lines)
        if all(line.effective_to is not None and line.effective_to <= at for line in lines):
            last = max(line.effective_to for line in lines if line.effective_to is not None)
            yield Finding("ended", provider, model, f"its last price ended at {format_instant(last)}")
        elif all(line.effective_from > at for line in lines):
            first = min(line.effective_from for line in lines)
            yield Finding("not_yet", provider, model, f"its first price begins at {format_instant(first)}")
        for line in lines:
            if (finding := _calendar_end(book, line, at)) is not None:
                yield finding


def _gaps(book: PriceBook, provider: str, model: str, lines: Sequence[PriceLine]) -> Iterator[Finding]:
    """Intervals without a price between the model's first line and its last."""
    starts = book.edges(provider, model)
    modes = sorted({line.mode for line in lines})
    for mode in modes:
        own = [line for line in lines if line.mode == mode]
        for tier in sorted({line.min_prompt_tokens for line in own}):
            tiered = [line for line in own if _covers(line, tier)]
            for start, end in zip(starts, (*starts[1:], None), strict=True):
                held = [line for line in tiered if _holds(line, start)]
                is_inside = any(line.effective_from < start for line in tiered) and any(
                    line.effective_to is None or line.effective_to > start for line in tiered
                )
                if not held and is_inside:
                    until = format_instant(end) if end is not None else "any later time"
                    yield Finding("gap", provider, model, f"no {mode} price from {format_instant(start)} to {until}")
                elif held and (at := _find_gap(held, start, end)) is not None:
                    yield Finding(
                        "gap",
                        provider,
                        model,
                        f"no {mode} price outside windows and days, such as {format_instant(at)}",
                    )


def _covers(line: PriceLine, prompt_tokens: int) -> bool:
    return line.min_prompt_tokens <= prompt_tokens and (
        line.max_prompt_tokens is None or prompt_tokens <= line.max_prompt_tokens
    )


def _holds(line: PriceLine, at: datetime) -> bool:
    return line.effective_from <= at and (line.effective_to is None or at < line.effective_to)


def _find_gap(lines: Sequence[PriceLine], start: datetime, end: datetime | None) -> datetime | None:
    """First instant at which none of some restricted lines is in force; gaps begin where a window or a day ends."""
    if any(not line.is_restricted for line in lines):
        return None
    minutes = {0} | {stop % MINUTES_A_DAY for line in lines for _, stop in line.windows}
    minutes |= {-line.days.utc_offset_minutes % MINUTES_A_DAY for line in lines if line.days is not None}
    midnight = start.replace(hour=0, minute=0, second=0, microsecond=0)
    steps = (timedelta(days=day, minutes=minute) for day in range(_DAYS_LOOKED_AT) for minute in sorted(minutes))
    for at in (start, *(midnight + step for step in steps)):
        if at >= start and (end is None or at < end) and not any(is_at_time(line, at, {}) for line in lines):
            return at
    return None


def _calendar_end(book: PriceBook, line: PriceLine, at: datetime) -> Finding | None:
    """The finding for a line that goes on after its calendar's last year, if it does."""
    if line.days is None or not line.days.calendar:
        return None
    last_year = max(day.year for day in book.holidays[line.days.calendar])
    in_use_until = line.effective_to or at.astimezone(UTC) + timedelta(days=60)
    if in_use_until.year <= last_year:
        return None
    return Finding(
        "calendar_ends",
        line.provider,
        line.model,
        f"line {line.line_id} goes on after {last_year}, the last year of which calendar {line.days.calendar} has "
        "holidays; add those of later years, or they are charged as other days",
    )


def diff(before: PriceBook, after: PriceBook) -> list[Change]:
    """Lines that changed from one book to another; a line's place in its file does not matter."""
    old = {_key(line): line for line in before.lines}
    new = {_key(line): line for line in after.lines}
    changes = [Change("removed", line, None) for key, line in old.items() if key not in new]
    for key, line in new.items():
        if key not in old:
            changes.append(Change("added", None, line))
        elif _read_terms(old[key]) != _read_terms(line):
            changes.append(Change("changed", old[key], line))
    return changes


def list_changed_fields(change: Change) -> list[str]:
    """Names of the fields that differ."""
    if change.before is None or change.after is None:
        return []
    names = [field.name for field in fields(PriceLine) if field.name not in ("line_id", "evidence")]
    return [name for name in names if getattr(change.before, name) != getattr(change.after, name)]


def _key(line: PriceLine) -> tuple[object, ...]:
    return (
        line.provider,
        line.model,
        line.mode,
        line.effective_from,
        line.windows,
        line.days,
        line.min_prompt_tokens,
    )


def _read_terms(line: PriceLine) -> tuple[object, ...]:
    return (
        line.effective_to,
        line.max_prompt_tokens,
        line.currency,
        line.cache_hit,
        line.cache_miss,
        line.output,
    )


def format_hours(line: PriceLine) -> str:
    """A line's windows and days, for people; empty if it always holds."""
    words = [f"{start // 60:02d}:{start % 60:02d}-{end // 60:02d}:{end % 60:02d}" for start, end in line.windows]
    if line.days is not None:
        words.append(format_day_rule(line.days))
    return " ".join(words)
