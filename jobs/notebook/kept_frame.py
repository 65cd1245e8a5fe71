"""The data frame of a run, kept below the run's output folder, so that the run outlives the notebook.

A kept frame is found by a digest of its rows: the same rows are the same input, whatever object or session brings them.
"""

import contextlib
import hashlib
import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from moebeam.jobs.check.identity import is_free
from moebeam.jobs.output.frame_record import is_frame_whole, write_frame
from moebeam.jobs.output.run_record import read_record
from moebeam.schemas.column_types import plain_type
from moebeam.schemas.errors import InputPatternError, OutputError
from moebeam.schemas.store import storage
from moebeam.schemas.store.run_layout import RunLayout, find_frame_digest

_ROW_GROUP_ROWS = 10_000


def keep_frame(layout: RunLayout, table: pa.Table) -> str:
    """Write a frame below an output folder that is free or belongs to a run over the same frame; returns its path.

    Raises:
        OutputError: the folder belongs to another run or cannot be written.
        InputPatternError: Parquet cannot hold a column.
    """
    path = layout.frame(digest_table(table))
    try:
        _check_output(layout, path, table.num_rows)
        if not is_frame_whole(storage.normalize_path(path)):
            write_frame(path, _encode(table))
    except OSError as error:
        raise OutputError(f"[output] path {layout.output!r}: cannot be written: {error}") from error
    return storage.normalize_path(path)


def drop_unclaimed_frame(layout: RunLayout, path: str) -> None:
    """Remove a frame whose job was refused before it claimed the folder."""
    with contextlib.suppress(OSError):
        if not storage.exists(layout.job):
            storage.remove_tree(path.rpartition("/")[0])
            if storage.is_local(path):
                for folder in Path(path).parents[1:3]:
                    folder.rmdir()


def digest_table(table: pa.Table) -> str:
    """SHA-256 of names, types and values, which depends on neither chunks, dictionaries nor what lies under nulls."""
    digest = _Digest()
    plain = table.cast(pa.schema([pa.field(field.name, plain_type(field.type)) for field in table.schema]))
    if plain.schema != table.schema:
        digest.write(str(table.schema).encode())
        table = plain
    with pa.ipc.new_stream(pa.PythonFile(digest, mode="w"), table.schema) as stream:
        for start in range(0, table.num_rows, _ROW_GROUP_ROWS):
            piece = table.slice(start, _ROW_GROUP_ROWS)
            # Taken anew, rows lie in fresh buffers: a slice's may hold its neighbours.
            fresh = piece.take(pa.array(range(piece.num_rows), pa.int64())).combine_chunks()
            stream.write_table(fresh)
    return digest.value.hexdigest()


class _Digest(io.RawIOBase):
    """A file that is only hashed."""

    def __init__(self) -> None:
        super().__init__()
        self.value = hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, content: "bytes | memoryview", /) -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        self.value.update(content)
        return len(content)


def _encode(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    try:
        pq.write_table(table, sink, row_group_size=_ROW_GROUP_ROWS)
    except (pa.ArrowException, ValueError) as error:
        raise InputPatternError(f"data: expected columns that Parquet can hold, found: {error}") from error
    return sink.getvalue().to_pybytes()


def _check_output(layout: RunLayout, path: str, num_rows: int) -> None:
    """Refuse before anything is written into a folder that is not this run's."""
    if not storage.exists(layout.job):
        if storage.is_folder(layout.output) and not is_free(layout):
            raise OutputError(
                f"[output] path {layout.output!r}: expected an empty folder or one of this job, "
                "found files that are not a moebeam run"
            )
        return
    source = read_record(layout.output).request.job.input
    digest = find_frame_digest(source.paths[0]) if source.paths else None
    if digest != find_frame_digest(path):
        found = f"the files of {source.shown_path}" if digest is None else "another data frame"
        raise OutputError(
            f"[output] path {layout.output!r} belongs to a run over {found}, expected these {num_rows:,} rows; "
            "choose another output path, or bring the data of that run"
        )
