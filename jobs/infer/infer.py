"""`Infer`: a job as a transform, between any reads and any writes of somebody else's pipeline."""

import logging
import tempfile
import uuid
from collections.abc import Sequence
from typing import Any

import apache_beam as beam
import pyarrow as pa
from apache_beam.options.pipeline_options import GoogleCloudOptions, PipelineOptions

from moebeam.jobs.check.input_columns import list_needed_columns
from moebeam.jobs.check.job_source import JobSource, load_job_for_frame
from moebeam.jobs.check.preflight import CheckedParts, check_parts
from moebeam.jobs.infer.open_run import RunOpener
from moebeam.pipelines.infer.infer_rows import InferRows, InferSpec
from moebeam.pipelines.infer.row_types import BeamType, is_field_name, list_fields, make_optional, to_arrow, to_beam
from moebeam.schemas.errors import InputPatternError, JobFileError
from moebeam.schemas.job.sections import Job
from moebeam.schemas.store import storage
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.schemas.tables import LEDGER_SCHEMA, OUTPUT, RESULT_SCHEMA
from moebeam.transforms.keep.row_batches import PROBLEM, ROW_ID, RowColumns
from moebeam.transforms.render.prompt_template import PromptTemplate

_LOGGER = logging.getLogger(__name__)


class Infer(beam.PTransform[Any, Any]):
    """Rows -> `Answers(results, rejects, ledger)`, three collections of typed Beam rows.

    Args:
        job: a `Job`, the path of a job file, or a job file's sections as a mapping. Its `[input] path` is ignored,
            and an `[output] table` is refused. Without an `[output] path` the run's folder is below
            `--temp_location`, or a temporary one on this machine.
        schema: of rows that have none of their own: dicts, Arrow record batches and pandas frames.
    """

    def __init__(self, job: JobSource, schema: pa.Schema | None = None) -> None:
        super().__init__()
        # Read here, so that a wrong job is refused where it is written.
        self._job = load_job_for_frame(job, _NO_OUTPUT)
        _refuse_table(self._job)
        self._schema = schema

    def expand(self, pcoll: "beam.PCollection[Any]") -> Any:
        _refuse_unbounded(pcoll)
        job = self._name_output(pcoll.pipeline.options)
        fields = _list_fields(pcoll.element_type, self._schema)
        job = _name_columns(job, fields)
        types = {name: arrow for name, beam_type in fields or () if (arrow := to_arrow(beam_type)) is not None}
        if self._schema is not None:
            types.update(zip(self._schema.names, self._schema.types, strict=True))
        known = [pa.field(name, types.get(name, pa.string())) for name, _ in fields or ()]
        parts = check_parts(job, None if fields is None else [*known, pa.field(ROW_ID, pa.string())])
        columns = RowColumns(_choose_columns(job, fields), types, is_complete=fields is not None)
        return pcoll | InferRows(
            InferSpec(
                layout=RunLayout(job.output.path),
                columns=columns,
                open_run=RunOpener(job, parts, columns),
                has_ids=job.input.id_column != ROW_ID,
                resources=job.model.resource_hints,
                fields={
                    "results": _list_result_fields(job, parts, dict(fields or ())),
                    "rejects": _list_result_fields(job, parts, dict(fields or ())),
                    "ledger": [(field.name, make_optional(to_beam(field.type))) for field in LEDGER_SCHEMA],
                },
            )
        )

    def _name_output(self, options: PipelineOptions) -> Job:
        """The job with a folder for its run."""
        job = self._job
        if job.output.path != _NO_OUTPUT:
            return job
        temporary: str | None = options.view_as(GoogleCloudOptions).temp_location
        runner = (options.get_all_options().get("runner") or "").lower()
        if temporary:
            path = storage.join(temporary, f"moebeam-{uuid.uuid4().hex[:12]}")
        elif any(name in runner for name in _REMOTE_RUNNERS):
            raise JobFileError(
                f"[output] path: missing; workers of {runner} need a folder that all of them reach, here or as "
                "--temp_location"
            )
        else:
            path = storage.join(tempfile.mkdtemp(prefix="moebeam-"), "output")
        _LOGGER.warning("[output] path: the job names none; its run is kept in %s", path)
        return job.model_copy(update={"output": job.output.model_copy(update={"path": path})})


_NO_OUTPUT = "/moebeam-names-the-output-later"
_REMOTE_RUNNERS = ("dataflow", "flink", "spark", "portable")


def _refuse_table(job: Job) -> None:
    if job.output.table is not None:
        raise JobFileError(
            f"[output] table: expected none in a job of Infer, found {job.output.table!r}; write the collections that "
            "Infer returns to tables, or let `moebeam run` commit its run to them"
        )


def _refuse_unbounded(pcoll: "beam.PCollection[Any]") -> None:
    if not getattr(pcoll, "is_bounded", True):
        raise InputPatternError(
            "Infer: expected a bounded collection, found an unbounded one, whose rows have no end to plan for; write "
            "it to files by windows and run a batch pipeline over each, or answer rows one by one with RunInference "
            "and MoebeamModelHandler"
        )


def _list_fields(element_type: BeamType, schema: pa.Schema | None) -> list[tuple[str, BeamType]] | None:
    """The columns that the rows will have; None where nobody has said."""
    if schema is not None:
        return [(field.name, make_optional(to_beam(field.type))) for field in schema]
    return list_fields(element_type)


def _name_columns(job: Job, fields: Sequence[tuple[str, BeamType]] | None) -> Job:
    """The job with the columns that it takes named, `all` of them too, and ids where rows bring none.

    Raises:
        JobFileError: a column is to be passed through whose type or name no Beam row can have.
    """
    section = job.input
    passed: Any = section.passthrough.columns
    names = [name for name, _ in fields or ()]
    if taken := sorted({ROW_ID, PROBLEM} & {*names}):
        raise JobFileError(f"rows: column {taken[0]!r} has a name that is kept for moebeam; rename it")
    if fields is None and (passed == "all" or passed or job.accounting.tag_columns):
        what = "all columns" if passed == "all" else ", ".join(map(repr, passed or job.accounting.tag_columns))
        raise JobFileError(
            f"[input] passthrough: {what} of rows without a schema; name their types by "
            "Infer(job, schema=pa.schema(…)), or make the rows Beam rows"
        )
    if passed == "all":
        passed = tuple(names)
    named = [section.passthrough.name_output(name) for name in dict.fromkeys((*passed, *job.accounting.tag_columns))]
    if odd := [name for name in named if not is_field_name(name)]:
        raise JobFileError(
            f"[input] passthrough: expected names that a Beam row's field can have, found {odd[0]!r}; write "
            f'passthrough = {{ rename = {{ "{odd[0]}" = "…" }} }}'
        )
    update = {
        "passthrough": section.passthrough.model_copy(update={"columns": passed}),
        "id_column": section.id_column or ROW_ID,
    }
    return job.model_copy(update={"input": section.model_copy(update=update)})


def _choose_columns(job: Job, fields: Sequence[tuple[str, BeamType]] | None) -> tuple[str, ...] | None:
    """The columns to keep: those that the job reads; None for all that rows happen to have."""
    needed = list_needed_columns(job, PromptTemplate(job.prompt))
    names = [name for name, _ in fields or ()]
    if needed is None:
        return tuple(names) if fields is not None else None
    return tuple(sorted(needed - {"line", ROW_ID}) if fields is None else (name for name in names if name in needed))


def _list_result_fields(job: Job, parts: CheckedParts, types: dict[str, BeamType]) -> list[tuple[str, BeamType]]:
    """The fields of results and rejects, as of `moebeam.schemas.tables.result_schema`."""
    fields = [(field.name, make_optional(to_beam(field.type))) for field in RESULT_SCHEMA]
    if parts.output_type is not None:
        fields.append((OUTPUT, make_optional(to_beam(parts.output_type.arrow))))
    section = job.input.passthrough
    passed = dict.fromkeys((*section.columns, *job.accounting.tag_columns))
    return [*fields, *((section.name_output(name), make_optional(types[name])) for name in passed if name in types)]
