"""One column of a batch in the type that it has over all files; a value that does not fit rejects its row alone.

Part of *read*.
"""

from typing import Any

import pyarrow as pa

from moebeam.schemas.column_types import plain_column
from moebeam.schemas.errors import InvalidValue, RowError


def cast_column(batch: pa.RecordBatch, field: "pa.Field[Any]", errors: dict[int, RowError]) -> "pa.Array[Any]":
    """A column in its unified, plain type; values that are not UTF-8 become null."""
    if field.name not in batch.schema.names:
        return pa.nulls(batch.num_rows, field.type)
    column = _reject_invalid_text(plain_column(batch.column(field.name)), field.name, errors)
    return column if column.type == field.type else _cast(column, field, errors)


def _cast(column: "pa.Array[Any]", field: "pa.Field[Any]", errors: dict[int, RowError]) -> "pa.Array[Any]":
    """Cast a column to its unified type; a value that does not fit becomes null and rejects only its row."""
    try:
        return column.cast(field.type)
    except pa.ArrowInvalid:
        pass
    cast: list[pa.Array[Any]] = []
    for row in range(len(column)):
        try:
            cast.append(column.slice(row, 1).cast(field.type))
        except pa.ArrowInvalid as error:
            found = " ".join(str(error).split())
            errors.setdefault(row, InvalidValue(f"column {field.name!r}: expected {field.type}, found: {found}"))
            cast.append(pa.nulls(1, field.type))
    return pa.concat_arrays(cast)


def _reject_invalid_text(column: "pa.Array[Any]", name: str, errors: dict[int, RowError]) -> "pa.Array[Any]":
    try:
        column.validate(full=True)
        return column
    except pa.ArrowInvalid:
        pass
    kept: list[int | None] = []
    for row in range(len(column)):
        try:
            column.take(pa.array([row])).validate(full=True)
            kept.append(row)
        except pa.ArrowInvalid as error:
            found = " ".join(str(error).split())
            errors.setdefault(row, InvalidValue(f"column {name!r}: expected valid UTF-8, found: {found}"))
            kept.append(None)
    return column.take(pa.array(kept, pa.int64()))
