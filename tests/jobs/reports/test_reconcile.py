"""A ledger against a bill: what matches, what is missing, what differs, and where a bill is wrong."""

from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from moebeam.jobs.reports.reconcile import (
    Billed,
    Tolerance,
    add_up_ledger,
    comparison_table,
    parse_columns,
    read_bill,
    reconcile,
)
from moebeam.schemas.errors import JobFileError
from moebeam.schemas.tables import LEDGER_SCHEMA

KEY = ("2026-11-23", "m", "USD")


def ledger(*lines: dict[str, Any]) -> pa.Table:
    default = {
        "provider": "p",
        "model": "m",
        "started_at": datetime(2026, 11, 23, 20, tzinfo=UTC),
        "currency": "USD",
        "cost": Decimal("0.5"),
        "cache_hit_tokens": 1,
        "cache_miss_tokens": 2,
        "visible_output_tokens": 3,
        "reasoning_tokens": 4,
    }
    return pa.Table.from_pylist([{**default, **line} for line in lines], schema=LEDGER_SCHEMA)


def bill(tmp_path: Path, text: str, columns: str | None = None, currency: str | None = None) -> dict[Any, Billed]:
    path = tmp_path / "invoice.csv"
    path.write_text(text)
    return read_bill(str(path), parse_columns(columns), currency)


def test_days_and_models_are_matched_missing_or_different(tmp_path: Path) -> None:
    ours, unpriced = add_up_ledger(
        [ledger({}, {}, {"model": "n"}, {"model": "o"}, {"currency": None, "cost": None})], utc_offset=timedelta(0)
    )
    theirs = bill(
        tmp_path,
        "day,model,amount,currency\n2026-11-23,m,1.0,USD\n2026-11-23,n,0.51,USD\n2026-11-24,m,7,USD\n",
    )
    found = reconcile(ours, theirs, Tolerance())
    assert [(one.key[1], one.verdict, one.difference) for one in found] == [
        ("m", "matched", Decimal(0)),
        ("n", "different", Decimal("0.01")),
        ("o", "missing in the bill", Decimal("-0.5")),
        ("m", "missing in the ledger", Decimal(7)),
    ]
    table = comparison_table(found, unpriced)
    assert len(table.rows) == 4
    assert table.note == "1 lines of the ledger have no price and are not compared."


@pytest.mark.parametrize(
    ("tolerance", "verdict"),
    [
        (Tolerance(), "different"),
        (Tolerance(amount=Decimal("0.009")), "different"),
        (Tolerance(amount=Decimal("0.01")), "matched"),
        (Tolerance(percent=Decimal("1.9")), "different"),
        (Tolerance(percent=Decimal(2)), "matched"),
    ],
)
def test_tolerances_reach_to_their_edge_and_not_beyond(tolerance: Tolerance, verdict: str) -> None:
    (found,) = reconcile({KEY: Billed(Decimal("0.50"))}, {KEY: Billed(Decimal("0.51"))}, tolerance)
    assert found.verdict == verdict


def test_tokens_are_compared_where_both_sides_tell_them(tmp_path: Path) -> None:
    theirs = bill(
        tmp_path,
        "day,model,amount,currency,cache_hit_tokens,output_tokens\n2026-11-23,m,0.5,USD,1,8\n",
    )
    (known,) = reconcile(add_up_ledger([ledger({})], utc_offset=timedelta(0))[0], theirs, Tolerance())
    assert (known.verdict, known.tokens) == ("different", ("output_tokens",))
    unknown = add_up_ledger([ledger({"cache_hit_tokens": None, "reasoning_tokens": 5})], utc_offset=timedelta(0))[0]
    assert reconcile(unknown, theirs, Tolerance())[0].verdict == "matched"


def test_the_bill_counts_days_where_its_provider_does() -> None:
    beijing, _ = add_up_ledger([ledger({})], utc_offset=timedelta(hours=8))
    assert list(beijing) == [("2026-11-24", "m", "USD")]


def test_lines_of_one_day_and_model_are_added_up_under_the_bills_own_names(tmp_path: Path) -> None:
    text = "\ufeffDate,Model,Cost\n2026-11-23T01:00:00Z,m,0.1\n\n2026-11-23T02:00:00Z,m,0.2\n"
    found = bill(tmp_path, text, "day=Date,model=Model,amount=Cost", "USD")
    assert found[KEY].amount == Decimal("0.3")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("day,model\n", r"invoice\.csv: line 1: expected the columns amount"),
        ("day,model,amount\n", r"line 1: expected the columns currency"),
        (
            "day,model,amount,currency\n23.11.2026,m,1,USD\n",
            r"line 2, column day: expected a day .* found '23\.11\.2026'",
        ),
        ("day,model,amount,currency\n2026-11-23,,1,USD\n", "line 2, column model: expected a model, found nothing"),
        ('day,model,amount,currency\n2026-11-23,m,"1,5",USD\n', "line 2, column amount: .* found '1,5'"),
        ("day,model,amount,currency\n2026-11-23,m,NaN,USD\n", "line 2, column amount"),
        ("day,model,amount,currency\n2026-11-23,m,1,\n", "line 2, column currency"),
        (
            "day,model,amount,currency,output_tokens\n2026-11-23,m,1,USD,1.5\n",
            "line 2, column output_tokens: expected a whole number",
        ),
    ],
)
def test_a_wrong_bill_is_named_by_line_and_column(text: str, expected: str, tmp_path: Path) -> None:
    with pytest.raises(JobFileError, match=expected):
        bill(tmp_path, text)


def test_an_unknown_column_of_ours_is_refused() -> None:
    with pytest.raises(JobFileError, match=r"--columns: expected one of day, .*, found 'price=Cost'"):
        parse_columns("price=Cost")
