"""Builds a shard's three tables from its answers: results, rejects, ledger.

Part of *answer*, between account and commit, once every request of the shard is answered: only then is it known how a
shared prefix's cost spreads over its users.
"""

from collections.abc import Collection, Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from moebeam.model_runner.prefix_tree import common_prefix_lengths
from moebeam.schemas.answers import AccountedAnswer, ValidatedAnswer
from moebeam.schemas.arrow import list_values, struct_columns, take_rows
from moebeam.schemas.canonical import Json
from moebeam.schemas.column_types import loosen_sizes, restore_column
from moebeam.schemas.column_values import print_column
from moebeam.schemas.contract.output_column import output_column
from moebeam.schemas.contract.output_type import OutputType
from moebeam.schemas.records import Usage, UsageStatus
from moebeam.schemas.tables import LEDGER_SCHEMA, PASSTHROUGH, RESULT_SCHEMA, Table, result_schema
from moebeam.transforms.answer.reuse import EarlierAnswer, parse_output
from moebeam.transforms.money.account import Accounting, class_amounts
from moebeam.transforms.money.allocate import Allocation, allocate
from moebeam.transforms.money.attempt_costs import (
    Attempts,
    bill_attempts,
    find_basis,
    find_currency,
    share_costs,
    split_mixed_costs,
    sum_costs,
)

_ZERO = Decimal(0)


@dataclass(frozen=True, slots=True)
class PlannedRows:
    """A shard's plan, and which of its rows are asked, merged, reused or rejected.

    Attributes:
        table: rows of `moebeam.schemas.tables.plan_schema`.
        asked: rows sent to the engine, in token order.
        followers: asked or reused row -> rows merged into it, in input order.
        reused: rows that an earlier run answered.
    """

    table: pa.Table
    asked: tuple[int, ...]
    followers: Mapping[int, Sequence[int]]
    reused: Mapping[int, EarlierAnswer] = field(default_factory=dict[int, EarlierAnswer])

    def with_reused(self, reused: Mapping[int, EarlierAnswer]) -> "PlannedRows":
        """The same plan, with `reused` rows no longer asked."""
        return replace(self, asked=tuple(row for row in self.asked if row not in reused), reused=reused)

    def with_asked(self, answered: Container[int]) -> "PlannedRows":
        """The same plan, with only those rows asked that are `answered`."""
        return replace(self, asked=tuple(row for row in self.asked if row in answered))

    def restrict_to(self, asked: Collection[int]) -> "tuple[PlannedRows, dict[int, int]]":
        """A plan of some asked rows and those merged into them, and row -> its place there."""
        members = sorted(member for row in asked for member in (row, *self.followers.get(row, ())))
        places = {member: place for place, member in enumerate(members)}
        followers = {places[row]: [places[member] for member in self.followers.get(row, ())] for row in asked}
        kept = tuple(places[row] for row in self.asked if row in places)
        return PlannedRows(take_rows(self.table, members), kept, followers), places

    @classmethod
    def from_table(cls, table: pa.Table) -> "PlannedRows":
        """Classify the rows of a shard's plan."""
        errors, merged_into = list_values(table, "error_type"), list_values(table, "merged_into")
        custom_ids, samples = list_values(table, "custom_id"), list_values(table, "sample")
        asked = tuple(row for row, error in enumerate(errors) if error is None and merged_into[row] is None)
        row_of = {(custom_ids[row], samples[row]): row for row in asked}
        followers: dict[int, list[int]] = {}
        for row, first_id in enumerate(merged_into):
            if first_id is not None:
                first = row_of.get((first_id, samples[row]))
                followers.setdefault(row_of[first_id, 0] if first is None else first, []).append(row)
        return cls(table, asked, followers)

    def values(self, name: str) -> list[Any]:
        """A column as Python values."""
        return list_values(self.table, name)


def shard_tables(
    shard: str,
    rows: PlannedRows,
    answers: Mapping[int, Attempts],
    accounting: Accounting,
    output_type: OutputType | None = None,
) -> dict[Table, pa.Table]:
    """Build a shard's tables: results and rejects in input order, the ledger in token order.

    Args:
        answers: the attempts of each of `rows.asked`, at least one.
        output_type: of the typed answer column; None if the job has no schema.
    """
    allocations = _allocate(rows, answers)
    columns = _result_columns(rows, answers, allocations, accounting)
    fields, passthrough = struct_columns(rows.table, PASSTHROUGH)
    typed = [] if output_type is None else [output_column(_values(rows, answers), output_type).array]
    table = pa.table(
        [
            *(pa.array(columns[field.name], field.type) for field in RESULT_SCHEMA),
            *typed,
            *(restore_column(column, field) for field, column in zip(fields, passthrough, strict=True)),
        ],
        schema=result_schema(fields, output_type and output_type.arrow),
    )
    input_order = np.lexsort([rows.table.column(name).to_numpy() for name in ("sample", "source_row", "unit")])
    table = take_rows(table, input_order)
    is_ok = pc.equal(table.column("status"), pa.scalar("ok"))
    return {
        "results": table.filter(is_ok),
        "rejects": loosen_sizes(table.filter(pc.invert(is_ok))),
        "ledger": _ledger(shard, rows, answers, allocations, accounting),
    }


def _values(rows: PlannedRows, answers: Mapping[int, Attempts]) -> list[Json]:
    """The parsed answer of each planned row; None without one."""
    values: list[Json] = [None] * rows.table.num_rows
    for row in rows.asked:
        for member in (row, *rows.followers.get(row, ())):
            values[member] = answers[row][-1].answer.value
    for row, answer in rows.reused.items():
        for member in (row, *rows.followers.get(row, ())):
            values[member] = parse_output(answer)
    return values


def _allocate(rows: PlannedRows, answers: Mapping[int, Attempts]) -> dict[int, Allocation | None]:
    """Spread the cost of first attempts; later attempts' prompts are charged to their own row, see `bill_attempts`."""
    keys = rows.values("prefix_key")
    lengths = rows.values("num_prompt_tokens")
    bills = [bill_attempts(answers[row], num_rows=1 + len(rows.followers.get(row, ()))) for row in rows.asked]
    lcps = common_prefix_lengths([keys[row] for row in rows.asked])
    return dict(zip(rows.asked, allocate([lengths[row] for row in rows.asked], lcps, bills), strict=True))


def _result_columns(
    rows: PlannedRows,
    answers: Mapping[int, Attempts],
    allocations: Mapping[int, Allocation | None],
    accounting: Accounting,
) -> dict[str, list[Any]]:
    """All columns of `RESULT_SCHEMA`, in plan order."""
    num_rows = rows.table.num_rows
    columns: dict[str, list[Any]] = {field.name: [None] * num_rows for field in RESULT_SCHEMA}
    repeated = ("custom_id", "sample", "source_file", "source_row", "scope", "num_rows", "merged_into")
    for name in (*repeated, "error_type", "error_message", "error_stage"):
        columns[name] = rows.values(name)
    columns["run_id"] = [accounting.run_id] * num_rows
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
    if accounting.book_version is not None:
        columns["cost"] = [_ZERO] * num_rows
        columns["cost_allocated"] = [_ZERO] * num_rows
        columns["price_book"] = [accounting.book_version] * num_rows
    for row in rows.asked:
        attempts, allocation = answers[row], allocations[row]
        group = (row, *rows.followers.get(row, ()))
        costs = sum_costs(attempts)
        shares = allocation.rows if allocation is not None else [None] * len(group)
        for member, share in zip(group, shares, strict=True):
            _fill_answer(columns, member, attempts)
            is_single = len(costs) == 1
            columns["cost_allocated"][member] = share if is_single else None
            columns["cost"][member] = _ZERO if is_single else None
        if len(costs) == 1:
            (columns["cost"][row],) = costs.values()
        elif costs:
            for member, amounts in zip(group, split_mixed_costs(costs, shares), strict=True):
                columns["costs_by_currency"][member] = amounts
        _fill_usage(columns, row, attempts)
    for row, answer in rows.reused.items():
        for member in (row, *rows.followers.get(row, ())):
            columns["status"][member], columns["reused_from"][member] = "ok", answer.reused_from
            for name, value in answer.values.items():
                columns[name][member] = value
    return columns


def _fill_answer(columns: dict[str, list[Any]], row: int, attempts: Attempts) -> None:
    """Fill the columns that a merged row shares with the asked one."""
    answer = attempts[-1].answer
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
        "provider_finish_reason": completion.provider_finish_reason,
        "provider": completion.provider,
        "model": completion.model,
        "model_revision": completion.model_revision,
        "currency": find_currency(attempts) if len(sum_costs(attempts)) == 1 else None,
        "cost_basis": find_basis(attempts),
        "failed_attempts": [
            _describe_failure(attempt.answer) for attempt in attempts if attempt.answer.error is not None
        ]
        or None,
        "logprobs": completion.logprobs,
        "top_logprobs": completion.top_logprobs
        and [
            [{"token": likely.token, "logprob": likely.logprob} for likely in place]
            for place in completion.top_logprobs
        ],
        "repaired": list(completion.repaired) or None,
    }
    if error is not None:
        values["error_type"], values["error_stage"] = error.error_type, error.error_stage
        values["error_message"] = str(error)
    for name, value in values.items():
        columns[name][row] = value


def _describe_failure(answer: ValidatedAnswer) -> dict[str, Any]:
    completion, error = answer.completion, answer.error
    assert error is not None
    return {
        "attempt": answer.attempt,
        "error_type": error.error_type,
        "error_message": str(error),
        "finish_reason": completion.finish_reason,
        "output_text": completion.text,
        "reasoning_content": completion.reasoning_content,
    }


def _fill_usage(columns: dict[str, list[Any]], row: int, attempts: Attempts) -> None:
    """Fill the columns of usage, summed over all attempts; only the asked row carries them."""
    completions = [attempt.answer.completion for attempt in attempts]
    usages = [completion.usage for completion in completions]
    columns["attempts"][row] = len(attempts)
    for name in ("prompt_tokens", "cached_tokens", "computed_tokens", "completion_tokens", "reasoning_tokens"):
        counts: list[int | None] = [_count(usage, name) for usage in usages]
        known = [count for count in counts if count is not None]
        columns[name][row] = sum(known) if len(known) == len(counts) else None
    if columns["prompt_tokens"][row] is None:
        columns["estimated_prompt_tokens"][row] = sum(usage.likely_prompt_tokens for usage in usages)
    if columns["completion_tokens"][row] is None:
        columns["estimated_completion_tokens"][row] = sum(usage.likely_completion_tokens for usage in usages)
    columns["usage_status"][row] = _usage_status(attempts)
    columns["latency_ms"][row] = sum(completion.latency_ms for completion in completions)


def _count(usage: Usage, name: str) -> int | None:
    """A count as it was reported; part of an unknown whole is unknown, too."""
    is_unknown = name == "reasoning_tokens" and usage.completion_tokens is None
    return None if is_unknown else getattr(usage, name)


_STATUSES: tuple[UsageStatus, ...] = ("reported", "contradictory", "missing")


def _usage_status(attempts: Attempts) -> UsageStatus | None:
    """The worst status of the attempts that an engine answered; None if it answered none."""
    completions = [attempt.answer.completion for attempt in attempts]
    statuses: list[UsageStatus] = [
        each.usage.status for each in completions if each.error is None or not each.usage.is_nothing
    ]
    return max(statuses, key=_STATUSES.index, default=None)


def _ledger(
    shard: str,
    rows: PlannedRows,
    answers: Mapping[int, Attempts],
    allocations: Mapping[int, Allocation | None],
    accounting: Accounting,
) -> pa.Table:
    """One line per attempt."""
    names = ("custom_id", "sample", "source_file", "source_row", "tenant", "cost_center")
    repeated = {name: rows.values(name) for name in names}
    tags = _tags(rows, accounting.fields_of_tags)
    lines: list[dict[str, Any]] = []
    for row in rows.asked:
        for accounted, share in zip(answers[row], share_costs(answers[row], allocations[row]), strict=True):
            completion = accounted.answer.completion
            lines.append(
                {
                    **{name: values[row] for name, values in repeated.items()},
                    "run_id": accounting.run_id,
                    "shard": shard,
                    "attempt": accounted.answer.attempt,
                    "outcome": "answered" if accounted.answer.error is None else "rejected",
                    "provider": completion.provider,
                    "model": completion.model,
                    "model_revision": completion.model_revision,
                    "started_at": completion.started_at,
                    "latency_ms": completion.latency_ms,
                    "cost_allocated": share,
                    "price_book": accounting.book_version,
                    "finish_reason": completion.finish_reason,
                    "error_type": accounted.answer.error and accounted.answer.error.error_type,
                    "tags": tags[row],
                    "journal": accounted.journal,
                    "num_lost_calls": len(completion.lost_calls),
                    "lost_cost_at_most": accounted.lost_cost_at_most,
                    **_cost_columns(accounted),
                }
            )
    arrays: Sequence[pa.Array[Any]] = [
        pa.array([line.get(field.name) for line in lines], field.type) for field in LEDGER_SCHEMA
    ]
    return pa.table(list(arrays), schema=LEDGER_SCHEMA)


def _tags(rows: PlannedRows, fields_of_tags: Mapping[str, str]) -> list[dict[str, str]]:
    """Tags of each planned row; a null is no tag, and *read* has rejected rows with a value that has no text."""
    columns = {
        field.name: (column, field) for field, column in zip(*struct_columns(rows.table, PASSTHROUGH), strict=True)
    }
    texts = {tag: print_column(*columns[name]) for tag, name in fields_of_tags.items()}
    return [
        {tag: text for tag, of_rows in texts.items() if isinstance(text := of_rows[row], str)}
        for row in range(rows.table.num_rows)
    ]


def _cost_columns(accounted: AccountedAnswer) -> dict[str, Any]:
    usage, charge = accounted.answer.completion.usage, accounted.charge
    classes = usage.classes
    tokens = {
        "cache_hit_tokens": classes.cache_hit,
        "cache_miss_tokens": classes.cache_miss,
        "visible_output_tokens": classes.visible_output,
        "reasoning_tokens": classes.reasoning,
        "usage_status": _usage_status([accounted]),
        "estimated_prompt_tokens": usage.estimated_prompt_tokens,
        "estimated_completion_tokens": usage.estimated_completion_tokens,
    }
    if charge is None:
        return tokens
    amounts = class_amounts(charge)
    return {
        **tokens,
        "cache_hit_cost": amounts.cache_hit,
        "cache_miss_cost": amounts.cache_miss,
        "visible_output_cost": amounts.visible_output,
        "reasoning_cost": amounts.reasoning,
        "cache_hit_price": charge.line.cache_hit,
        "cache_miss_price": charge.line.cache_miss,
        "output_price": charge.line.output,
        "cost": charge.cost,
        "currency": charge.line.currency,
        "cost_basis": charge.basis,
        "price_line": charge.line.line_id,
    }
