"""What `run_job` takes as data, what it refuses, and that answers come back as the kind that was given."""

import sys
from types import ModuleType
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest

from moebeam.jobs.notebook.frames import read_frame
from moebeam.schemas.errors import InputPatternError

ANSWERS = pa.table({"source_row": [0, 1, 2], "status": ["ok", "rejected", "ok"]})
ROWS = {"text": ["one", None, "three"], "n": [1, 2, 3]}


class OnlyAStream:
    """A frame of a library that nobody here knows."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table

    def __arrow_c_stream__(self, requested_schema: object | None = None) -> object:
        return self._table.__arrow_c_stream__(requested_schema)


class OnlyAnArray:
    def __arrow_c_array__(self, requested_schema: object | None = None) -> object:
        return pa.record_batch(ROWS).__arrow_c_array__(requested_schema)


TABLE = pa.table(ROWS)


@pytest.mark.parametrize(
    "data",
    [
        pd.DataFrame(ROWS),
        TABLE,
        pa.record_batch(ROWS),
        pa.RecordBatchReader.from_batches(TABLE.schema, TABLE.to_batches(max_chunksize=2)),
        OnlyAStream(TABLE),
        OnlyAnArray(),
        TABLE.to_pylist(),
    ],
    ids=lambda data: type(data).__name__,
)
def test_every_kind_of_frame_has_the_same_rows(data: object) -> None:
    assert read_frame(data).table.to_pylist() == TABLE.to_pylist()


@pytest.mark.parametrize("data", [TABLE, pa.record_batch(ROWS), OnlyAStream(TABLE)])
def test_answers_of_an_arrow_stream_are_a_table(data: object) -> None:
    assert read_frame(data).restore(ANSWERS) is ANSWERS


def test_answers_of_dicts_are_dicts() -> None:
    assert read_frame(TABLE.to_pylist()).restore(ANSWERS) == ANSWERS.to_pylist()


def test_answers_of_a_polars_frame_are_a_polars_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    polars: Any = ModuleType("polars")
    polars.DataFrame = type("DataFrame", (OnlyAStream,), {})
    polars.from_arrow = lambda table: ("of polars", table)
    monkeypatch.setitem(sys.modules, "polars", polars)
    assert read_frame(polars.DataFrame(TABLE)).restore(ANSWERS) == ("of polars", ANSWERS)


@pytest.mark.parametrize(
    "index",
    [
        pd.Index(["a", "b", "c"], name="key"),
        pd.Index([7, 7, 7]),
        pd.MultiIndex.from_tuples([("x", 1), ("x", 2), ("y", 1)], names=["group", "number"]),
        pd.date_range("2026-01-01", periods=3, tz="UTC"),
    ],
    ids=["named", "repeated", "of two levels", "of times"],
)
def test_a_pandas_index_comes_back_with_its_names(index: pd.Index) -> None:
    frame = read_frame(pd.DataFrame(ROWS, index=index))
    assert frame.table.column_names == ["text", "n"]
    pd.testing.assert_index_equal(frame.restore(ANSWERS).index, index)
    some = frame.restore(ANSWERS.slice(1, 1))
    assert (list(some.index), list(some["status"])) == ([index[1]], ["rejected"])


def test_a_key_that_only_later_dicts_have_is_a_column() -> None:
    table = read_frame([{"a": 1}, {"b": "x"}]).table
    assert table.to_pylist() == [{"a": 1, "b": None}, {"a": None, "b": "x"}]


def test_categories_stay_and_views_become_plain_text() -> None:
    columns = {
        "category": pa.array(["x", "y", "x"]).dictionary_encode(),
        "view": pa.array(["a", "b", None], pa.string_view()),
        "views": pa.array([["a"], ["b"], None], pa.list_(pa.string_view())),
    }
    types = read_frame(pa.table(columns)).table.schema.types
    assert types == [pa.dictionary(pa.int32(), pa.string()), pa.large_string(), pa.list_(pa.large_string())]


def test_a_pandas_frame_comes_back_with_columns_that_pandas_alone_cannot_hold() -> None:
    years = pa.array([2**31 - 1, None, 0], pa.int32()).view(pa.date32())
    order = pd.CategoricalDtype(["low", "medium", "high"], ordered=True)
    data = pd.DataFrame({"kind": pd.Series(["high", None, "low"], dtype=order)})
    table = read_frame(data).table
    assert table.column("kind").chunk(0).dictionary.to_pylist() == ["low", "medium", "high"]
    answers = pa.table({"source_row": [0, 1, 2], "kind": table.column("kind"), "years": years})
    back = read_frame(data).restore(answers)
    assert back["kind"].dtype == order
    assert back["years"].array.__arrow_array__().combine_chunks().equals(years)
    dicts = read_frame([{"a": 1}]).restore(answers)
    assert [row["kind"] for row in dicts] == ["high", None, "low"]
    assert dicts[2]["years"].cast(pa.int32()).as_py() == 0


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (pd.DataFrame({0: ["a"]}), r"expected column names that are text, found 0 \(int\); rename it"),
        (pd.DataFrame([["a", "b"]], columns=["x", "x"]), "every column name once, found twice: x"),
        (pa.table([[1], [2]], names=["x", "x"]), "every column name once, found twice: x"),
        ([{"a": 1}, "b"], r"data\[1\]: expected a dict, found 'b'"),
        ([{"a": 1}, {"a": "b"}], "column 'a': expected values of one type"),
        ([{1: "a"}], r"column names that are text, found 1 \(int\)"),
        ([], "expected at least one row, found an empty list"),
        (pd.DataFrame({"x": [1, "a"]}), "columns that Arrow can hold, found: .*column x"),
        (pd.Series(["a"]), "expected a data frame of pandas, polars or pyarrow"),
        ("rows.parquet", r"found builtins\.str"),
        (None, r"found builtins\.NoneType"),
        ({"a": [1]}, r"found builtins\.dict"),
    ],
)
def test_what_is_no_frame_is_refused_with_the_reason(data: object, told: str) -> None:
    with pytest.raises(InputPatternError, match=told):
        read_frame(data)
