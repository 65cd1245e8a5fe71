"""`moebeam prices`, and the cross-check against a price list that others keep."""

import importlib.util
import json
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moebeam.jobs.commands.cli import run_command
from moebeam.jobs.prices.shipped import SHIPPED_BOOK
from moebeam.jobs.reports.price_cross_check import TOLERANCE, cost_elsewhere, cross_check
from moebeam.schemas.records import Usage
from moebeam.transforms.money.account import charge
from moebeam.transforms.money.price_book import PriceBook
from moebeam.transforms.money.price_file import COLUMNS

HEADER = ",".join(COLUMNS)
WEEKDAY = datetime(2026, 11, 24, tzinfo=UTC)
BOUNDARIES = [0, 59, 60, 239, 240, 359, 360, 599, 600, 1439]

has_genai_prices = pytest.mark.skipif(
    importlib.util.find_spec("genai_prices") is None, reason="genai-prices is not installed"
)
BOOK = PriceBook.load(str(SHIPPED_BOOK))


def answer(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, dict[str, Any]]:
    code = run_command(["prices", *args, "--json"])
    return code, json.loads(capsys.readouterr().out)


@has_genai_prices
@given(
    model=st.sampled_from(["deepseek-v4-flash", "deepseek-v4-pro", "deepseek-flash"]),
    prompt=st.integers(0, 2_000_000),
    cached_share=st.floats(0, 1),
    output=st.integers(0, 400_000),
    day=st.integers(0, 2),
    minute=st.one_of(st.integers(0, 1439), st.sampled_from(BOUNDARIES)),
    second=st.sampled_from([0, 1, 59]),
)
def test_costs_equal_those_of_genai_prices(
    model: str, prompt: int, cached_share: float, output: int, day: int, minute: int, second: int
) -> None:
    instant = WEEKDAY + timedelta(days=day, minutes=minute, seconds=second)
    usage = Usage(prompt_tokens=prompt, completion_tokens=output, cached_tokens=int(prompt * cached_share))
    line = BOOK.find("deepseek", model, instant)
    assert line is not None
    ours, theirs = charge(usage, line).cost, cost_elsewhere(usage, "deepseek", model, instant)
    assert abs(ours - theirs) <= TOLERANCE


@has_genai_prices
def test_the_cross_check_finds_a_wrong_price() -> None:
    line = "deepseek,deepseek-v4-pro,2026-08-16T16:00:00Z,,,USD,0.022,0.66,1.99"
    book = PriceBook.parse(f"{HEADER}\n{line}\nhere,other,2026-01-01T00:00:00Z,,,USD,,1,1\n".encode(), "b.csv")
    found = cross_check(book, WEEKDAY)
    assert {(difference.token_class, difference.ours) for difference in found.differences} >= {
        ("output", Decimal("1.99"))
    }
    assert found.unknown == (("here", "other"),)


@has_genai_prices
def test_the_shipped_prices_of_deepseek_pass_the_cross_check(capsys: pytest.CaptureFixture[str]) -> None:
    _, found = answer(capsys, "check", "--against", "genai-prices", "--at", "2026-11-24T00:00:00Z")
    assert found["against"]["num_compared"] > 1000
    assert [row for row in found["against"]["differences"] if row["provider"] == "deepseek"] == []


def test_list_shows_the_prices_of_an_instant(capsys: pytest.CaptureFixture[str]) -> None:
    code, found = answer(
        capsys, "list", "--provider", "deepseek", "--model", "deepseek-v4-pro", "--at", "2026-11-24T09:30:00+08:00"
    )
    assert code == 0
    (row,) = found["prices"]
    assert (row["cache_hit_per_mtok"], row["cache_miss_per_mtok"], row["output_per_mtok"]) == ("0.044", "1.32", "3.96")
    assert row["when"] == "01:00-04:00 06:00-10:00 mon-fri +08:00 except CN"
    assert row["evidence"] == "official"


def test_list_for_people_goes_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(["prices", "list", "--model", "deepseek-v4-pro", "--provider", "deepseek"]) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "deepseek-v4-pro" in captured.err


@pytest.mark.parametrize(
    ("args", "part"),
    [
        (["list", "--at", "2026-11-24T00:00:00"], "--at: expected a time with its zone"),
        (["list", "--provider", "nobody"], "expected a price that holds at"),
        (["list", "nowhere.csv"], "nowhere.csv: the price book cannot be read"),
    ],
)
def test_a_wrong_question_says_why(capsys: pytest.CaptureFixture[str], args: list[str], part: str) -> None:
    code, found = answer(capsys, *args)
    assert code == 2
    assert part in found["error"]


def test_check_refuses_overlaps_and_shows_gaps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = "p,m,2026-01-01T00:00:00Z,2026-02-01T00:00:00Z,,USD,,1,1"
    book = tmp_path / "book.csv"
    book.write_text(f"{HEADER}\n{first}\np,m,2026-03-01T00:00:00Z,,,USD,,1,1\n")
    code, found = answer(capsys, "check", str(book))
    assert code == 0
    assert [finding["kind"] for finding in found["findings"]] == ["gap"]
    book.write_text(f"{HEADER}\n{first}\np,m,2026-01-31T00:00:00Z,,,USD,,1,1\n")
    code, found = answer(capsys, "check", str(book))
    assert code == 2
    assert "line 3, column effective_from_utc: expected one price of p m at any instant" in found["error"]


def test_diff_tells_a_changed_price(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, new = tmp_path / "old.csv", tmp_path / "new.csv"
    old.write_text(f"{HEADER}\np,m,2026-01-01T00:00:00Z,,,USD,,1,1\n")
    new.write_text(f"{HEADER}\np,m,2026-01-01T00:00:00Z,,,USD,0.5,1,1\n")
    _, found = answer(capsys, "diff", str(old), str(new))
    (change,) = found["changes"]
    assert (change["kind"], change["fields"]) == ("changed", ["cache_hit"])
    assert change["before"]["cache_hit_per_mtok"] is None
    assert change["after"]["cache_hit_per_mtok"] == "0.5"


def test_the_shipped_book_has_a_word_and_providers_have_all_their_names(capsys: pytest.CaptureFixture[str]) -> None:
    args = ("--at", "2026-11-24T02:00:00Z")
    found = answer(capsys, "list", "builtin", "--provider", "alibaba-bailian", *args)
    assert found == answer(capsys, "list", "--provider", "alibaba", *args)
    assert {line["provider"] for line in found[1]["prices"]} == {"alibaba"}
    assert answer(capsys, "check", "builtin", *args) == answer(capsys, "check", *args)
    assert answer(capsys, "diff", "builtin", str(SHIPPED_BOOK))[1]["changes"] == []
    code, told = answer(capsys, "list", "--provider", "volcanoo", *args)
    assert code == 2
    assert "did you mean 'volcano'?" in json.dumps(told)


def test_prices_of_a_tier_are_shown_with_their_mode(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    book = tmp_path / "prices.csv"
    book.write_text(f"{HEADER},mode\np,m,2020-01-01T00:00:00Z,,,USD,1,2,4,flex\n")
    _, found = answer(capsys, "list", str(book))
    assert [line["mode"] for line in found["prices"]] == ["flex"]
    assert run_command(["prices", "list", str(book)]) == 0
    assert "flex" in capsys.readouterr().err
