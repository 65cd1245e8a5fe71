"""Turns a range of rows in token order into shards: merges runs and requests, rejects repeated ids, cuts, writes.

The core of *plan*; `step.py` wraps it for Beam.
"""

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from moebeam.model_runner.prefix_tree import common_prefix_lengths, num_tree_tokens
from moebeam.schemas.arrow import list_values, replace_column
from moebeam.schemas.errors import DuplicateId
from moebeam.schemas.job.sections import PlanSection
from moebeam.schemas.records import parse_sampling_json
from moebeam.schemas.store import storage
from moebeam.schemas.store.record_json import RecordJson
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.schemas.tables import plan_schema
from moebeam.transforms.durable.failure import record_failure
from moebeam.transforms.plan.plan_record import PlannedShard, PlanRecord
from moebeam.transforms.plan.row_order import RowKey, can_merge, sort_rows
from moebeam.transforms.plan.shard_cut import RowCosts, cut_rows, estimate_output_tokens
from moebeam.transforms.plan.shard_ranges import ShardRange
from moebeam.transforms.plan.sorted_runs import read_range, read_rows, row_bytes, write_rows


@dataclass(frozen=True, slots=True)
class PlanSpec:
    """What the plan's steps need from the job.

    Attributes:
        group_starts: the first input unit of each group of units; a run never holds rows of two groups.
    """

    section: PlanSection
    layout: RunLayout
    passthrough: tuple["pa.Field[Any]", ...]
    group_starts: tuple[int, ...] = (0,)


def build_shards(element: ShardRange, spec: PlanSpec, duplicates: Mapping[int, set[int]]) -> list[PlannedShard]:
    """Merge a range of every run, reject repeated ids, cut it, and write each shard's plan; an empty range makes none.

    Args:
        duplicates: input unit -> rows of its file whose id came before.
    """
    layout, schema = spec.layout, plan_schema(spec.passthrough)
    if element.is_rejects:
        table = pa.concat_tables([read_rows(layout.sorted_run_file(run)) for run in element.runs])
        return [write_shard(layout, element.shard, table.cast(schema))]
    lower, upper = RowKey.from_text(element.lower), RowKey.from_text(element.upper) if element.upper else None
    parts = [read_range(layout, run, lower, upper) for run in element.runs]
    table = sort_rows(pa.concat_tables([part for part in parts if part.num_rows] or parts[:1]))
    del parts
    table = _reject_duplicate_ids(table, duplicates).cast(schema)
    keys = list_values(table, "prefix_key")
    table, can_begin = _merge_requests(table, keys, spec.section)
    costs = _estimate_costs(table, keys, can_begin)
    del keys
    starts = cut_rows(costs, spec.section)
    return [
        write_shard(layout, element.shard_name(number), table.slice(start, end - start))
        for number, (start, end) in enumerate(pairwise([*starts, table.num_rows]))
    ]


def _estimate_costs(table: pa.Table, keys: Sequence[bytes], can_begin: npt.NDArray[np.bool_]) -> RowCosts:
    """Cost of each planned row, given its neighbours in token order."""
    asked = np.flatnonzero(_is_asked(table))
    texts = list_values(table, "sampling")
    outputs = {text: estimate_output_tokens(parse_sampling_json(text).max_tokens) for text in set(texts)}
    shared = common_prefix_lengths([keys[row] for row in asked.tolist()])
    tokens = np.zeros(table.num_rows, dtype=np.int64)
    tokens[asked] = table.column("num_prompt_tokens").to_numpy()[asked] - shared
    tokens[asked] += np.array([outputs[texts[row]] for row in asked.tolist()], dtype=np.int64)
    # A row that is not asked gets the next asked row's value: a shard's tree begins with that one.
    following = np.searchsorted(asked, np.arange(table.num_rows))
    return RowCosts(
        tokens=tokens,
        shared_tokens=np.append(shared, 0)[following],
        num_rows=np.ones(table.num_rows, dtype=np.int64),
        num_bytes=row_bytes(table),
        can_begin=can_begin,
    )


def _is_asked(table: pa.Table) -> Any:
    """A mask of the rows to ask: neither rejected nor merged into another."""
    return pc.and_(pc.is_null(table.column("error_type")), pc.is_null(table.column("merged_into")))


def write_shard(layout: RunLayout, shard: str, table: pa.Table) -> PlannedShard:
    """Write one shard's plan: rows of `moebeam.schemas.tables.plan_schema` in token order."""
    write_rows(layout.shard_plan(shard), table)
    requests = table.select(["prefix_key", "num_prompt_tokens"]).filter(_is_asked(table))
    keys = list_values(requests, "prefix_key")
    lengths = requests.column("num_prompt_tokens").to_numpy().astype(np.int64)
    return PlannedShard(
        shard,
        num_rows=table.num_rows,
        num_requests=len(keys),
        num_rejects=table.num_rows - table.column("error_type").null_count,
        num_prompt_tokens=int(lengths.sum()),
        num_tree_tokens=num_tree_tokens(lengths, common_prefix_lengths(keys)),
    )


def _reject_duplicate_ids(table: pa.Table, duplicates: Mapping[int, set[int]]) -> pa.Table:
    if not duplicates:
        return table
    rows = zip(list_values(table, "unit"), list_values(table, "source_row"), strict=True)
    is_duplicate = [row in duplicates.get(unit, ()) for unit, row in rows]
    if not any(is_duplicate):
        return table
    ids = list_values(table, "custom_id")
    error = DuplicateId
    columns = {
        "error_stage": [error.error_stage if marked else None for marked in is_duplicate],
        "error_type": [error.error_type if marked else None for marked in is_duplicate],
        "error_message": [
            f"id {custom_id!r}: expected every id once, found it on an earlier row" if marked else None
            for marked, custom_id in zip(is_duplicate, ids, strict=True)
        ],
    }
    for name, values in columns.items():
        table = replace_column(table, name, values)
    return table


def _merge_requests(
    table: pa.Table, keys: Sequence[bytes], section: PlanSection
) -> tuple[pa.Table, npt.NDArray[np.bool_]]:
    """Point each request that repeats the one before it at its first copy; `table` is in `RUN_ORDER`.

    Returns:
        The table, and whether a shard may begin at each row: not at one that repeats a mergeable request.
    """
    can_begin = np.ones(table.num_rows, dtype=np.bool_)
    if section.merge == "never":
        return table, can_begin
    mergeable = {text: can_merge(text, section) for text in set(list_values(table, "sampling"))}
    names = ("sampling", "options", "cost_center", "custom_id", "error_type")
    merged: list[str | None] = []
    before: tuple[Any, ...] = ()
    first_id: str | None = None
    for row, (key, sampling, options, cost_center, custom_id, error) in enumerate(
        zip(keys, *(list_values(table, name) for name in names), strict=True)
    ):
        request = (key, sampling, options, cost_center)
        can_begin[row] = not mergeable[sampling] or request != before
        if can_begin[row]:
            before, first_id = request, None
        merged.append(first_id if error is None else None)
        if error is None and first_id is None:
            first_id = custom_id
    return replace_column(table, "merged_into", merged), can_begin


def write_plan(shards: Iterable[PlannedShard], layout: RunLayout) -> tuple[PlannedShard, ...]:
    """Declare the plan complete, then drop the runs that it was built from."""
    record = PlanRecord(tuple(sorted(shards, key=lambda shard: shard.shard)))
    with record_failure(layout, "plan"):
        storage.write_whole(layout.plan_record, RecordJson(PlanRecord).encode(record))
        with contextlib.suppress(OSError):
            # Another launcher may be writing the same runs; *publish* removes what is left.
            storage.remove_tree(layout.sorted_runs)
    return record.shards
