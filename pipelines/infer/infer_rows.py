"""The way of somebody else's rows: keep -> open -> read -> render -> plan -> answer -> publish -> rows of tables.

The run is opened by a step, because its rows are known only by then: the step claims the folder and makes the job's
parts, which reach all later steps as a side input. Whatever runs twice finds what it did before.
"""

import json
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import apache_beam as beam
import pyarrow.parquet as pq
from apache_beam.pvalue import AsSingleton

from moebeam.pipelines.infer.row_types import BeamType, make_row_type, read_rows
from moebeam.pipelines.main_job import MainJob
from moebeam.schemas.errors import JobInterrupted
from moebeam.schemas.store import storage
from moebeam.schemas.store.checked_file import open_checked
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.schemas.tables import Table
from moebeam.transforms.answer.step import AnswerShards
from moebeam.transforms.beam.late_spec import LateSpec
from moebeam.transforms.keep.cut_files import FileCut
from moebeam.transforms.keep.row_batches import RowColumns
from moebeam.transforms.keep.step import KeepRows
from moebeam.transforms.plan.plan_record import PlannedShard
from moebeam.transforms.plan.step import FindDuplicates, PlanShards
from moebeam.transforms.publish.step import PublishRun
from moebeam.transforms.read.input_scan import UnitGroup
from moebeam.transforms.read.step import ReadGroups
from moebeam.transforms.render.step import RenderPrompts

OpenRun: TypeAlias = Callable[[FileCut], MainJob]
"""Claims the folder for the kept rows and makes the parts of the job; picklable, and the same when called again."""


class Answers(NamedTuple):
    """Rows of a run's tables, as typed Beam rows with the columns of `results/`, `rejects/` and `ledger/`."""

    results: Any
    rejects: Any
    ledger: Any


@dataclass(frozen=True, slots=True)
class InferSpec:
    """What is known of a run before its rows are.

    Attributes:
        has_ids: whether rows bring ids of their own, which may repeat.
        resources: what workers need to answer, by the names of Beam's resource hints.
        fields: of each table's rows.
    """

    layout: RunLayout
    columns: RowColumns
    open_run: OpenRun
    has_ids: bool
    resources: Mapping[str, str]
    fields: Mapping[Table, Sequence[tuple[str, BeamType]]]


class InferRows(beam.PTransform[Any, Any]):
    """Rows -> `Answers`, after the manifest is written."""

    def __init__(self, spec: InferSpec) -> None:
        super().__init__()
        self._spec = spec

    def expand(self, pcoll: "beam.PCollection[Any]") -> Any:
        spec = self._spec
        kept = pcoll | "Keep" >> KeepRows(spec.layout, spec.columns)
        opened: Any = kept | "Open" >> beam.Map(_open, spec.open_run).with_output_types(bytes)
        manifest = self._run(opened)
        files: Any = manifest | "ListFiles" >> beam.FlatMap(_list_files, spec.layout).with_output_types(
            tuple[str, str, str]
        )
        return Answers(*(self._read(files, table) for table in ("results", "rejects", "ledger")))

    def _run(self, opened: Any) -> Any:
        """The stages of `moebeam.pipelines.main_job.build`, over a job that comes late."""
        spec = self._spec
        job = AsSingleton(opened)

        def late(part: str) -> LateSpec[Any]:
            return LateSpec(job, part, spec.layout)

        groups = opened | "ListUnits" >> beam.FlatMap(_list_groups).with_output_types(UnitGroup)
        rows = groups | "Read" >> ReadGroups(late("columns"), spec.layout)
        duplicates = rows | "FindDuplicates" >> FindDuplicates() if spec.has_ids else None
        requests = rows | "Render" >> RenderPrompts(late("render"))
        planned = requests | "Plan" >> PlanShards(late("plan"), duplicates)
        reused = opened | "ReusePlan" >> beam.FlatMap(_list_planned).with_output_types(PlannedShard)
        shards = (planned, reused) | "Shards" >> beam.Flatten()
        commits = shards | "Answer" >> AnswerShards(late("answer"), spec.resources)
        return commits | "Publish" >> PublishRun(late("publish"))

    def _read(self, files: Any, table: Table) -> Any:
        row_type = make_row_type(self._spec.fields[table])
        return (
            files
            | f"Only_{table}" >> beam.Filter(_is_of, table)
            | f"Spread_{table}" >> beam.Reshuffle()
            | f"Read_{table}" >> beam.ParDo(_ReadTable(row_type)).with_output_types(row_type)
        )


def _open(cut: FileCut, open_run: OpenRun) -> bytes:
    return pickle.dumps(open_run(cut))


def _list_groups(pickled: bytes) -> Iterator[UnitGroup]:
    job: MainJob = pickle.loads(pickled)
    if job.planned is None:
        yield from job.scan.groups


def _list_planned(pickled: bytes) -> Iterator[PlannedShard]:
    job: MainJob = pickle.loads(pickled)
    if job.planned is not None:
        yield from job.planned.shards


def _list_files(manifest: str, layout: RunLayout) -> Iterator[tuple[str, str, str]]:
    """(table, path, SHA-256) of each file of a complete run.

    Raises:
        JobInterrupted: the run was stopped by a limit; others would take the part for the whole.
    """
    found = json.loads(manifest)
    if found["status"] != "complete":
        raise JobInterrupted(
            f"{layout.output}: {found.get('reason_message') or 'stopped'}; {found['num_committed_shards']} of "
            f"{found['num_shards']} shards are answered and kept; run the pipeline again over the same [output] path "
            "to go on"
        )
    for table, files in found["files"].items():
        for file in files:
            yield table, storage.join(layout.output, file["path"]), file["sha256"]


def _is_of(file: tuple[str, str, str], table: str) -> bool:
    return file[0] == table


class _ReadTable(beam.DoFn):
    def __init__(self, row_type: BeamType) -> None:
        self._row_type = row_type

    def process(self, element: tuple[str, str, str]) -> Iterator[Any]:
        _, path, sha256 = element
        with open_checked(path, sha256) as source:
            yield from read_rows(pq.read_table(source), self._row_type)
