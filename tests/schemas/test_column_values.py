"""Column values: what prompts, ids, labels and tags make of a column, whatever its type."""

import datetime as dt
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moebeam.schemas.column_types import agree_on_types, plain_column, plain_field
from moebeam.schemas.column_values import (
    can_print_as_label,
    print_column,
    python_values,
    readable_column,
    readable_field,
)
from moebeam.schemas.errors import InvalidValue
from tests.support.jobs.odd_columns import UUID, extend, odd_columns

COLUMNS = odd_columns()


def note(array: Any) -> "pa.Field[Any]":
    field = plain_field(pa.field("x", array.type))
    return agree_on_types(pa.schema([field]), [pa.schema([field])]).field(0)


def printed(array: Any) -> list[Any]:
    return print_column(plain_column(array), note(array))


@pytest.mark.parametrize("name", COLUMNS)
def test_every_value_is_readable_or_an_error_of_its_own_row(name: str) -> None:
    array = COLUMNS[name]
    for column in (array, array.slice(1), array.slice(1, 1)):
        readable = readable_column(plain_column(column), note(array))
        readable.validate(full=True)
        assert readable.type == readable_field(note(array)).type
        values = python_values(readable, name)
        assert [value is None for value in values] == [value is None for value in printed(column)]
        assert all(value is None or isinstance(value, str | InvalidValue) for value in printed(column))
    assert printed(array)[2] == printed(array.slice(2))[0] or isinstance(printed(array)[2], InvalidValue)


@pytest.mark.parametrize(
    ("array", "texts"),
    [
        (COLUMNS["uuid"], [str(UUID), None, "ffffffff-ffff-ffff-ffff-ffffffffffff"]),
        (COLUMNS["json"], ['{"a": 1}', None, "[]"]),
        (COLUMNS["bool8"], ["True", None, "False"]),
        (COLUMNS["bool"], ["True", None, "False"]),
        (COLUMNS["tensor"], ["[[0.1, 2.0]]", "[[3.0, 4.0]]", "[[5.0, 6.0]]"]),
        (COLUMNS["opaque"], [str(2**63 - 1), None, "1"]),
        (COLUMNS["celsius"], ["0.1", None, "-273.15"]),
        (COLUMNS["float16"], ["65500.0", None, "0.1"]),
        (COLUMNS["float32"], ["3.4e+38", None, "0.1"]),
        (COLUMNS["float64"], [None, None, "-inf"]),
        (COLUMNS["fixed_size_list"], ["[0.1, 2.0]", "[3.0, 4.0]", "[5.0, 6.0]"]),
        (COLUMNS["list_of_uuids"], [f'["{UUID}"]', None, "[]"]),
        (COLUMNS["struct_of_uuid"].slice(0, 1), [f'{{"id": "{UUID}"}}']),
        (COLUMNS["map"], ['[["a", 2.5], ["a", null]]', None, "[]"]),
        (COLUMNS["ordered_dictionary"], ["high", None, "low"]),
        (COLUMNS["decimal256"], ["9" * 76, None, "1"]),
        (COLUMNS["timestamp_offset"], ["1970-01-01T05:30:00+05:30", None, "1970-01-01T05:30:00.000001+05:30"]),
        (COLUMNS["time64_ns"], ["23:59:59.999999999", None, "00:00:00.000000001"]),
        (
            pa.array([1_000, 1, None], pa.timestamp("ns")),
            ["1970-01-01T00:00:00.000001", "1970-01-01T00:00:00.000000001", None],
        ),
        (pa.array([None, [0.1, float("nan")]], pa.list_(pa.float32())), [None, "[0.1, null]"]),
        (
            pa.array([{"a": {"b": 0.1}}, None]).cast(pa.struct([("a", pa.struct([("b", pa.float32())]))])),
            ['{"a": {"b": 0.1}}', None],
        ),
        (
            extend(pa.fixed_shape_tensor(pa.int32(), [2, 3], permutation=[1, 0]), [[1, 2, 3, 4, 5, 6], None]),
            ["[[1, 4], [2, 5], [3, 6]]", None],
        ),
    ],
)
def test_values_are_printed_as_people_write_them(array: Any, texts: list[str | None]) -> None:
    assert printed(array) == texts


def test_what_python_cannot_hold_spoils_no_other_row() -> None:
    years = pa.array([379_638_835_200_000_000, None, 0], pa.timestamp("us"))
    far, nothing, epoch = python_values(years, "at")
    assert str(far) == "column at: expected a value that Python can hold, found OverflowError: date value out of range"
    assert (nothing, epoch) == (None, dt.datetime(1970, 1, 1))
    assert isinstance(printed(pa.array([b"\xff"]))[0], InvalidValue)
    zone, *_ = python_values(COLUMNS["timestamp_no_zone"], "at")
    assert "Mars/Phobos" in str(zone)


def test_times_do_not_depend_on_whether_pandas_is_installed() -> None:
    values = [2_000, None, 5_000_000]
    for value_type in (pa.timestamp("ns"), pa.duration("ns"), pa.time64("ns")):
        found = python_values(pa.array(values, pa.int64()).view(value_type), "x")
        assert {type(value) for value in found} <= {dt.datetime, dt.timedelta, dt.time, type(None)}
    nested = pa.array([[{"at": 2_000}]], pa.list_(pa.struct([("at", pa.timestamp("ns"))])))
    assert python_values(nested, "x") == [[{"at": dt.datetime(1970, 1, 1, 0, 0, 0, 2)}]]


@given(st.lists(st.floats(width=32) | st.none(), max_size=5), st.sampled_from([pa.float16(), pa.float32()]))
def test_a_printed_float_reads_back_as_the_same_float_of_its_width(values: list[float | None], width: Any) -> None:
    array = pa.array(values, pa.float32()).cast(width, safe=False)
    shortest = readable_column(array, pa.field("x", width))
    expected = [None if value is None or value != value else value for value in array.to_pylist()]
    assert shortest.cast(width, safe=False).to_pylist() == expected


@pytest.mark.parametrize(
    ("value_type", "can"),
    [
        (pa.string(), True),
        (pa.int8(), True),
        (pa.float32(), True),
        (pa.uuid(), True),
        (pa.json_(), True),
        (pa.fixed_shape_tensor(pa.int8(), [1]), True),
        (pa.dictionary(pa.int8(), pa.string()), True),
        (pa.date32(), True),
        (pa.decimal128(5, 2), True),
        (pa.null(), True),
        (pa.binary(), False),
        (pa.binary(16), False),
        (pa.list_(pa.string()), False),
        (pa.struct([("a", pa.string())]), False),
    ],
    ids=str,
)
def test_ids_and_labels_are_columns_with_one_text_a_row(value_type: Any, can: bool) -> None:
    field = plain_field(pa.field("x", value_type))
    assert can_print_as_label(field) is can


def test_a_decimal_keeps_its_places() -> None:
    assert printed(pa.array([Decimal("1.500")])) == ["1.500"]
