"""Scans files of rows that have no footer: counts their rows, finds their columns, and cuts them into pieces.

Part of the scan before *read*; every byte of such a file is looked at once.
"""

from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import pyarrow as pa

from moebeam.schemas.column_types import plain_field
from moebeam.schemas.store.file_mark import FileMark
from moebeam.transforms.read.rows.arrow_file import list_batches, open_arrow
from moebeam.transforms.read.rows.csv_rows import find_delimiter, find_types, make_is_open, read_header
from moebeam.transforms.read.rows.json_rows import find_json_types
from moebeam.transforms.read.rows.line_blocks import Block, open_lines, read_blocks
from moebeam.transforms.read.rows.merged_types import merge_schemas

RowsFormat: TypeAlias = Literal["csv", "jsonl_rows", "jsonl", "arrow"]
"""`jsonl` are lines of the OpenAI batch shape, whose columns are their own."""

PIECE_BYTES = 8 << 20
_MAX_ROWS = 1 << 40


@dataclass(frozen=True, slots=True)
class Piece:
    """Neighbouring rows of a file, which are read at once; a packed file and an Arrow stream are one piece.

    Attributes:
        offset: byte at which the first record begins; 0 of a packed file, whose header comes before it.
        first_line: its number, from 1.
        num_bytes: unpacked.
    """

    first_row: int
    num_rows: int
    num_bytes: int
    offset: int = 0
    first_line: int = 1


@dataclass(frozen=True, slots=True)
class RowsScan:
    """A file's pieces and all of its columns; of CSV also the delimiter."""

    pieces: tuple[Piece, ...]
    schema: pa.Schema
    delimiter: str = ""


def scan_rows(
    path: str, mark: FileMark | None, kind: RowsFormat, delimiter: str | None, needed: Collection[str] | None
) -> RowsScan:
    """Scan a file.

    Args:
        needed: columns whose types are found; others are text in the result.
    Raises:
        pa.ArrowInvalid: it cannot be read; says why.
        InputChanged: it is not as claimed.
        OSError: the file is missing, or a store failed.
    """
    if kind == "arrow":
        return _scan_arrow(path, mark)
    with open_lines(path, mark) as (lines, is_packed):
        if kind == "csv":
            return _scan_csv(lines, is_packed, delimiter, needed)
        schemas: list[pa.Schema] = []
        pieces: list[Piece] = []
        for block in read_blocks(lines, max_rows=_MAX_ROWS, max_bytes=PIECE_BYTES):
            if kind == "jsonl_rows":
                schemas.append(find_json_types(block, None))
            _add_piece(pieces, block)
    return RowsScan(_join_packed(pieces, is_packed), merge_schemas(schemas))


def _scan_csv(
    lines: Iterator[bytes], is_packed: bool, delimiter: str | None, needed: Collection[str] | None
) -> RowsScan:
    first = next(lines, b"")
    if not first.strip():
        raise pa.ArrowInvalid("expected a header with the names of columns in the first line, found none")
    delimiter = delimiter or find_delimiter(first)
    is_open = make_is_open(delimiter)
    header, end_line, goes_on = first, 2, is_open(first, False)
    while goes_on and (line := next(lines, b"")):
        header, end_line, goes_on = header + line, end_line + 1, is_open(line, True)
    names = read_header(header, delimiter)
    schemas = [pa.schema([pa.field(name, pa.null()) for name in names])]
    pieces = [Piece(0, 0, 0, len(header), end_line)]
    for block in read_blocks(lines, first_line=end_line, max_rows=_MAX_ROWS, max_bytes=PIECE_BYTES, is_open=is_open):
        schemas.append(find_types(block, names, delimiter, needed))
        _add_piece(pieces, block)
    return RowsScan(_join_packed(pieces[1:], is_packed), merge_schemas(schemas), delimiter)


def _add_piece(pieces: list[Piece], block: Block) -> None:
    last = pieces[-1] if pieces else Piece(0, 0, 0)
    pieces.append(
        Piece(
            last.first_row + last.num_rows,
            len(block.records),
            block.num_bytes,
            last.offset + last.num_bytes,
            # Blank lines before the first record belong to the piece.
            block.end_line - block.num_lines,
        )
    )


def _join_packed(pieces: list[Piece], is_packed: bool) -> tuple[Piece, ...]:
    if not is_packed or not pieces:
        return tuple(pieces)
    num_rows = sum(piece.num_rows for piece in pieces)
    return (replace(pieces[0], offset=0, num_rows=num_rows, num_bytes=sum(piece.num_bytes for piece in pieces)),)


def _scan_arrow(path: str, mark: FileMark | None) -> RowsScan:
    with open_arrow(path, mark) as reader:
        schema = pa.schema([plain_field(field) for field in reader.schema])
        is_stream = isinstance(reader, pa.ipc.RecordBatchStreamReader)
    # Of one column, to learn lengths: a packed batch is unpacked to tell them.
    with open_arrow(path, mark, schema.names[:1]) as reader:
        lengths = [batch.num_rows for batch in list_batches(reader)]
    size = mark.size if mark is not None else 0
    num_rows = max(1, sum(lengths))
    if is_stream:
        return RowsScan((Piece(0, sum(lengths), size),) if sum(lengths) else (), schema)
    pieces: list[Piece] = []
    for length in lengths:
        first_row = pieces[-1].first_row + pieces[-1].num_rows if pieces else 0
        pieces.append(Piece(first_row, length, size * length // num_rows))
    return RowsScan(tuple(pieces), schema)
