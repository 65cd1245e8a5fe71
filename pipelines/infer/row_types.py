"""Beam's row types and Arrow's: what rows bring is kept in Arrow, and tables come back as typed Beam rows.

What Beam has no exact type for (times of day, durations, instants finer than a microsecond, integers beyond 64 bits
with a sign) comes back as text, as does a struct with a name that is no identifier, as JSON.
"""

import json
import keyword
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any, Optional, TypeAlias, cast, get_args

import numpy as np
import pyarrow as pa
from apache_beam.typehints.row_type import RowTypeConstraint
from apache_beam.typehints.schemas import named_fields_from_element_type
from apache_beam.utils.timestamp import Timestamp

BeamType: TypeAlias = Any
Convert: TypeAlias = Callable[[Any], Any]

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_ARROW_OF: Mapping[Any, "pa.DataType"] = {
    str: pa.string(),
    bytes: pa.binary(),
    bool: pa.bool_(),
    int: pa.int64(),
    float: pa.float64(),
    date: pa.date32(),
    Timestamp: pa.timestamp("us", tz="UTC"),
    np.int8: pa.int8(),
    np.int16: pa.int16(),
    np.int32: pa.int32(),
    np.int64: pa.int64(),
    np.float32: pa.float32(),
    np.float64: pa.float64(),
}
_BEAM_OF: Mapping["pa.DataType", Any] = {
    **{arrow: beam for beam, arrow in _ARROW_OF.items() if beam not in (np.int64, np.float64)},
    pa.large_string(): str,
    pa.large_binary(): bytes,
    pa.uint8(): np.int16,
    pa.uint16(): np.int32,
    pa.uint32(): int,
    pa.float16(): np.float32,
    pa.date64(): date,
}


def list_fields(element_type: BeamType) -> list[tuple[str, BeamType]] | None:
    """The fields of a collection of rows with a schema; None for any other."""
    try:
        return list(named_fields_from_element_type(element_type))
    except (TypeError, ValueError, AttributeError):
        return None


def to_arrow(beam_type: BeamType) -> "pa.DataType | None":
    """The Arrow type in which values of a Beam type are kept; None where the values tell."""
    beam_type = _strip_optional(beam_type)
    return _ARROW_OF.get(beam_type) if _is_hashable(beam_type) else None


def to_beam(arrow: "pa.DataType") -> BeamType:
    """The Beam type, without its null, of a column of a table."""
    types: Any = pa.types
    if arrow in _BEAM_OF:
        return _BEAM_OF[arrow]
    if types.is_dictionary(arrow):
        return to_beam(cast("Any", arrow).value_type)
    if types.is_decimal(arrow):
        return Decimal
    if types.is_timestamp(arrow) and cast("Any", arrow).unit != "ns":
        return Timestamp
    if types.is_map(arrow):
        return Mapping[to_beam(cast("Any", arrow).key_type), make_optional(to_beam(cast("Any", arrow).item_type))]
    if types.is_list(arrow) or types.is_large_list(arrow) or types.is_fixed_size_list(arrow):
        return Sequence[make_optional(to_beam(cast("Any", arrow).value_type))]
    if types.is_struct(arrow):
        fields = list(cast("Iterable[pa.Field[Any]]", arrow))
        if fields and all(is_field_name(field.name) for field in fields):
            return RowTypeConstraint.from_fields([(field.name, make_optional(to_beam(field.type))) for field in fields])
    return str


def is_field_name(name: str) -> bool:
    """Whether a Beam row can have a field of this name."""
    return name.isidentifier() and not keyword.iskeyword(name) and not name.startswith("_")


def make_optional(beam_type: BeamType) -> BeamType:
    """The type with a null; every column of a table has one."""
    return Optional[_strip_optional(beam_type)]  # noqa: UP045  # Beam's row types know no `|`


def make_row_type(fields: Sequence[tuple[str, BeamType]]) -> BeamType:
    """The type of rows with these fields, in this order."""
    return RowTypeConstraint.from_fields(list(fields))


def read_rows(table: pa.Table, row_type: BeamType) -> Iterator[Any]:
    """The rows of a table as values of a row type; fields that the table lacks are null."""
    columns: list[Iterable[Any]] = []
    for name, beam_type in row_type._fields:
        if name not in table.schema.names:
            columns.append([None] * table.num_rows)
            continue
        values = _to_pylist(table.column(name))
        convert = _converter(beam_type)
        columns.append(values if convert is None else [None if value is None else convert(value) for value in values])
    yield from map(row_type.user_type, *columns)


def _to_pylist(column: "pa.ChunkedArray[Any]") -> list[Any]:
    if pa.types.is_timestamp(column.type) and cast("Any", column.type).unit == "ns":
        column = column.cast(pa.string())
    return column.to_pylist()


def _converter(beam_type: BeamType) -> Convert | None:
    """What makes a value of a Beam type of Arrow's; None where it is one already."""
    beam_type = _strip_optional(beam_type)
    if isinstance(beam_type, RowTypeConstraint):
        return _row_converter(beam_type)
    if beam_type is Timestamp:
        return _to_timestamp
    if beam_type is date:
        return lambda value: value.date() if isinstance(value, datetime) else value
    if beam_type is str:
        return _to_text
    arguments = get_args(beam_type) or tuple(getattr(beam_type, "tuple_types", ()) or ())
    if arguments and len(arguments) == 1 and (inner := _converter(arguments[0])) is not None:
        return lambda values: [None if value is None else inner(value) for value in values]
    if len(arguments) == 2:
        key, item = (_converter(argument) or _keep for argument in arguments)
        return lambda pairs: {key(name): None if value is None else item(value) for name, value in _list_pairs(pairs)}
    if arguments:
        return list
    return None


def _row_converter(row_type: BeamType) -> Convert:
    fields = [(name, _converter(beam_type) or _keep) for name, beam_type in row_type._fields]
    make = row_type.user_type

    def convert(value: Any) -> Any:
        return make(*[None if value.get(name) is None else inner(value[name]) for name, inner in fields])

    return convert


def _keep(value: Any) -> Any:
    return value


def _list_pairs(pairs: Any) -> Iterable[tuple[Any, Any]]:
    return cast("Mapping[Any, Any]", pairs).items() if isinstance(pairs, Mapping) else pairs


def _to_timestamp(value: Any) -> Timestamp:
    since = (value if value.tzinfo is not None else value.replace(tzinfo=UTC)) - _EPOCH
    return Timestamp(micros=since // timedelta(microseconds=1))


def _to_text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, dict | list) else str(value)


def _strip_optional(beam_type: BeamType) -> BeamType:
    arguments = get_args(beam_type) or tuple(getattr(beam_type, "union_types", ()) or ())
    others = [argument for argument in arguments if argument is not type(None)]
    return others[0] if len(others) == 1 and len(others) < len(arguments) else beam_type


def _is_hashable(value: object) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True
