"""One type for each column of files that declare none: the types found in their parts, brought together.

Part of the scan before *read*. What has no type in common is text.
"""

import re
from collections.abc import Iterable
from typing import Any

import pyarrow as pa

from moebeam.schemas.errors import InputPatternError
from moebeam.schemas.job.input_section import InputSection

_DECIMAL = re.compile(r"decimal128\(\s*(\d{1,2})\s*,\s*(-?\d{1,2})\s*\)")
_ALIASES = {"timestamp": "timestamp[us]", "date": "date32", "text": "string"}


def merge_schemas(schemas: Iterable[pa.Schema]) -> pa.Schema:
    """Every column of all schemas, in order of appearance, in a type that holds all values."""
    merged: dict[str, pa.DataType] = {}
    for schema in schemas:
        for field in schema:
            merged[field.name] = merge_types(merged.get(field.name, pa.null()), field.type)
    return pa.schema([pa.field(name, kind) for name, kind in merged.items()])


def merge_types(first: pa.DataType, second: pa.DataType) -> pa.DataType:
    """The type of columns that hold values of both types."""
    if first == second or pa.types.is_null(second):
        return first
    if pa.types.is_null(first):
        return second
    try:
        pair = [pa.schema([pa.field("column", kind)]) for kind in (first, second)]
        return pa.unify_schemas(pair, promote_options="permissive").field("column").type
    except (pa.ArrowException, TypeError):
        return pa.string()


def settle_nulls(schema: pa.Schema) -> pa.Schema:
    """A schema in which a column without any value is text."""
    return pa.schema([field.with_type(pa.string()) if pa.types.is_null(field.type) else field for field in schema])


def declare_types(section: InputSection, found: pa.Schema) -> pa.Schema:
    """The columns found, with the types that `[input] types` declares.

    Raises:
        InputPatternError: it names a type or a column that there is not.
    """
    for name, text in section.types.items():
        if name not in found.names:
            raise InputPatternError(
                f"[input] types: {section.shown_path} has no column {name!r}; its columns are {', '.join(found.names)}"
            )
        found = found.set(found.names.index(name), pa.field(name, _parse_type(name, text)))
    return found


def refuse_declared(section: InputSection, found: str) -> None:
    """Refuse types and a delimiter for an input of another format.

    Raises:
        InputPatternError: says which key.
    """
    for key, value in (("types", section.types), ("delimiter", section.delimiter)):
        if value:
            raise InputPatternError(f"[input] {key}: expected an input of CSV files, found one of format {found}")


def _parse_type(name: str, text: str) -> pa.DataType:
    try:
        if (decimal := _DECIMAL.fullmatch(text.strip())) is not None:
            return pa.decimal128(int(decimal[1]), int(decimal[2]))
        type_for_alias: Any = pa.type_for_alias
        return type_for_alias(_ALIASES.get(text.strip(), text.strip()))
    except ValueError as error:
        raise InputPatternError(
            f"[input] types: {name}: expected a type of pyarrow such as string, int64, double, bool, date32, "
            f"timestamp[us] or decimal128(9, 2), found {text!r}"
        ) from error
