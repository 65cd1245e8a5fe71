"""A data frame is found by its rows alone, and kept only where it may be."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moebeam.jobs.notebook.kept_frame import digest_table, drop_unclaimed_frame, keep_frame
from moebeam.schemas.errors import InputPatternError, OutputError
from moebeam.schemas.store.run_layout import RunLayout, find_frame_digest

TABLE = pa.table({"text": ["one", None, "three"], "n": [1, 2, 3]})
ROWS = st.lists(st.tuples(st.none() | st.text(max_size=3), st.none() | st.integers(-5, 5)), max_size=20)


def table_of(rows: list[tuple[str | None, int | None]]) -> pa.Table:
    return pa.table(
        {"a": pa.array([row[0] for row in rows], pa.string()), "b": pa.array([row[1] for row in rows], pa.int64())}
    )


@given(ROWS, st.integers(1, 5), st.integers(0, 9), st.integers(0, 9))
def test_the_digest_depends_on_neither_chunks_nor_neighbours(
    rows: list[tuple[str | None, int | None]], size: int, before: int, after: int
) -> None:
    table = table_of(rows)
    around = pa.concat_tables([table_of([("x", 9)] * before), table, table_of([("y", None)] * after)])
    cut = pa.Table.from_batches(around.combine_chunks().slice(before, len(rows)).to_batches(size), table.schema)
    assert cut.equals(table)
    assert digest_table(cut) == digest_table(table)


@given(ROWS, ROWS)
def test_other_rows_have_another_digest(
    rows: list[tuple[str | None, int | None]], others: list[tuple[str | None, int | None]]
) -> None:
    assert (digest_table(table_of(rows)) == digest_table(table_of(others))) == (rows == others)


def test_names_and_types_are_part_of_the_digest() -> None:
    same_values = [TABLE, TABLE.rename_columns(["text", "m"]), TABLE.cast(pa.schema({"text": "string", "n": "int32"}))]
    assert len({digest_table(table) for table in same_values}) == 3


def test_a_frame_is_kept_below_a_free_output_and_found_again(tmp_path: Path) -> None:
    layout = RunLayout(str(tmp_path / "out"))
    path = keep_frame(layout, TABLE)
    assert find_frame_digest(path) == digest_table(TABLE)
    assert pq.read_table(path).equals(TABLE)
    written_at = Path(path).stat().st_mtime_ns
    assert keep_frame(layout, TABLE.slice(0)) == path
    assert Path(path).stat().st_mtime_ns == written_at


def test_nothing_is_written_beside_files_that_are_no_run(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match="found files that are not a moebeam run"):
        keep_frame(RunLayout(str(tmp_path)), TABLE)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_the_frame_of_a_refused_job_leaves_nothing(tmp_path: Path) -> None:
    layout = RunLayout(str(tmp_path))
    drop_unclaimed_frame(layout, keep_frame(layout, TABLE))
    assert list(tmp_path.iterdir()) == []


def test_the_frame_of_a_claimed_output_stays(tmp_path: Path) -> None:
    layout = RunLayout(str(tmp_path))
    path = keep_frame(layout, TABLE)
    Path(layout.job).write_text("{}")
    drop_unclaimed_frame(layout, path)
    assert Path(path).exists()


def test_a_type_that_parquet_lacks_is_refused(tmp_path: Path) -> None:
    table = pa.table({"x": pa.array([None], pa.month_day_nano_interval())})
    with pytest.raises(InputPatternError, match="columns that Parquet can hold"):
        keep_frame(RunLayout(str(tmp_path)), table)
