"""What is worth knowing about a price book beside its prices: gaps, lines that ended, calendars that run out, changes.

Pure functions over `PriceBook`; `moebeam prices` prints what they find.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from datetime import UTC, datetime, timedelta
from typing import Literal, TypeAlias

from moebeam.schemas.prices import PriceLine
from moebeam.transforms.money.price_book import PriceBook, is_at_time
from moebeam.transforms.money.price_calendar import spell_day_rule
from moebeam.transforms.money.price_file import MINUTES_A_DAY, spell_instant

FindingKind: TypeAlias = Literal["gap", "ended", "not_yet", "calendar_ends"]
ChangeKind: TypeAlias = Literal["added", "removed", "changed"]

_DAYS_LOOKED_AT = 9


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing about a model's prices that a person should look at; no error."""

    kind: FindingKind
    provider: str
    model: str
    message: str


@dataclass(frozen=True, slots=True)
class Change:
    """One line that differs between two books; `before` or `after` is None where it is only in the other."""

    kind: ChangeKind
    before: PriceLine | None
    after: PriceLine | None

    @property
    def line(self) -> PriceLine:
        found = self.after or self.before
        assert found is not None
        return found


def prices_at(book: PriceBook, at: datetime) -> list[PriceLine]:
    """The lines that decide at an instant, of every provider, model, mode and tier, in the book's order."""
    in_utc = at.astimezone(UTC)
    decided: list[PriceLine] = []
    for line in book.lines:
        found = book.find(line.provider, line.model, in_utc, prompt_tokens=line.min_prompt_tokens, mode=line.mode)
        if found is line:
            decided.append(line)
    return decided


def review(book: PriceBook, at: datetime) -> Iterator[Finding]:
    """Gaps between a model's lines, prices that ended or have not begun, calendars that end before the lines do."""
    for provider, model in book.timelines:
        lines = [line for line in book.lines if (line.provider, line.model) == (provider, model)]
        yield from _gaps(book, provider, model, lines)
        if all(line.effective_to is not None and line.effective_to <= at for line in lines):
            last = max(line.effective_to for line in lines if line.effective_to is not None)
            yield Finding("ended", provider, model, f"its last price ended at {spell_instant(last)}")
        elif all(line.effective_from > at for line in lines):
            first = min(line.effective_from for line in lines)
            yield Finding("not_yet", provider, model, f"its first price begins at {spell_instant(first)}")
        for line in lines:
            if (finding := _calendar_end(book, line, at)) is not None:
                yield finding


def _gaps(book: PriceBook, provider: str, model: str, lines: Sequence[PriceLine]) -> Iterator[Finding]:
    """Intervals without a price, between the model's first line and its last."""
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
                    until = spell_instant(end) if end is not None else "any later time"
                    yield Finding("gap", provider, model, f"no {mode} price from {spell_instant(start)} to {until}")
                elif held and (at := _uncovered(held, start, end)) is not None:
                    yield Finding(
                        "gap", provider, model, f"no {mode} price outside windows and days, such as {spell_instant(at)}"
                    )


def _covers(line: PriceLine, prompt_tokens: int) -> bool:
    return line.min_prompt_tokens <= prompt_tokens and (
        line.max_prompt_tokens is None or prompt_tokens <= line.max_prompt_tokens
    )


def _holds(line: PriceLine, at: datetime) -> bool:
    return line.effective_from <= at and (line.effective_to is None or at < line.effective_to)


def _uncovered(lines: Sequence[PriceLine], start: datetime, end: datetime | None) -> datetime | None:
    """The first instant at which none of some restricted lines holds; such a time begins where a window or day ends."""
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
    """A line that goes on after the last year of which its calendar has days."""
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
    """What changed from one book to another, line by line; the place of a line in its file does not matter."""
    old = {_key(line): line for line in before.lines}
    new = {_key(line): line for line in after.lines}
    changes = [Change("removed", line, None) for key, line in old.items() if key not in new]
    for key, line in new.items():
        if key not in old:
            changes.append(Change("added", None, line))
        elif _terms(old[key]) != _terms(line):
            changes.append(Change("changed", old[key], line))
    return changes


def changed_fields(change: Change) -> list[str]:
    """Names of the fields in which a changed line differs."""
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


def _terms(line: PriceLine) -> tuple[object, ...]:
    return (
        line.effective_to,
        line.max_prompt_tokens,
        line.currency,
        line.cache_hit,
        line.cache_miss,
        line.output,
    )


def spell_when(line: PriceLine) -> str:
    """When a line holds within its interval, for people; empty where always."""
    words = [f"{start // 60:02d}:{start % 60:02d}-{end // 60:02d}:{end % 60:02d}" for start, end in line.windows]
    if line.days is not None:
        words.append(spell_day_rule(line.days))
    return " ".join(words)
