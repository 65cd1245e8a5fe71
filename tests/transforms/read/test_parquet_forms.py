"""Every form of Parquet that pyarrow writes is read whole, with the values that pyarrow reads."""

import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moebeam.schemas.job.input_section import InputSection
from moebeam.transforms.read.input_rows import ReadColumns, read_unit
from moebeam.transforms.read.input_scan import scan_input

TEXTS = {"text": ["a", "b", None]}
AMOUNTS = [Decimal("1.23"), None, Decimal(4)]
NESTED = [{"a": [{"b": [[1, 2], []], "c": {"d": "x"}}]}, None, {"a": []}]

FORMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "INT96": ({"t": [datetime.datetime(2020, 1, 1)] * 3}, {"use_deprecated_int96_timestamps": True}),
    "lists of old names": ({"l": [[1, 2], [], None]}, {"use_compliant_nested_type": False}),
    "no schema of Arrow's": ({"c": pa.array(["a", "b"]).dictionary_encode()}, {"store_schema": False}),
    "deltas of texts": (TEXTS, {"use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY"}}),
    "deltas of lengths": (TEXTS, {"use_dictionary": False, "column_encoding": {"text": "DELTA_LENGTH_BYTE_ARRAY"}}),
    "deltas of numbers": ({"n": [1, 2, 3]}, {"use_dictionary": False, "column_encoding": {"n": "DELTA_BINARY_PACKED"}}),
    "split bytes": ({"f": [1.5, 2.0]}, {"use_dictionary": False, "column_encoding": {"f": "BYTE_STREAM_SPLIT"}}),
    "LZ4": (TEXTS, {"compression": "lz4"}),
    "Zstandard": (TEXTS, {"compression": "zstd"}),
    "Brotli": (TEXTS, {"compression": "brotli"}),
    "gzip": (TEXTS, {"compression": "gzip"}),
    "pages of version 2": (TEXTS, {"data_page_version": "2.0"}),
    "format 1.0": (TEXTS, {"version": "1.0"}),
    "decimals as bytes": ({"d": pa.array(AMOUNTS, pa.decimal128(30, 2))}, {}),
    "decimals as integers": ({"d": pa.array(AMOUNTS, pa.decimal128(9, 2))}, {"store_decimal_as_integer": True}),
    "long decimals": ({"d": pa.array(AMOUNTS, pa.decimal256(60, 2))}, {}),
    "nested": ({"n": NESTED}, {}),
    "a name with a dot beside a struct": ({"a.b": ["x", "y"], "a": [{"b": "v"}, {"b": "w"}]}, {}),
    "odd names": ({"": ["a"], " ": ["b"], "ü\n": ["c"], "{{ x }}": ["d"]}, {}),
    "a page index": (TEXTS, {"write_page_index": True}),
    "checksums": (TEXTS, {"write_page_checksum": True}),
    "maps": ({"m": pa.array([[("a", 1)], None, []], pa.map_(pa.string(), pa.int64()))}, {}),
    "half floats": ({"h": pa.array([1.5, None], pa.float16())}, {}),
    "times": ({"t": pa.array([1000, None], pa.time64("ns")), "d": pa.array([1000, None], pa.duration("us"))}, {}),
    "nulls alone": ({"n": pa.nulls(3)}, {}),
    "no rows": ({"text": pa.array([], pa.string())}, {}),
    "no columns": ({}, {}),
}


def read_values(source: Path) -> list[dict[str, Any]]:
    scan = scan_input(InputSection(path=str(source)))
    columns = ReadColumns(tuple(scan.schema), tuple(scan.schema))
    batches = [batch for unit in scan.units for batch in read_unit(unit, columns)]
    assert all(batch.column("error_type").null_count == batch.num_rows for batch in batches)
    return [row for batch in batches for row in batch.column("passthrough").to_pylist()]


@pytest.mark.parametrize("form", FORMS)
def test_a_form_is_read_whole(tmp_path: Path, form: str) -> None:
    columns, options = FORMS[form]
    pq.write_table(pa.table(columns), tmp_path / "a.parquet", **options)
    assert read_values(tmp_path / "a.parquet") == pq.ParquetFile(tmp_path / "a.parquet").read().to_pylist()


@pytest.mark.parametrize("name", ["A.PARQUET", "a", "a.parquet.snappy", "in [1] ü.pq"])
def test_a_files_name_does_not_matter(tmp_path: Path, name: str) -> None:
    pq.write_table(pa.table(TEXTS), tmp_path / name)
    assert len(read_values(tmp_path / name)) == 3


def test_empty_row_groups_between_others_cost_no_row(tmp_path: Path) -> None:
    table = pa.table(TEXTS)
    with pq.ParquetWriter(tmp_path / "a.parquet", table.schema) as writer:
        for part in (table.slice(0, 0), table.slice(0, 1), table.slice(0, 0), table.slice(1)):
            writer.write_table(part)
    assert [row["text"] for row in read_values(tmp_path / "a.parquet")] == TEXTS["text"]
