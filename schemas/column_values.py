"""Values of the user's columns as Python has them and as people write them: for prompts, ids, labels and tags.

Nothing else makes a Python object of a user's value. Where Python cannot hold one, such as a time after the year 9999,
that value is an `InvalidValue` and the others stay what they are.
"""

import uuid
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from moebeam.schemas.column_types import declared_field, make_list, plain_type
from moebeam.schemas.errors import InvalidValue
from moebeam.schemas.printed_values import print_value


def readable_field(field: "pa.Field[Any]") -> "pa.Field[Any]":
    """The field of `readable_column`."""
    return pa.field(field.name, _readable_type(declared_field(field).type))


def _readable_type(value_type: Any) -> Any:
    types = pa.types
    if isinstance(value_type, pa.BaseExtensionType):
        match value_type.extension_name:
            case "arrow.uuid":
                return pa.string()
            case "arrow.bool8":
                return pa.bool_()
            case "arrow.fixed_shape_tensor":
                tensor: Any = _readable_type(cast("Any", value_type.storage_type).value_type)
                for _ in _shape(value_type):
                    tensor = pa.list_(tensor)
                return tensor
            case _:
                return _readable_type(value_type.storage_type)
    if types.is_dictionary(value_type):
        return _readable_type(value_type.value_type)
    if types.is_float32(value_type) or types.is_float16(value_type):
        return pa.float64()
    if types.is_struct(value_type):
        return pa.struct([pa.field(field.name, _readable_type(field.type)) for field in value_type])
    if types.is_map(value_type):
        return pa.map_(_readable_type(value_type.key_type), _readable_type(value_type.item_type))
    if types.is_large_list(value_type):
        return pa.large_list(_readable_type(value_type.value_type))
    if types.is_list(value_type) or types.is_fixed_size_list(value_type):
        return pa.list_(_readable_type(value_type.value_type))
    return plain_type(value_type)


def readable_column(column: "pa.Array[Any]", field: "pa.Field[Any]") -> "pa.Array[Any]":
    """A plain column with values as people write them.

    A UUID is its text, a tensor a nested list, a float the shortest number of its width (0.1, not
    0.10000000149011612), and a NaN, which pandas writes for a missing number, is a null.

    Args:
        field: of the column, with its note.
    """
    declared = declared_field(field).type
    is_as_read = _readable_type(declared) == column.type and not _has_floats(column.type)
    return column if is_as_read else _make_readable(column, declared)


def _has_floats(value_type: Any) -> bool:
    if pa.types.is_nested(value_type):
        return any(_has_floats(value_type.field(index).type) for index in range(value_type.num_fields))
    return pa.types.is_floating(value_type)


def _make_readable(column: Any, declared: Any) -> Any:
    """As `readable_column`, at any level: a column of `plain_type(declared)`."""
    types = pa.types
    if isinstance(declared, pa.BaseExtensionType):
        match declared.extension_name:
            case "arrow.uuid":
                texts = [None if value is None else str(uuid.UUID(bytes=value)) for value in column.to_pylist()]
                return pa.array(texts, pa.string())
            case "arrow.bool8":
                return column.cast(pa.bool_())
            case "arrow.fixed_shape_tensor":
                return _nest_tensors(column, declared)
            case _:
                return _make_readable(column, declared.storage_type)
    if types.is_dictionary(declared):
        return _make_readable(column, declared.value_type)
    if types.is_floating(declared):
        return _shorten_floats(column)
    if _readable_type(declared) == column.type and not _has_floats(declared):
        return column
    if types.is_struct(declared):
        children = [_make_readable(column.field(index), field.type) for index, field in enumerate(declared)]
        fields = [pa.field(field.name, child.type) for field, child in zip(declared, children, strict=True)]
        return pa.StructArray.from_arrays(children, fields=fields, mask=column.is_null())
    if types.is_map(declared):
        fresh = column.take(
            pa.array(range(len(column)), pa.int64())
        )  # keys and items of a slice are those of the whole
        keys, items = _make_readable(fresh.keys, declared.key_type), _make_readable(fresh.items, declared.item_type)
        # A null offset makes its map null.
        is_null = pa.concat_arrays([fresh.is_null(), pa.array([False])])
        return pa.MapArray.from_arrays(pc.if_else(is_null, pa.scalar(None, pa.int32()), fresh.offsets), keys, items)
    return make_list(column, _make_readable(pc.list_flatten(column), declared.value_type))


def _shorten_floats(column: Any) -> Any:
    if pa.types.is_float16(column.type):
        halves = column.to_numpy(zero_copy_only=False).astype(np.float16)
        column = pa.array(halves.astype("U").astype(np.float64))
    elif pa.types.is_float32(column.type):
        column = column.cast(pa.string()).cast(pa.float64())
    is_nan = pc.is_nan(column)
    return pc.if_else(is_nan, pa.scalar(None, pa.float64()), column) if pc.any(is_nan).as_py() else column


def _nest_tensors(column: Any, tensor: Any) -> Any:
    shape, order = _shape(tensor), tensor.permutation
    values = pc.list_flatten(column)
    if order is not None:
        places = np.arange(len(values)).reshape(-1, *tensor.shape).transpose(0, *(1 + axis for axis in order))
        values = values.take(pa.array(places.ravel()))
    values = _make_readable(values, tensor.storage_type.value_type)
    for size in reversed(shape[1:]):
        values = pa.ListArray.from_arrays(pa.array(range(0, len(values) + 1, size), pa.int32()), values)
    is_null = column.is_null().to_numpy(zero_copy_only=False)
    ends = np.cumsum(np.where(is_null, 0, shape[0]))
    offsets = pa.array(np.concatenate([[0], ends]), pa.int32(), mask=np.append(is_null, False))
    return pa.ListArray.from_arrays(offsets, values)


def _shape(tensor: Any) -> list[int]:
    """The shape in which a tensor is read, not the one in which it is stored."""
    return tensor.shape if tensor.permutation is None else [tensor.shape[axis] for axis in tensor.permutation]


def python_values(column: "pa.Array[Any]", name: str) -> "list[Any]":
    """A readable column as Python values, None for null, and an `InvalidValue` for what Python cannot hold.

    Times finer than Python's are texts; whether pandas is installed makes no difference.
    """
    try:
        exact = _microsecond_type(column.type)
        return (column if exact == column.type else column.cast(exact)).to_pylist()
    except Exception:  # each Arrow type raises its own errors
        return [_python_value(column.slice(row, 1), name) for row in range(len(column))]


def _python_value(one: Any, name: str) -> Any:
    try:
        exact = _microsecond_type(one.type)
        try:
            return one.cast(exact).to_pylist()[0]
        except pa.ArrowInvalid:
            if not pa.types.is_temporal(one.type) or pa.types.is_duration(one.type):
                raise
            return one.cast(pa.string()).to_pylist()[0].replace(" ", "T")
    except Exception as error:
        found = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return InvalidValue(f"column {name}: expected a value that Python can hold, found {found}")


def _microsecond_type(value_type: Any) -> Any:
    """A type whose times are in the finest unit of Python's."""
    types = pa.types
    if types.is_timestamp(value_type) and value_type.unit == "ns":
        return pa.timestamp("us", value_type.tz)
    if types.is_time64(value_type):
        return pa.time64("us")
    if types.is_duration(value_type) and value_type.unit == "ns":
        return pa.duration("us")
    if types.is_struct(value_type):
        return pa.struct([pa.field(field.name, _microsecond_type(field.type)) for field in value_type])
    if types.is_map(value_type):
        return pa.map_(_microsecond_type(value_type.key_type), _microsecond_type(value_type.item_type))
    if types.is_large_list(value_type):
        return pa.large_list(_microsecond_type(value_type.value_type))
    if types.is_list(value_type):
        return pa.list_(_microsecond_type(value_type.value_type))
    return value_type


def print_column(column: "pa.Array[Any]", field: "pa.Field[Any]") -> "list[str | InvalidValue | None]":
    """A plain column as texts, as a template prints its values; None for null."""
    types = pa.types
    is_text = types.is_string(column.type) or types.is_large_string(column.type)
    if (is_text or types.is_integer(column.type)) and readable_field(field).type == column.type:
        return [*column.cast(pa.string()).to_pylist()]
    return [
        None if value is None else value if isinstance(value, InvalidValue) else _print_or_refuse(value, field.name)
        for value in python_values(readable_column(column, field), field.name)
    ]


def _print_or_refuse(value: object, name: str) -> "str | InvalidValue":
    try:
        return str(print_value(value))
    except InvalidValue as error:
        return InvalidValue(f"column {name}: {error}")


def can_print_as_label(field: "pa.Field[Any]") -> bool:
    """Whether a column can be an id, a label or a tag: its values are texts, numbers, times or of a known extension."""
    types, readable = pa.types, readable_field(field).type
    if types.is_binary(readable) or types.is_large_binary(readable) or types.is_fixed_size_binary(readable):
        return False
    return not types.is_nested(readable) or isinstance(declared_field(field).type, pa.BaseExtensionType)
