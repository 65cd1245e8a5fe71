"""FOCUS: a run's ledger as rows of the FinOps Open Cost and Usage Specification, version 1.2.

Implements `moebeam report --focus FILE`. One row per UTC day, tenant, cost centre, provider, model, token class, unit
price and tag set; quantity times unit price is exactly the cost. The specification's columns come first, then our own
with the prefix `x_`. Columns about commitments, reservations, regions and resources do not apply to tokens and are left
out, as the specification allows.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import pyarrow as pa

from moebeam.jobs.console.report_table import Column, ReportTable
from moebeam.schemas.arrow import list_values
from moebeam.schemas.prices import EXACT
from moebeam.schemas.tables import MONEY

FOCUS_VERSION = "1.2"
PRICING_UNIT = "1000000 Tokens"
CONSUMED_UNIT = "Tokens"

_CLASSES = {
    "cache_hit": ("cache_hit_tokens", "cache_hit_price", "cache_hit_cost", "Input tokens, cache hit"),
    "cache_miss": ("cache_miss_tokens", "cache_miss_price", "cache_miss_cost", "Input tokens, cache miss"),
    "visible_output": ("visible_output_tokens", "output_price", "visible_output_cost", "Output tokens"),
    "reasoning": ("reasoning_tokens", "output_price", "reasoning_cost", "Reasoning tokens"),
}
"""Token class -> ledger columns for tokens, unit price and amount, and a description."""

_MISS_PRICE = "cache_miss_price"

SCHEMA = pa.schema(
    [
        pa.field("BilledCost", MONEY),
        pa.field("BillingAccountId", pa.string()),
        pa.field("BillingAccountName", pa.string()),
        pa.field("BillingCurrency", pa.string()),
        pa.field("BillingPeriodEnd", pa.timestamp("s", tz="UTC")),
        pa.field("BillingPeriodStart", pa.timestamp("s", tz="UTC")),
        pa.field("ChargeCategory", pa.string()),
        pa.field("ChargeClass", pa.string()),
        pa.field("ChargeDescription", pa.string()),
        pa.field("ChargeFrequency", pa.string()),
        pa.field("ChargePeriodEnd", pa.timestamp("s", tz="UTC")),
        pa.field("ChargePeriodStart", pa.timestamp("s", tz="UTC")),
        pa.field("ConsumedQuantity", MONEY),
        pa.field("ConsumedUnit", pa.string()),
        pa.field("ContractedCost", MONEY),
        pa.field("ContractedUnitPrice", MONEY),
        pa.field("EffectiveCost", MONEY),
        pa.field("InvoiceId", pa.string()),
        pa.field("InvoiceIssuerName", pa.string()),
        pa.field("ListCost", MONEY),
        pa.field("ListUnitPrice", MONEY),
        pa.field("PricingCategory", pa.string()),
        pa.field("PricingQuantity", MONEY),
        pa.field("PricingUnit", pa.string()),
        pa.field("ProviderName", pa.string()),
        pa.field("PublisherName", pa.string()),
        pa.field("ServiceCategory", pa.string()),
        pa.field("ServiceName", pa.string()),
        pa.field("ServiceSubcategory", pa.string()),
        pa.field("SkuId", pa.string()),
        pa.field("SkuMeter", pa.string()),
        pa.field("SkuPriceDetails", pa.string()),
        pa.field("SkuPriceId", pa.string()),
        pa.field("SubAccountId", pa.string()),
        pa.field("SubAccountName", pa.string()),
        pa.field("Tags", pa.string()),
        pa.field("x_CostCenter", pa.string()),
        pa.field("x_CostBasis", pa.string()),
        pa.field("x_PriceBook", pa.string()),
        pa.field("x_PriceLine", pa.string()),
        pa.field("x_RunId", pa.string()),
        pa.field("x_TokenClass", pa.string()),
    ]
)
"""The specification's columns by name, then ours; includes all that version 1.2 requires."""

_LINE = (
    "tenant",
    "cost_center",
    "provider",
    "model",
    "model_revision",
    "started_at",
    "currency",
    "cost_basis",
    "price_book",
    "price_line",
    "run_id",
    "tags",
    *dict.fromkeys(name for columns in _CLASSES.values() for name in columns[:3]),
)


@dataclass(frozen=True, slots=True)
class _Charge:
    """The grouping key of a FOCUS row."""

    day: datetime
    tenant: str | None
    cost_center: str | None
    provider: str
    model: str
    currency: str
    cost_basis: str
    price_book: str
    price_line: str
    run_id: str
    tags: str
    token_class: str
    unit_price: Decimal


def focus_table(ledgers: Iterable[pa.Table], account: str) -> tuple[pa.Table, int]:
    """Convert a ledger to FOCUS rows.

    Args:
        ledgers: rows of `moebeam.schemas.tables.LEDGER_SCHEMA`, file by file.
        account: name and id of the billing account, such as the run's.
    Returns:
        The rows, and the number of ledger lines left out for lack of a price.
    """
    sums: dict[_Charge, tuple[int, Decimal]] = {}
    num_unpriced = 0
    for ledger in ledgers:
        for values in zip(*(list_values(ledger, name) for name in _LINE), strict=True):
            line = dict(zip(_LINE, values, strict=True))
            if line["currency"] is None:
                num_unpriced += 1
                continue
            for token_class, (tokens, price, amount, _) in _CLASSES.items():
                if line[tokens]:
                    charge = _charge(line, token_class, line[price] if line[price] is not None else line[_MISS_PRICE])
                    count, cost = sums.get(charge, (0, Decimal(0)))
                    sums[charge] = (count + line[tokens], EXACT.add(cost, line[amount]))
    ordered = sorted(sums, key=lambda charge: tuple(str(getattr(charge, name)) for name in _Charge.__slots__))
    rows = [_row(charge, *sums[charge], account) for charge in ordered]
    return pa.Table.from_pylist(rows, schema=SCHEMA), num_unpriced


def _charge(line: Mapping[str, Any], token_class: str, unit_price: Decimal) -> _Charge:
    started: datetime = line["started_at"].astimezone(UTC)
    return _Charge(
        day=started.replace(hour=0, minute=0, second=0, microsecond=0),
        tenant=line["tenant"],
        cost_center=line["cost_center"],
        provider=line["provider"],
        model=line["model"],
        currency=line["currency"],
        cost_basis=line["cost_basis"],
        price_book=line["price_book"],
        price_line=line["price_line"],
        run_id=line["run_id"],
        tags=json.dumps(dict(sorted(line["tags"] or ())), ensure_ascii=False),
        token_class=token_class,
        unit_price=unit_price,
    )


def _row(charge: _Charge, num_tokens: int, cost: Decimal, account: str) -> dict[str, Any]:
    month = charge.day.replace(day=1)
    sku = f"{charge.provider}/{charge.model}/{charge.token_class}"
    details = {"x_Model": charge.model, "x_TokenClass": charge.token_class}
    costs = dict.fromkeys(("BilledCost", "ContractedCost", "EffectiveCost", "ListCost"), cost)
    return {
        **costs,
        "BillingAccountId": account,
        "BillingAccountName": account,
        "BillingCurrency": charge.currency,
        "BillingPeriodStart": month,
        "BillingPeriodEnd": (month + timedelta(days=32)).replace(day=1),
        "ChargeCategory": "Usage",
        "ChargeClass": None,
        "ChargeDescription": f"{_CLASSES[charge.token_class][3]} of {charge.model}",
        "ChargeFrequency": "Usage-Based",
        "ChargePeriodStart": charge.day,
        "ChargePeriodEnd": charge.day + timedelta(days=1),
        "ConsumedQuantity": Decimal(num_tokens),
        "ConsumedUnit": CONSUMED_UNIT,
        "ContractedUnitPrice": charge.unit_price,
        # A run has no invoice; `moebeam reconcile` compares it with one later.
        "InvoiceId": None,
        "InvoiceIssuerName": charge.provider,
        "ListUnitPrice": charge.unit_price,
        "PricingCategory": "Standard",
        "PricingQuantity": EXACT.scaleb(Decimal(num_tokens), -6),
        "PricingUnit": PRICING_UNIT,
        "ProviderName": charge.provider,
        "PublisherName": charge.provider,
        "ServiceCategory": "AI and Machine Learning",
        "ServiceName": charge.model,
        "ServiceSubcategory": "Generative AI",
        "SkuId": sku,
        "SkuMeter": _CLASSES[charge.token_class][3],
        "SkuPriceDetails": json.dumps(details, ensure_ascii=False),
        "SkuPriceId": sku,
        "SubAccountId": charge.tenant or None,
        "SubAccountName": charge.tenant or None,
        "Tags": charge.tags,
        "x_CostCenter": charge.cost_center,
        "x_CostBasis": charge.cost_basis,
        "x_PriceBook": charge.price_book,
        "x_PriceLine": charge.price_line,
        "x_RunId": charge.run_id,
        "x_TokenClass": charge.token_class,
    }


def focus_report_table(table: pa.Table) -> ReportTable:
    """Convert FOCUS rows for CSV, with instants as ISO 8601 in UTC."""
    columns = tuple(Column(field.name, "money" if field.type == MONEY else "text") for field in table.schema)
    rows = tuple(
        tuple(
            f"{value:%Y-%m-%dT%H:%M:%SZ}" if isinstance(value, datetime) else value
            for value in (row[column.name] for column in columns)
        )
        for row in table.to_pylist()
    )
    return ReportTable("focus", f"FOCUS {FOCUS_VERSION}", columns, rows)
