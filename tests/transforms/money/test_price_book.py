import contextlib
import csv
import hashlib
import io
import pickle
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moebeam.schemas.errors import JobFileError
from moebeam.schemas.prices import PriceLine
from moebeam.schemas.providers import name_provider
from moebeam.transforms.money.price_book import PriceBook
from moebeam.transforms.money.price_file import COLUMNS
from tests.support.paths import SHARED

FACTS = SHARED / "facts" / "prices.csv"
HEADER = ",".join(COLUMNS)
LINE = "p,m,2026-01-01T00:00:00Z,,,USD,0.1,0.2,0.3"

has_facts = pytest.mark.skipif(not FACTS.is_file(), reason="../shared/facts/prices.csv is not there")


def book_of(*lines: str, header: str = HEADER) -> PriceBook:
    return PriceBook.parse("\n".join([header, *lines]).encode(), "folder/book.csv")


def refusal(*lines: str, header: str = HEADER) -> str:
    with pytest.raises(JobFileError) as caught:
        book_of(*lines, header=header)
    return str(caught.value)


def at(text: str) -> datetime:
    return datetime.fromisoformat(text)


def prices(line: PriceLine | None) -> tuple[str | None, str, str] | None:
    return line and (
        line.cache_hit if line.cache_hit is None else str(line.cache_hit),
        str(line.cache_miss),
        str(line.output),
    )


@pytest.fixture(scope="module")
def facts() -> PriceBook:
    return PriceBook.load(str(FACTS))


@has_facts
def test_every_line_of_the_price_history_is_read(facts: PriceBook) -> None:
    rows = list(csv.DictReader(io.StringIO(FACTS.read_text())))
    assert len(facts.lines) == len(rows) > 30
    for number, (line, row) in enumerate(zip(facts.lines, rows, strict=True), start=2):
        assert line.line_id == str(number)
        names = (name_provider(row["provider"]), row["model"], row["currency"])
        assert (line.provider, line.model, line.currency) == names
        assert str(line.cache_miss) == row["cache_miss_per_mtok"]
        assert str(line.output) == row["output_per_mtok"]
        assert ("" if line.cache_hit is None else str(line.cache_hit)) == row["cache_hit_per_mtok"]
    assert facts.version == f"prices.csv@{hashlib.sha256(FACTS.read_bytes()).hexdigest()[:12]}"


@has_facts
@pytest.mark.parametrize(
    ("model", "instant", "expected"),
    [
        # At launch, and a hit price cut at a half-open edge.
        ("deepseek-v4-flash", "2026-04-23T23:59:59Z", None),
        ("deepseek-v4-flash", "2026-04-24T00:00:00Z", ("0.028", "0.14", "0.28")),
        ("deepseek-v4-pro", "2026-04-24T02:00:00Z", ("0.145", "1.74", "3.48")),
        ("deepseek-v4-flash", "2026-04-26T12:14:59.999999Z", ("0.028", "0.14", "0.28")),
        ("deepseek-v4-flash", "2026-04-26T12:15:00Z", ("0.0028", "0.14", "0.28")),
        # Peak hours in two windows.
        ("deepseek-v4-pro", "2026-11-02T00:59:59Z", ("0.022", "0.66", "1.98")),
        ("deepseek-v4-pro", "2026-11-02T01:00:00Z", ("0.044", "1.32", "3.96")),
        ("deepseek-v4-pro", "2026-11-02T03:59:59Z", ("0.044", "1.32", "3.96")),
        ("deepseek-v4-pro", "2026-11-02T04:00:00Z", ("0.022", "0.66", "1.98")),
        ("deepseek-v4-pro", "2026-11-02T06:00:00Z", ("0.044", "1.32", "3.96")),
        ("deepseek-v4-pro", "2026-11-02T10:00:00Z", ("0.022", "0.66", "1.98")),
        # The same instant in Beijing's time.
        ("deepseek-v4-pro", "2026-11-02T14:30:00+08:00", ("0.044", "1.32", "3.96")),
        # Old line ends, new one begins, both with a window.
        ("deepseek-v4-flash", "2026-09-10T03:59:59Z", ("0.014", "0.44", "1.32")),
        ("deepseek-v4-flash", "2026-09-10T04:00:00Z", ("0.003", "0.15", "0.60")),
        ("deepseek-v4-flash", "2026-09-10T06:30:00Z", ("0.006", "0.30", "1.20")),
        # A night window that wraps midnight.
        ("deepseek-chat", "2025-03-01T16:29:59Z", ("0.07", "0.27", "1.10")),
        ("deepseek-chat", "2025-03-01T16:30:00Z", ("0.035", "0.135", "0.55")),
        ("deepseek-chat", "2025-03-02T00:00:00Z", ("0.035", "0.135", "0.55")),
        ("deepseek-chat", "2025-03-02T00:29:59Z", ("0.035", "0.135", "0.55")),
        ("deepseek-chat", "2025-03-02T00:30:00Z", ("0.07", "0.27", "1.10")),
        ("deepseek-chat", "2025-02-20T17:00:00Z", ("0.07", "0.27", "1.10")),
        ("deepseek-chat", "2025-09-05T16:30:00Z", ("0.07", "0.56", "1.68")),
        ("deepseek-chat", "2026-04-24T00:00:00Z", None),
        ("deepseek-v9", "2026-11-02T00:00:00Z", None),
    ],
)
def test_history_gives_the_price_of_the_instant(
    facts: PriceBook, model: str, instant: str, expected: tuple[str, str, str] | None
) -> None:
    assert prices(facts.find("deepseek", model, at(instant))) == expected


@has_facts
def test_provider_without_a_hit_price_has_none_not_zero(facts: PriceBook) -> None:
    assert prices(facts.find("azure", "deepseek-v4-pro", at("2026-11-02T00:00:00Z"))) == (None, "1.74", "3.48")


def test_window_alone_leaves_the_rest_of_the_day_without_price() -> None:
    book = book_of("p,m,2026-01-01T00:00:00Z,,22:00-24:00 00:30-01:00,USD,,1,2")
    assert book.lines[0].windows == ((1320, 1440), (30, 60))
    assert book.find("p", "m", at("2026-01-01T00:45:00Z")) is book.lines[0]
    assert book.find("p", "m", at("2026-01-01T23:59:59Z")) is book.lines[0]
    assert book.find("p", "m", at("2026-01-02T00:00:00Z")) is None
    assert book.find("p", "m", at("2026-01-01T12:00:00Z")) is None


def test_gap_between_intervals_has_no_price() -> None:
    book = book_of("p,m,2026-01-01T00:00:00Z,2026-02-01T00:00:00Z,,USD,,1,2", "p,m,2026-03-01T00:00:00Z,,,USD,,3,4")
    assert book.find("p", "m", at("2026-02-15T00:00:00Z")) is None
    assert book.find("p", "m", at("2026-03-15T00:00:00Z")) is book.lines[1]


def test_instant_without_time_zone_is_refused() -> None:
    with pytest.raises(ValueError, match="time zone"):
        book_of(LINE).find("p", "m", datetime(2026, 5, 1))


def test_columns_may_stand_in_any_order_with_others_among_them() -> None:
    book = book_of(
        '"a note, quoted",0.3,0.2,0.1,USD,,,2026-01-01T00:00:00Z,m,p', header="note," + ",".join(COLUMNS[::-1])
    )
    assert prices(book.find("p", "m", at("2026-05-01T00:00:00Z"))) == ("0.1", "0.2", "0.3")


def test_blank_lines_spaces_and_byte_order_mark_are_no_content() -> None:
    book = PriceBook.parse(f"\ufeff{HEADER}\r\n\r\n{LINE.replace(',', ' , ')}\r\n\r\n".encode(), "b.csv")
    assert [line.line_id for line in book.lines] == ["3"]
    assert (book.lines[0].provider, book.lines[0].currency) == ("p", "USD")


def test_line_number_is_where_the_record_begins() -> None:
    book = book_of(LINE + ',"two\nlines"', LINE.replace("p,", "q,", 1) + ",", header=HEADER + ",note")
    assert [line.line_id for line in book.lines] == ["2", "4"]


def test_version_follows_the_content() -> None:
    assert book_of(LINE).version.startswith("book.csv@")
    assert book_of(LINE).version == book_of(LINE).version != book_of(LINE + "1").version


def test_pickled_book_finds_the_same() -> None:
    book = book_of(LINE)
    copy = pickle.loads(pickle.dumps(book))
    assert copy == book
    assert copy.find("p", "m", at("2026-05-01T00:00:00Z")) == book.lines[0]


@pytest.mark.parametrize(
    ("column", "cell", "expected"),
    [
        ("cache_miss_per_mtok", "0.2.1", "a price per 1,000,000 tokens, not negative, such as 0.28"),
        ("cache_miss_per_mtok", "-0.2", "a price per 1,000,000 tokens, not negative"),
        ("cache_miss_per_mtok", "", "a price per 1,000,000 tokens"),
        ("output_per_mtok", "", "a price per 1,000,000 tokens"),
        ("output_per_mtok", "NaN", "a price per 1,000,000 tokens"),
        ("output_per_mtok", "Infinity", "a price per 1,000,000 tokens"),
        ("output_per_mtok", "1e3", "a price per 1,000,000 tokens"),
        ("output_per_mtok", "1_000", "a price per 1,000,000 tokens"),
        ("output_per_mtok", "\u0661", "a price per 1,000,000 tokens"),
        ("output_per_mtok", "$1", "a price per 1,000,000 tokens"),
        ("cache_hit_per_mtok", "0.0000001", "a price of at most 6 decimal places"),
        ("cache_hit_per_mtok", "1234567890123", "a price of at most 12 digits before the point"),
        ("effective_from_utc", "2026-13-01T00:00:00Z", "a UTC timestamp such as 2026-04-24T00:00:00Z"),
        ("effective_from_utc", "", "a UTC timestamp such as"),
        ("effective_from_utc", "2026-01-01T00:00:00", "a UTC timestamp such as 2026-04-24T00:00:00Z, with its Z"),
        ("effective_to_utc", "soon", "a UTC timestamp"),
        ("effective_to_utc", "2026-01-01T00:00:00Z", "an instant after 2026-01-01T00:00:00Z"),
        ("window_utc", "night", "windows such as 16:30-00:30, separated by blanks"),
        ("window_utc", "1:00-2:00", "windows such as"),
        ("window_utc", "01:00-02:60", "times from 00:00 to 24:00"),
        ("window_utc", "24:00-01:00", "times from 00:00 to 24:00"),
        ("window_utc", "01:00-24:01", "times from 00:00 to 24:00"),
        ("window_utc", "01:00-01:00", "windows that end at another time than they begin"),
        ("window_utc", "00:00-24:00", "windows that end at another time than they begin"),
        ("window_utc", "01:00-03:00 02:00-04:00", "windows that do not overlap"),
        ("window_utc", "23:00-02:00 01:00-03:00", "windows that do not overlap"),
        ("currency", "", "a code of three capital letters"),
        ("currency", "usd", "a code of three capital letters"),
        ("provider", "", "a name"),
        ("model", "", "a name"),
    ],
)
def test_wrong_cell_is_refused_with_file_line_column_expected_and_found(column: str, cell: str, expected: str) -> None:
    cells = LINE.split(",")
    cells[COLUMNS.index(column)] = cell
    message = refusal(LINE.replace("p,", "q,", 1), ",".join(cells))
    assert message.startswith(f"folder/book.csv: line 3, column {column}: expected {expected}")
    assert message.endswith(f"found {cell!r}" if cell else "found nothing")


def test_zeros_after_the_sixth_place_are_no_precision() -> None:
    assert book_of("p,m,2026-01-01T00:00:00Z,,,USD,0.10000000,0.2,0.3").lines[0].cache_hit == Decimal("0.1")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "book.csv: expected a header"),
        ("\n\n", "book.csv: expected a header"),
        (HEADER, "book.csv: expected at least one price line, found none"),
        (HEADER.replace("currency", "money"), "found none named currency"),
        (f"{HEADER},model\n{LINE},x", "line 1: expected each column once, found model again"),
        (f"{HEADER}\n{LINE},x", "line 2: expected 9 columns, found 10; quote a cell that holds a comma"),
        (f"{HEADER}\np,m", "line 2: expected 9 columns, found 2"),
        (f'{HEADER}\n{LINE}\n"p', "line 3: expected CSV, found: unexpected end of data"),
        (b"\xff", "expected CSV in UTF-8, found other bytes at byte 0"),
    ],
)
def test_file_that_is_no_price_book_is_refused(tmp_path: Path, content: str | bytes, message: str) -> None:
    path = tmp_path / "book.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(JobFileError) as caught:
        PriceBook.load(str(path))
    assert str(caught.value).startswith(str(path))
    assert message in str(caught.value)


@pytest.mark.parametrize("name", ["missing.csv", "."])
def test_file_that_cannot_be_read_is_refused_by_name(tmp_path: Path, name: str) -> None:
    with pytest.raises(JobFileError, match="cannot be read"):
        PriceBook.load(str(tmp_path / name))


SPRING = "2026-03-01T00:00:00Z,2026-06-01T00:00:00Z"


@pytest.mark.parametrize(
    ("first", "second", "instant"),
    [
        (f"{SPRING},", "2026-05-31T00:00:00Z,,", "2026-05-31T00:00:00Z"),
        ("2026-01-01T00:00:00Z,,", f"{SPRING},", "2026-03-01T00:00:00Z"),
        (f"{SPRING},01:00-04:00", "2026-05-01T00:00:00Z,,03:59-05:00", "2026-05-01T03:59:00Z"),
        (f"{SPRING},23:00-01:00", "2026-05-01T12:00:00Z,,00:30-02:00", "2026-05-02T00:30:00Z"),
        (f"{SPRING},00:00-01:00", "2026-05-31T23:59:30Z,,23:00-23:59 00:59-02:00", None),
        (f"{SPRING},", "2026-06-01T00:00:00Z,,", None),
        (f"{SPRING},", f"{SPRING},01:00-02:00", None),
        (f"{SPRING},01:00-02:00", f"{SPRING},02:00-03:00", None),
        (f"{SPRING},01:00-02:00", "2026-05-31T12:00:00Z,,01:00-02:00", None),
    ],
)
def test_two_lines_of_equal_rank_may_not_hold_at_once(first: str, second: str, instant: str | None) -> None:
    lines = f"p,m,{first},USD,,1,2", "q,m,2026-01-01T00:00:00Z,,,USD,,1,2", f"p,m,{second},USD,,1,2"
    if instant is None:
        assert len(book_of(*lines).lines) == 3
    else:
        assert refusal(*lines) == (
            "folder/book.csv: line 4, column effective_from_utc: expected one price of p m at any instant, "
            f"found another on line 2 that also holds at {instant}"
        )


windows = st.lists(st.integers(0, 47), min_size=2, max_size=6, unique=True).map(sorted)
drafts_of_lines = st.tuples(st.integers(0, 3), st.integers(1, 3), st.none() | windows)


@settings(deadline=None)
@given(
    st.integers(0, 4 * 1440), st.lists(st.tuples(st.integers(0, 3), st.integers(1, 3), st.none() | windows), max_size=6)
)
def test_find_agrees_with_looking_at_every_line(minutes: int, drafts: list[Any]) -> None:
    start = datetime(2026, 1, 1, tzinfo=UTC)
    lines: list[str] = [LINE.replace("p,", "q,", 1)]
    book = book_of(*lines)
    for day, num_days, halves in drafts:
        pairs = [] if halves is None else list(zip(halves[::2], halves[1::2], strict=False))
        window = " ".join(f"{a // 2:02}:{a % 2 * 30:02}-{b // 2:02}:{b % 2 * 30:02}" for a, b in pairs)
        begin, end = start + timedelta(days=day), start + timedelta(days=day + num_days)
        draft = f"p,m,{begin.isoformat()},{end.isoformat()},{window},USD,,{len(lines)},0"
        with contextlib.suppress(JobFileError):  # it would overlap a line of equal rank
            book = book_of(*lines, draft)
            lines.append(draft)
    instant = start + timedelta(minutes=minutes)
    minute = instant.hour * 60 + instant.minute
    holding = [
        line
        for line in book.lines
        if line.provider == "p"
        and line.effective_from <= instant
        and (line.effective_to is None or instant < line.effective_to)
        and (not line.windows or any(a <= minute < b for a, b in line.windows))
    ]
    expected = next((line for line in holding if line.windows), next(iter(holding), None))
    assert book.find("p", "m", instant) is expected
    assert book.find("p", "m", instant.astimezone(timezone(timedelta(hours=-7)))) is expected
