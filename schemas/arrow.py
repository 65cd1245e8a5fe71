"""A thin typed adapter over pyarrow, whose published stubs are incomplete."""

import io
from collections.abc import Sequence
from typing import Any, BinaryIO, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq


def list_values(rows: pa.Table | pa.RecordBatch, column: str) -> list[Any]:
    """A column as Python values, None for null; shape (num_rows,)."""
    return rows.column(column).to_pylist()


def take_rows(table: pa.Table, indices: Sequence[int] | npt.NDArray[np.integer[Any]]) -> pa.Table:
    """Rows of a table by index, in the order of the indices."""
    return table.take(cast("Any", pa.array(indices, pa.int64())))


def replace_column(table: pa.Table, name: str, values: Sequence[Any]) -> pa.Table:
    """The table with one column replaced; position and type stay."""
    index = table.schema.get_field_index(name)
    return table.set_column(index, table.schema.field(index), pa.array(values, table.schema.field(index).type))


def struct_columns(table: pa.Table, name: str) -> tuple[list["pa.Field[Any]"], list["pa.Array[Any]"]]:
    """The fields and child arrays of a struct column; a child is null where the struct is."""
    struct: Any = table.column(name).combine_chunks()
    return list(struct.type), struct.flatten()


def open_arrow_file(source: BinaryIO, columns: Sequence[str] | None = None) -> pa.ipc.RecordBatchFileReader:
    """Open an Arrow IPC file.

    Args:
        columns: returned in the file's order; bytes of other columns are not read. None reads all.
    Raises:
        ValueError: the file lacks one of them.
    """
    file = cast("io.IOBase", source)
    reader = pa.ipc.open_file(file)
    if columns is None:
        return reader
    fields = [reader.schema.names.index(name) for name in columns]
    return pa.ipc.open_file(file, options=pa.ipc.IpcReadOptions(included_fields=fields))


def encode_arrow_file(table: pa.Table, *, max_batch_rows: int) -> bytes:
    """Encode a zstd-compressed Arrow IPC file with batches of at most `max_batch_rows` rows."""
    sink = pa.BufferOutputStream()
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    with pa.ipc.new_file(sink, table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=max_batch_rows)
    return sink.getvalue().to_pybytes()


def encode_parquet_file(table: pa.Table) -> bytes:
    """Encode a Parquet file; equal tables give equal bytes."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()
