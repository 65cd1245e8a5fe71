"""The tables of a run, shard by shard, for commands that read all its rows: checked against their records, in batches.

`batch_export.py` and `moebeam.jobs.compare` read through it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from moebeam.jobs.output.current_run import read_current_run
from moebeam.jobs.output.run_state import read_manifest
from moebeam.schemas.errors import CommitError, OutputError
from moebeam.schemas.store import storage
from moebeam.schemas.store.checked_file import open_checked
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.schemas.tables import TABLES, Table
from moebeam.transforms.durable.commit import list_committed_shards, read_commit

RunStatus: TypeAlias = Literal["complete", "incomplete"]

_BATCH_ROWS = 256


@dataclass(frozen=True, slots=True)
class ShardFile:
    """A table of one shard as its record names it."""

    path: str
    num_rows: int
    num_bytes: int
    sha256: str


RunShard: TypeAlias = Mapping[Table, ShardFile]
"""A shard's files; an empty table has none."""


def find_shards(layout: RunLayout, *, is_partial: bool) -> tuple[RunStatus, list[RunShard]]:
    """Find the files of a run, shard by shard, in the tables' order.

    Args:
        is_partial: take an unfinished run as far as it is committed, and publish what a killed one left.
    Raises:
        OutputError: the run is unfinished and that is not asked for, or its records cannot be read.
    """
    try:
        manifest = read_current_run(layout).manifest if is_partial else read_manifest(layout)
    except (CommitError, OSError) as error:
        raise OutputError(f"{layout.output}: cannot be looked at: {error}") from error
    if manifest is not None and manifest["status"] == "complete":
        return "complete", _read_manifest_shards(layout, manifest)
    if is_partial:
        return "incomplete", list(_read_committed_shards(layout))
    raise OutputError(
        f"{layout.output}: expected a finished run, found one that is not; moebeam resume {layout.output} finishes it, "
        "--partial exports what it has"
    )


def _read_manifest_shards(layout: RunLayout, manifest: Mapping[str, Any]) -> list[RunShard]:
    found: dict[str, dict[Table, ShardFile]] = {}
    for table in TABLES:
        for file in manifest["files"][table]:
            path = storage.join(layout.output, file["path"])
            # A shard's tables share one name; ledger files of wasted work have other names.
            name = path.rpartition("/")[2]
            if table != "ledger" or name in found:
                found.setdefault(name, {})[table] = ShardFile(path, file["num_rows"], file["num_bytes"], file["sha256"])
    return [found[name] for name in sorted(found)]


def _read_committed_shards(layout: RunLayout) -> Iterator[RunShard]:
    try:
        for name in list_committed_shards(layout):
            commit = read_commit(layout, name)
            if commit is None:
                raise OutputError(f"{layout.shard_commit(name)}: expected a commit record, found none")
            shard: dict[Table, ShardFile] = {}
            for file in commit.files:
                published = layout.published_file(file.table, commit.shard)
                is_published = storage.exists(published)
                path = published if is_published else storage.join(layout.output, file.path)
                shard[file.table] = ShardFile(path, file.num_rows, file.num_bytes, file.sha256)
            yield shard
    except (CommitError, OSError) as error:
        raise OutputError(f"{layout.output}: its commits cannot be read: {error}") from error


def read_batches(
    file: ShardFile, columns: Sequence[str], later: Sequence[str] = (), *, batch_rows: int = _BATCH_ROWS
) -> Iterator[pa.RecordBatch]:
    """Read some columns of a table's file.

    Args:
        later: columns that tables of older versions lack; read where they are.
    Raises:
        OutputError: the file is missing, damaged, or of a version with other columns.
    """
    try:
        with open_checked(file.path, file.sha256) as source, pq.ParquetFile(source, pre_buffer=False) as parquet:
            missing = [name for name in columns if name not in parquet.schema_arrow.names]
            if missing:
                raise OutputError(f"{file.path}: expected the columns {', '.join(missing)}, found none of these names")
            if parquet.metadata.num_rows != file.num_rows:
                raise OutputError(f"{file.path}: expected {file.num_rows} rows, found {parquet.metadata.num_rows}")
            there = [name for name in later if name in parquet.schema_arrow.names]
            yield from parquet.iter_batches(batch_rows, columns=[*columns, *there], use_threads=False)
    except (pa.ArrowException, ValueError, OSError) as error:
        raise OutputError(f"{file.path}: expected a table of the run, found: {error}") from error
