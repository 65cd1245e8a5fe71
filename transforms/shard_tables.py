"""A shard's answers as its three tables: results, rejects, ledger.

Stands in the *answer* stage, between account and commit, once every request of the shard is answered: only then is
it known how a shared prefix's cost spreads over its users.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from model_runner.prefix_tree import common_prefix_lengths
from schemas.arrow import rows_at, struct_columns, values_of
from schemas.layout import Table
from schemas.tables import LEDGER_SCHEMA, PASSTHROUGH, RESULT_SCHEMA, result_schema
from transforms.account import AccountedAnswer
from transforms.allocate import Allocation, allocate, bill_of

_ZERO = Decimal(0)


@dataclass(frozen=True, slots=True)
class ShardNames:
    """What every row of a shard's tables repeats."""

    run_id: str
    shard: str
    price_book: str | None


@dataclass(frozen=True, slots=True)
class PlannedRows:
    """A shard's plan, and which of its rows are asked, merged or rejected.

    Attributes:
        table: rows of `schemas.tables.plan_schema`.
        asked: rows that are sent to the engine, in token order.
        followers: asked row -> rows that were merged into it, in input order.
    """

    table: pa.Table
    asked: tuple[int, ...]
    followers: Mapping[int, Sequence[int]]

    @classmethod
    def of(cls, table: pa.Table) -> "PlannedRows":
        """Sort out a shard's plan."""
        errors, merged_into, custom_ids = (values_of(table, n) for n in ("error_type", "merged_into", "custom_id"))
        asked = tuple(row for row, error in enumerate(errors) if error is None and merged_into[row] is None)
        row_of = {custom_ids[row]: row for row in asked}
        followers: dict[int, list[int]] = {}
        for row, first_id in enumerate(merged_into):
            if first_id is not None:
                followers.setdefault(row_of[first_id], []).append(row)
        return cls(table, asked, followers)

    def text(self, name: str) -> list[Any]:
        """A column as Python values."""
        return values_of(self.table, name)


def shard_tables(rows: PlannedRows, answers: Mapping[int, AccountedAnswer], names: ShardNames) -> dict[Table, pa.Table]:
    """Build the tables of a shard; results and rejects in input order, the ledger in token order.

    Args:
        answers: one for each of `rows.asked`.
    """
    allocations = _allocate(rows, answers)
    columns = _result_columns(rows, answers, allocations, names)
    fields, passthrough = struct_columns(rows.table, PASSTHROUGH)
    table = pa.table(
        [*(pa.array(columns[field.name], field.type) for field in RESULT_SCHEMA), *passthrough],
        schema=result_schema(fields),
    )
    input_order = np.lexsort([rows.table.column("source_row").to_numpy(), rows.table.column("unit").to_numpy()])
    table = rows_at(table, input_order)
    is_ok = pc.equal(table.column("status"), pa.scalar("ok"))
    return {
        "results": table.filter(is_ok),
        "rejects": table.filter(pc.invert(is_ok)),
        "ledger": _ledger(rows, answers, allocations, names),
    }


def _allocate(rows: PlannedRows, answers: Mapping[int, AccountedAnswer]) -> dict[int, Allocation | None]:
    keys = rows.text("prefix_key")
    lengths = rows.text("num_prompt_tokens")
    charges = [answers[row].charge for row in rows.asked]
    bills = [
        bill_of(charge, num_rows=1 + len(rows.followers.get(row, ()))) if charge is not None else None
        for row, charge in zip(rows.asked, charges, strict=True)
    ]
    lcps = common_prefix_lengths([keys[row] for row in rows.asked])
    return dict(zip(rows.asked, allocate([lengths[row] for row in rows.asked], lcps, bills), strict=True))


def _result_columns(
    rows: PlannedRows,
    answers: Mapping[int, AccountedAnswer],
    allocations: Mapping[int, Allocation | None],
    names: ShardNames,
) -> dict[str, list[Any]]:
    """Every column of `RESULT_SCHEMA`, in the order of the plan."""
    num_rows = rows.table.num_rows
    columns: dict[str, list[Any]] = {field.name: [None] * num_rows for field in RESULT_SCHEMA}
    repeated = ("custom_id", "source_file", "source_row", "scope", "num_rows", "merged_into")
    for name in (*repeated, "error_type", "error_message", "error_stage"):
        columns[name] = rows.text(name)
    columns["run_id"] = [names.run_id] * num_rows
    columns["status"] = ["rejected"] * num_rows
    for name in (
        "attempts",
        "prompt_tokens",
        "cached_tokens",
        "computed_tokens",
        "completion_tokens",
        "reasoning_tokens",
    ):
        columns[name] = [0] * num_rows
    if names.price_book is not None:
        columns["cost"] = [_ZERO] * num_rows
        columns["cost_allocated"] = [_ZERO] * num_rows
        columns["price_book"] = [names.price_book] * num_rows
    for row in rows.asked:
        accounted, allocation = answers[row], allocations[row]
        group = (row, *rows.followers.get(row, ()))
        shares = allocation.rows if allocation is not None else [None] * len(group)
        for member, share in zip(group, shares, strict=True):
            _fill_answer(columns, member, accounted)
            columns["cost_allocated"][member] = share
            columns["cost"][member] = _ZERO if accounted.charge is not None else None
        _fill_usage(columns, row, accounted)
    return columns


def _fill_answer(columns: dict[str, list[Any]], row: int, accounted: AccountedAnswer) -> None:
    """What a merged row shares with the one that was asked for it."""
    answer, charge = accounted.answer, accounted.charge
    completion, error = answer.completion, answer.error
    values: dict[str, Any] = {
        "status": "ok" if error is None else "rejected",
        "output_text": completion.text,
        "output_json": answer.output_json,
        "reasoning_content": completion.reasoning_content,
        "tool_calls": [
            {"id": call.id, "name": call.name, "arguments": call.arguments} for call in completion.tool_calls
        ]
        or None,
        "finish_reason": completion.finish_reason,
        "provider": completion.provider,
        "model": completion.model,
        "model_revision": completion.model_revision,
        "currency": charge and charge.line.currency,
        "cost_basis": charge and charge.basis,
    }
    if error is not None:
        values["error_type"], values["error_stage"] = error.error_type, error.error_stage
        values["error_message"] = str(error)
    for name, value in values.items():
        columns[name][row] = value


def _fill_usage(columns: dict[str, list[Any]], row: int, accounted: AccountedAnswer) -> None:
    """What was paid for: only the row that was asked carries it."""
    completion = accounted.answer.completion
    usage = completion.usage
    columns["attempts"][row] = 1
    columns["prompt_tokens"][row] = usage.prompt_tokens
    columns["cached_tokens"][row] = usage.cached_tokens
    columns["computed_tokens"][row] = usage.computed_tokens
    columns["completion_tokens"][row] = usage.completion_tokens
    columns["reasoning_tokens"][row] = usage.reasoning_tokens
    columns["latency_ms"][row] = completion.latency_ms
    if accounted.charge is not None:
        columns["cost"][row] = accounted.charge.cost


def _ledger(
    rows: PlannedRows,
    answers: Mapping[int, AccountedAnswer],
    allocations: Mapping[int, Allocation | None],
    names: ShardNames,
) -> pa.Table:
    """One line for each attempt that was made."""
    repeated = {name: rows.text(name) for name in ("custom_id", "source_file", "source_row", "tenant", "cost_center")}
    lines: list[dict[str, Any]] = []
    for row in rows.asked:
        accounted, allocation = answers[row], allocations[row]
        completion = accounted.answer.completion
        lines.append(
            {
                **{name: values[row] for name, values in repeated.items()},
                "run_id": names.run_id,
                "shard": names.shard,
                "attempt": 1,
                "outcome": "answered" if accounted.answer.error is None else "rejected",
                "provider": completion.provider,
                "model": completion.model,
                "model_revision": completion.model_revision,
                "started_at": completion.started_at,
                "latency_ms": completion.latency_ms,
                "cost_allocated": allocation and allocation.total,
                "price_book": names.price_book,
                **_charged(accounted),
            }
        )
    arrays: Sequence[pa.Array[Any]] = [
        pa.array([line.get(field.name) for line in lines], field.type) for field in LEDGER_SCHEMA
    ]
    return pa.table(list(arrays), schema=LEDGER_SCHEMA)


def _charged(accounted: AccountedAnswer) -> dict[str, Any]:
    usage, charge = accounted.answer.completion.usage, accounted.charge
    tokens = {
        "cache_hit_tokens": usage.cached_tokens,
        "cache_miss_tokens": usage.prompt_tokens - (usage.cached_tokens or 0),
        "visible_output_tokens": usage.completion_tokens - usage.reasoning_tokens,
        "reasoning_tokens": usage.reasoning_tokens,
    }
    if charge is None:
        return tokens
    return {
        **tokens,
        "cache_hit_price": charge.line.cache_hit,
        "cache_miss_price": charge.line.cache_miss,
        "output_price": charge.line.output,
        "cost": charge.cost,
        "currency": charge.line.currency,
        "cost_basis": charge.basis,
        "price_line": charge.line.line_id,
    }
