"""Checks the input columns that a job names, and chooses those to read and to pass through.

Part of `jobs/check/preflight.py`; *read* uses the chosen columns.
"""

import difflib
import io
from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from moebeam.schemas.errors import JobError, JobFileError
from moebeam.schemas.job.sections import Job
from moebeam.schemas.store.run_layout import find_frame_digest
from moebeam.schemas.tables import OUTPUT, RESULT_SCHEMA, result_schema
from moebeam.transforms.read.input_rows import JSONL_INPUT_FIELDS, ReadColumns
from moebeam.transforms.read.input_scan import InputScan
from moebeam.transforms.render.prompt_template import PromptTemplate


def list_needed_columns(job: Job, template: PromptTemplate | None) -> frozenset[str] | None:
    """List the columns that the job reads; None means all."""
    if job.input.passthrough == "all" or template is None:
        return None
    single = (
        job.input.id_column,
        job.input.tenant_column,
        job.input.cost_center_column,
        job.prompt.messages_column,
        job.tools.column,
    )
    passed = {*job.input.passthrough, *job.accounting.tag_columns}
    return template.variables | passed | {name for name in single if name is not None} | {"line"}


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
            ("[input] passthrough", section.passthrough or None),
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
    named = [("[prompt] template", name) for name in sorted(template.variables)]
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
    if section.passthrough != "all":
        named += [("[input] passthrough", name) for name in section.passthrough]
    named += [("[accounting] tag_columns", name) for name in job.accounting.tag_columns]
    for key, name in named:
        if name not in scan.names:
            near = difflib.get_close_matches(name, scan.names, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; its columns are {', '.join(scan.names)}"
            source = section.path if find_frame_digest(section.path) is None else "data"
            yield JobFileError(f"{key}: {source} has no column {name!r}{hint}")
    for key, name in named:
        is_label = key == "[accounting] tag_columns" or (key.endswith("_column") and key.startswith("[input]"))
        if is_label and name in scan.schema.names:
            found = scan.schema.field(name).type
            if not _can_be_label(found):
                yield JobFileError(f"{key}: expected a column of text or whole numbers, found {name!r} of type {found}")
    taken = {field.lower() for field in RESULT_SCHEMA.names} | ({OUTPUT} if job.output.schema_ is not None else set())
    passed = scan.schema.names if section.passthrough == "all" else section.passthrough
    for name in dict.fromkeys((*passed, *job.accounting.tag_columns)):
        if name.lower() in taken:
            yield JobFileError(
                f"[input] passthrough: column {name!r} has the name of an output column (case ignored); "
                "rename it in the input or leave it out"
            )


def choose_columns(job: Job, scan: InputScan, template: PromptTemplate) -> ReadColumns:
    """Choose the columns for *read*; the job must have no column problems."""
    if scan.format == "jsonl":
        return ReadColumns(input_fields=JSONL_INPUT_FIELDS, passthrough=())
    column = job.prompt.messages_column
    names = sorted(template.variables) if column is None else [column]
    if job.tools.column is not None and job.tools.column not in names:
        names.append(job.tools.column)
    passed = scan.schema.names if job.input.passthrough == "all" else job.input.passthrough
    passed = (*passed, *job.accounting.tag_columns)
    fields: Mapping[str, pa.Field[Any]] = {name: scan.schema.field(name) for name in scan.schema.names}
    return ReadColumns(
        # Without a readable file no column is known, and every unit is a reject.
        input_fields=tuple(fields[name] for name in names if name in fields),
        passthrough=tuple(fields[name] for name in dict.fromkeys(passed) if name in fields),
        id_column=job.input.id_column if job.input.id_column in fields else None,
        tenant_column=job.input.tenant_column if job.input.tenant_column in fields else None,
        cost_center_column=job.input.cost_center_column if job.input.cost_center_column in fields else None,
    )


def check_writable(columns: ReadColumns) -> None:
    """Refuse passthrough columns that Parquet cannot hold, before anything is billed.

    Raises:
        JobFileError: a passthrough column has such a type.
    """
    for field in columns.passthrough:
        try:
            pq.write_table(result_schema([field]).empty_table(), io.BytesIO())
            pa.concat_arrays([pa.nulls(2, field.type)] * 2).take(pa.array([3, 0]))
        except (pa.ArrowException, ValueError) as error:
            raise JobFileError(
                f"[input] passthrough: column {field.name!r} of type {field.type} cannot be written to Parquet: {error}"
            ) from error


def _can_be_label(found: pa.DataType) -> bool:
    types = pa.types
    return (
        types.is_string(found)
        or types.is_large_string(found)
        or types.is_string_view(found)
        or types.is_integer(found)
        or types.is_null(found)
    )
