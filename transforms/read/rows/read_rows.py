"""Reads the rows of a piece of a CSV, JSON lines or Arrow file, in batches of bounded rows and bytes.

Part of *read*, for which `input_rows.py` gives every row its identity.
"""

from collections.abc import Iterator, Mapping, Sequence

import pyarrow as pa

from moebeam.schemas.errors import RowError
from moebeam.transforms.read.input_scan import InputUnit
from moebeam.transforms.read.rows.arrow_file import check_batch, list_batches, open_arrow
from moebeam.transforms.read.rows.csv_rows import make_is_open, read_csv_block, read_header
from moebeam.transforms.read.rows.json_rows import read_json_block
from moebeam.transforms.read.rows.line_blocks import Block, IsOpen, open_lines, read_blocks, take_bytes

MAX_BATCH_ROWS = 1024
MAX_BATCH_BYTES = 8 << 20


def read_rows(
    unit: InputUnit, names: Sequence[str], types: Mapping[str, pa.DataType]
) -> Iterator[tuple[pa.RecordBatch, dict[int, RowError]]]:
    """Read a unit.

    Args:
        names: columns to read; those that the file lacks are left out.
        types: that they have over all files.
    Returns:
        Batches, CSV's as text, each with the errors of its rows that cannot be read.
    Raises:
        pa.ArrowInvalid: the rest of the unit cannot be read.
        InputChanged: the file is not as claimed.
        OSError: the store failed.
    """
    if unit.format == "arrow":
        for batch in _read_arrow(unit, names):
            yield batch, {}
    elif unit.format == "csv":
        yield from _read_csv(unit, names, types)
    else:
        for block in read_line_blocks(unit):
            yield read_json_block(block, names, types)


def read_line_blocks(unit: InputUnit, is_open: IsOpen | None = None) -> Iterator[Block]:
    """The records of a unit of a file of lines."""
    with open_lines(unit.path, unit.claim, unit.offset) as (lines, is_packed):
        if is_packed and unit.format == "csv":
            _read_record(lines, is_open)
        yield from read_blocks(
            take_bytes(lines, unit.num_bytes),
            first_line=unit.first_line,
            max_rows=MAX_BATCH_ROWS,
            max_bytes=MAX_BATCH_BYTES,
            is_open=is_open,
        )


def _read_csv(
    unit: InputUnit, names: Sequence[str], types: Mapping[str, pa.DataType]
) -> Iterator[tuple[pa.RecordBatch, dict[int, RowError]]]:
    is_open = make_is_open(unit.delimiter)
    with open_lines(unit.path, unit.claim) as (lines, _):
        stored = read_header(_read_record(lines, is_open), unit.delimiter)
    present = [name for name in names if name in stored]
    for block in read_line_blocks(unit, is_open):
        yield read_csv_block(block, stored, unit.delimiter, present, types)


def _read_record(lines: Iterator[bytes], is_open: IsOpen | None) -> bytes:
    record = line = next(lines, b"")
    goes_on = is_open is not None and is_open(line, False)
    while is_open is not None and goes_on and (line := next(lines, b"")):
        record, goes_on = record + line, is_open(line, True)
    return record


def _read_arrow(unit: InputUnit, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
    with open_arrow(unit.path, unit.claim, names) as reader:
        is_stream = isinstance(reader, pa.ipc.RecordBatchStreamReader)
        found = list_batches(reader) if is_stream else [reader.get_batch(unit.row_group)]
        for batch in found:
            check_batch(batch)
            num_rows = max(1, min(MAX_BATCH_ROWS, MAX_BATCH_BYTES * batch.num_rows // max(1, batch.nbytes)))
            for start in range(0, batch.num_rows, num_rows):
                yield batch.slice(start, num_rows)
