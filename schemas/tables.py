"""Arrow schemas of all tables: plan, results, rejects, ledger.

Columns are only ever added, and each addition raises `TABLES_VERSION`. A column keeps its type when it is all null.
"""

from collections.abc import Iterable
from typing import Any, Literal, TypeAlias

import pyarrow as pa

from moebeam.schemas.column_types import restored_field

TABLES_VERSION = 6

MONEY = pa.decimal128(38, 12)
"""Type of every price, cost and sum of costs."""

TOOL_CALLS = pa.list_(
    pa.struct([pa.field("id", pa.string()), pa.field("name", pa.string()), pa.field("arguments", pa.string())])
)

TOP_LOGPROBS = pa.list_(pa.list_(pa.struct([pa.field("token", pa.string()), pa.field("logprob", pa.float64())])))
"""For each token of an answer the likeliest ones at its place."""

FAILED_ATTEMPTS = pa.list_(
    pa.struct(
        [
            pa.field("attempt", pa.int32()),
            pa.field("error_type", pa.string()),
            pa.field("error_message", pa.string()),
            pa.field("finish_reason", pa.string()),
            pa.field("output_text", pa.string()),
            pa.field("reasoning_content", pa.string()),
        ]
    )
)
"""The text of each attempt that was not accepted, and the reason."""

COSTS_BY_CURRENCY = pa.list_(
    pa.struct(
        [
            pa.field("currency", pa.string()),
            pa.field("cost", MONEY),
            pa.field("cost_allocated", MONEY),
        ]
    )
)
"""Costs of a row whose attempts were priced in several currencies."""

RESULT_SCHEMA = pa.schema(
    [
        pa.field("custom_id", pa.string()),
        pa.field("status", pa.string()),
        pa.field("output_text", pa.string()),
        pa.field("output_json", pa.string()),
        pa.field("reasoning_content", pa.string()),
        pa.field("tool_calls", TOOL_CALLS),
        pa.field("finish_reason", pa.string()),
        pa.field("error_type", pa.string()),
        pa.field("error_message", pa.string()),
        pa.field("error_stage", pa.string()),
        pa.field("attempts", pa.int32()),
        pa.field("failed_attempts", FAILED_ATTEMPTS),
        pa.field("logprobs", pa.list_(pa.float64())),
        pa.field("provider", pa.string()),
        pa.field("model", pa.string()),
        pa.field("model_revision", pa.string()),
        pa.field("prompt_tokens", pa.int64()),
        pa.field("cached_tokens", pa.int64()),
        pa.field("computed_tokens", pa.int64()),
        pa.field("completion_tokens", pa.int64()),
        pa.field("reasoning_tokens", pa.int64()),
        pa.field("cost", MONEY),
        pa.field("cost_allocated", MONEY),
        pa.field("currency", pa.string()),
        pa.field("cost_basis", pa.string()),
        pa.field("price_book", pa.string()),
        pa.field("merged_into", pa.string()),
        pa.field("latency_ms", pa.float64()),
        pa.field("run_id", pa.string()),
        pa.field("source_file", pa.string()),
        pa.field("source_row", pa.int64()),
        pa.field("scope", pa.string()),
        pa.field("num_rows", pa.int64()),
        pa.field("costs_by_currency", COSTS_BY_CURRENCY),
        pa.field("reused_from", pa.string()),
        pa.field("provider_finish_reason", pa.string()),
        pa.field("usage_status", pa.string()),
        pa.field("estimated_prompt_tokens", pa.int64()),
        pa.field("estimated_completion_tokens", pa.int64()),
        pa.field("top_logprobs", TOP_LOGPROBS),
        pa.field("sample", pa.int32()),
        pa.field("repaired", pa.list_(pa.string())),
    ]
)
"""Columns shared by `results/` and `rejects/`, before the input's passthrough columns.

`status` is `ok` or `rejected`; `scope` is `row`, `row_group` or `file`, and `num_rows` is the number of input rows that
a reject covers (null for an unreadable file of unknown length). `attempts` counts calls to the model;
`failed_attempts` keeps each answer that was not accepted. Amounts in two currencies have no sum: a row whose attempts
were priced in several has null `cost`, `cost_allocated` and `currency`, `cost_basis = "mixed_currency"`, and its
amounts in `costs_by_currency`, which is null otherwise. `reused_from` names the row of an earlier run, as
`run_id/custom_id`, whose answer was copied; such a row has no tokens, no cost and no ledger line.

`provider_finish_reason` is the provider's own word for `finish_reason`. `usage_status` is `reported`, `missing` (the
provider did not count the tokens of some attempt: they and the cost are null) or `contradictory` (it did, but the
counts cannot all be right; they stand as it reported them), null for a row that no engine answered. Where a sum of
tokens is null, the column `estimated_...` has what was counted here in place of the provider, added to what it did
count; null elsewhere.

`sample` numbers the answers of one row, from 0; a row that was rejected before it was asked is one line with 0.
`merged_into` names the row whose answer stands here: its sample of the same number, or its only one.

`repaired` names what was mended to read the calls of an answer that breaks its model's format (docs/api.md lists the
names); null where nothing was.
"""

LEDGER_SCHEMA = pa.schema(
    [
        pa.field("run_id", pa.string()),
        pa.field("shard", pa.string()),
        pa.field("custom_id", pa.string()),
        pa.field("source_file", pa.string()),
        pa.field("source_row", pa.int64()),
        pa.field("attempt", pa.int32()),
        pa.field("outcome", pa.string()),
        pa.field("tenant", pa.string()),
        pa.field("cost_center", pa.string()),
        pa.field("provider", pa.string()),
        pa.field("model", pa.string()),
        pa.field("model_revision", pa.string()),
        pa.field("started_at", pa.timestamp("us", tz="UTC")),
        pa.field("latency_ms", pa.float64()),
        pa.field("cache_hit_tokens", pa.int64()),
        pa.field("cache_miss_tokens", pa.int64()),
        pa.field("visible_output_tokens", pa.int64()),
        pa.field("reasoning_tokens", pa.int64()),
        pa.field("cache_hit_price", MONEY),
        pa.field("cache_miss_price", MONEY),
        pa.field("output_price", MONEY),
        pa.field("cost", MONEY),
        pa.field("cost_allocated", MONEY),
        pa.field("currency", pa.string()),
        pa.field("cost_basis", pa.string()),
        pa.field("price_book", pa.string()),
        pa.field("price_line", pa.string()),
        pa.field("cache_hit_cost", MONEY),
        pa.field("cache_miss_cost", MONEY),
        pa.field("visible_output_cost", MONEY),
        pa.field("reasoning_cost", MONEY),
        pa.field("finish_reason", pa.string()),
        pa.field("error_type", pa.string()),
        pa.field("accelerator_s", pa.float64()),
        pa.field("journal", pa.string()),
        pa.field("tags", pa.map_(pa.string(), pa.string())),
        pa.field("num_lost_calls", pa.int32()),
        pa.field("lost_cost_at_most", MONEY),
        pa.field("usage_status", pa.string()),
        pa.field("estimated_prompt_tokens", pa.int64()),
        pa.field("estimated_completion_tokens", pa.int64()),
        pa.field("sample", pa.int32()),
    ]
)
"""One line per attempt at a request, with disjoint token classes; prices are per 1,000,000 tokens.

`outcome` is `answered`, `rejected` (billed, but no valid answer) or `wasted` (billed in a shard attempt that was
abandoned). With unknown cached tokens, `cache_hit_tokens` is null and all prompt tokens are `cache_miss_tokens`, with
`cost_basis = "upper_bound"`. The amounts of the four classes sum to `cost`. `accelerator_s` is this line's share of
the engine's seconds, by computed tokens; null if the engine does not count them. `journal` names the file that
recorded a remote answer on arrival. `tags` holds the non-null columns of `[accounting] tag_columns`. `num_lost_calls`
counts the attempt's calls that returned no usage though the provider may have worked on them; `lost_cost_at_most` is
the most it may bill for them, in `currency`, and is part of no other amount; null without a price. Token classes that
the provider did not count are null, as is the cost, and `estimated_...` stands beside them. With `usage_status`
`contradictory`, cached tokens beyond the prompt are added to `cache_miss_tokens` (hits are unknown), reasoning tokens
beyond the output stand beside it, and `cost_basis` is `upper_bound`.
"""

PARTIAL_SCHEMA = pa.schema(
    [
        *LEDGER_SCHEMA,
        pa.field("output_text", pa.string()),
        pa.field("reasoning_content", pa.string()),
        pa.field("tool_calls", TOOL_CALLS),
        pa.field("error_message", pa.string()),
    ]
)
"""A line of `partial/`: a journaled answer of a shard that is not committed, as the ledger's line and its text.

`outcome` is `journaled`. The answer is not validated yet; the next attempt of the run uses it or, if another one was
kept for the same request, turns the line to `wasted`. `error_type` is set where the provider answered with a failure
that used tokens, or where the request was given up at a stop.
"""

PLAN_SCHEMA = pa.schema(
    [
        pa.field("custom_id", pa.string()),
        pa.field("source_file", pa.string()),
        pa.field("source_row", pa.int64()),
        pa.field("unit", pa.int32()),
        pa.field("scope", pa.string()),
        pa.field("num_rows", pa.int64()),
        pa.field("prefix_key", pa.large_binary()),
        pa.field("num_prompt_tokens", pa.int32()),
        pa.field("messages", pa.large_string()),
        pa.field("sampling", pa.string()),
        pa.field("options", pa.string()),
        pa.field("tenant", pa.string()),
        pa.field("cost_center", pa.string()),
        pa.field("error_stage", pa.string()),
        pa.field("error_type", pa.string()),
        pa.field("error_message", pa.string()),
        pa.field("merged_into", pa.string()),
        pa.field("sample", pa.int32()),
    ]
)
"""A planned row, before its `passthrough` struct: a request in `prefix_key` (see `moebeam.model_runner.prefix_tree`),
`messages` and `sampling` (canonical JSON) and `options` (`moebeam.schemas.chat_options`; null means the job's own), or
a reject in the `error_*` columns, never both. `unit` is the ordinal of the input unit (file, row group), `source_row`
the row's index in its file. A request is one answer of a row: its number is `sample`; a reject covers the whole row."""

PASSTHROUGH = "passthrough"
OUTPUT = "output"
"""Name of the typed answer column; a job with a schema has it between `RESULT_SCHEMA` and the passthrough columns."""
INPUT = "input"

READ_SCHEMA = pa.schema(
    [
        PLAN_SCHEMA.field(name)
        for name in (
            "custom_id",
            "source_file",
            "source_row",
            "unit",
            "scope",
            "num_rows",
            "tenant",
            "cost_center",
            "error_stage",
            "error_type",
            "error_message",
        )
    ]
)
"""A row as read, before its `input` struct (the prompt's columns) and its `passthrough` struct."""


def result_schema(passthrough: "Iterable[pa.Field[Any]]", output: pa.DataType | None = None) -> pa.Schema:
    """`RESULT_SCHEMA`, then the typed answer column if the job has a schema, then the passthrough columns.

    Args:
        passthrough: plain fields that note what the input declares them to be (`moebeam.schemas.column_types`).
    """
    typed = [] if output is None else [pa.field(OUTPUT, output)]
    return pa.schema([*RESULT_SCHEMA, *typed, *map(restored_field, passthrough)])


def plan_schema(passthrough: "Iterable[pa.Field[Any]]") -> pa.Schema:
    """`PLAN_SCHEMA`, then the passthrough columns as one struct."""
    return pa.schema([*PLAN_SCHEMA, pa.field(PASSTHROUGH, pa.struct(list(passthrough)))])


def read_schema(input_fields: "Iterable[pa.Field[Any]]", passthrough: "Iterable[pa.Field[Any]]") -> pa.Schema:
    """`READ_SCHEMA`, then one struct of the prompt's columns and one of the passthrough columns."""
    return pa.schema(
        [
            *READ_SCHEMA,
            pa.field(INPUT, pa.struct(list(input_fields))),
            pa.field(PASSTHROUGH, pa.struct(list(passthrough))),
        ]
    )


Table: TypeAlias = Literal["results", "rejects", "ledger"]


TABLES: tuple[Table, ...] = ("results", "rejects", "ledger")
