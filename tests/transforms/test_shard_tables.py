"""A shard's tables: what answered, merged and rejected rows carry."""

from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa

from model_runner.prefix_tree import prefix_key
from schemas.errors import EngineFailed
from schemas.prices import PriceLine
from schemas.records import Completion, Sampling, Usage
from schemas.tables import plan_schema
from transforms.account import AccountedAnswer, charge
from transforms.render import sampling_json
from transforms.shard_tables import PlannedRows, ShardNames, shard_tables
from transforms.validate import ValidatedAnswer

LINE = PriceLine(
    line_id="7",
    provider="p",
    model="m",
    effective_from=datetime(2026, 1, 1, tzinfo=UTC),
    effective_to=None,
    windows=(),
    currency="USD",
    cache_hit=Decimal("0.1"),
    cache_miss=Decimal(1),
    output=Decimal(2),
)
NAMES = ShardNames("run", "s0", "book@1")


def planned(prompts: list[list[int] | None], merged_into: list[str | None]) -> PlannedRows:
    rows = [
        {
            "custom_id": f"r{row}",
            "source_file": "f",
            "source_row": 10 - row,
            "unit": 0,
            "scope": "row",
            "num_rows": 1,
            "prefix_key": None if tokens is None else prefix_key("", np.array(tokens, np.int32)),
            "num_prompt_tokens": None if tokens is None else len(tokens),
            "sampling": sampling_json(Sampling(max_tokens=4)),
            "tenant": "t",
            "cost_center": "c",
            "error_type": "null_value" if tokens is None else None,
            "error_stage": "render" if tokens is None else None,
            "merged_into": merged_into[row],
            "passthrough": {"extra": row},
        }
        for row, tokens in enumerate(prompts)
    ]
    return PlannedRows.of(pa.Table.from_pylist(rows, schema=plan_schema([pa.field("extra", pa.int64())])))


def accounted(row: int, usage: Usage, *, error: EngineFailed | None = None, priced: bool = True) -> AccountedAnswer:
    started = datetime(2026, 5, 1, tzinfo=UTC)
    completion = Completion(str(row), f"answer {row}", "stop", usage, started, 5.0, "p", "m", "rev", error=error)
    return AccountedAnswer(ValidatedAnswer(completion, None, error), charge(usage, LINE) if priced else None)


def test_the_row_that_was_asked_pays_and_the_cost_is_allocated_to_all_who_used_it() -> None:
    rows = planned([[1, 2, 3, 4], [1, 2, 3, 4], [1, 2, 9]], [None, "r0", None])
    answers = {0: accounted(0, Usage(4, 2, 0)), 2: accounted(2, Usage(3, 1, 2))}
    tables = shard_tables(rows, answers, NAMES)
    results = {row["custom_id"]: row for row in tables["results"].to_pylist()}
    assert [results[name]["output_text"] for name in ("r0", "r1", "r2")] == ["answer 0", "answer 0", "answer 2"]
    assert (results["r0"]["cost"], results["r1"]["cost"]) == (Decimal("0.000008"), Decimal(0))
    assert results["r2"]["cost"] == Decimal("0.0000032")
    assert (results["r1"]["attempts"], results["r1"]["prompt_tokens"], results["r1"]["latency_ms"]) == (0, 0, None)
    # Tokens 1 and 2 were billed 2 misses and 2 hits to three rows; tokens 3 and 4 and the output to two of them.
    shared = Decimal("0.0000022") / 3
    assert abs(results["r1"]["cost_allocated"] - (shared + Decimal("0.000003"))) < Decimal("1e-11")
    assert abs(results["r2"]["cost_allocated"] - (shared + Decimal("0.000003"))) < Decimal("1e-11")
    assert sum(row["cost_allocated"] for row in results.values()) == Decimal("0.0000112")
    ledger = tables["ledger"].to_pylist()
    assert [(line["custom_id"], line["outcome"], line["price_line"]) for line in ledger] == [
        ("r0", "answered", "7"),
        ("r2", "answered", "7"),
    ]
    assert sum(line["cost_allocated"] for line in ledger) == Decimal("0.0000112")


def test_a_failed_request_rejects_its_merged_rows_and_is_still_paid() -> None:
    rows = planned([[1], [1]], [None, "r0"])
    tables = shard_tables(rows, {0: accounted(0, Usage(1, 0, 0), error=EngineFailed("broke"))}, NAMES)
    assert tables["results"].num_rows == 0
    rejects = tables["rejects"].to_pylist()
    assert [row["error_type"] for row in rejects] == ["engine_failed"] * 2
    assert {row["error_message"] for row in rejects} == {"broke"}
    assert [line["outcome"] for line in tables["ledger"].to_pylist()] == ["rejected"]
    assert sum(row["cost"] for row in rejects) == Decimal("0.000001")


def test_rows_come_out_in_input_order_with_their_passthrough_columns() -> None:
    rows = planned([[1], [2], None], [None, None, None])
    tables = shard_tables(rows, {0: accounted(0, Usage(1, 1, 0)), 1: accounted(1, Usage(1, 1, 0))}, NAMES)
    assert tables["results"].column("custom_id").to_pylist() == ["r1", "r0"]
    assert tables["results"].column("extra").to_pylist() == [1, 0]
    (reject,) = tables["rejects"].to_pylist()
    assert (reject["extra"], reject["error_type"], reject["cost"], reject["attempts"]) == (
        2,
        "null_value",
        Decimal(0),
        0,
    )


def test_without_a_price_nothing_is_zero() -> None:
    rows = planned([[1]], [None])
    names = ShardNames("run", "s0", None)
    (row,) = shard_tables(rows, {0: accounted(0, Usage(1, 1), priced=False)}, names)["results"].to_pylist()
    assert (row["cost"], row["cost_allocated"], row["currency"], row["cost_basis"]) == (None,) * 4
    assert (row["cached_tokens"], row["computed_tokens"]) == (None, None)


def test_a_shard_of_rejects_needs_no_answers(tmp_path: Path) -> None:
    tables = shard_tables(planned([None, None], [None, None]), {}, NAMES)
    assert [tables[name].num_rows for name in ("results", "rejects", "ledger")] == [0, 2, 0]
