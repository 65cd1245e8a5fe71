from datetime import datetime

from moebeam.transforms.money.price_book import PriceBook
from moebeam.transforms.money.price_file import COLUMNS
from moebeam.transforms.money.price_review import Finding, diff, list_changed_fields, prices_at, review

HEADER = ",".join((*COLUMNS, "days", "mode"))
NOW = datetime.fromisoformat("2026-11-24T00:00:00Z")


def book_of(*lines: str) -> PriceBook:
    holidays = b"calendar,date,source\nCN,2026-10-01,notice\n"
    return PriceBook.parse("\n".join([HEADER, *lines]).encode(), "book.csv", holidays)


def line(start: str, end: str = "", *, window: str = "", days: str = "", miss: str = "0.2", mode: str = "") -> str:
    ends = f"{end}T00:00:00Z" if end else ""
    return f"p,m,{start}T00:00:00Z,{ends},{window},USD,0.1,{miss},0.4,{days},{mode}"


def found(*lines: str) -> list[Finding]:
    return list(review(book_of(*lines), NOW))


def test_a_book_without_holes_has_no_findings() -> None:
    assert found(line("2026-01-01", "2026-02-01"), line("2026-02-01"), line("2026-01-01", window="01:00-04:00")) == []


def test_an_interval_without_a_price_is_a_gap() -> None:
    (gap,) = found(line("2026-01-01", "2026-02-01"), line("2026-03-01"))
    assert (gap.kind, gap.message) == (
        "gap",
        "no online price from 2026-02-01T00:00:00Z to 2026-03-01T00:00:00Z",
    )


def test_hours_and_days_without_a_price_are_gaps() -> None:
    (hours,) = found(line("2026-01-01", window="00:00-04:00"))
    assert hours.message == "no online price outside windows and days, such as 2026-01-01T04:00:00Z"
    (days,) = found(line("2026-01-01", days="mon-fri"))
    assert days.message == "no online price outside windows and days, such as 2026-01-03T00:00:00Z"
    assert found(line("2026-01-01", days="mon-fri"), line("2026-01-01", days="sat-sun")) == []


def test_batch_prices_do_not_fill_a_gap_of_online_ones() -> None:
    (gap,) = found(line("2026-01-01", "2026-02-01"), line("2026-03-01"), line("2026-01-01", mode="batch"))
    assert gap.message.startswith("no online price from 2026-02-01")


def test_prices_that_ended_or_have_not_begun_are_told() -> None:
    assert [finding.kind for finding in found(line("2026-01-01", "2026-02-01"))] == ["ended"]
    assert [finding.kind for finding in found(line("2027-01-01"))] == ["not_yet"]


def test_a_calendar_that_runs_out_is_told() -> None:
    days = "mon-fri +08:00 except CN"
    kinds = [finding.kind for finding in found(line("2026-01-01"), line("2026-01-01", days=days))]
    assert kinds == ["calendar_ends"]
    assert found(line("2026-01-01"), line("2026-01-01", "2026-12-01", days=days)) == []


def test_the_prices_of_an_instant_are_those_that_decide() -> None:
    book = book_of(
        line("2026-01-01"),
        line("2026-01-01", window="01:00-04:00"),
        line("2026-01-01", mode="batch"),
        line("2025-01-01", "2026-01-01"),
    )
    ids = {
        instant: [found.line_id for found in prices_at(book, datetime.fromisoformat(instant))]
        for instant in ("2026-11-24T00:59:59Z", "2026-11-24T01:00:00Z", "2025-06-01T00:00:00Z")
    }
    assert ids == {
        "2026-11-24T00:59:59Z": ["2", "4"],
        "2026-11-24T01:00:00Z": ["3", "4"],
        "2025-06-01T00:00:00Z": ["5"],
    }


def test_a_diff_names_what_changed_wherever_lines_stand() -> None:
    before = book_of(line("2026-01-01", "2026-02-01"), line("2026-02-01"), line("2026-02-01", mode="batch"))
    after = book_of(
        line("2026-02-01", miss="0.3"), line("2026-01-01", "2026-02-01"), line("2026-02-01", window="01:00-04:00")
    )
    changes = {change.kind: change for change in diff(before, after)}
    assert set(changes) == {"added", "removed", "changed"}
    assert changes["added"].line.windows == ((60, 240),)
    assert changes["removed"].line.mode == "batch"
    assert list_changed_fields(changes["changed"]) == ["cache_miss"]
    assert diff(before, before) == []
