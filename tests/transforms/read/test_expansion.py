"""Files that unpack to far more than they hold: refused, or read a few rows at a time."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moebeam.transforms.read import expansion
from moebeam.transforms.read.expansion import bound_rows
from moebeam.transforms.read.input_rows import MAX_BATCH_ROWS
from moebeam.transforms.read.parquet_file import open_parquet


def write(path: Path, column: Any, **options: Any) -> str:
    pq.write_table(pa.table({"text": column}), path, compression="zstd", store_schema=False, **options)
    return str(path)


def repeat(text: str, num_values: int) -> Any:
    return pa.DictionaryArray.from_arrays(pa.array([0] * num_values, pa.int32()), pa.array([text]))


def bound(path: str) -> int | None:
    with open_parquet(path) as parquet:
        return bound_rows(parquet, path, 0, ["text"])


def test_a_long_value_of_a_dictionary_bounds_the_rows_that_are_read_at_once(tmp_path: Path) -> None:
    assert bound(write(tmp_path / "a.parquet", repeat("x" * (1 << 20), 1_000))) == 64
    assert bound(write(tmp_path / "b.parquet", repeat("x" * 10, 1_000))) is None
    ordinary = bound(write(tmp_path / "c.parquet", [f"text {row}" * 50 for row in range(2_000)]))
    assert ordinary is not None
    assert ordinary > MAX_BATCH_ROWS


def test_values_that_repeat_without_end_are_refused_with_their_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expansion, "MAX_REPEATED_BYTES", 1 << 20)
    monkeypatch.setattr(expansion, "MAX_READ_BYTES", 1 << 20)
    path = write(tmp_path / "a.parquet", repeat("x" * 1_000, 200_000))
    with pytest.raises(pa.ArrowInvalid, match=r"column text: expected values of at most 1,048,576 bytes .* repeat"):
        bound(path)


def test_long_values_that_are_rare_are_no_reason_to_refuse_a_column(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expansion, "MAX_REPEATED_BYTES", 8 << 20)
    monkeypatch.setattr(expansion, "MAX_READ_BYTES", 1 << 20)
    column = pa.DictionaryArray.from_arrays(
        pa.array([0] * 199_999 + [1], pa.int32()), pa.array(["short", "x" * 1_000_000])
    )
    assert bound(write(tmp_path / "a.parquet", column)) == 1


@pytest.mark.parametrize("kind", ["texts", "numbers"])
def test_one_row_that_repeats_a_value_without_end_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(expansion, "SUSPECT_COLUMN_BYTES", 1 << 20)
    monkeypatch.setattr(expansion, "MAX_READ_BYTES", 1 << 20)
    items = repeat("x" * 1_000, 300_000) if kind == "texts" else pa.array([7] * 300_000)
    lists = pa.ListArray.from_arrays(pa.array([0, 300_000], pa.int32()), items)
    with pytest.raises(pa.ArrowInvalid, match=r"column text\.list\.element: expected values of at most 1,048,576"):
        bound(write(tmp_path / "a.parquet", lists))
