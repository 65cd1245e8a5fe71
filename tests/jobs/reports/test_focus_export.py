"""FOCUS rows: the specification's columns, and quantity times price is cost, to the last place."""

import json
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from moebeam.jobs.console.report_table import format_csv
from moebeam.jobs.reports.focus_export import SCHEMA, focus_report_table, focus_table
from moebeam.schemas.tables import LEDGER_SCHEMA

MANDATORY = {
    *("BilledCost", "BillingAccountId", "BillingAccountName", "BillingCurrency", "BillingPeriodEnd"),
    *("BillingPeriodStart", "ChargeCategory", "ChargeClass", "ChargeDescription", "ChargePeriodEnd"),
    *("ChargePeriodStart", "ContractedCost", "EffectiveCost", "InvoiceIssuerName", "ListCost", "PricingQuantity"),
    *("PricingUnit", "ProviderName", "PublisherName", "ServiceCategory", "ServiceName"),
}
"""Of version 1.2."""

HIT, MISS, OUTPUT = Decimal("0.028"), Decimal("0.14"), Decimal("0.28")


def line(hits: int | None, misses: int, visible: int, reasoning: int, **values: Any) -> dict[str, Any]:
    amounts = {
        "cache_hit_cost": (hits or 0) * HIT / 1_000_000,
        "cache_miss_cost": misses * MISS / 1_000_000,
        "visible_output_cost": visible * OUTPUT / 1_000_000,
        "reasoning_cost": reasoning * OUTPUT / 1_000_000,
    }
    return {
        "provider": "p",
        "model": "m",
        "tenant": "t",
        "run_id": "r",
        "started_at": datetime(2026, 12, 31, 23, tzinfo=UTC),
        "cache_hit_tokens": hits,
        "cache_miss_tokens": misses,
        "visible_output_tokens": visible,
        "reasoning_tokens": reasoning,
        "cache_hit_price": HIT,
        "cache_miss_price": MISS,
        "output_price": OUTPUT,
        **amounts,
        "cost": sum(amounts.values()),
        "currency": "USD",
        "cost_basis": "exact",
        "price_book": "b@1",
        "price_line": "2",
        **values,
    }


def ledger(*lines: dict[str, Any]) -> pa.Table:
    return pa.Table.from_pylist(list(lines), schema=LEDGER_SCHEMA)


TOKENS = st.integers(0, 10**9)


@given(
    st.lists(st.tuples(st.one_of(st.none(), TOKENS), TOKENS, TOKENS, TOKENS, st.sampled_from(["a", "b"])), max_size=15)
)
def test_every_row_is_quantity_times_price_and_all_rows_are_the_ledger(rows: list[Any]) -> None:
    lines = [line(*counts, tenant=tenant) for *counts, tenant in rows]
    table, unpriced = focus_table([ledger(*lines)], "run r")
    assert unpriced == 0
    found = table.to_pylist()
    for row in found:
        for cost, price in (("ListCost", "ListUnitPrice"), ("ContractedCost", "ContractedUnitPrice")):
            assert row[cost] == row["PricingQuantity"] * row[price]
        assert row["ConsumedQuantity"] == row["PricingQuantity"] * 1_000_000
        assert row["BilledCost"] == row["EffectiveCost"] == row["ListCost"]
    assert sum(row["BilledCost"] for row in found) == sum(made["cost"] for made in lines)


def test_the_mandatory_columns_are_there_and_ours_come_last() -> None:
    names = SCHEMA.names
    assert set(names) >= MANDATORY
    ours = [name for name in names if name.startswith("x_")]
    assert names[-len(ours) :] == ours
    nullable = {"ChargeClass", "PricingQuantity", "PricingUnit", "BillingAccountName"}
    table, _ = focus_table([ledger(line(1, 2, 3, 4))], "run r")
    for name in MANDATORY - nullable:
        assert table.column(name).null_count == 0, name
    assert set(table.column("ServiceCategory").to_pylist()) == {"AI and Machine Learning"}


def test_columns_that_version_1_2_asks_of_providers_with_price_lists_and_invoices_are_there() -> None:
    # `focus-validator` 2.2.1 found these two missing.
    table, _ = focus_table([ledger(line(1, 2, 3, 4))], "run r")
    details = [json.loads(text) for text in table.column("SkuPriceDetails").to_pylist()]
    assert [found["x_TokenClass"] for found in details] == table.column("x_TokenClass").to_pylist()
    assert all(name.startswith("x_") for found in details for name in found), "keys of our own"
    assert table.column("InvoiceId").null_count == table.num_rows, "a run knows of no invoice"


def test_a_charge_lies_in_its_day_and_month_in_utc() -> None:
    table, _ = focus_table([ledger(line(0, 2, 0, 0))], "run r")
    (row,) = table.to_pylist()
    assert row["ChargePeriodStart"] == datetime(2026, 12, 31, tzinfo=UTC)
    assert row["ChargePeriodEnd"] - row["ChargePeriodStart"] == timedelta(days=1)
    assert (row["BillingPeriodStart"].month, row["BillingPeriodEnd"]) == (12, datetime(2027, 1, 1, tzinfo=UTC))
    text = format_csv(focus_report_table(table))
    assert "2026-12-31T00:00:00Z" in text
    assert text.splitlines()[0].split(",") == SCHEMA.names


def test_lines_without_a_price_are_counted_and_tags_travel_as_json() -> None:
    table, unpriced = focus_table(
        [ledger(line(0, 1, 0, 0, tags=[("team", '=x"')]), line(0, 1, 0, 0, currency=None, cost=None))], "run r"
    )
    assert unpriced == 1
    assert table.column("Tags").to_pylist() == ['{"team": "=x\\""}']


def test_without_a_hit_price_hits_stand_at_the_miss_price() -> None:
    amounts = {"cache_hit_price": None, "cache_hit_cost": 5 * MISS / 1_000_000}
    table, _ = focus_table([ledger(line(5, 0, 0, 0, **amounts))], "run r")
    (row,) = table.to_pylist()
    assert (row["ListUnitPrice"], row["ListCost"]) == (MISS, 5 * MISS / 1_000_000)
