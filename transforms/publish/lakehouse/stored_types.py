"""Types that Iceberg and Delta tables have, for those of a run's tables, and how a run's schema fits a table's.

A column whose Parquet form is already what the format asks for is taken as it is, so that published files can be used
byte by byte; the others are cast, see `docs/lakehouse.md`.
"""

from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from moebeam.schemas.column_types import plain_column, plain_type

_MAX_PRECISION = 38
"""Most digits of a decimal in Iceberg, Delta and common readers."""


@dataclass(frozen=True, slots=True)
class Fit:
    """How a run's columns fit a table.

    Attributes:
        problems: what cannot be, each in words that name the column.
        merged: the table's columns, then those that the run adds.
        has_added: whether the run adds any, be it inside of a struct.
    """

    problems: tuple[str, ...]
    merged: pa.Schema
    has_added: bool


def stored_schema(schema: pa.Schema, *, has_times: bool) -> pa.Schema:
    """The columns of a run's table as a lakehouse stores them; a column without any type is left out.

    Args:
        has_times: whether the format has a type for the time of a day; without one it is text.
    Raises:
        ValueError: the format has no type for a column; names it.
    """
    fields: list[pa.Field[Any]] = []
    for field in schema:
        if pa.types.is_null(field.type):
            continue
        try:
            fields.append(pa.field(field.name, _stored_type(plain_type(field.type), has_times)))
        except ValueError as error:
            raise ValueError(f"column {field.name!r}: expected a type that the table can have, found {error}") from None
    return pa.schema(fields)


def _stored_type(value_type: Any, has_times: bool) -> Any:
    types = pa.types
    if types.is_struct(value_type):
        return pa.struct([pa.field(field.name, _stored_type(field.type, has_times)) for field in value_type])
    if types.is_map(value_type):
        key, item = value_type.key_type, value_type.item_type
        return pa.map_(_stored_type(key, has_times), _stored_type(item, has_times))
    if types.is_list(value_type) or types.is_large_list(value_type):
        return pa.list_(_stored_type(value_type.value_type, has_times))
    if types.is_unsigned_integer(value_type):
        return {8: pa.int32(), 16: pa.int32(), 32: pa.int64(), 64: pa.decimal128(20)}[value_type.bit_width]
    if types.is_integer(value_type):
        return pa.int64() if value_type.bit_width == 64 else pa.int32()
    if types.is_decimal(value_type) and value_type.precision <= _MAX_PRECISION:
        return pa.decimal128(value_type.precision, value_type.scale)
    if types.is_timestamp(value_type):
        return pa.timestamp("us", tz=value_type.tz and "UTC")
    if types.is_time(value_type):
        return pa.time64("us") if has_times else pa.string()
    if types.is_fixed_size_binary(value_type):
        return pa.binary()
    for has_type, stored in _SCALARS:
        if has_type(value_type):
            return stored
    raise ValueError(str(value_type))


_SCALARS: tuple[tuple[Any, Any], ...] = (
    (pa.types.is_boolean, pa.bool_()),
    (pa.types.is_string, pa.string()),
    (pa.types.is_large_string, pa.string()),
    (pa.types.is_binary, pa.binary()),
    (pa.types.is_large_binary, pa.binary()),
    (pa.types.is_float16, pa.float32()),
    (pa.types.is_float32, pa.float32()),
    (pa.types.is_float64, pa.float64()),
    (pa.types.is_date, pa.date32()),
    (pa.types.is_duration, pa.int64()),
    (pa.types.is_null, pa.string()),
)


def needs_cast(schema: pa.Schema, stored: pa.Schema) -> bool:
    """Whether the Parquet files of a run's table are not yet what its stored columns ask for."""
    as_parquet = [(field.name, _without_large(plain_type(field.type))) for field in schema]
    return as_parquet != [(field.name, field.type) for field in stored]


def _without_large(value_type: Any) -> Any:
    """The type with offsets of 32 bits, which are the same in Parquet."""
    types = pa.types
    if types.is_struct(value_type):
        return pa.struct([pa.field(field.name, _without_large(field.type)) for field in value_type])
    if types.is_map(value_type):
        return pa.map_(_without_large(value_type.key_type), _without_large(value_type.item_type))
    if types.is_list(value_type) or types.is_large_list(value_type):
        return pa.list_(_without_large(value_type.value_type))
    if types.is_large_string(value_type):
        return pa.string()
    return pa.binary() if types.is_large_binary(value_type) else value_type


def cast_table(table: pa.Table, stored: pa.Schema) -> pa.Table:
    """Rows of a run in the stored columns; parts of a second below a microsecond are cut off.

    Raises:
        pa.ArrowException: a value has no place in the stored type.
    """
    columns: list[Any] = []
    for field in stored:
        chunks = [plain_column(chunk) for chunk in table.column(field.name).chunks]
        columns.append(pa.chunked_array([_cast(chunk, field.type) for chunk in chunks], field.type))
    return pa.table(columns, schema=stored)


def _cast(column: Any, value_type: Any) -> Any:
    return column.cast(value_type, safe=not _has_fine_time(column.type))


def find_cut_times(schema: pa.Schema) -> list[str]:
    """Columns whose instants or times are finer than a microsecond, which tables do not keep."""
    return [field.name for field in schema if _has_fine_time(plain_type(field.type))]


def _has_fine_time(value_type: Any) -> bool:
    if pa.types.is_timestamp(value_type) or pa.types.is_time64(value_type):
        return value_type.unit == "ns"
    return any(_has_fine_time(value_type.field(index).type) for index in range(value_type.num_fields))


def fit_schemas(existing: pa.Schema, wanted: pa.Schema) -> Fit:
    """Compare a run's stored columns with those of a table; columns may only be added.

    Args:
        existing: of the table, in any Arrow types that its library reads it as.
    """
    problems: list[str] = []
    merged, has_added = _merge_fields(tuple(existing), tuple(wanted), "", problems)
    return Fit(tuple(problems), pa.schema(merged), has_added)


def check_fit(existing: pa.Schema, wanted: pa.Schema) -> Fit:
    """`fit_schemas`, for a commit.

    Raises:
        ValueError: the run's columns do not fit the table.
    """
    fit = fit_schemas(existing, wanted)
    if fit.problems:
        raise ValueError("; ".join(fit.problems))
    return fit


def _merge_fields(
    existing: "tuple[pa.Field[Any], ...]", wanted: "tuple[pa.Field[Any], ...]", inside: str, problems: list[str]
) -> "tuple[list[pa.Field[Any]], bool]":
    by_name = {field.name: field for field in wanted}
    known = {field.name for field in existing}
    folded = {name.casefold(): name for name in known}
    merged: list[pa.Field[Any]] = []
    has_added = False
    for field in existing:
        name = inside + field.name
        ours = by_name.get(field.name)
        if not field.nullable:
            problems.append(f"column {name!r}: expected one that may be null, found a required one")
        if ours is None:
            merged.append(field)
            continue
        both, adds = _merge_types(_without_large(plain_type(field.type)), ours.type, name, problems)
        merged.append(field if not adds else pa.field(field.name, both))
        has_added |= adds
    for field in wanted:
        if field.name in known:
            continue
        if (other := folded.get(field.name.casefold())) is not None:
            problems.append(f"column {inside + field.name!r}: found {other!r} in the table, which differs in case only")
        merged.append(field)
        has_added = True
    return merged, has_added


def _merge_types(found: Any, wanted: Any, name: str, problems: list[str]) -> tuple[Any, bool]:
    """The type that holds both, and whether it has more than the table's."""
    types = pa.types
    if types.is_struct(found) and types.is_struct(wanted):
        fields, adds = _merge_fields(tuple(found), tuple(wanted), f"{name}.", problems)
        return pa.struct(fields), adds
    if types.is_list(found) and types.is_list(wanted):
        item, adds = _merge_types(found.value_type, wanted.value_type, f"{name}[]", problems)
        return pa.list_(item), adds
    if types.is_map(found) and types.is_map(wanted):
        item, adds = _merge_types(found.item_type, wanted.item_type, f"{name}[]", problems)
        key, _ = _merge_types(found.key_type, wanted.key_type, f"{name}[key]", problems)
        return pa.map_(key, item), adds
    if found != wanted:
        problems.append(f"column {name!r}: expected {wanted}, which this run writes, found {found} in the table")
    return found, False
