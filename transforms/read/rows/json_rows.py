"""Rows of JSON lines: an object a line, its keys the columns.

Part of *read* and of the scan before the run. The scan finds the type of each column from all of its values; a column
whose values have no type in common is text, in which values that are no text stand as JSON.
"""

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import pyarrow as pa

from moebeam.schemas.canonical import Json
from moebeam.schemas.errors import InvalidLine, InvalidValue, RowError, abbreviate
from moebeam.transforms.read.rows.csv_rows import make_empty_batch
from moebeam.transforms.read.rows.line_blocks import Block, strip_mark

_BAD_VALUES = (pa.ArrowException, OverflowError, TypeError, ValueError)


def find_json_types(block: Block, needed: Collection[str] | None) -> pa.Schema:
    """The columns of a block, each in one type that holds all of its values; lines that are no objects have none."""
    columns: dict[str, list[Json]] = {}
    for record in block.records:
        row = _parse(record, 0)
        if isinstance(row, dict):
            for name, value in row.items():
                if needed is None or name in needed:
                    columns.setdefault(name, []).append(value)
    return pa.schema([pa.field(name, _find_type(values)) for name, values in columns.items()])


def _find_type(values: Sequence[Json]) -> pa.DataType:
    try:
        infer_type: Any = pa.infer_type
        found: pa.DataType = infer_type(values)
        pa.array(values, found)
        return found
    except _BAD_VALUES:
        return pa.string()


def read_json_block(
    block: Block, wanted: Sequence[str], types: Mapping[str, pa.DataType]
) -> tuple[pa.RecordBatch, dict[int, RowError]]:
    """Read a block's rows.

    Args:
        wanted: columns to read; one that a line lacks is null there.
        types: of columns; others are text.
    Returns:
        The columns, and the errors of lines that are no rows and of values that have another type; these are null.
    """
    errors: dict[int, RowError] = {}
    rows: list[dict[str, Json]] = []
    for place, record in enumerate(block.records):
        row = _parse(record, block.lines[place])
        if isinstance(row, RowError):
            errors[place] = row
            rows.append({})
        else:
            rows.append(row)
    if not wanted:
        return make_empty_batch(len(rows)), errors
    arrays = [
        _make_array(name, [row.get(name) for row in rows], types.get(name, pa.string()), block.lines, errors)
        for name in wanted
    ]
    return pa.RecordBatch.from_arrays(arrays, [*wanted]), errors


def _make_array(
    name: str, values: list[Json], wanted: pa.DataType, lines: Sequence[int], errors: dict[int, RowError]
) -> "pa.Array[Any]":
    if pa.types.is_string(wanted) or pa.types.is_large_string(wanted):
        values = [value if value is None or isinstance(value, str) else _print(value) for value in values]
    try:
        return pa.array(values, wanted)
    except _BAD_VALUES:
        pass
    kept: list[Json] = []
    for place, value in enumerate(values):
        try:
            pa.array([value], wanted)
            kept.append(value)
        except _BAD_VALUES:
            found = f"expected {wanted}, found {abbreviate(value)}"
            errors.setdefault(place, InvalidValue(f"line {lines[place]}: column {name!r}: {found}"))
            kept.append(None)
    return pa.array(kept, wanted)


def _print(value: Json) -> str:
    return json.dumps(value, ensure_ascii=False)


def _parse(record: bytes, line: int) -> dict[str, Json] | RowError:
    try:
        row: Json = json.loads(strip_mark(record))
    except UnicodeDecodeError as error:
        return InvalidLine(f"line {line}: expected UTF-8, found byte 0x{record[error.start]:02x}")
    except json.JSONDecodeError as error:
        return InvalidLine(f"line {line}: expected a JSON object, found an error at column {error.colno}: {error.msg}")
    except (ValueError, RecursionError) as error:
        return InvalidLine(f"line {line}: expected a JSON object that can be read, found: {error}")
    if not isinstance(row, dict):
        return InvalidLine(f"line {line}: expected a JSON object, found {abbreviate(row)}")
    return row
