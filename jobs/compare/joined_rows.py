"""The rows of two runs, matched by id and sample, in memory that does not grow with them.

Both runs are read once and dealt out, by a checksum of the id, to files on this machine that are small enough to be
matched one after the other.
"""

import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa

from moebeam.jobs.compare.answers import Answer
from moebeam.jobs.output.current_run import read_partials
from moebeam.jobs.output.run_tables import RunShard, find_shards, read_batches
from moebeam.schemas.arrow import list_values
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.schemas.tables import TOOL_CALLS, Table

_TABLES: tuple[Table, ...] = ("results", "rejects")
_TEXTS = ("custom_id", "status", "error_type", "output_text", "output_json", "reasoning_content")
_COLUMNS = (*_TEXTS, "tool_calls", "source_file", "source_row")
_KEPT = pa.schema(
    [
        *(pa.field(name, pa.large_string()) for name in _TEXTS),
        pa.field("tool_calls", TOOL_CALLS),
        pa.field("source_file", pa.large_string()),
        pa.field("source_row", pa.int64()),
        pa.field("sample", pa.int32()),
    ]
)

MAX_PART_ROWS = 25_000
MAX_PART_BYTES = 8 << 20
"""Of Parquet files, compressed, a part's rows in memory are some ten times as large."""

MAX_PARTS = 200
_BATCH_ROWS = 4096

Key: TypeAlias = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Row:
    """A row's place in the input, and what one run said to it."""

    custom_id: str | None
    sample: int
    source_file: str | None
    source_row: int | None
    answer: Answer


@dataclass(frozen=True, slots=True)
class Pair:
    """A row as both runs have it; one of them may not."""

    a: Row | None
    b: Row | None

    @property
    def some(self) -> Row:
        """The row of the first run that has it."""
        row = self.a or self.b
        assert row is not None, "expected a row of one run at least, found none"
        return row


@dataclass(frozen=True, slots=True)
class RunRows:
    """Where a run's rows are: in its committed shards, and in journals where it is not finished."""

    layout: RunLayout
    shards: Sequence[RunShard]
    is_complete: bool

    @classmethod
    def find(cls, layout: RunLayout) -> "RunRows":
        """Find the rows of a run, finished or not.

        Raises:
            OutputError: its records cannot be read.
        """
        status, shards = find_shards(layout, is_partial=True)
        return cls(layout, shards, status == "complete")

    @property
    def num_rows(self) -> int:
        return sum(shard[table].num_rows for shard in self.shards for table in _TABLES if table in shard)

    @property
    def num_bytes(self) -> int:
        return sum(shard[table].num_bytes for shard in self.shards for table in _TABLES if table in shard)

    def read(self) -> Iterator[pa.RecordBatch]:
        """Read the compared columns of all rows; rows in journals are as the model gave them.

        Raises:
            OutputError: a table is missing or damaged.
            OSError: the store failed.
        """
        for shard in self.shards:
            for table in _TABLES:
                if table in shard:
                    for batch in read_batches(shard[table], _COLUMNS, ("sample",), batch_rows=_BATCH_ROWS):
                        yield _keep(pa.Table.from_batches([batch]))
        for partial in () if self.is_complete else read_partials(self.layout):
            for batch in partial.rows.to_batches(max_chunksize=_BATCH_ROWS):
                yield _keep(pa.Table.from_batches([batch]))


def _keep(rows: pa.Table) -> pa.RecordBatch:
    if "sample" not in rows.schema.names:  # a table of an older version
        rows = rows.append_column("sample", pa.array([0] * rows.num_rows, pa.int32()))
    kept = rows.select(_KEPT.names).cast(_KEPT)
    return kept.combine_chunks().to_batches()[0] if kept.num_rows else pa.RecordBatch.from_pylist([], _KEPT)


def join_rows(a: RunRows, b: RunRows) -> Iterator[Pair]:
    """Match the rows of two runs; each row is in exactly one pair, in an order that depends on the ids alone.

    Rows of one id and sample, such as rejected repetitions of an id, are matched in the order of the input.

    Raises:
        OutputError: a table is missing or damaged.
        OSError: a store, or this machine's disk, failed.
    """
    most_rows, most_bytes = max(a.num_rows, b.num_rows), max(a.num_bytes, b.num_bytes)
    num_parts = min(MAX_PARTS, 1 + max(most_rows // MAX_PART_ROWS, most_bytes // MAX_PART_BYTES))
    with TemporaryDirectory(prefix="moebeam-compare-") as folder:
        parts_a = _deal(a.read(), Path(folder) / "a", num_parts)
        parts_b = _deal(b.read(), Path(folder) / "b", num_parts)
        for part_a, part_b in zip(parts_a, parts_b, strict=True):
            yield from _match(_read_part(part_a), _read_part(part_b))


def _deal(batches: Iterable[pa.RecordBatch], folder: Path, num_parts: int) -> list[Path]:
    """Write rows into one Arrow file a part."""
    folder.mkdir()
    paths = [folder / f"{part}.arrow" for part in range(num_parts)]
    with ExitStack() as stack:
        writers = [stack.enter_context(pa.ipc.new_stream(str(path), _KEPT)) for path in paths]
        for batch in batches:
            owners = np.fromiter(
                (zlib.crc32(key.encode(errors="replace")) % num_parts for key in _ids(batch)), np.int64
            )
            for part in np.unique(owners).tolist():
                rows: Any = pa.array(np.flatnonzero(owners == part))
                writers[part].write_batch(batch.take(rows))
    return paths


def _ids(batch: pa.RecordBatch) -> Iterator[str]:
    """What rows are matched by, beside their sample: the id, or the place in the input of what has none."""
    columns = (list_values(batch, name) for name in ("custom_id", "source_file", "source_row"))
    for custom_id, file, row in zip(*columns, strict=True):
        yield custom_id if custom_id is not None else f"\0{file}\0{row}"


def _read_part(path: Path) -> dict[Key, list[Row]]:
    found: dict[Key, list[Row]] = {}
    with pa.OSFile(str(path), "rb") as source, pa.ipc.open_stream(source) as reader:
        for batch in reader:
            for key, row in zip(_ids(batch), batch.to_pylist(), strict=True):
                kept = Row(
                    row["custom_id"], row["sample"] or 0, row["source_file"], row["source_row"], Answer.from_row(row)
                )
                found.setdefault((key, kept.sample), []).append(kept)
    path.unlink()
    return found


def _match(a: dict[Key, list[Row]], b: dict[Key, list[Row]]) -> Iterator[Pair]:
    for key in [*a, *(key for key in b if key not in a)]:
        ours, theirs = (sorted(side.get(key, ()), key=input_order) for side in (a, b))
        for place in range(max(len(ours), len(theirs))):
            yield Pair(
                ours[place] if place < len(ours) else None,
                theirs[place] if place < len(theirs) else None,
            )


def input_order(row: Row) -> tuple[str, int, int]:
    """Sorts rows as the input has them."""
    return row.source_file or "", -1 if row.source_row is None else row.source_row, row.sample
