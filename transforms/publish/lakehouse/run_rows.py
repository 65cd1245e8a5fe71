"""The rows of a finished run as its commit to a lakehouse takes them: published files, one at a time."""

import io
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Protocol, TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from moebeam.schemas.arrow import encode_parquet_file
from moebeam.schemas.store import storage
from moebeam.schemas.store.checked_file import read_checked
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.schemas.tables import Table
from moebeam.transforms.publish.lakehouse.stored_types import cast_table

NUM_THREADS = 8
"""Files of a commit that are read and written at once; each is in memory as a whole."""

RUN_ID = "moebeam.run-id"
"""Property of a snapshot: the run whose rows it brought."""

Done = TypeVar("Done")


class LakehouseTable(Protocol):
    """A table of a lakehouse, which need not exist."""

    @property
    def name(self) -> str:
        """Its URL, for messages."""
        ...

    def read_schema(self) -> pa.Schema | None:
        """Its columns; None if there is no such table."""
        ...

    def find_commit(self, run_id: str) -> str | None:
        """The snapshot or version that brought a run's rows; None if none did."""
        ...

    def commit(self, rows: "RunRows") -> str:
        """Commit a run's rows at once; returns the snapshot or version, also where somebody else has just done so."""
        ...


class CommitConflict(Exception):
    """Others kept changing the table; nothing was committed."""


@dataclass(frozen=True, slots=True)
class RunFile:
    """A published file; `name` is that of its shard."""

    name: str
    path: str
    num_rows: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Replaced:
    """Rows of a table that a run replaces: those whose value in a column is one of these; None stands for null."""

    column: str
    values: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class RunRows:
    """Rows of one of a run's tables, on their way into a table of a lakehouse.

    Attributes:
        schema: stored columns, see `stored_types.py`.
        is_cast: whether files must be cast to them; otherwise their bytes are what the table needs.
        replaced: None where the rows are only added.
    """

    run_id: str
    table: Table
    schema: pa.Schema
    files: tuple[RunFile, ...]
    is_cast: bool = False
    replaced: Replaced | None = None

    def read_bytes(self, file: RunFile) -> bytes:
        """A file as a data file of the table.

        Raises:
            FileDamaged: it is not what was published.
            OSError: it cannot be read.
        """
        content = read_checked(file.path, file.sha256)
        return encode_parquet_file(cast_table(_parse(content), self.schema)) if self.is_cast else content

    def read_table(self, file: RunFile) -> pa.Table:
        """A file in the stored columns; raises as `read_bytes`."""
        return cast_table(_parse(read_checked(file.path, file.sha256)), self.schema)

    def stream(self) -> pa.RecordBatchReader:
        """All rows, a file in memory at a time."""
        return pa.RecordBatchReader.from_batches(
            self.schema, (batch for file in self.files for batch in self.read_table(file).to_batches())
        )


def _parse(content: bytes) -> pa.Table:
    return pq.read_table(io.BytesIO(content))


def list_files(layout: RunLayout, manifest: Mapping[str, Any], table: Table) -> tuple[RunFile, ...]:
    """The files of a table, as a complete run's manifest names them."""
    return tuple(
        RunFile(
            file["path"].rpartition("/")[2].removesuffix(".parquet"),
            storage.join(layout.output, file["path"]),
            file["num_rows"],
            file["sha256"],
        )
        for file in manifest["files"][table]
        if file["num_rows"]
    )


def find_replaced(results: RunRows, rejects: RunRows, column: str) -> tuple[RunRows, RunRows]:
    """Results and rejects that replace the rows of all values that the run has in a column, answered or rejected.

    An unreadable file is a reject without a value: it replaces such rejects alone, and no result.

    Raises:
        FileDamaged: a file is not what was published.
        OSError: a file cannot be read.
    """
    of_rows: set[Any] = set()
    of_files: set[Any] = set()
    for rows in (results, rejects):
        for file in rows.files:
            with pq.ParquetFile(io.BytesIO(read_checked(file.path, file.sha256))) as found:
                table = found.read(columns=[column, "scope"])
            values = cast_table(table.select([column]), pa.schema([rows.schema.field(column)])).column(0)
            is_row: Any = pc.is_in(table.column("scope"), value_set=pa.array(["row", None], pa.string()))
            of_rows.update(pc.unique(values.filter(is_row)).to_pylist())
            of_files.update(pc.unique(values.filter(pc.invert(is_row))).to_pylist())
    return (
        replace(results, replaced=Replaced(column, _sort(of_rows))),
        replace(rejects, replaced=Replaced(column, _sort(of_rows | of_files))),
    )


def _sort(values: set[Any]) -> tuple[Any, ...]:
    return (*sorted(value for value in values if value is not None), *([None] if None in values else []))


def map_files(rows: RunRows, work: Callable[[RunFile], Done]) -> Iterator[Done]:
    """Do work for each file, in order, on several threads; few files are begun before they are waited for."""
    files = iter(rows.files)
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        waiting = deque(pool.submit(work, file) for file in islice(files, 2 * NUM_THREADS))
        while waiting:
            yield waiting.popleft().result()
            waiting.extend(pool.submit(work, file) for file in islice(files, 1))
