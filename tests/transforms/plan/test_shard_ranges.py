"""Ranges and the sorted runs that they are found in: even within the stated bound, complete, alike on every worker."""

import contextlib
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moebeam.model_runner.prefix_tree import prefix_key
from moebeam.schemas.job.sections import PlanSection
from moebeam.schemas.records import Sampling, sampling_json
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.schemas.tables import plan_schema
from moebeam.transforms.plan import shard_ranges, sorted_runs
from moebeam.transforms.plan.row_order import Places, RowKey, sort_rows
from moebeam.transforms.plan.shard_ranges import ShardRange, cut_ranges, num_ranges
from moebeam.transforms.plan.sorted_runs import (
    ROW_BYTES,
    RunFile,
    read_range,
    read_samples,
    row_bytes,
    sample_places,
    write_runs,
)

SAMPLINGS = {"greedy": sampling_json(Sampling(max_tokens=9)), "hot": sampling_json(Sampling(9, temperature=1.0))}
ROWS = st.lists(
    st.tuples(
        st.lists(st.integers(0, 2), min_size=1, max_size=4), st.sampled_from(list(SAMPLINGS)), st.integers(0, 900)
    ),
    min_size=1,
    max_size=50,
)
MARK = 1500


def rendered(rows: Sequence[tuple[list[int], str, int]], *, first_row: int = 0) -> pa.RecordBatch:
    """Rows as *render* leaves them: token ids, kind of sampling, bytes of messages."""
    values = [
        {
            "custom_id": f"row{first_row + row}",
            "source_file": "file",
            "source_row": first_row + row,
            "unit": 0,
            "scope": "row",
            "num_rows": 1,
            "sample": 0,
            "prefix_key": prefix_key("", np.array(tokens, np.int32)),
            "num_prompt_tokens": len(tokens),
            "messages": "m" * num_bytes,
            "sampling": SAMPLINGS[kind],
            "tenant": "",
            "cost_center": "",
            "passthrough": {},
        }
        for row, (tokens, kind, num_bytes) in enumerate(rows)
    ]
    return pa.RecordBatch.from_pylist(values, schema=plan_schema([]))


@contextlib.contextmanager
def small_runs(*, range_bytes: int = 1 << 40) -> Generator[None]:
    """Samples every `MARK` bytes, batches of a few rows, and ranges of so many bytes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shard_ranges, "num_ranges", lambda runs: -(-sum(run.num_bytes for run in runs) // range_bytes))
        patch.setattr(sorted_runs, "SAMPLE_BYTES", MARK)
        patch.setattr(sorted_runs, "_BATCH_BYTES", 2 * MARK)
        yield


def write_all(layout: RunLayout, batches: Sequence[pa.RecordBatch], section: PlanSection) -> list[RunFile]:
    return [run for batch in batches for run in write_runs([batch], layout, section)]


def halves(part: ShardRange) -> tuple[RowKey, RowKey | None]:
    return RowKey.from_text(part.lower), RowKey.from_text(part.upper) if part.upper else None


@given(rows=ROWS, run_rows=st.integers(1, 50), range_bytes=st.integers(2 * ROW_BYTES, 40 * ROW_BYTES))
def test_ranges_differ_from_an_even_share_by_what_samples_leave_open(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[tuple[list[int], str, int]],
    run_rows: int,
    range_bytes: int,
) -> None:
    layout = RunLayout(str(tmp_path_factory.mktemp("runs")))
    batches = [rendered(rows[start : start + run_rows], first_row=start) for start in range(0, len(rows), run_rows)]
    section = PlanSection(merge="never")
    with small_runs(range_bytes=range_bytes):
        runs = write_all(layout, batches, section)
        ranges = list(cut_ranges(runs, layout))
        assert ranges == list(cut_ranges(runs[::-1], layout)), "the order in which runs come changes nothing"
        share = sum(run.num_bytes for run in runs) / shard_ranges.num_ranges(runs)
    largest = max(int(row_bytes(pa.Table.from_batches([batch])).max()) for batch in batches)
    found: list[str] = []
    for part in ranges:
        parts = [read_range(layout, run, *halves(part)) for run in part.runs]
        table = sort_rows(pa.concat_tables(parts))
        found += table.column("custom_id").to_pylist()
        num_bytes = sum(int(row_bytes(one).sum()) for one in parts if one.num_rows)
        # A slice counts the even share of what is not its own a little differently.
        assert num_bytes <= 1.1 * share + (len(runs) + 2) * (MARK + largest)
    everything = sort_rows(pa.Table.from_batches(batches))
    assert found == everything.column("custom_id").to_pylist(), "each row once, in one order over all ranges"


@given(rows=ROWS, data=st.data())
def test_a_range_of_a_run_is_what_a_scan_of_all_its_rows_finds(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[list[int], str, int]], data: st.DataObject
) -> None:
    layout = RunLayout(str(tmp_path_factory.mktemp("runs")))
    with small_runs():
        (run,) = write_all(layout, [rendered(rows)], PlanSection())
    table = sort_rows(pa.Table.from_batches([rendered(rows)]))
    places = Places(table)
    every = [places[row] for row in range(len(places))]
    anywhere = st.sampled_from(
        [RowKey(), *every, *(RowKey(p.key) for p in every), *(RowKey(p.key, p.request) for p in every)]
    )
    lower, upper = data.draw(anywhere), data.draw(st.none() | anywhere)
    kept = [row for row, place in enumerate(every) if lower <= place and (upper is None or place < upper)]
    found = read_range(layout, run.run_id, lower, upper)
    assert found.column("source_row").to_pylist() == [table.column("source_row")[row].as_py() for row in kept]


@given(rows=ROWS, merge=st.sampled_from(["auto", "always", "never"]))
def test_samples_stand_between_rows_and_never_inside_of_what_is_merged(
    rows: list[tuple[list[int], str, int]], merge: Any
) -> None:
    table = sort_rows(pa.Table.from_batches([rendered(rows)]))
    places = Places(table)
    section = PlanSection(merge=merge)
    for place, row in sample_places(table, range(table.num_rows), section):
        assert place <= places[row]
        assert row == 0 or places[row - 1] < place
        if row and places.key(row) == places.key(row - 1) and places.request(row) == places.request(row - 1):
            kind = table.column("sampling")[row].as_py()
            assert merge == "never" or (merge == "auto" and kind == SAMPLINGS["hot"])


def test_samples_of_long_prompts_are_as_short_as_what_tells_them_apart(tmp_path: Path) -> None:
    layout = RunLayout(str(tmp_path))
    batch = rendered([([row, *[5] * 1000], "greedy", 0) for row in range(50)])
    with small_runs():
        (run,) = write_all(layout, [batch], PlanSection())
    keys = [RowKey.from_text(text).key for text in read_samples(layout, run.run_id).column("place").to_pylist()]
    assert len(keys) == 50
    assert {len(key) for key in keys[1:]} == {8 + 4}, "tenant and one token"


def test_runs_do_not_sample_in_step(tmp_path: Path) -> None:
    layout = RunLayout(str(tmp_path))
    batches = [rendered([([row], "hot", 0) for row in range(40)], first_row=40 * number) for number in range(8)]
    with small_runs():
        runs = write_all(layout, batches, PlanSection())
    before = [tuple(read_samples(layout, run.run_id).column("bytes_before").to_pylist()) for run in runs]
    assert len(set(before)) > 4


def test_a_run_that_is_written_twice_has_the_same_bytes(tmp_path: Path) -> None:
    batch = rendered([([row % 3], "hot", row) for row in range(40)])
    files: list[dict[str, bytes]] = []
    for name in ("a", "b"):
        write_all(RunLayout(str(tmp_path / name)), [batch], PlanSection())
        files.append({path.name: path.read_bytes() for path in (tmp_path / name).rglob("*") if path.is_file()})
    assert len(files[0]) == 2
    assert files[0] == files[1]


def test_ranges_are_of_the_size_of_runs_unless_shards_are_large() -> None:
    def count(num_runs: int, num_shards: int) -> int:
        size = shard_ranges.MAX_SORTED_RUN_BYTES
        weight = num_shards * sorted_runs.SHARD_WEIGHT // num_runs
        return num_ranges([RunFile(f"r{run}", "requests", 1, size, weight) for run in range(num_runs)])

    assert count(10, 100) == 10, "about ten shards each"
    assert count(10, 40) == 5, "eight shards each, in the memory of two runs"
    assert count(10, 4) == 2, "two large shards each"
    assert count(100, 1) == 19, "no larger than a shard may be"
    assert count(1, 0) == 1
    assert num_ranges([]) == 1
