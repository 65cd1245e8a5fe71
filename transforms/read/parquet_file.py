"""Opens Parquet files so that none of them can end the process: all that a check, a quote or a run reads of one.

pyarrow raises for nearly every damage. What it does not survive is looked for in the footer first: columns nested
thousands of levels deep, encrypted columns, for whose sizes it aborts the process, and row groups whose columns are not
those of the schema. A footer is read once, in one piece.
"""

import contextlib
import io
import re
from collections.abc import Collection, Generator, Iterator
from itertools import accumulate
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from moebeam.schemas.store import storage
from moebeam.schemas.store.file_mark import FileMark
from moebeam.transforms.read.claimed_file import open_claimed
from moebeam.transforms.read.footer_marks import has_encrypted_columns, is_too_deep

_MAGIC = b"PAR1"
_MAGIC_ENCRYPTED = b"PARE"
_TAIL_BYTES = 64 << 10
_NO_KEYS = "expected a Parquet file that needs no key: write it anew without encryption"
_LENGTH_BYTES = 8
"""The footer's length and the magic bytes, at a file's end."""

_COLUMN_KEY = re.compile(rb"\x2c\x19[\x18\x28\x38\x48\x58\x68\x78\x88\x98\xa8\xb8\xc8\xd8\xe8\xf8]")
"""How a column's own key begins in Thrift's compact protocol; may also stand in other data."""


@contextlib.contextmanager
def open_parquet(path: str, claim: FileMark | None = None) -> Generator[pq.ParquetFile]:
    """Open a Parquet file whose footer is safe to look at.

    Args:
        claim: what the file must be, see `claimed_file.open_claimed`.
    Raises:
        pa.ArrowInvalid: no Parquet file, damaged or encrypted; says what was expected.
        InputChanged: it is not as claimed.
        OSError: the file is missing, or a store failed.
    """
    with open_claimed(path, claim) as source:
        with _telling_names():
            metadata = _read_footer(source)
            parquet = pq.ParquetFile(source, metadata=metadata, pre_buffer=False)
        with parquet:
            yield parquet


def list_columns(
    parquet: pq.ParquetFile, row_group: int, names: Collection[str]
) -> Iterator[tuple[str, "pq.ColumnChunkMetaData"]]:
    """Stored columns of a row group that belong to the named columns of the table, with their dotted paths."""
    group, schema, wanted = parquet.metadata.row_group(row_group), parquet.schema, {*names}
    for index in range(group.num_columns):
        path = schema.column(index).path
        # A name may hold dots itself.
        if not wanted.isdisjoint(accumulate(path.split("."), "{}.{}".format)):
            yield path, group.column(index)


def sum_column_bytes(parquet: pq.ParquetFile, row_group: int, names: Collection[str]) -> int:
    """Uncompressed bytes of the named columns in a row group."""
    return sum(column.total_uncompressed_size for _, column in list_columns(parquet, row_group, names))


def read_schema(parquet: pq.ParquetFile) -> pa.Schema:
    """A file's columns.

    Raises:
        pa.ArrowInvalid: the name of a column is not UTF-8, in the schema or beside the column itself.
    """
    with _telling_names():
        schema = parquet.schema_arrow
        _ = schema.names
        if parquet.metadata.num_row_groups:
            group = parquet.metadata.row_group(0)
            _ = [group.column(index).path_in_schema for index in range(group.num_columns)]
    return schema


@contextlib.contextmanager
def _telling_names() -> Generator[None]:
    """Raise what pyarrow does at a name that is not UTF-8 with the name itself."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise pa.ArrowInvalid(f"expected column names in UTF-8, found {bytes(error.object)!r}") from error


def is_parquet(path: str) -> bool:
    """Whether a file begins or ends as Parquet files do, however damaged the rest is.

    Raises:
        OSError: the file is missing, or a store failed.
    """
    with storage.open_input(path) as source:
        head = source.read(len(_MAGIC))
        num_bytes = source.seek(0, io.SEEK_END)
        source.seek(max(0, num_bytes - len(_MAGIC)))
        return bool({head, source.read(len(_MAGIC))} & {_MAGIC, _MAGIC_ENCRYPTED})


def _read_footer(source: BinaryIO) -> "pq.FileMetaData":
    """Read and check a file's footer.

    Raises:
        pa.ArrowInvalid: there is none, or it is not safe to look at.
    """
    num_bytes = source.seek(0, io.SEEK_END)
    source.seek(max(0, num_bytes - _TAIL_BYTES))
    tail = source.read(_TAIL_BYTES)
    if tail[-4:] == _MAGIC_ENCRYPTED:
        raise pa.ArrowInvalid(f"is encrypted; {_NO_KEYS}")
    if num_bytes < len(_MAGIC) + _LENGTH_BYTES or tail[-4:] != _MAGIC:
        found = f"{tail[-4:]!r}; it may have been cut short" if tail else "an empty file"
        raise pa.ArrowInvalid(f"expected a Parquet file, which ends in {_MAGIC!r}, found {found}")
    length = int.from_bytes(tail[-_LENGTH_BYTES:-4], "little")
    if length > num_bytes - len(_MAGIC) - _LENGTH_BYTES:
        raise pa.ArrowInvalid(f"expected a footer within the file's {num_bytes:,} bytes, found one of {length:,} bytes")
    if length + _LENGTH_BYTES > len(tail):
        source.seek(num_bytes - length - _LENGTH_BYTES)
        tail = source.read(length + _LENGTH_BYTES)
    tail = tail[-length - _LENGTH_BYTES :]
    footer = tail[:length]
    if is_too_deep(footer):
        raise pa.ArrowInvalid("its columns are nested too deeply to be read")
    metadata = pq.read_metadata(pa.BufferReader(_MAGIC + tail))
    # A signature follows the footer of a file with encrypted columns.
    is_suspect = metadata.serialized_size != length or _COLUMN_KEY.search(footer) is not None
    if is_suspect and has_encrypted_columns(footer):
        raise pa.ArrowInvalid(f"has encrypted columns; {_NO_KEYS}")
    for index in range(metadata.num_row_groups):
        if (found := metadata.row_group(index).num_columns) != metadata.num_columns:
            raise pa.ArrowInvalid(f"row group {index}: expected {metadata.num_columns} columns, found {found}")
    return metadata
