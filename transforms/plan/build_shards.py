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
from moebeam.schemas.errors import CommitError, DuplicateId
from moebeam.schemas.job.sections import PlanSection
from moebeam.schemas.records import parse_sampling_json
from moebeam.schemas.store import storage
from moebeam.schemas.store.record_json import encode_record, read_record
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
        is_planned: an earlier attempt has planned, and no row comes here.
    """

    section: PlanSection
    layout: RunLayout
    passthrough: tuple["pa.Field[Any]", ...]
    group_starts: tuple[int, ...] = (0,)
    is_planned: bool = False


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
    return describe_shard(shard, table)


def describe_shard(shard: str, table: pa.Table) -> PlannedShard:
    """A shard's line in the record of the plan, from its rows."""
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
        num_further_samples=_count_further_samples(table),
    )


def _count_further_samples(table: pa.Table) -> int:
    """Planned rows beyond the first of their row of the input; all of a row's are neighbours."""
    units, rows = (table.column(name).to_numpy() for name in ("unit", "source_row"))
    return int(np.count_nonzero((units[1:] == units[:-1]) & (rows[1:] == rows[:-1])))


def _reject_duplicate_ids(table: pa.Table, duplicates: Mapping[int, set[int]]) -> pa.Table:
    """Make rows whose id came before rejects, one for all samples of a row."""
    if not duplicates:
        return table
    rows = zip(list_values(table, "unit"), list_values(table, "source_row"), strict=True)
    found = np.array([row in duplicates.get(unit, ()) for unit, row in rows], dtype=np.bool_)
    if not found.any():
        return table
    is_kept = ~found | np.equal(list_values(table, "sample"), 0)
    table = table.filter(pa.array(is_kept))
    is_duplicate = found[is_kept].tolist()
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

    The samples of a row are copies where sampling is greedy. Where rows are merged that are not, each sample is a copy
    of the first row's sample of its number.

    Returns:
        The table, and whether a shard may begin at each row: not at one that repeats a mergeable request, nor between
        the samples of a row, which share a prompt.
    """
    samples = list_values(table, "sample")
    can_begin = np.equal(samples, 0)
    if section.merge == "never":
        return table, can_begin
    texts = set(list_values(table, "sampling"))
    mergeable = {text: can_merge(text, section) for text in texts}
    greedy = {text: parse_sampling_json(text).is_greedy for text in texts}
    names = ("sampling", "options", "cost_center", "custom_id", "error_type")
    merged: list[str | None] = []
    before: tuple[Any, ...] = ()
    first_ids: dict[int, str] = {}
    for row, (key, sampling, options, cost_center, custom_id, error) in enumerate(
        zip(keys, *(list_values(table, name) for name in names), strict=True)
    ):
        request = (key, sampling, options, cost_center)
        is_copy = mergeable[sampling] and request == before
        if not is_copy:
            before, first_ids = request, {}
        can_begin[row] &= not is_copy
        number = 0 if greedy[sampling] else samples[row]
        merged.append(first_ids.get(number) if error is None and mergeable[sampling] else None)
        if error is None:
            first_ids.setdefault(number, custom_id)
    return replace_column(table, "merged_into", merged), can_begin


def write_plan(shards: Iterable[PlannedShard], layout: RunLayout) -> tuple[PlannedShard, ...]:
    """Declare the plan complete, then drop the runs that it was built from.

    Raises:
        CommitError: shards were committed under another plan, which this one was to replace.
    """
    record = PlanRecord(tuple(sorted(shards, key=lambda shard: shard.shard)))
    with record_failure(layout, "plan"):
        _check_same(record, layout)
        storage.write_whole(layout.plan_record, encode_record(record))
        storage.remove_files([layout.plan_before])
        with contextlib.suppress(OSError):
            # Another launcher may be writing the same runs; *publish* removes what is left.
            storage.remove_tree(layout.sorted_runs)
    return record.shards


def _check_same(record: PlanRecord, layout: RunLayout) -> None:
    """Hold a plan that was made again against the one that the committed shards were answered with."""
    before = read_record(layout.plan_before, PlanRecord, "the record of a plan")
    if before is None or before == record:
        return
    found = {shard.shard: shard for shard in record.shards}
    shard = next((one for one in before.shards if found.get(one.shard) != one), before.shards[0])
    raise CommitError(
        f"{layout.plan}: expected to make the damaged plan again as it was, found {found.get(shard.shard)} in place of "
        f"{shard}: the input or the program is not what it was; run the job into another output"
    )
