"""Checks the input columns that a job names, and chooses those to read and to pass through.

Part of `jobs/check/preflight.py`; *read* uses the chosen columns.
"""

import difflib
import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from moebeam.schemas.column_types import declared_field
from moebeam.schemas.column_values import can_print_as_label
from moebeam.schemas.errors import JobError, JobFileError
from moebeam.schemas.job.sections import Job
from moebeam.schemas.store.run_layout import find_frame_digest
from moebeam.schemas.tables import OUTPUT, RESULT_SCHEMA, result_schema
from moebeam.transforms.keep.row_batches import PROBLEM
from moebeam.transforms.read.input_rows import JSONL_INPUT_FIELDS, ReadColumns
from moebeam.transforms.read.input_scan import InputScan
from moebeam.transforms.render.prompt_template import PromptTemplate
from moebeam.transforms.render.template_columns import ROW

_NUM_SHOWN = 3
"""Renamed columns in a message's example."""


def list_needed_columns(job: Job, template: PromptTemplate | None) -> frozenset[str] | None:
    """List the columns that the job reads; None means all."""
    passed = job.input.passthrough.columns
    read = template and template.columns.needed
    if passed == "all" or read is None:
        return None
    single = (
        job.input.id_column,
        job.input.tenant_column,
        job.input.cost_center_column,
        job.prompt.messages_column,
        job.tools.column,
    )
    named = {name for name in single if name is not None}
    return read | named | {*passed, *job.input.passthrough.rename, *job.accounting.tag_columns, "line"}


def find_column_problems(job: Job, scan: InputScan, template: PromptTemplate) -> Iterable[JobError]:
    """Find named columns that are missing, of the wrong type, or that clash with ours."""
    section, prompt = job.input, job.prompt
    if scan.format == "jsonl":
        for key, value in (
            ("[prompt] system", prompt.system),
            ("[prompt] template", prompt.template),
            ("[prompt] messages_column", prompt.messages_column),
            ("[input] id_column", section.id_column),
            ("[input] tenant_column", section.tenant_column),
            ("[input] cost_center_column", section.cost_center_column),
            ("[input] passthrough", section.passthrough.columns or None),
            ("[tools] column", job.tools.column),
            ("[accounting] tag_columns", job.accounting.tag_columns or None),
        ):
            if value is not None:
                yield JobFileError(f"{key}: not for JSONL input, whose lines bring their own ids and messages")
        return
    if prompt.template is None and prompt.messages_column is None:
        yield JobFileError("[prompt]: expected `template` (or `messages_column`), found neither")
    if not scan.names and scan.num_unreadable_files:
        return
    named = [("[prompt] template", name) for name in template.columns.choose(scan.names)]
    named += [
        (f"[input] {key}", name)
        for key, name in (
            ("id_column", section.id_column),
            ("tenant_column", section.tenant_column),
            ("cost_center_column", section.cost_center_column),
        )
        if name is not None
    ]
    if job.tools.column is not None:
        named.append(("[tools] column", job.tools.column))
    if prompt.messages_column is not None:
        named.append(("[prompt] messages_column", prompt.messages_column))
    if section.passthrough.columns != "all":
        named += [("[input] passthrough", name) for name in section.passthrough.columns]
    named += [("[input] passthrough", name) for name in section.passthrough.rename]
    named += [("[accounting] tag_columns", name) for name in job.accounting.tag_columns]
    for key, name in named:
        if name not in scan.names:
            hint = _hint_column(key, name, scan.names)
            yield JobFileError(f"{key}: {_name_source(job)} has no column {name!r}{hint}")
    for key, name in named:
        is_label = key == "[accounting] tag_columns" or (key.endswith("_column") and key.startswith("[input]"))
        if is_label and name in scan.schema.names and not can_print_as_label(scan.schema.field(name)):
            found = declared_field(scan.schema.field(name)).type
            yield JobFileError(f"{key}: expected a column of text, numbers or times, found {name!r} of type {found}")
    yield from _find_name_problems(job, scan)


def _name_source(job: Job) -> str:
    """The input, as messages call it."""
    return "data" if any(find_frame_digest(path) for path in job.input.paths) else job.input.shown_path


def _hint_column(key: str, name: str, names: Sequence[str]) -> str:
    """The column that may be meant by a name that no column has."""
    near = difflib.get_close_matches(name, names, n=1)
    if not near:
        near = [other for other in names if name in re.split(r"\W+", other)][:1]
    if not near:
        return f"; its columns are {', '.join(names)}"
    has_variable = near[0].isidentifier() or key != "[prompt] template"
    return f"; did you mean {repr(near[0]) if has_variable else f'{ROW}[{json.dumps(near[0])}]'}?"


def _find_name_problems(job: Job, scan: InputScan) -> Iterable[JobError]:
    """Find passthrough columns that would have the name of another column of the output, case ignored."""
    section = job.input.passthrough
    taken = {name.lower() for name in (*RESULT_SCHEMA.names, *([OUTPUT] if job.output.schema_ is not None else []))}
    clashing: list[str] = []
    owners: dict[str, str] = {}
    passed = _list_passed(job, scan.schema.names)
    for name in section.rename:
        if name in scan.names and name not in passed:
            yield JobFileError(f"[input] passthrough: rename: expected a column that is passed through, found {name!r}")
    for name in passed:
        new = section.name_output(name).lower()
        if new in taken:
            clashing.append(name)
        elif new in owners:
            yield JobFileError(
                "[input] passthrough: expected names that differ by more than case, "
                f"found {section.name_output(name)!r} for both {owners[new]!r} and {name!r}; rename one of them"
            )
        owners.setdefault(new, name)
    if clashing:
        columns = "" if section.columns == "all" else f"columns = {json.dumps(section.columns)}, "
        renamed = ", ".join(f"{json.dumps(name)} = {json.dumps(f'in_{name}')}" for name in clashing[:_NUM_SHOWN])
        named = f"column{'s' if clashing[1:] else ''} {', '.join(map(repr, clashing))}"
        yield JobFileError(
            f"[input] passthrough: {named} would have the name of an output column (case ignored); write "
            f'passthrough = {{ {columns}prefix = "in_" }}, or passthrough = {{ {columns}rename = {{ {renamed} }} }}'
        )


def _list_passed(job: Job, names: Sequence[str]) -> list[str]:
    """Columns to pass through, each once; those of tags are among them."""
    columns = job.input.passthrough.columns
    return list(dict.fromkeys((*(names if columns == "all" else columns), *job.accounting.tag_columns)))


def choose_columns(job: Job, scan: InputScan, template: PromptTemplate) -> ReadColumns:
    """Choose the columns for *read*; the job must have no column problems."""
    if scan.format == "jsonl":
        return ReadColumns(
            input_fields=JSONL_INPUT_FIELDS,
            passthrough=(),
            tenant=job.input.tenant,
            cost_center=job.input.cost_center,
        )
    column = job.prompt.messages_column
    names = template.columns.choose(scan.names) if column is None else [column]
    if job.tools.column is not None and job.tools.column not in names:
        names.append(job.tools.column)
    fields: Mapping[str, pa.Field[Any]] = {name: scan.schema.field(name) for name in scan.schema.names}
    passed = [name for name in _list_passed(job, scan.schema.names) if name in fields]
    return ReadColumns(
        # Without a readable file no column is known, and every unit is a reject.
        input_fields=tuple(fields[name] for name in names if name in fields),
        passthrough=tuple(fields[name] for name in passed),
        output_names=tuple(map(job.input.passthrough.name_output, passed)),
        id_column=job.input.id_column if job.input.id_column in fields else None,
        tenant_column=job.input.tenant_column if job.input.tenant_column in fields else None,
        cost_center_column=job.input.cost_center_column if job.input.cost_center_column in fields else None,
        tag_columns=tuple(name for name in job.accounting.tag_columns if name in fields),
        tenant=job.input.tenant,
        cost_center=job.input.cost_center,
        problem_column=PROBLEM if PROBLEM in scan.names else None,
    )


def check_writable(columns: ReadColumns) -> None:
    """Refuse passthrough columns that Parquet cannot hold, before anything is billed.

    Raises:
        JobFileError: a passthrough column has such a type.
    """
    for field in columns.output_fields:
        try:
            pq.write_table(result_schema([field]).empty_table(), io.BytesIO())
            pa.concat_arrays([pa.nulls(2, field.type)] * 2).take(pa.array([3, 0]))
        except (pa.ArrowException, ValueError) as error:
            raise JobFileError(
                f"[input] passthrough: column {field.name!r} of type {field.type} cannot be written to Parquet: {error}"
            ) from error
