"""Days, holidays, tiers, batch mode and TOML of price books, and the shipped book."""

import pickle
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from moebeam.jobs.prices.shipped import SHIPPED_BOOK
from moebeam.schemas.errors import JobFileError
from moebeam.schemas.prices import DayRule
from moebeam.transforms.money.price_book import PriceBook
from moebeam.transforms.money.price_calendar import format_day_rule, is_on_days, parse_day_rule, parse_holidays
from moebeam.transforms.money.price_file import COLUMNS

HEADER = ",".join((*COLUMNS, "days", "mode", "prompt_tokens", "batch_percent"))
HOLIDAYS = b"calendar,date,source\nCN,2026-10-01,notice\n"


def book_of(*lines: str, holidays: bytes | None = HOLIDAYS) -> PriceBook:
    return PriceBook.parse("\n".join([HEADER, *lines]).encode(), "folder/book.csv", holidays)


def line(*, prices: str = "0.1,0.2,0.4", window: str = "", rest: str = ",,,") -> str:
    return f"p,m,2026-01-01T00:00:00Z,,{window},USD,{prices},{rest}"


def at(text: str) -> datetime:
    return datetime.fromisoformat(text)


@pytest.fixture(scope="module")
def shipped() -> PriceBook:
    return PriceBook.load(str(SHIPPED_BOOK))


@pytest.mark.parametrize(
    ("instant", "is_peak"),
    [
        ("2026-08-22T15:59:59Z", False),  # 23:59 in Beijing, outside the hours anyway
        ("2026-08-21T02:00:00Z", True),  # Friday
        ("2026-08-22T02:00:00Z", True),  # Saturday, the day before the rule
        ("2026-08-23T02:00:00Z", False),  # Sunday
        ("2026-08-29T02:00:00Z", False),  # Saturday
        ("2026-08-30T16:30:00Z", False),  # Monday in Beijing, outside the hours
        ("2026-08-31T00:59:59.999999Z", False),
        ("2026-08-31T01:00:00Z", True),  # Monday
        ("2026-08-31T03:59:59.999999Z", True),
        ("2026-08-31T04:00:00Z", False),
        ("2026-09-25T02:00:00Z", False),  # Mid-Autumn Festival, a Friday
        ("2026-09-20T02:00:00Z", False),  # a Sunday on which people work: weekends are wholly off-peak
        ("2026-09-30T09:59:59Z", True),
        ("2026-10-01T02:00:00Z", False),
        ("2026-10-07T06:00:00Z", False),
        ("2026-10-08T06:00:00Z", True),
    ],
)
@pytest.mark.parametrize("model", ["deepseek-v4-flash", "deepseek-v4-pro"])
def test_beijing_weekends_and_holidays_are_off_peak(
    shipped: PriceBook, model: str, instant: str, is_peak: bool
) -> None:
    found = shipped.find("deepseek", model, at(instant))
    assert found is not None
    assert bool(found.windows) is is_peak


@pytest.mark.parametrize(
    ("model", "hit", "miss", "output"),
    [("deepseek-v4-flash", "0.028", "0.14", "0.28"), ("deepseek-v4-pro", "0.145", "1.74", "3.48")],
)
def test_the_prices_of_24_april_2026_reproduce(
    shipped: PriceBook, model: str, hit: str, miss: str, output: str
) -> None:
    for instant in ("2026-04-24T00:00:00Z", "2026-04-24T03:00:00Z", "2026-04-26T12:14:59Z"):
        found = shipped.find("deepseek", model, at(instant))
        assert found is not None
        assert (str(found.cache_hit), str(found.cache_miss), str(found.output)) == (hit, miss, output)


def test_the_day_of_a_rule_is_that_of_its_place() -> None:
    rule = DayRule(frozenset(range(5)), 480)
    assert not is_on_days(rule, at("2026-11-22T15:59:59Z"), {})  # Sunday 23:59 in Beijing
    assert is_on_days(rule, at("2026-11-22T16:00:00Z"), {})  # Monday 00:00
    assert is_on_days(rule, at("2026-11-27T15:59:59Z"), {})  # Friday 23:59
    assert not is_on_days(rule, at("2026-11-27T16:00:00Z"), {})


def test_a_holiday_of_another_calendar_changes_nothing() -> None:
    rule = DayRule(frozenset(range(7)), 0, "CN")
    day = date(2026, 10, 1)
    assert not is_on_days(rule, at("2026-10-01T12:00:00Z"), {"CN": frozenset([day])})
    assert is_on_days(rule, at("2026-10-01T12:00:00Z"), {"DE": frozenset([day])})


@given(
    first=st.integers(0, 6),
    length=st.integers(1, 6),
    minutes=st.integers(-14 * 60, 14 * 60),
    calendar=st.sampled_from(["", "CN", "my-days"]),
)
def test_a_rule_of_days_reads_as_it_is_spelled(first: int, length: int, minutes: int, calendar: str) -> None:
    rule = DayRule(frozenset((first + step) % 7 for step in range(length)), minutes, calendar)
    assert parse_day_rule(format_day_rule(rule)) == rule


@pytest.mark.parametrize("text", ["monday", "mon-", "mon-fri +8", "mon-fri +15:00", "except CN", "mon-fri except"])
def test_days_that_cannot_be_read_are_refused(text: str) -> None:
    assert parse_day_rule(text) is None
    with pytest.raises(JobFileError, match=r"book.csv: line 2, column days: expected days such as"):
        book_of(line(rest=f"{text},,,"))


def test_a_calendar_without_days_is_refused() -> None:
    for holidays in (None, b"calendar,date,source\nDE,2026-10-03,law\n"):
        with pytest.raises(JobFileError, match=r"line 2, column days: .* found 'CN', of which it has no day"):
            book_of(line(rest="mon-fri +08:00 except CN,,,"), holidays=holidays)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"calendar,date\nCN,2026-10-01\n", "none named source"),
        (b"calendar,date,source\nCN,1 October,notice\n", "line 2, column date: expected a day"),
        (b"calendar,date,source\nCN,2026-10-01,\n", "line 2, column source: expected a value"),
        (b"\xff", "expected CSV in UTF-8"),
    ],
)
def test_a_wrong_file_of_holidays_is_told(content: bytes, part: str) -> None:
    with pytest.raises(JobFileError, match=part):
        parse_holidays(content, "holidays.csv")


def test_holidays_are_part_of_the_version_only_where_they_matter() -> None:
    plain, days = line(), line(rest="mon-fri +08:00 except CN,,,")
    more = HOLIDAYS + b"CN,2026-10-02,notice\n"
    assert book_of(plain).version == book_of(plain, holidays=more).version
    assert book_of(days).version != book_of(days, holidays=more).version


def test_lines_of_different_days_do_not_overlap_but_of_one_they_do() -> None:
    week, end = line(rest="mon-fri,,,"), line(rest="sat-sun,,,")
    book_of(week, end)
    with pytest.raises(JobFileError, match=r"found another on line 2 that also holds at 2026-01-02T00:00:00Z"):
        book_of(week, line(rest="fri-sat,,,"))
    # Saturday in Beijing begins on Friday at 16:00 UTC.
    with pytest.raises(JobFileError, match=r"also holds at 2026-01-02T16:00:00Z"):
        book_of(week, line(rest="sat-sun +08:00,,,"))


@example(num_tokens=128_000)
@example(num_tokens=128_001)
@example(num_tokens=200_000)
@example(num_tokens=200_001)
@given(num_tokens=st.integers(0, 300_000))
def test_the_length_of_the_prompt_decides_between_tiers(num_tokens: int) -> None:
    book = book_of(
        line(rest=",,0-128000,"),
        line(prices="0.2,0.4,0.8", rest=",,128001-200000,"),
        line(prices="0.3,0.6,1.2", rest=",,200001-,"),
    )
    found = book.find("p", "m", at("2026-06-01T00:00:00Z"), prompt_tokens=num_tokens)
    assert found is not None
    assert found.line_id == ("2" if num_tokens <= 128_000 else "3" if num_tokens <= 200_000 else "4")


def test_tiers_that_overlap_are_refused() -> None:
    with pytest.raises(JobFileError, match="found another on line 2"):
        book_of(line(rest=",,0-128000,"), line(rest=",,128000-,"))


def test_batch_prices_hold_for_batches_alone() -> None:
    book = book_of(line(rest=",,,50"))
    now = at("2026-06-01T00:00:00Z")
    online, batch = book.find("p", "m", now), book.find("p", "m", now, mode="batch")
    assert online is not None
    assert batch is not None
    assert (online.line_id, online.cache_miss) == ("2", Decimal("0.2"))
    assert (batch.line_id, batch.cache_hit, batch.cache_miss, batch.output) == (
        "2/batch",
        Decimal("0.05"),
        Decimal("0.1"),
        Decimal("0.2"),
    )
    assert book_of(line()).find("p", "m", now, mode="batch") is None
    with pytest.raises(JobFileError, match="found another on line 2/batch"):
        book_of(line(rest=",,,50"), line(rest=",batch,,"))


def test_each_mode_has_prices_of_its_own() -> None:
    flex, priority = line(prices="0.05,0.1,0.2", rest=",flex,,"), line(prices="0.2,0.4,0.8", rest=",priority,,")
    book = book_of(line(), flex, priority)
    now = at("2026-06-01T00:00:00Z")
    found = [book.find("p", "m", now, mode=mode) for mode in ("online", "flex", "priority", "batch")]
    assert [line and line.line_id for line in found] == ["2", "3", "4", None]
    assert book_of(line()).find("p", "m", now, mode="flex") is None


def test_a_provider_is_found_by_any_of_its_names() -> None:
    book = book_of(line().replace("p,m,", "alibaba-bailian,m,", 1), line().replace("p,m,", "volcano,m,", 1))
    now = at("2026-06-01T00:00:00Z")
    for name, first in (("alibaba", "alibaba"), ("alibaba-bailian", "alibaba"), ("volcengine-ark", "volcano")):
        found = book.find(name, "m", now)
        assert found is not None
        assert found.provider == first
        assert book.edges(name, "m")
    with pytest.raises(JobFileError, match="expected one price of alibaba m"):
        book_of(line().replace("p,m,", "alibaba-bailian,m,", 1), line().replace("p,m,", "alibaba,m,", 1))


@pytest.mark.parametrize(
    ("given_line", "part"),
    [
        (line(rest=",,,101"), "a percentage from 0 to 100"),
        (line(rest=",batch,,50"), "nothing on a line that is itself of mode batch"),
        (line(prices="0.000001,1,1", rest=",,,50"), "a share that gives prices of at most 6 decimal places"),
        (line(rest=",flex,,50"), "nothing on a line that is itself of mode flex"),
        (line(rest=",fast,,"), "one of online, batch, flex, priority, found 'fast'"),
        (line(rest=",,5-4,"), "an upper end of at least 5"),
        (line(rest=",,4,"), "prompt lengths such as"),
    ],
)
def test_wrong_modes_shares_and_tiers_are_refused(given_line: str, part: str) -> None:
    with pytest.raises(JobFileError, match=part):
        book_of(given_line)


def test_a_toml_book_says_what_its_csv_twin_says() -> None:
    toml = b"""
    [[price]]
    provider = "p"
    model = "m"
    effective_from_utc = 2026-01-01T00:00:00Z
    currency = "USD"
    cache_hit_per_mtok = 0.10
    cache_miss_per_mtok = "0.2"
    output_per_mtok = 4
    window_utc = "01:00-04:00"
    days = "mon-fri +08:00 except CN"
    """
    book = PriceBook.parse(toml, "folder/book.toml", HOLIDAYS)
    (found,) = book.lines
    assert (str(found.cache_hit), str(found.cache_miss), str(found.output)) == ("0.10", "0.2", "4")
    assert book.find("p", "m", at("2026-10-02T02:00:00Z")) == found
    assert book.find("p", "m", at("2026-10-01T02:00:00Z")) is None
    assert pickle.loads(pickle.dumps(book)) == book


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"price = 1", r"expected \[\[price\]\] tables"),
        (b"[[price]]\nprovider = true", "price 1, key provider: expected text"),
        (b"[[price]]\nprovider = 'p'", "price 1, column effective_from_utc: expected a UTC timestamp .* nothing"),
        (b"[[price", "expected TOML in UTF-8"),
    ],
)
def test_a_wrong_toml_book_is_told(content: bytes, part: str) -> None:
    with pytest.raises(JobFileError, match=part):
        PriceBook.parse(content, "book.toml")


@given(minutes=st.integers(0, 60 * 24 * 400))
def test_at_any_instant_the_line_that_is_found_holds(minutes: int) -> None:
    book = PriceBook.load(str(SHIPPED_BOOK))
    instant = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(minutes=minutes)
    found = book.find("deepseek", "deepseek-v4-pro", instant)
    if found is None:
        assert instant < at("2026-04-24T00:00:00Z")
        return
    assert found.effective_from <= instant
    assert found.effective_to is None or instant < found.effective_to
    if found.days is not None:
        beijing = instant + timedelta(hours=8)
        assert beijing.weekday() < 5
        assert beijing.date() not in book.holidays["CN"]
