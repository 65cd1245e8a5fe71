"""Column types: whatever a file declares, its columns travel plain and are what they were in the tables."""

import io
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moebeam.schemas.column_types import (
    agree_on_types,
    loosen_sizes,
    note_categories,
    plain_column,
    plain_field,
    plain_type,
    restore_column,
    restored_field,
    storable_table,
)
from tests.support.jobs.odd_columns import Celsius, as_unregistered, odd_columns

COLUMNS = odd_columns()

PLAIN = {"string_view", "binary_view", "list_view", "list_of_dictionaries", "list_of_uuids", "list_of_fixed_size_lists"}
"""Columns that stay plain: their type is an encoding of the same values, or one that pandas or polars fails at."""


def note(array: Any, field: "pa.Field[Any] | None" = None) -> "pa.Field[Any]":
    """The field of a column as a scan of its only file notes it."""
    found = plain_field(field or pa.field("x", array.type))
    if isinstance(array, pa.DictionaryArray) and array.type.ordered:
        found = note_categories(found, array)
    return agree_on_types(pa.schema([found]), [pa.schema([found])]).field(0)


@pytest.mark.parametrize("name", [name for name in COLUMNS if name != "celsius"])
def test_a_column_comes_back_from_its_plain_form(name: str) -> None:
    array = COLUMNS[name]
    field = note(array)
    declared = array.type
    if pa.types.is_dictionary(declared):
        declared = pa.dictionary(pa.int32(), declared.value_type, declared.ordered)
    expected = pa.list_(pa.binary()) if name == "list_of_uuids" else plain_type(declared) if name in PLAIN else declared
    assert restored_field(field).type == expected
    for column in (array, array.slice(1), array.slice(1, 1)):
        plain = plain_column(column)
        plain.validate(full=True)
        assert plain.type == field.type == plain_type(array.type)
        restored = restore_column(plain, field)
        restored.validate(full=True)
        assert restored.type == restored_field(field).type
        assert plain_column(restored).cast(plain.type).to_string() == plain.to_string()


def test_the_order_of_categories_outlives_files_that_use_few_of_them() -> None:
    field = note(COLUMNS["ordered_dictionary"])
    few = restore_column(pa.array(["high", None, "unheard of"]), field)
    assert few.type.ordered
    assert few.dictionary.to_pylist() == ["low", "medium", "high", "unheard of"]
    assert few.to_pylist() == ["high", None, "unheard of"]
    unordered = restored_field(plain_field(pa.field("x", COLUMNS["ordered_dictionary"].type)))
    assert unordered.type == pa.dictionary(pa.int32(), pa.string())


def test_an_extension_that_this_process_does_not_know_stays_one() -> None:
    field, storage = as_unregistered("x", COLUMNS["celsius"])
    found = restored_field(note(storage, field))
    assert (found.type, found.metadata) == (pa.float32(), field.metadata)
    sink = io.BytesIO()
    pq.write_table(pa.table([storage], schema=pa.schema([found])), sink)
    pa.register_extension_type(cast("Any", Celsius()))
    try:
        assert pq.read_table(sink).schema.field(0).type == Celsius()
    finally:
        pa.unregister_extension_type("tests.celsius")


@pytest.mark.parametrize(
    ("one", "other", "agreed"),
    [
        (pa.uuid(), pa.uuid(), pa.uuid()),
        (pa.uuid(), pa.binary(16), pa.binary(16)),
        (pa.uuid(), pa.null(), pa.uuid()),
        (
            pa.dictionary(pa.int8(), pa.string()),
            pa.dictionary(pa.int32(), pa.string()),
            pa.dictionary(pa.int32(), pa.string()),
        ),
        (pa.dictionary(pa.int8(), pa.string()), pa.string(), pa.string()),
        (pa.list_(pa.int32(), 2), pa.list_(pa.int32(), 3), pa.list_(pa.int32())),
        (pa.list_(pa.int32(), 2), None, pa.list_(pa.int32())),
        (pa.uuid(), None, pa.uuid()),
        (pa.json_(), pa.large_string(), pa.large_string()),
    ],
    ids=str,
)
def test_a_declared_type_is_kept_where_all_files_declare_it(one: Any, other: Any, agreed: Any) -> None:
    for first, second in ((one, other), (other, one)):
        schemas = [pa.schema([] if each is None else [plain_field(pa.field("x", each))]) for each in (first, second)]
        unified = pa.unify_schemas(schemas, promote_options="permissive")
        assert restored_field(agree_on_types(unified, schemas).field("x")).type == agreed


def test_sizes_are_loose_only_where_a_table_may_have_nulls_of_its_own() -> None:
    names = ["fixed_size_list", "tensor", "uuid", "dictionary"]
    table = loosen_sizes(pa.table([COLUMNS[name] for name in names], names=names))
    assert table.schema.types[:2] == [pa.list_(pa.float32())] * 2
    assert table.schema.types[2:] == [pa.uuid(), pa.dictionary(pa.int32(), pa.string())]


def test_a_frame_is_stored_in_types_that_parquet_keeps() -> None:
    runs = pa.RunEndEncodedArray.from_arrays(pa.array([2, 3], pa.int32()), pa.array(["a", None]))
    numbers = pa.array([1, None, 1]).dictionary_encode()
    categories = COLUMNS["ordered_dictionary"]
    stored = storable_table(pa.table({**COLUMNS, "runs": runs, "numbers": numbers}))
    assert stored.column("runs").to_pylist() == ["a", "a", None]
    assert stored.schema.field("numbers").type == pa.int64()
    column: Any = stored.column("ordered_dictionary")
    assert column.chunk(0).dictionary.equals(categories.dictionary)
    sink = io.BytesIO()
    pq.write_table(stored.drop_columns(["timestamp_s", "timestamp_ms"]), sink)
    read = pq.read_table(sink)
    for name in ("uuid", "json", "tensor", "fixed_size_list", "ordered_dictionary", "dictionary", "bool8"):
        assert read.schema.field(name).type == stored.schema.field(name).type
