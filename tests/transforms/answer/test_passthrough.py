"""Passthrough: a column of any type is in the tables what it was in the input, and all common readers can read it."""

import contextlib
import io
import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moebeam.model_runner.prefix_tree import prefix_key
from moebeam.schemas.answers import AccountedAnswer, ValidatedAnswer
from moebeam.schemas.arrow import encode_parquet_file
from moebeam.schemas.column_types import plain_column
from moebeam.schemas.job.sections import InputSection, PlanSection
from moebeam.schemas.records import Completion, Sampling, Usage, sampling_json
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.schemas.tables import plan_schema
from moebeam.transforms.answer.shard_tables import PlannedRows, shard_tables
from moebeam.transforms.beam.coders import RecordBatchCoder
from moebeam.transforms.durable.commit import sum_tables
from moebeam.transforms.money.account import Accounting
from moebeam.transforms.plan.sorted_runs import read_rows, write_runs
from moebeam.transforms.read.input_rows import ReadColumns, read_unit
from moebeam.transforms.read.input_scan import InputScan, scan_input
from tests.support.jobs.odd_columns import odd_columns

COLUMNS = odd_columns()

Tables = Mapping[str, pa.Table]


def answer_all(folder: Path, scan: InputScan) -> Tables:
    """The tables of a run whose rows are all answered, as far as they could be read, by way of Beam and the plan."""
    columns = ReadColumns((), tuple(scan.schema))
    coder = RecordBatchCoder()
    layout = RunLayout(str(folder))
    parts: list[pa.Table] = []
    for unit in scan.units:
        batches = [coder.decode(coder.encode(batch)) for batch in read_unit(unit, columns)]
        for run in write_runs([plan_batch(batch, columns) for batch in batches], layout, PlanSection()):
            parts.append(read_rows(layout.sorted_run_file(run.run_id)))
    rows = PlannedRows.from_table(pa.concat_tables(parts))
    answers = {row: [answer(row)] for row in rows.asked}
    found = shard_tables("s0", rows, answers, Accounting("run"))
    assert sum_tables(found).num_results == len(answers)
    return {name: pq.read_table(pa.BufferReader(encode_parquet_file(table))) for name, table in found.items()}


def plan_batch(read: pa.RecordBatch, columns: ReadColumns) -> pa.RecordBatch:
    schema = plan_schema(columns.passthrough)
    planned: dict[str, pa.Array[Any]] = {
        name: read.column(name) if name in read.schema.names else pa.nulls(read.num_rows, schema.field(name).type)
        for name in schema.names
    }
    keys = [prefix_key("", np.array([row], np.int32)) for row in read.column("source_row").to_pylist()]
    planned["prefix_key"] = pa.array(keys, pa.large_binary())
    planned["num_prompt_tokens"] = pa.array([1] * read.num_rows, pa.int32())
    planned["sampling"] = pa.array([sampling_json(Sampling(max_tokens=4))] * read.num_rows)
    return pa.RecordBatch.from_arrays(list(planned.values()), schema=schema)


def answer(row: int) -> AccountedAnswer:
    completion = Completion(
        str(row), "yes", "stop", Usage(1, 1, 0), datetime(2026, 5, 1, tzinfo=UTC), 5.0, "p", "m", "r"
    )
    return AccountedAnswer(ValidatedAnswer(completion, None, None), None)


def write_input(folder: Path, array: Any, *, beside: str | None = None) -> InputScan:
    """Write a file with a column, and another one, if any, that cannot be read."""
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table({"x": array}), folder / "a.parquet")
    if beside is not None:
        (folder / "b.parquet").write_text(beside)
    return scan_input(InputSection(path=str(folder)))


def show(column: Any) -> str:
    """All values of a column, without making Python's of them; NaNs are alike."""
    plain = pa.chunked_array([plain_column(chunk) for chunk in column.chunks])
    text = plain.combine_chunks().to_string(window=99, container_window=99)
    # Parquet has its own names for the items of lists and maps.
    return re.sub(r" \('\w+'\)", "", text.replace("element:", "item:"))


@pytest.fixture(scope="module")
def answered(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Tables]:
    """Tables of a run over a column of that name and a file that cannot be read, each made once."""

    @cache
    def answer_column(name: str) -> Tables:
        folder = tmp_path_factory.mktemp(name)
        return answer_all(folder / "out", write_input(folder / "in", COLUMNS[name], beside="no Parquet"))

    return answer_column


@pytest.mark.parametrize("name", COLUMNS)
def test_values_and_types_pass_through_a_run(answered: Callable[[str], Tables], name: str) -> None:
    tables = answered(name)
    sink = io.BytesIO()
    pq.write_table(pa.table({"x": COLUMNS[name]}), sink)
    given_column, found = pq.read_table(sink).column("x"), tables["results"].column("x")
    assert (tables["results"].num_rows, tables["rejects"].num_rows) == (3, 1)
    assert tables["rejects"].column("x").null_count == 1
    assert show(found) == show(given_column)
    for is_kind in (pa.types.is_dictionary, pa.types.is_fixed_size_list, is_extension):
        assert is_kind(found.type) == is_kind(given_column.type)


def is_extension(value_type: Any) -> bool:
    return isinstance(value_type, pa.BaseExtensionType)


def read_by_duckdb(path: Path) -> int:
    found = duckdb.sql(f"select * from '{path}'")
    assert found is not None
    return found.to_arrow_table().num_rows


def read_by_polars(path: Path) -> int:
    polars: Any = pytest.importorskip("polars", reason="polars is no dependency")
    return polars.read_parquet(path).height


READERS: dict[str, Callable[[Path], int]] = {
    "pyarrow": lambda path: pq.read_table(path).num_rows,
    "pandas": lambda path: len(pd.read_parquet(path)),
    "duckdb": read_by_duckdb,
    "polars": read_by_polars,
}
BEYOND = {
    ("pandas", "date32"),
    ("pandas", "date32_min"),
    ("pandas", "time64_ns"),
    ("pandas", "timestamp_no_zone"),
    ("polars", "decimal256"),
    ("polars", "timestamp_no_zone"),
    ("polars", "timestamp_offset"),
}
"""What a reader's own types cannot hold, in any file: dates of the year 5,881,580, nanoseconds of a day, zones that
have no name or that nobody knows, 76 digits."""


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", COLUMNS)
def test_every_table_is_read_back_by_every_reader(
    tmp_path: Path, answered: Callable[[str], Tables], name: str, reader: str
) -> None:
    for table, num_rows in (("results", 3), ("rejects", 1), ("ledger", 3)):
        path = tmp_path / f"{table}.parquet"
        path.write_bytes(encode_parquet_file(answered(name)[table]))
        is_beyond = (reader, name) in BEYOND
        if is_beyond and table == "rejects":
            continue
        with pytest.raises(BaseException) if is_beyond and table == "results" else contextlib.nullcontext():
            assert READERS[reader](path) == num_rows


_INTEGERS = st.sampled_from([-(2**63), -1, 0, 1, 2**63 - 1]) | st.integers(-(2**63), 2**63 - 1)
_OF_INTEGERS = st.one_of(
    st.sampled_from([pa.int64(), pa.duration("ms"), pa.duration("us"), pa.duration("ns")]),
    st.builds(
        pa.timestamp, st.sampled_from(["ms", "us", "ns"]), st.sampled_from([None, "UTC", "Asia/Tokyo", "No/Zone"])
    ),
)


@st.composite
def columns(draw: st.DrawFn) -> Any:
    """Columns of random types, nested at random, of three rows."""
    values = draw(st.lists(_INTEGERS | st.none(), min_size=12, max_size=12))
    value_type: Any = draw(_OF_INTEGERS)
    array: Any = pa.Array.from_buffers(value_type, 12, pa.array(values, pa.int64()).buffers())
    for wrap in draw(st.lists(st.sampled_from(["list", "sized", "struct", "map"]), max_size=3)):
        num_rows = len(array)
        if wrap == "list" and num_rows % 2 == 0:
            array = pa.ListArray.from_arrays(pa.array([*range(0, num_rows, 2), num_rows], pa.int32()), array)
        elif wrap == "sized" and num_rows % 2 == 0:
            array = pa.FixedSizeListArray.from_arrays(array, 2)
        elif wrap == "struct":
            is_null = pa.array([row % 3 == 0 and not has_sizes(array.type) for row in range(num_rows)])
            array = pa.StructArray.from_arrays([array], ["a"], mask=is_null)
        elif wrap == "map":
            array = pa.MapArray.from_arrays(pa.array(range(num_rows + 1)), pa.array(["k"] * num_rows), array)
    return array.slice(draw(st.integers(0, len(array) - 3)), 3)


def has_sizes(value_type: Any) -> bool:
    """Whether pyarrow would read none of its nulls."""
    return "fixed_size_list" in str(value_type)


@given(array=columns())
def test_values_of_any_type_pass_through_a_run(tmp_path_factory: pytest.TempPathFactory, array: Any) -> None:
    folder = tmp_path_factory.mktemp("any")
    tables = answer_all(folder / "out", write_input(folder / "in", array))
    assert show(tables["results"].column("x")) == show(pq.read_table(folder / "in" / "a.parquet").column("x"))
