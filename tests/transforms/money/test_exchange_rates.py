from datetime import UTC, date, datetime
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moebeam.schemas.errors import JobFileError
from moebeam.transforms.money.exchange_rates import Converted, ExchangeRates

HEADER = "date,base,quote,rate,source\n"
RATES = ExchangeRates.parse(
    f"{HEADER}2026-08-01,USD,CNY,7.2,made up\n2026-09-01,USD,CNY,7.1,made up\n".encode(), "rates.csv"
)


def on(day: int, month: int = 8) -> datetime:
    return datetime(2026, month, day, 12, tzinfo=UTC)


def test_the_last_rate_before_an_instant_holds() -> None:
    assert RATES.convert(Decimal(10), "USD", "CNY", on(31)) == Converted(Decimal("72.000000000000"), date(2026, 8, 1))
    assert RATES.convert(Decimal(10), "USD", "CNY", on(1, 9)) == Converted(Decimal("71.000000000000"), date(2026, 9, 1))
    assert RATES.convert(Decimal(10), "USD", "CNY", on(31, 7)) is None


def test_a_rate_serves_both_directions_and_is_never_chained() -> None:
    found = RATES.convert(Decimal("7.2"), "CNY", "USD", on(2))
    assert found == Converted(Decimal("1.000000000000"), date(2026, 8, 1))
    assert RATES.convert(Decimal(1), "EUR", "CNY", on(2)) is None


@given(st.decimals(0, 10**9, places=12))
def test_the_same_currency_is_not_touched(amount: Decimal) -> None:
    assert RATES.convert(amount, "EUR", "EUR", on(2)) == Converted(amount, None)


@pytest.mark.parametrize(
    ("row", "part"),
    [
        ("1 August,USD,CNY,7.2,x", "column date: expected a day"),
        ("2026-08-01,usd,CNY,7.2,x", "column base: expected a code"),
        ("2026-08-01,USD,USD,1,x", "column quote: expected another currency"),
        ("2026-08-01,USD,CNY,0,x", "column rate: expected a positive number"),
        ("2026-08-01,USD,CNY,-7,x", "column rate: expected a positive number"),
        ("2026-08-01,USD,CNY,7.2,", "column source: expected where"),
        ("2026-08-01,USD,CNY,7.2,x\n2026-08-01,USD,CNY,7.3,x", "line 3: expected one rate of USD in CNY"),
    ],
)
def test_a_wrong_line_is_told(row: str, part: str) -> None:
    with pytest.raises(JobFileError, match=part):
        ExchangeRates.parse(f"{HEADER}{row}\n".encode(), "rates.csv")


def test_a_missing_column_is_told() -> None:
    with pytest.raises(JobFileError, match="none named source"):
        ExchangeRates.parse(b"date,base,quote,rate\n", "rates.csv")
