"""*plan*: rendered rows become shards, contiguous ranges in token order, kept on the store.

Before it: *render*. After it: *answer*. The number of shards and their borders depend on the input and the job alone.
Sorted runs go to the store; their key samples give the borders; each shard then merges its range of every run,
marks duplicates of ids and of requests, and is written to `_moebeam/plan/<shard>.arrow`.
"""

import contextlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import apache_beam as beam
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from apache_beam.pvalue import AsList
from apache_beam.transforms.window import GlobalWindow
from apache_beam.utils.windowed_value import WindowedValue

from model_runner.prefix_tree import common_prefix_lengths, num_tree_tokens
from schemas import storage
from schemas.arrow import values_of, with_column
from schemas.errors import CommitError, DuplicateId
from schemas.job import PlanSection
from schemas.layout import RunLayout
from schemas.tables import plan_schema
from transforms.coders import register_record
from transforms.failure import recorded_failure
from transforms.heartbeat import Beat, Heartbeat
from transforms.plan_record import PlannedShard, PlanRecord, read_plan
from transforms.record_json import RecordJson
from transforms.renderer import sampling_of
from transforms.sorted_runs import (
    MAX_RUN_BYTES,
    MAX_SHARD_BYTES,
    SHARD_WEIGHT,
    RunFile,
    read_key_range,
    read_rows,
    read_samples,
    run_name,
    sort_rows,
    write_rows,
    write_runs,
)

register_record(RunFile)
register_record(PlannedShard)
register_record(PlanRecord)

MAX_REJECT_ROWS = 65_536
"""Most rows of a shard that holds rejects only."""


@register_record
@dataclass(frozen=True, slots=True)
class ShardRange:
    """What a shard will hold: the rows of `runs` whose key is in `[lower, upper)`.

    Keys are hexadecimal; an empty `upper` means no end. A shard of rejects holds its runs whole.
    """

    shard: str
    lower: str
    upper: str
    runs: tuple[str, ...]
    is_rejects: bool = False


@dataclass(frozen=True, slots=True)
class PlanSpec:
    """What the plan's steps need to know of the job.

    Attributes:
        group_starts: the first input unit of each group of units; a run never holds rows of two groups.
    """

    section: PlanSection
    layout: RunLayout
    passthrough: tuple["pa.Field[Any]", ...]
    group_starts: tuple[int, ...] = (0,)


class PlanShards(beam.PTransform[Any, Any]):
    """Batches of planned rows (and duplicate ids, where rows have ids) -> planned shards on the store."""

    def __init__(self, spec: PlanSpec, duplicates: "beam.PCollection[tuple[int, list[int]]] | None") -> None:
        super().__init__()
        self._spec = spec
        self._duplicates = duplicates

    def expand(self, pcoll: "beam.PCollection[pa.RecordBatch]") -> "beam.PCollection[PlannedShard]":
        spec = self._spec
        duplicates: Any = AsList(self._duplicates) if self._duplicates is not None else []
        planned: Any = (
            pcoll
            | "WriteRuns" >> beam.ParDo(_WriteRuns(spec))
            | "GatherRuns" >> beam.combiners.ToList()
            | "CutShards" >> beam.FlatMap(cut_shards, spec.layout).with_output_types(ShardRange)
            | "SpreadRanges" >> beam.Reshuffle()
            | "BuildShard" >> beam.ParDo(_BuildShard(spec), duplicates)
            | "GatherShards" >> beam.combiners.ToList()
            | "WritePlan" >> beam.FlatMap(write_plan, spec.layout).with_output_types(PlannedShard)
        )
        return planned


class _WriteRuns(beam.DoFn):
    """Collects the batches of one group of input units until a run is full."""

    def __init__(self, spec: PlanSpec) -> None:
        self._spec = spec

    def start_bundle(self) -> None:
        self._batches: list[pa.RecordBatch] = []
        self._num_bytes = 0
        self._heartbeat = Heartbeat(self._spec.layout, "plan")

    def process(self, element: pa.RecordBatch) -> Iterator[RunFile]:
        if self._batches and self._group_of(element) != self._group_of(self._batches[0]):
            yield from self._flush()
        self._batches.append(element)
        self._num_bytes += element.nbytes
        if self._heartbeat.is_due(self._run_name()):
            self._beat()
        if self._num_bytes >= MAX_RUN_BYTES:
            yield from self._flush()

    def finish_bundle(self) -> "Iterator[WindowedValue]":
        if self._batches:
            for run in self._flush():
                yield WindowedValue(run, GlobalWindow().max_timestamp(), (GlobalWindow(),))

    def _flush(self) -> list[RunFile]:
        layout = self._spec.layout
        with recorded_failure(layout, "plan"):
            try:
                runs = list(write_runs(self._batches, layout, self._spec.section))
            except FileNotFoundError:
                # Another launcher has finished this plan and removed the folder of its runs; `cut_shards` takes it.
                if read_plan(layout) is None:
                    raise
                runs = []
        self._beat()
        self._batches, self._num_bytes = [], 0
        return runs

    def _group_of(self, batch: pa.RecordBatch) -> int:
        return bisect_right(self._spec.group_starts, int(batch.column("unit")[0].as_py()))

    def _beat(self) -> None:
        self._heartbeat.beat(self._run_name(), Beat(rows_done=sum(batch.num_rows for batch in self._batches)))

    def _run_name(self) -> str:
        return run_name(self._batches[0])


class _BuildShard(beam.DoFn):
    def __init__(self, spec: PlanSpec) -> None:
        self._spec = spec
        self._num_shards = beam.metrics.Metrics.counter("plan", "num_shards")

    def process(self, element: ShardRange, duplicates: list[tuple[int, list[int]]]) -> Iterator[PlannedShard]:
        by_unit: dict[int, set[int]] = {}
        for unit, rows in duplicates:
            by_unit.setdefault(unit, set()).update(rows)
        self._num_shards.inc()
        with recorded_failure(self._spec.layout, "plan"):
            planned = self._built(element, by_unit)
        yield planned

    def _built(self, shard: ShardRange, duplicates: Mapping[int, set[int]]) -> PlannedShard:
        try:
            if shard.runs:
                return build_shard(shard, self._spec, duplicates)
        except FileNotFoundError:
            if read_plan(self._spec.layout) is None:
                raise
        plan = read_plan(self._spec.layout)
        assert plan is not None, f"shard {shard.shard} has no runs and no plan"
        return next(planned for planned in plan.shards if planned.shard == shard.shard)


def cut_shards(runs: Sequence[RunFile], layout: RunLayout) -> Iterator[ShardRange]:
    """Cut all requests into contiguous ranges of about equal weight; rejects into shards of their own.

    Equal keys are never cut apart. The result does not depend on the order of `runs`. If another launcher has finished
    the same plan meanwhile, and dropped the runs that both wrote, its shards come out, with ranges of no run.
    """
    with recorded_failure(layout, "plan"):
        try:
            ranges = list(_ranges(runs, layout))
        except FileNotFoundError:
            ranges = None
        if (plan := read_plan(layout)) is not None:
            ranges = [ShardRange(shard.shard, "", "", ()) for shard in plan.shards]
        if ranges is None:
            raise CommitError(f"{layout.runs}: expected the runs that were written for the plan, found some missing")
    yield from ranges


def _ranges(runs: Sequence[RunFile], layout: RunLayout) -> Iterator[ShardRange]:
    ordered = sorted(runs, key=lambda run: run.run_id)
    requests = [run for run in ordered if run.kind == "requests"]
    names = tuple(run.run_id for run in requests)
    borders = _borders([read_samples(layout, run) for run in requests])
    for index, lower in enumerate(borders):
        upper = borders[index + 1].hex() if index + 1 < len(borders) else ""
        yield ShardRange(f"s{index:06d}", lower.hex(), upper, names)
    for index, group in enumerate(_reject_groups([run for run in ordered if run.kind == "rejects"])):
        yield ShardRange(f"x{index:06d}", "", "", tuple(run.run_id for run in group), is_rejects=True)


def _borders(samples: Sequence[pa.Table]) -> list[bytes]:
    """The first key of each shard, in order; the first shard begins at the empty key."""
    if not samples:
        return []
    table = pa.concat_tables(samples)
    table = table.sort_by([("key", "ascending"), ("weight", "ascending")])
    weights = table.column("weight").to_numpy()
    num_shards = max(1, -(-int(weights.sum()) // SHARD_WEIGHT))
    middles = np.cumsum(weights) - weights // 2
    targets = [int(weights.sum()) * index // num_shards for index in range(1, num_shards)]
    positions = np.searchsorted(middles, targets, side="left")
    keys = table.column("key")
    first = keys[0].as_py()
    cuts = {keys[int(position)].as_py() for position in positions if position < len(weights)} - {first}
    return [b"", *sorted(cuts)]


def _reject_groups(runs: Sequence[RunFile]) -> Iterator[list[RunFile]]:
    """Runs of rejects, in input order, as many together as a shard may hold."""
    group: list[RunFile] = []
    num_rows = num_bytes = 0
    for run in runs:
        num_rows, num_bytes = num_rows + run.num_rows, num_bytes + run.num_bytes
        if group and (num_rows > MAX_REJECT_ROWS or num_bytes > MAX_SHARD_BYTES):
            yield group
            group, num_rows, num_bytes = [], run.num_rows, run.num_bytes
        group.append(run)
    if group:
        yield group


def build_shard(shard: ShardRange, spec: PlanSpec, duplicates: Mapping[int, set[int]]) -> PlannedShard:
    """Merge a shard's range of every run, mark duplicates, and write the shard's plan.

    Args:
        duplicates: input unit -> rows of its file whose id came before.
    """
    if shard.is_rejects:
        table = pa.concat_tables([read_rows(spec.layout.run_file(run)) for run in shard.runs])
    else:
        lower, upper = bytes.fromhex(shard.lower), bytes.fromhex(shard.upper) if shard.upper else None
        parts = [read_key_range(spec.layout, run, lower, upper) for run in shard.runs]
        table = sort_rows(pa.concat_tables([part for part in parts if part.num_rows] or parts[:1]))
        table = _reject_duplicate_ids(table, duplicates)
        table = _merge_requests(table, spec.section)
    return write_shard(spec.layout, shard.shard, table.cast(plan_schema(spec.passthrough)))


def write_shard(layout: RunLayout, shard: str, table: pa.Table) -> PlannedShard:
    """Write the plan of one shard, rows of `schemas.tables.plan_schema` in token order."""
    write_rows(layout.shard_plan(shard), table)
    is_request = pc.and_(pc.is_null(table.column("error_type")), pc.is_null(table.column("merged_into")))
    requests = table.filter(is_request)
    keys = values_of(requests, "prefix_key")
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
    rows = zip(values_of(table, "unit"), values_of(table, "source_row"), strict=True)
    is_duplicate = [row in duplicates.get(unit, ()) for unit, row in rows]
    if not any(is_duplicate):
        return table
    ids = values_of(table, "custom_id")
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
        table = with_column(table, name, values)
    return table


def _merge_requests(table: pa.Table, section: PlanSection) -> pa.Table:
    """Let each request that repeats the one before it, in a table in `RUN_ORDER`, name that one's first copy."""
    if section.merge == "never":
        return table
    names = ("prefix_key", "sampling", "options", "cost_center", "custom_id", "error_type")
    merged: list[str | None] = []
    first: tuple[Any, ...] = ()
    first_id = ""
    can_merge: dict[str, bool] = {}
    for key, sampling, options, cost_center, custom_id, error in zip(
        *(values_of(table, name) for name in names), strict=True
    ):
        if sampling not in can_merge:
            can_merge[sampling] = section.merge == "always" or sampling_of(sampling).is_greedy
        request = (key, sampling, options, cost_center)
        if error is not None:
            merged.append(None)
        elif request == first and can_merge[sampling]:
            merged.append(first_id)
        else:
            first, first_id = request, custom_id
            merged.append(None)
    return with_column(table, "merged_into", merged)


def write_plan(shards: Iterable[PlannedShard], layout: RunLayout) -> tuple[PlannedShard, ...]:
    """Declare the plan complete, then drop the runs that it was made of."""
    record = PlanRecord(tuple(sorted(shards, key=lambda shard: shard.shard)))
    with recorded_failure(layout, "plan"):
        storage.write_whole(layout.plan_record, RecordJson(PlanRecord).encode(record))
        with contextlib.suppress(OSError):
            # Another launcher may be writing the same runs; *publish* removes whatever is left.
            storage.remove_tree(layout.runs)
    return record.shards
