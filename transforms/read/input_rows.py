"""Reads the rows of an input unit as record batches of `moebeam.schemas.tables.read_schema`.

The pure part of *read*, free of Beam, so that a quote reads rows exactly as a run does. Every row that a footer
promised comes out, as a row or inside a reject; a unit that cannot be read is one reject with its `scope` and
`num_rows`.
"""

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from moebeam.schemas.column_types import plain_field
from moebeam.schemas.column_values import print_column, readable_column, readable_field
from moebeam.schemas.errors import (
    InvalidId,
    InvalidLine,
    InvalidValue,
    RowCountMismatch,
    RowError,
    UnreadableFile,
    UnreadableRowGroup,
)
from moebeam.schemas.tables import read_schema
from moebeam.transforms.read.batch_lines import BatchRequest, parse_batch_line, read_custom_id
from moebeam.transforms.read.cast_column import cast_column
from moebeam.transforms.read.claimed_file import check_claim
from moebeam.transforms.read.expansion import bound_rows
from moebeam.transforms.read.input_scan import InputUnit
from moebeam.transforms.read.parquet_file import open_parquet
from moebeam.transforms.read.rows.read_rows import MAX_BATCH_BYTES, MAX_BATCH_ROWS, read_line_blocks, read_rows
from moebeam.transforms.read.transient_errors import RETRY_DELAYS_S, is_permanent, is_transient

_PROBE_ROWS = 16

JSONL_INPUT_FIELDS = (
    pa.field("messages", pa.large_string()),
    pa.field("sampling", pa.string()),
    pa.field("options", pa.large_string()),
)


@dataclass(frozen=True, slots=True)
class ReadColumns:
    """Which input columns are read, and for what; fields are as `moebeam.schemas.column_types` makes them.

    Attributes:
        input_fields: columns that the prompt is made of; batches have them as people read them.
        passthrough: columns repeated in the output; they stay as they are.
        tag_columns: those of `passthrough` that must have a text, too.
        output_names: names of `passthrough` in the output; empty where each keeps its own.
        tenant, cost_center: of rows that name none.
        problem_column: where it has a text, the row is rejected for that.
    """

    input_fields: tuple["pa.Field[Any]", ...]
    passthrough: tuple["pa.Field[Any]", ...]
    id_column: str | None = None
    tenant_column: str | None = None
    cost_center_column: str | None = None
    output_names: tuple[str, ...] = ()
    tag_columns: tuple[str, ...] = ()
    tenant: str = ""
    cost_center: str = ""
    problem_column: str | None = None

    @property
    def output_fields(self) -> tuple["pa.Field[Any]", ...]:
        """The passthrough columns as *read* and all later stages know them."""
        names = self.output_names or [field.name for field in self.passthrough]
        return tuple(field.with_name(name) for field, name in zip(self.passthrough, names, strict=True))

    @property
    def names(self) -> list[str]:
        """Names of all columns to read, each once."""
        single = (self.id_column, self.tenant_column, self.cost_center_column, self.problem_column)
        names = [field.name for field in (*self.input_fields, *self.passthrough)]
        return list(dict.fromkeys([*names, *(name for name in single if name is not None)]))

    @property
    def schema(self) -> pa.Schema:
        """Schema of the batches that *read* yields."""
        return read_schema(self.readable_fields, self.output_fields)

    @property
    def readable_fields(self) -> list["pa.Field[Any]"]:
        """The prompt's columns, as batches have them."""
        return [readable_field(field) for field in self.input_fields]


def read_unit(unit: InputUnit, columns: ReadColumns) -> Iterator[pa.RecordBatch]:
    """Read one unit in row order, in batches of bounded rows and bytes.

    The rows, and the `num_rows` of the rejects among them, add up to `unit.num_rows`.

    Raises:
        InputChanged: the file is not what the scan saw, before or after its rows were read.
        OSError: the store failed.
    """
    if unit.error is not None or unit.num_rows is None:
        check_claim(unit.path, unit.claim)
        yield _unit_reject(unit, columns, "file", UnreadableFile(f"{unit.path}: {unit.error}"), 0, None)
        return
    num_read = 0
    pauses_s = iter(RETRY_DELAYS_S)
    while True:
        try:
            for batch in _rows_from(num_read, unit, columns):
                wanted = batch.slice(0, unit.num_rows - num_read)
                num_read += wanted.num_rows
                if wanted.num_rows:
                    yield wanted
            break
        except (pa.ArrowException, OSError, ValueError) as error:
            if is_transient(error) and (pause_s := next(pauses_s, None)) is not None:
                time.sleep(pause_s)
                continue
            if not is_permanent(error):
                raise
            message = f"{_name_piece(unit)}: {' '.join(str(error).split())}"
            missing = unit.num_rows - num_read
            yield _unit_reject(unit, columns, "row_group", UnreadableRowGroup(message), num_read, missing)
            return
    if num_read < unit.num_rows:
        message = f"{_name_piece(unit)}: expected {unit.num_rows} rows, found {num_read}"
        missing = unit.num_rows - num_read
        yield _unit_reject(unit, columns, "row_group", RowCountMismatch(message), num_read, missing)


def _name_piece(unit: InputUnit) -> str:
    if unit.format in ("parquet", "arrow"):
        return f"{unit.path}: {'row group' if unit.format == 'parquet' else 'record batch'} {unit.row_group}"
    return f"{unit.path}: from line {unit.first_line}"


def _rows_from(num_read: int, unit: InputUnit, columns: ReadColumns) -> Iterator[pa.RecordBatch]:
    """A unit's batches without its first `num_read` rows, which an earlier try has read."""
    read = {"parquet": _read_row_group, "jsonl": _read_lines}.get(unit.format, _read_rows)
    for batch in read(unit, columns):
        num_skipped = min(num_read, batch.num_rows)
        num_read -= num_skipped
        yield batch.slice(num_skipped)


def _read_row_group(unit: InputUnit, columns: ReadColumns) -> Iterator[pa.RecordBatch]:
    assert unit.num_rows is not None
    first_row = unit.first_row
    folders = dict(unit.partitions)
    with open_parquet(unit.path, unit.claim) as parquet:
        stored = {*parquet.schema_arrow.names} - folders.keys()
        present = [name for name in columns.names if name in stored]
        most_rows = bound_rows(parquet, unit.path, unit.row_group, present) or MAX_BATCH_ROWS
        # Footers tell encoded sizes; repeated values may grow a thousandfold, so the first rows are probed.
        probed = 0
        for num_probed in (1, min(most_rows, _PROBE_ROWS)):
            if probed * num_probed <= MAX_BATCH_BYTES:
                sample = next(parquet.iter_batches(num_probed, [unit.row_group], present, use_threads=False), None)
                probed = sample.nbytes // sample.num_rows if sample is not None and sample.num_rows else 0
        row_bytes = max(1, probed, unit.num_bytes // max(1, unit.num_rows))
        batch_rows = max(1, min(MAX_BATCH_ROWS, most_rows, MAX_BATCH_BYTES // row_bytes))
        for batch in parquet.iter_batches(batch_rows, [unit.row_group], present, use_threads=False):
            yield _identify(batch, first_row, unit, columns)
            first_row += batch.num_rows


def _read_rows(unit: InputUnit, columns: ReadColumns) -> Iterator[pa.RecordBatch]:
    first_row = unit.first_row
    folders = {name for name, _ in unit.partitions}
    types = {field.name: field.type for field in (*columns.input_fields, *columns.passthrough)}
    for batch, errors in read_rows(unit, [name for name in columns.names if name not in folders], types):
        yield _identify(batch, first_row, unit, columns, errors)
        first_row += batch.num_rows


def _identify(
    batch: pa.RecordBatch,
    first_row: int,
    unit: InputUnit,
    columns: ReadColumns,
    found: Mapping[int, RowError] | None = None,
) -> pa.RecordBatch:
    """Cast columns to their unified types and give every row its identity.

    Every value that must be a text later, such as a tag, is made one here, so that its row is not asked in vain.

    Args:
        found: errors of rows that could not be read.
    """
    errors: dict[int, RowError] = {**(found or {})}
    fields = {field.name: field for field in (*columns.input_fields, *columns.passthrough)}
    folders = dict(unit.partitions)
    values: dict[str, pa.Array[Any]] = {}
    for name in columns.names:
        if name not in fields:  # of an id or a label: files may disagree about its type
            is_known = name in batch.schema.names and name not in folders
            fields[name] = plain_field(batch.schema.field(name)) if is_known else pa.field(name, pa.string())
        if name in folders:
            values[name] = _repeat_partition(folders[name], fields[name], batch.num_rows)
        else:
            values[name] = cast_column(batch, fields[name], errors)
    if (name := columns.problem_column) is not None:
        errors.update({row: InvalidValue(text) for row, text in enumerate(values[name].to_pylist()) if text})
    texts = {
        name: _texts(values[name], fields[name], errors)
        for name in (columns.tenant_column, columns.cost_center_column, *columns.tag_columns)
        if name is not None
    }
    derived = pa.array([f"{unit.label}:{first_row + row}" for row in range(batch.num_rows)], pa.string())
    custom_ids = derived
    if (name := columns.id_column) is not None:
        custom_ids = _ids(_texts(values[name], fields[name], errors), derived, errors, name)
    return _assemble(
        columns,
        unit,
        np.arange(first_row, first_row + batch.num_rows),
        custom_ids,
        tenants=_labels(batch.num_rows, columns.tenant, texts, columns.tenant_column),
        cost_centers=_labels(batch.num_rows, columns.cost_center, texts, columns.cost_center_column),
        errors=errors,
        inputs=[readable_column(values[field.name], field) for field in columns.input_fields],
        passthrough=[values[field.name] for field in columns.passthrough],
    )


def _repeat_partition(text: str | None, field: "pa.Field[Any]", num_rows: int) -> "pa.Array[Any]":
    """The value of a partition folder as a column; `partitions.py` has seen that its text has the column's type."""
    return pa.array([text] * num_rows, pa.string()).cast(field.type)


def _texts(column: "pa.Array[Any]", field: "pa.Field[Any]", errors: dict[int, RowError]) -> list[str | None]:
    """A column as text; a value that has none is null and rejects its row."""
    texts: list[str | None] = []
    for row, text in enumerate(print_column(column, field)):
        if isinstance(text, InvalidValue):
            errors.setdefault(row, text)
        texts.append(text if isinstance(text, str) else None)
    return texts


def _ids(texts: list[str | None], derived: "pa.Array[Any]", errors: dict[int, RowError], name: str) -> "pa.Array[Any]":
    """The id column; a row without a usable id keeps its derived one and is rejected."""
    for row, text in enumerate(texts):
        if not text and not isinstance(errors.get(row), InvalidLine):
            found = errors.get(row) or ("null" if text is None else "an empty string")
            errors[row] = InvalidId(f"id column {name!r}: expected a value, found {found}")
    return pc.coalesce(pa.array([text or None for text in texts], pa.string()), derived)


def _labels(
    num_rows: int, default: str, texts: Mapping[str, list[str | None]] | None = None, name: str | None = None
) -> "pa.Array[Any]":
    """Tenant or cost centre of each row; the default for a null and where no column is named."""
    named = [] if texts is None or name is None else texts[name]
    return pa.array([text or default for text in named] if name is not None else [default] * num_rows, pa.string())


def _read_lines(unit: InputUnit, columns: ReadColumns) -> Iterator[pa.RecordBatch]:
    first_row = unit.first_row
    for block in read_line_blocks(unit):
        yield _parse_lines([record.rstrip(b"\n") for record in block.records], first_row, unit, columns)
        first_row += len(block.records)


def _parse_lines(lines: list[bytes], first_row: int, unit: InputUnit, columns: ReadColumns) -> pa.RecordBatch:
    errors: dict[int, RowError] = {}
    custom_ids: list[str] = []
    requests: list[BatchRequest | None] = []
    for row, line in enumerate(lines):
        derived = f"{unit.label}:{first_row + row}"
        try:
            request = parse_batch_line(line)
        except RowError as error:
            found_id = read_custom_id(line)
            errors[row] = error if found_id is not None else InvalidId(f"custom_id: expected a string, found {error}")
            custom_ids.append(found_id or derived)
            requests.append(None)
        else:
            custom_ids.append(request.custom_id)
            requests.append(request)
    return _assemble(
        columns,
        unit,
        np.arange(first_row, first_row + len(lines)),
        pa.array(custom_ids, pa.string()),
        tenants=_labels(len(lines), columns.tenant),
        cost_centers=_labels(len(lines), columns.cost_center),
        errors=errors,
        inputs=[
            pa.array([request and getattr(request, field.name) for request in requests], field.type)
            for field in JSONL_INPUT_FIELDS
        ],
        passthrough=[],
    )


def _unit_reject(
    unit: InputUnit, columns: ReadColumns, scope: str, error: RowError, num_read: int, num_rows: int | None
) -> pa.RecordBatch:
    """One row that stands for all rows of a unit that could not be read."""
    name = unit.label if scope == "file" else f"{unit.label}:{unit.first_row + num_read}"
    nothing = [pa.nulls(1, field.type) for field in columns.readable_fields]
    return _assemble(
        columns,
        unit,
        np.array([unit.first_row + num_read]),
        pa.array([name], pa.string()),
        tenants=_labels(1, columns.tenant),
        cost_centers=_labels(1, columns.cost_center),
        errors={0: error},
        inputs=nothing,
        passthrough=[pa.nulls(1, field.type) for field in columns.passthrough],
        scope=scope,
        num_rows=num_rows,
    )


def _assemble(
    columns: ReadColumns,
    unit: InputUnit,
    source_rows: "np.ndarray[Any, Any]",
    custom_ids: "pa.Array[Any]",
    *,
    tenants: "pa.Array[Any]",
    cost_centers: "pa.Array[Any]",
    errors: dict[int, RowError],
    inputs: "list[pa.Array[Any]]",
    passthrough: "list[pa.Array[Any]]",
    scope: str = "row",
    num_rows: int | None = 1,
) -> pa.RecordBatch:
    size = len(source_rows)
    found = [errors.get(row) for row in range(size)] if errors else [None] * size
    return pa.RecordBatch.from_arrays(
        [
            custom_ids,
            pa.array([unit.path] * size, pa.string()),
            pa.array(source_rows, pa.int64()),
            pa.array(np.full(size, unit.ordinal), pa.int32()),
            pa.array([scope] * size, pa.string()),
            pa.array([num_rows] * size, pa.int64()),
            tenants,
            cost_centers,
            pa.array([error and error.error_stage for error in found], pa.string()),
            pa.array([error and error.error_type for error in found], pa.string()),
            pa.array([error and str(error) for error in found], pa.string()),
            make_struct(pa.struct(columns.readable_fields), inputs, size),
            make_struct(pa.struct(list(columns.output_fields)), passthrough, size),
        ],
        schema=columns.schema,
    )


def make_struct(struct: "pa.StructType", arrays: "list[pa.Array[Any]]", size: int) -> "pa.Array[Any]":
    """Build a struct array from child arrays; Arrow's own constructor loses the length if there are none."""
    if not arrays:
        return pa.array([{}] * size, struct)
    return pa.StructArray.from_arrays(arrays, fields=[struct.field(index) for index in range(struct.num_fields)])
