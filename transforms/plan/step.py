"""*plan*: rendered rows become shards, contiguous ranges in token order, kept on the store.

Before it: *render*. After it: *answer*. The number of shards and their borders depend on the input and the job alone.
Sorted runs go to the store; their samples divide the order of all rows into ranges that one worker can sort; a worker
then merges its range of every run, marks duplicates of ids and of requests, and cuts it into shards by what their rows
cost in that order. Each is written to `_moebeam/plan/<shard>.arrow`.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import apache_beam as beam
import pyarrow as pa
from apache_beam.pvalue import AsList
from apache_beam.transforms.window import GlobalWindow
from apache_beam.utils.windowed_value import WindowedValue

from moebeam.schemas.arrow import list_values
from moebeam.transforms.beam.coders import register_record
from moebeam.transforms.beam.counters import add_to_counters
from moebeam.transforms.beam.late_spec import LateSpec, call_with, do_with
from moebeam.transforms.durable.failure import record_failure
from moebeam.transforms.durable.progress import ProgressWriter, ShardProgress
from moebeam.transforms.durable.stop import check_planning
from moebeam.transforms.plan.build_shards import PlanSpec, build_shards, write_plan
from moebeam.transforms.plan.duplicate_ids import digest_ids, find_duplicates
from moebeam.transforms.plan.plan_record import PlannedShard, PlanRecord, read_plan
from moebeam.transforms.plan.shard_ranges import ShardRange, cut_ranges
from moebeam.transforms.plan.sorted_runs import (
    MAX_SORTED_RUN_BYTES,
    RunFile,
    run_name,
    write_runs,
)

for record_type in (PlannedShard, PlanRecord, RunFile, ShardRange):
    register_record(record_type)


class FindDuplicates(beam.PTransform[Any, Any]):
    """Batches of rows as read -> (unit, rows of that unit whose id came before)."""

    def expand(self, pcoll: "beam.PCollection[pa.RecordBatch]") -> "beam.PCollection[tuple[int, list[int]]]":
        found: Any = (
            pcoll
            | "Digest" >> beam.FlatMap(digest_ids).with_output_types(tuple[int, bytes])
            | "GroupByBucket" >> beam.GroupByKey()
            | "Compare" >> beam.FlatMap(_compare_ids).with_output_types(tuple[int, list[int]])
        )
        return found


def _compare_ids(bucket: tuple[int, Iterable[bytes]]) -> Iterator[tuple[int, list[int]]]:
    yield from find_duplicates(bucket[1]).items()


class PlanShards(beam.PTransform[Any, Any]):
    """Batches of planned rows (and duplicate ids, where rows have ids) -> planned shards on the store."""

    def __init__(
        self, spec: PlanSpec | LateSpec[PlanSpec], duplicates: "beam.PCollection[tuple[int, list[int]]] | None"
    ) -> None:
        super().__init__()
        self._spec = spec
        self._duplicates = duplicates

    def expand(self, pcoll: "beam.PCollection[pa.RecordBatch]") -> "beam.PCollection[PlannedShard]":
        spec = self._spec
        duplicates: Any = AsList(self._duplicates) if self._duplicates is not None else []
        planned: Any = (
            pcoll
            | "WriteRuns" >> beam.ParDo(*do_with(_WriteRuns, spec)).with_output_types(RunFile)
            | "GatherRuns" >> beam.combiners.ToList()
            | "CutRanges" >> beam.FlatMap(*call_with(_cut_ranges, spec)).with_output_types(ShardRange)
            | "SpreadRanges" >> beam.Reshuffle()
            | "BuildShards" >> beam.ParDo(*do_with(_BuildShards, spec), duplicates).with_output_types(PlannedShard)
            | "GatherShards" >> beam.combiners.ToList()
            | "WritePlan" >> beam.FlatMap(*call_with(_write_plan, spec)).with_output_types(PlannedShard)
        )
        return planned


def _cut_ranges(runs: Sequence[RunFile], spec: PlanSpec) -> Iterator[ShardRange]:
    if not spec.is_planned:
        yield from cut_ranges(runs, spec.layout)


def _write_plan(shards: Sequence[PlannedShard], spec: PlanSpec) -> Iterator[PlannedShard]:
    if not spec.is_planned:
        yield from write_plan(shards, spec.layout)


class _WriteRuns(beam.DoFn):
    """Collects the batches of one group of input units until a run is full."""

    def __init__(self, spec: PlanSpec) -> None:
        self._spec = spec

    def start_bundle(self) -> None:
        self._batches: list[pa.RecordBatch] = []
        self._num_bytes = self._num_rows = 0
        self._progress = ProgressWriter(self._spec.layout, "plan")

    def process(self, element: pa.RecordBatch) -> Iterator[RunFile]:
        # Reading and rendering are fused with this step, so that they end with it.
        check_planning(self._spec.layout)
        if self._batches and self._find_group(element) != self._find_group(self._batches[0]):
            yield from self._flush()
        self._batches.append(element)
        self._num_bytes += element.nbytes
        self._num_rows += list_values(element, "sample").count(0)
        if self._progress.is_due(self._run_name()):
            self._write_progress()
        if self._num_bytes >= MAX_SORTED_RUN_BYTES:
            yield from self._flush()

    def finish_bundle(self) -> "Iterator[WindowedValue]":
        if self._batches:
            for run in self._flush():
                yield WindowedValue(run, GlobalWindow().max_timestamp(), (GlobalWindow(),))

    def _flush(self) -> list[RunFile]:
        layout = self._spec.layout
        with record_failure(layout, "plan"):
            try:
                runs = list(write_runs(self._batches, layout, self._spec.section))
            except FileNotFoundError:
                # Another launcher has finished this plan and removed the folder of its runs; `cut_ranges` takes it.
                if read_plan(layout) is None:
                    raise
                runs = []
        self._write_progress()
        self._batches, self._num_bytes, self._num_rows = [], 0, 0
        return runs

    def _find_group(self, batch: pa.RecordBatch) -> int:
        return bisect_right(self._spec.group_starts, int(batch.column("unit")[0].as_py()))

    def _write_progress(self) -> None:
        self._progress.write(self._run_name(), ShardProgress(rows_done=self._num_rows))

    def _run_name(self) -> str:
        return run_name(self._batches[0])


class _BuildShards(beam.DoFn):
    def __init__(self, spec: PlanSpec) -> None:
        self._spec = spec

    def process(self, element: ShardRange, duplicates: list[tuple[int, list[int]]]) -> Iterator[PlannedShard]:
        check_planning(self._spec.layout)
        by_unit: dict[int, set[int]] = {}
        for unit, rows in duplicates:
            by_unit.setdefault(unit, set()).update(rows)
        with record_failure(self._spec.layout, "plan"):
            shards = self._build(element, by_unit)
        num_rows, num_requests = (
            sum(getattr(shard, name) for shard in shards) for name in ("num_rows", "num_requests")
        )
        add_to_counters("plan", {"num_shards": len(shards), "num_rows": num_rows, "num_requests": num_requests})
        yield from shards

    def _build(self, element: ShardRange, duplicates: Mapping[int, set[int]]) -> list[PlannedShard]:
        try:
            if element.runs:
                return build_shards(element, self._spec, duplicates)
        except FileNotFoundError:
            if read_plan(self._spec.layout) is None:
                raise
        plan = read_plan(self._spec.layout)
        assert plan is not None, f"range {element.shard} has no runs and no plan"
        return [shard for shard in plan.shards if element.holds(shard.shard)]
