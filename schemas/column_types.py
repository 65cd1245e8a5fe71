"""Types of the user's columns: how they travel between stages, and what they are again in the tables.

Between stages a column is *plain*: dictionaries decoded, extensions as their storage, views and fixed sizes as ordinary
lists and texts, at any level. Such columns can be merged, sorted and cut, whichever files they come from. What a file
said a column is stays noted in the metadata of its field; the tables say it again.
"""

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_DECLARED = b"moebeam:declared"
"""Metadata: the type that a file declares, as a schema of one field."""

_CATEGORIES = b"moebeam:categories"
"""Metadata: the values of an ordered dictionary, as an Arrow stream."""

_MAX_CATEGORY_BYTES = 64 << 10
"""Most bytes of an order of categories that every batch of rows carries; a longer one is given up."""

_EXTENSION = b"ARROW:extension:"
"""Begins the metadata by which a field of an extension that this process does not know is one all the same."""


def plain_type(value_type: Any) -> Any:
    """An Arrow type without dictionaries, views, extensions, run lengths and fixed sizes, at any level."""
    types = pa.types
    if isinstance(value_type, pa.BaseExtensionType):
        return plain_type(value_type.storage_type)
    if types.is_dictionary(value_type) or types.is_run_end_encoded(value_type):
        return plain_type(value_type.value_type)
    if types.is_string_view(value_type):
        return pa.large_string()
    if types.is_binary_view(value_type):
        return pa.large_binary()
    if types.is_struct(value_type):
        return pa.struct([pa.field(field.name, plain_type(field.type)) for field in value_type])
    if types.is_map(value_type):
        return pa.map_(plain_type(value_type.key_type), plain_type(value_type.item_type))
    if types.is_large_list(value_type) or types.is_large_list_view(value_type):
        return pa.large_list(plain_type(value_type.value_type))
    if types.is_list(value_type) or types.is_list_view(value_type) or types.is_fixed_size_list(value_type):
        return pa.list_(plain_type(value_type.value_type))
    return value_type


def plain_column(column: "pa.Array[Any]") -> "pa.Array[Any]":
    """A column in its plain type.

    Raises:
        pa.ArrowException: there is no plain form, as of run lengths inside of a list.
    """
    if isinstance(column, pa.RunEndEncodedArray):
        column = cast("Any", pc).run_end_decode(column)
    value_type = plain_type(column.type)
    return column if column.type == value_type else _without_list_views(column).cast(value_type)


def _without_list_views(column: Any) -> Any:
    """Arrow's own cast of a list view fails on nulls."""
    types = pa.types
    if types.is_list_view(column.type) or types.is_large_list_view(column.type):
        return make_list(column, _without_list_views(pc.list_flatten(column)))
    if types.is_struct(column.type) and column.type.num_fields:
        children = [_without_list_views(column.field(index)) for index in range(column.type.num_fields)]
        return pa.StructArray.from_arrays(children, names=column.type.names, mask=column.is_null())
    if (types.is_list(column.type) or types.is_large_list(column.type)) and _has_list_view(column.type.value_type):
        return make_list(column, _without_list_views(pc.list_flatten(column)))
    return column


def _has_list_view(value_type: Any) -> bool:
    types = pa.types
    if types.is_list_view(value_type) or types.is_large_list_view(value_type):
        return True
    if types.is_struct(value_type):
        return any(_has_list_view(field.type) for field in value_type)
    return (types.is_list(value_type) or types.is_large_list(value_type)) and _has_list_view(value_type.value_type)


def make_list(column: Any, values: Any) -> Any:
    """Lists of new values with the lengths and nulls of a list column; `values` has one for each of its items."""
    is_null = column.is_null().to_numpy(zero_copy_only=False)
    ends = np.cumsum(pc.list_value_length(column).fill_null(0).to_numpy(zero_copy_only=False), dtype=np.int64)
    is_large = pa.types.is_large_list(column.type) or pa.types.is_large_list_view(column.type)
    # A null offset makes its list null.
    offsets: Any = pa.array(
        np.concatenate([[0], ends]), pa.int64() if is_large else pa.int32(), mask=np.append(is_null, False)
    )
    return (pa.LargeListArray if is_large else pa.ListArray).from_arrays(offsets, values)


def plain_field(field: "pa.Field[Any]") -> "pa.Field[Any]":
    """A nullable field in its plain type, which notes the declared one if that says more."""
    plain = pa.field(field.name, plain_type(field.type))
    declared_type = _declared_type(field.type)
    metadata = {key: value for key, value in (field.metadata or {}).items() if key.startswith(_EXTENSION)}
    if declared_type != field.type:  # an extension is of one storage type only
        metadata = {}
    declared = pa.field("", declared_type, metadata=metadata or None)
    if declared.type == plain.type and not metadata:
        return plain
    return plain.with_metadata({_DECLARED: pa.schema([declared]).serialize().to_pybytes()})


def _declared_type(value_type: Any) -> Any:
    """What of a type is the user's: its extensions, categories and fixed sizes, not how it is encoded."""
    types = pa.types
    if isinstance(value_type, pa.BaseExtensionType):
        return value_type
    if types.is_dictionary(value_type):
        return pa.dictionary(pa.int32(), plain_type(value_type.value_type), value_type.ordered)
    if types.is_struct(value_type):
        return pa.struct([pa.field(field.name, _declared_type(field.type)) for field in value_type])
    if types.is_map(value_type):
        return pa.map_(_declared_type(value_type.key_type), _declared_type(value_type.item_type))
    if types.is_fixed_size_list(value_type):
        return pa.list_(_declared_type(value_type.value_type), value_type.list_size)
    if types.is_large_list(value_type):
        return pa.large_list(_declared_type(value_type.value_type))
    if types.is_list(value_type):
        return pa.list_(_declared_type(value_type.value_type))
    return plain_type(value_type)


def note_categories(field: "pa.Field[Any]", column: "pa.DictionaryArray[Any, Any]") -> "pa.Field[Any]":
    """The plain field of an ordered dictionary, which notes the order of its values too."""
    categories = plain_column(column.dictionary)
    if categories.nbytes > _MAX_CATEGORY_BYTES:
        return field
    sink = pa.BufferOutputStream()
    batch = pa.RecordBatch.from_arrays([categories], names=[""])
    with pa.ipc.new_stream(sink, batch.schema) as stream:
        stream.write_batch(batch)
    metadata: dict[Any, Any] = {**_read_metadata(field), _CATEGORIES: sink.getvalue().to_pybytes()}
    return field.with_metadata(metadata)


def _read_metadata(field: "pa.Field[Any]") -> dict[bytes, bytes]:
    return field.metadata or {}


def agree_on_types(unified: pa.Schema, schemas: Sequence[pa.Schema]) -> pa.Schema:
    """The unified plain schema of several files, with those notes on which all files agree.

    Args:
        unified: of all, in plain types.
        schemas: each file's, of fields as `plain_field` makes them. A column that is all null in a file is of any type.
    """
    fields: list[pa.Field[Any]] = []
    for field in unified:
        places = [schema.get_field_index(field.name) for schema in schemas]
        said = [schema.field(place) for schema, place in zip(schemas, places, strict=True) if place >= 0]
        said = [other for other in said if not pa.types.is_null(other.type)]
        notes = [_read_metadata(other) for other in said]
        agreed: dict[Any, Any] = {
            key: notes[0][key]
            for key in (_DECLARED, _CATEGORIES)
            if notes and key in notes[0] and all(note.get(key) == notes[0][key] for note in notes)
        }
        agrees = _DECLARED in agreed and all(other.type == field.type for other in said)
        noted = field.with_metadata(agreed) if agrees else field.remove_metadata()
        # Of a column that some file lacks there are nulls, see `restored_field`.
        has_nulls = len(said) < len(schemas) and _is_fixed_size(declared_field(noted).type)
        fields.append(noted if agrees and not has_nulls and _can_restore(noted) else field.remove_metadata())
    return pa.schema(fields)


def _can_restore(field: "pa.Field[Any]") -> bool:
    try:
        restore_column(pa.nulls(1, field.type), field)
    except pa.ArrowException:  # an extension may refuse its own storage type
        return False
    return True


def declared_field(field: "pa.Field[Any]") -> "pa.Field[Any]":
    """What a file declared of a plain field, by its note; the field itself without one."""
    note = (field.metadata or {}).get(_DECLARED)
    return field if note is None else _read_note(note).with_name(field.name)


def _read_note(note: bytes) -> "pa.Field[Any]":
    return pa.ipc.read_schema(pa.py_buffer(note)).field(0)


def restored_field(field: "pa.Field[Any]") -> "pa.Field[Any]":
    """A plain field as the tables have it: in its declared type, as far as common readers can read that."""
    declared = declared_field(field)
    restored = _restored_type(declared.type, is_ordered=_CATEGORIES in (field.metadata or {}))
    is_whole = declared is not field and restored == declared.type
    return pa.field(field.name, restored, metadata=declared.metadata if is_whole else None)


def _restored_type(value_type: Any, *, is_ordered: bool) -> Any:
    """The declared type of a column without what Parquet cannot keep, or what pandas and polars cannot read.

    Categories are kept at the top and only of text; fixed sizes at the top; extensions there and in structs. Bytes in
    a list, as those of UUIDs, lose their fixed size, at which pandas fails.
    """
    types = pa.types
    if isinstance(value_type, pa.BaseExtensionType):
        return value_type
    if types.is_dictionary(value_type):
        values = value_type.value_type
        is_text = types.is_string(values) or types.is_large_string(values)
        ordered: Any = value_type.ordered and is_ordered
        return pa.dictionary(pa.int32(), values, ordered) if is_text else values
    if types.is_fixed_size_list(value_type) and value_type.list_size:
        return pa.list_(_restored_in_list(value_type.value_type), value_type.list_size)
    return _restored_in_struct(value_type)


def _restored_in_struct(value_type: Any) -> Any:
    if isinstance(value_type, pa.BaseExtensionType) and not _is_fixed_size(value_type):
        return value_type
    if pa.types.is_struct(value_type):
        return pa.struct([pa.field(field.name, _restored_in_struct(field.type)) for field in value_type])
    return plain_type(value_type) if pa.types.is_fixed_size_binary(value_type) else _restored_in_list(value_type)


def _restored_in_list(value_type: Any) -> Any:
    types, plain = pa.types, plain_type(value_type)
    if types.is_fixed_size_binary(plain):
        return pa.binary()
    if types.is_struct(plain):
        return pa.struct([pa.field(field.name, _restored_in_list(field.type)) for field in plain])
    if types.is_map(plain):
        return pa.map_(_restored_in_list(plain.key_type), _restored_in_list(plain.item_type))
    if types.is_large_list(plain):
        return pa.large_list(_restored_in_list(plain.value_type))
    return pa.list_(_restored_in_list(plain.value_type)) if types.is_list(plain) else plain


def _is_fixed_size(value_type: Any) -> bool:
    storage = value_type.storage_type if isinstance(value_type, pa.BaseExtensionType) else value_type
    return pa.types.is_fixed_size_list(storage)


def restore_column(column: Any, field: "pa.Field[Any]") -> Any:
    """A plain column in the type of `restored_field`."""
    value_type: Any = restored_field(field).type
    if column.type == value_type:
        return column
    if pa.types.is_dictionary(value_type) and value_type.ordered:
        return _encode_ordered(column, _read_metadata(field)[_CATEGORIES], value_type)
    return column.cast(value_type)


def _encode_ordered(column: Any, note: bytes, value_type: Any) -> Any:
    """Values that the noted order lacks come after it."""
    known = pa.ipc.open_stream(note).read_next_batch().column(0).cast(value_type.value_type)
    found = column.unique().drop_null()
    categories = pa.concat_arrays([known, found.filter(pc.invert(pc.is_in(found, value_set=known)))])
    indices = pc.index_in(column, value_set=categories)
    if isinstance(indices, pa.ChunkedArray):
        indices = indices.combine_chunks()
    return pa.DictionaryArray.from_arrays(indices, categories, ordered=True)


def loosen_sizes(table: pa.Table) -> pa.Table:
    """A table with nulls that no file had, as `rejects/` has them, where a row may stand for a whole file.

    Fixed-size lists are lists there: pyarrow cannot read a null one from Parquet.
    """
    for index, field in enumerate(table.schema):
        if _is_fixed_size(field.type):
            loose = _restored_in_list(field.type)
            table = table.set_column(index, pa.field(field.name, loose), table.column(index).cast(loose))
    return table


def storable_table(table: pa.Table) -> pa.Table:
    """A table of any Arrow types in those that Parquet keeps and common readers can read.

    Raises:
        pa.ArrowException: there is no such type for a column.
    """
    columns: list[Any] = []
    for field, column in zip(table.schema, table.columns, strict=True):
        value_type = _restored_type(_declared_type(field.type), is_ordered=True)
        if column.type != value_type:
            chunks = [plain_column(chunk) for chunk in column.chunks]
            is_kept = pa.types.is_dictionary(value_type) or not chunks
            column = (column if is_kept else pa.chunked_array(chunks)).cast(value_type)
        columns.append(column)
    return pa.table(columns, names=table.column_names)
