"""What the columns of a row group unpack to, found before they are read: footers tell it only of what is stored.

Part of *read*. A dictionary holds a value once, and a few bytes repeat it a million times: 7 KB can stand for 300 GB.
Dictionaries are read first, therefore, without the values that they stand for. The longest value in them bounds how
many rows are read at once, and a column that would unpack without end is refused.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from moebeam.schemas.store import storage
from moebeam.transforms.read.parquet_file import list_columns

MAX_COLUMN_BYTES = 4 << 30
"""Most bytes to which the pages of one column of a row group may unpack."""

SUSPECT_COLUMN_BYTES = 256 << 20
MAX_COMPRESSION = 1000
"""A column above `SUSPECT_COLUMN_BYTES` that is compressed more than this is a decompression bomb."""

MAX_REPEATED_BYTES = 16 << 30
"""Most bytes of one column of a row group, with each repeated value counted each time: 16 KB in a million rows."""

MAX_READ_BYTES = 64 << 20
"""Most bytes of one column that are read at once, where a dictionary has a value that is as long as any may be."""

_SHORT_VALUE_BYTES = 64
"""Stored bytes a value below which a column is mostly repeats, whose lengths are worth adding up."""

_COUNTED_ROWS = 65_536
_NUM_BYTES = {"BOOLEAN": 1, "INT32": 4, "INT64": 8, "INT96": 12, "FLOAT": 4, "DOUBLE": 8}


@dataclass(frozen=True, slots=True)
class _Column:
    """A stored column of a row group.

    Attributes:
        value_bytes: most bytes that a value takes; None where the dictionary says it.
        is_repeated: whether one row may hold any number of values.
    """

    path: str
    index: int
    num_values: int
    packed: int
    unpacked: int
    value_bytes: int | None
    is_repeated: bool


def bound_rows(parquet: pq.ParquetFile, path: str, row_group: int, names: Collection[str]) -> int | None:
    """How many rows of a row group may be read at once, for the sake of its dictionaries; None where any number may.

    Raises:
        pa.ArrowInvalid: a column would unpack to more than it may; names it, its size and the limit.
        OSError: the store failed.
    """
    columns = list(_list_columns(parquet, row_group, names))
    for column in columns:
        _refuse_pages(column)
        if column.is_repeated and column.value_bytes is not None:
            _refuse_repeats(column, column.num_values * column.value_bytes, SUSPECT_COLUMN_BYTES)
    longest = max((column.value_bytes or 0 for column in columns), default=0)
    suspects = [column for column in columns if _may_grow(column)]
    if suspects:
        longest = max(longest, _measure_dictionaries(parquet, path, row_group, suspects))
    return max(1, MAX_READ_BYTES // longest) if longest else None


def _list_columns(parquet: pq.ParquetFile, row_group: int, names: Collection[str]) -> Iterator[_Column]:
    schema = parquet.schema
    indexes = {schema.column(index).path: index for index in range(len(schema))}
    for path, chunk in list_columns(parquet, row_group, names):
        column = schema.column(indexes[path])
        length = column.length or 0
        value_bytes = length if length > 0 else _NUM_BYTES.get(column.physical_type)
        yield _Column(
            path,
            indexes[path],
            chunk.num_values,
            max(1, chunk.total_compressed_size),
            chunk.total_uncompressed_size,
            value_bytes,
            column.max_repetition_level > 0,
        )


def _refuse_pages(column: _Column) -> None:
    """Refuse a column whose pages alone would exhaust a worker's memory."""
    is_suspect = column.unpacked > SUSPECT_COLUMN_BYTES and column.unpacked > MAX_COMPRESSION * column.packed
    if column.unpacked > MAX_COLUMN_BYTES or is_suspect:
        most = f"{MAX_COMPRESSION:,} times the {column.packed:,} it takes" if is_suspect else f"{MAX_COLUMN_BYTES:,}"
        raise pa.ArrowInvalid(
            f"column {column.path}: expected to unpack to at most {most} bytes, found {column.unpacked:,}; "
            "write smaller row groups"
        )


def _refuse_repeats(column: _Column, num_bytes: int, limit: int) -> None:
    """Refuse a column whose values take more than a limit, if that is far more than what is stored of them."""
    if num_bytes > limit and num_bytes > MAX_COMPRESSION * column.packed:
        raise pa.ArrowInvalid(
            f"column {column.path}: expected values of at most {limit:,} bytes in {column.packed:,} stored ones, "
            f"found {num_bytes:,}, because values repeat; write smaller row groups"
        )


def _may_grow(column: _Column) -> bool:
    """Whether a dictionary may make a column larger than what is read at once anyhow.

    A value is no longer than all that is stored of its column.
    """
    return column.value_bytes is None and column.num_values * column.unpacked > MAX_READ_BYTES


def _measure_dictionaries(parquet: pq.ParquetFile, path: str, row_group: int, columns: list[_Column]) -> int:
    """The longest value in the dictionaries of some columns, in bytes.

    Raises:
        pa.ArrowInvalid: see `bound_rows`.
    """
    longest = 0
    with storage.open_input(path) as source:
        paths = [column.path for column in columns]
        opened = pq.ParquetFile(source, metadata=parquet.metadata, read_dictionary=paths, pre_buffer=False)
        with opened as dictionaries:
            for column in columns:
                first = next(_read_lengths(dictionaries, row_group, column, 1), None)
                most, dictionary = (first.longest, first.dictionary) if first is not None else (0, 0)
                longest = max(longest, most)
                if column.is_repeated:
                    _refuse_repeats(column, column.num_values * most, SUSPECT_COLUMN_BYTES)
                elif (
                    column.num_values * most > MAX_REPEATED_BYTES
                    and column.unpacked - dictionary < column.num_values * _SHORT_VALUE_BYTES
                ):
                    _count_repeats(dictionaries, row_group, column)
    return longest


def _count_repeats(dictionaries: pq.ParquetFile, row_group: int, column: _Column) -> None:
    """Add up the lengths of all values of a column, and refuse it as soon as they are too many."""
    num_bytes = 0
    for lengths in _read_lengths(dictionaries, row_group, column, _COUNTED_ROWS):
        num_bytes += lengths.total
        _refuse_repeats(column, num_bytes, MAX_REPEATED_BYTES)


@dataclass(frozen=True, slots=True)
class _Lengths:
    """Bytes of the longest entry of a dictionary, of all its entries, and of the values that stand for them."""

    longest: int
    dictionary: int
    total: int


def _read_lengths(dictionaries: pq.ParquetFile, row_group: int, column: _Column, num_rows: int) -> Iterator[_Lengths]:
    name = column.path
    for batch in dictionaries.iter_batches(num_rows, [row_group], [name], use_threads=False):
        for found in _list_dictionaries(batch.column(0)):
            lengths = pc.binary_length(found.dictionary)
            total = pc.sum(lengths.take(found.indices)).as_py() if len(found) else 0
            yield _Lengths(pc.max(lengths).as_py() or 0, pc.sum(lengths).as_py() or 0, total or 0)


def _list_dictionaries(column: Any) -> Iterator[Any]:
    """The arrays of a column that have dictionaries, at any depth."""
    types = pa.types
    if types.is_dictionary(column.type):
        yield column
    elif types.is_struct(column.type):
        for index in range(column.type.num_fields):
            yield from _list_dictionaries(column.field(index))
    elif types.is_map(column.type):
        yield from _list_dictionaries(column.keys)
        yield from _list_dictionaries(column.items)
    elif types.is_list(column.type) or types.is_large_list(column.type) or types.is_fixed_size_list(column.type):
        yield from _list_dictionaries(column.values)
