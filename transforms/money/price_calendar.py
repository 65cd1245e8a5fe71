"""Days on which a price holds: weekdays at a UTC offset, without the public holidays of a calendar.

Part of the price book. Dates of holidays come from the user's file beside the book: governments announce them year by
year, so no rule predicts them.
"""

import csv
import io
import re
from collections.abc import Mapping
from datetime import date, datetime, timedelta
from typing import TypeAlias

from moebeam.schemas.errors import JobFileError
from moebeam.schemas.prices import DayRule

Holidays: TypeAlias = Mapping[str, frozenset[date]]
"""Days by calendar."""

HOLIDAY_FILE = "holidays.csv"
HOLIDAY_COLUMNS = ("calendar", "date", "source")

_DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_RULE = re.compile(
    r"(?P<first>[a-z]{3})(?:-(?P<last>[a-z]{3}))?"
    r"(?: (?P<sign>[+-])(?P<hours>[0-9]{2}):(?P<minutes>[0-9]{2}))?"
    r"(?: except (?P<calendar>[A-Za-z0-9_-]+))?"
)
DAY_RULE_FORM = "days such as `mon-fri +08:00 except CN` (weekdays, their offset from UTC, a calendar of holidays)"


def parse_day_rule(text: str) -> DayRule | None:
    """Parse a cell of the column `days`; None if it is not a rule."""
    found = _RULE.fullmatch(text)
    if found is None or found["first"] not in _DAYS or (found["last"] or "mon") not in _DAYS:
        return None
    first = _DAYS.index(found["first"])
    last = _DAYS.index(found["last"]) if found["last"] else first
    if found["hours"] is not None and (int(found["hours"]) > 14 or int(found["minutes"]) > 59):
        return None
    offset = int(found["hours"] or 0) * 60 + int(found["minutes"] or 0)
    return DayRule(
        weekdays=frozenset((first + step) % 7 for step in range((last - first) % 7 + 1)),
        utc_offset_minutes=-offset if found["sign"] == "-" else offset,
        calendar=found["calendar"] or "",
    )


def format_day_rule(rule: DayRule) -> str:
    """Format a rule as price books write it."""
    starts = [day for day in range(7) if day in rule.weekdays and (day - 1) % 7 not in rule.weekdays]
    first = starts[0] if starts else 0
    last = (first + len(rule.weekdays) - 1) % 7
    sign, offset = "-" if rule.utc_offset_minutes < 0 else "+", abs(rule.utc_offset_minutes)
    names = _DAYS[first] if first == last else f"{_DAYS[first]}-{_DAYS[last]}"
    exception = f" except {rule.calendar}" if rule.calendar else ""
    return f"{names} {sign}{offset // 60:02d}:{offset % 60:02d}{exception}"


def is_on_days(rule: DayRule, in_utc: datetime, holidays: Holidays) -> bool:
    """Whether a UTC instant falls on a day of the rule."""
    day = (in_utc + timedelta(minutes=rule.utc_offset_minutes)).date()
    return day.weekday() in rule.weekdays and day not in holidays.get(rule.calendar, ())


def parse_holidays(content: bytes, source: str) -> Holidays:
    """Parse a file of holidays: CSV with the columns `calendar`, `date` and `source`; others are ignored.

    Raises:
        JobFileError: names file, line, column, expected and found.
    """
    try:
        rows = csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline=""), strict=True)
        missing = [name for name in HOLIDAY_COLUMNS if name not in (rows.fieldnames or ())]
        if missing:
            raise JobFileError(
                f"{source}: line 1: expected the columns {', '.join(HOLIDAY_COLUMNS)}, found none named "
                f"{', '.join(missing)}"
            )
        days: dict[str, set[date]] = {}
        for row in rows:
            for column in HOLIDAY_COLUMNS:
                if not (row[column] or "").strip():
                    raise JobFileError(
                        f"{source}: line {rows.line_num}, column {column}: expected a value, found nothing"
                    )
            days.setdefault(row["calendar"].strip(), set()).add(_date(row["date"].strip(), source, rows.line_num))
    except (UnicodeDecodeError, csv.Error) as error:
        raise JobFileError(f"{source}: expected CSV in UTF-8, found: {error}") from error
    return {calendar: frozenset(found) for calendar, found in days.items()}


def _date(text: str, source: str, line: int) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError as error:
        raise JobFileError(
            f"{source}: line {line}, column date: expected a day such as 2026-10-01, found {text!r}"
        ) from error
