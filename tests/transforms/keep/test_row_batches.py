"""Equal rows have equal digests, files and ids, whoever brings them and in which bundles."""

import random
from pathlib import Path
from typing import Any, NamedTuple

import apache_beam as beam
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moebeam.schemas.errors import InputPatternError
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.transforms.keep.cut_files import RowCounts, count_slots, cut_files, divide_table
from moebeam.transforms.keep.kept_file import write_kept_file
from moebeam.transforms.keep.row_batches import DIGEST, PROBLEM, ROW_ID, RowColumns, read_rows


class Row(NamedTuple):
    a: int | None
    b: str


def digests(elements: list[Any], columns: RowColumns | None = None) -> list[bytes]:
    return [
        digest for table in read_rows(elements, columns or RowColumns()) for digest in table.column(DIGEST).to_pylist()
    ]


def test_a_row_has_one_digest_in_every_form() -> None:
    forms: list[Any] = [Row(1, "x"), {"b": "x", "a": 1}, beam.Row(a=1, b="x"), pa.record_batch({"b": ["x"], "a": [1]})]
    assert len({digests([form])[0] for form in forms}) == 1
    assert digests([{"a": None, "b": "x"}]) == digests([{"b": "x"}])
    assert digests([{"a": 1}]) != digests([{"a": "1"}])


def keep(folder: Path, rows: list[dict[str, Any]], bundle: int) -> list[dict[str, Any]]:
    tables = [
        table
        for start in range(0, len(rows), bundle)
        for table in read_rows(rows[start : start + bundle], RowColumns())
    ]
    cut = cut_files(sum((count_slots(table) for table in tables), RowCounts()))
    by_file: dict[int, list[pa.Table]] = {}
    for table in tables:
        for number, piece in divide_table(table, cut).items():
            by_file.setdefault(number, []).append(piece)
    paths = [
        write_kept_file(RunLayout(str(folder)), cut, number, by_file[number], RowColumns())
        for number in sorted(by_file)
    ]
    return [row for path in paths for row in pq.read_table(path).to_pylist()]


def test_files_do_not_depend_on_order_or_bundles(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"text": f"t{number % 90}"} for number in range(100)]
    kept = keep(tmp_path / "one", rows, 100)
    random.Random(3).shuffle(rows)
    assert keep(tmp_path / "other", rows, 7) == kept
    ids = [row[ROW_ID] for row in kept]
    assert len(set(ids)) == 100 and sum("-" in name for name in ids) == 10


def test_a_value_that_does_not_fit_is_noted_on_its_row() -> None:
    columns = RowColumns(("a",), {"a": pa.int64()})
    (table,) = read_rows([{"a": 1}, {"a": "many"}], columns)
    assert table.column("a").to_pylist() == [1, None]
    assert table.column(PROBLEM).to_pylist()[0] is None
    assert "column 'a': expected int64" in str(table.column(PROBLEM)[1])


def test_what_is_no_row_is_refused() -> None:
    with pytest.raises(InputPatternError, match="expected Beam rows, dicts"):
        list(read_rows([3], RowColumns()))
