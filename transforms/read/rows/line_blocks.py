"""Files of lines, packed or not, in blocks of whole records.

Part of *read* and of the scan before the run. A record is a line, or several where a CSV field holds line breaks. Only
files that are not packed can be read from the middle; a packed one is a single unit, read as a stream.
"""

import contextlib
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO, cast

import pyarrow as pa

from moebeam.schemas.store.file_mark import FileMark
from moebeam.transforms.read.claimed_file import open_claimed

MAX_RECORD_BYTES = 256 << 20
_CHUNK_BYTES = 1 << 20
_BOM = b"\xef\xbb\xbf"
_PACKINGS = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd"}
_FOREIGN_BOMS = (b"\xff\xfe", b"\xfe\xff")

IsOpen = Callable[[bytes, bool], bool]
"""Whether a record goes on after a line, from the line and whether it went on before it."""


@dataclass(frozen=True, slots=True)
class Block:
    """Neighbouring records.

    Attributes:
        records: without blank ones; each ends in its line break, but for the last of a file.
        lines: number of each record's first line, from 1.
        num_bytes: of the file that the block spans, blank lines included.
        num_lines: that the block spans, blank ones included.
        end_line: number of the line after it.
    """

    records: list[bytes] = field(default_factory=list[bytes])
    lines: list[int] = field(default_factory=list[int])
    num_bytes: int = 0
    num_lines: int = 0
    end_line: int = 1


@contextlib.contextmanager
def open_lines(path: str, claim: FileMark | None, offset: int = 0) -> Generator[tuple[Iterator[bytes], bool]]:
    """Open a file of lines.

    Args:
        claim: see `claimed_file.open_claimed`.
        offset: bytes to skip; 0 for a packed file.
    Returns:
        Its lines with their line breaks, byte order mark included, and whether it is packed.
    Raises:
        pa.ArrowInvalid: UTF-16, or damaged while it is read.
        InputChanged: it is not as claimed.
        OSError: the file is missing, or a store failed.
    """
    with open_claimed(path, claim) as source:
        head = source.read(4)
        source.seek(offset)
        if head[:2] in _FOREIGN_BOMS:
            raise pa.ArrowInvalid("expected UTF-8, found UTF-16; save it as UTF-8")
        packing: Any = next((name for magic, name in _PACKINGS.items() if head.startswith(magic)), None)
        if packing is None:
            yield _split_lines(source), False
        else:
            with pa.CompressedInputStream(pa.PythonFile(cast("Any", source), mode="r"), packing) as unpacked:
                yield _split_lines(unpacked), True


def strip_mark(line: bytes) -> bytes:
    """A file's first line without its byte order mark."""
    return line.removeprefix(_BOM)


def read_blocks(
    lines: Iterator[bytes], *, first_line: int = 1, max_rows: int, max_bytes: int, is_open: IsOpen | None = None
) -> Iterator[Block]:
    """Cut lines into blocks of at most so many records, and bytes but for the last record.

    Raises:
        pa.ArrowInvalid: a record is longer than any may be.
    """
    block, block_line = Block(end_line=first_line), first_line
    parts: list[bytes] = []
    start, number, num_bytes, record_bytes = first_line, first_line, 0, 0
    goes_on = False
    for line in lines:
        if not goes_on:
            start, record_bytes = number, 0
        number += 1
        num_bytes += len(line)
        record_bytes += len(line)
        if record_bytes > MAX_RECORD_BYTES:
            raise pa.ArrowInvalid(
                f"line {start}: expected a record of at most {MAX_RECORD_BYTES >> 20} MiB, found a longer one; "
                "a quote may be left open there"
            )
        goes_on = is_open is not None and is_open(line, goes_on)
        if goes_on:
            parts.append(line)
            continue
        record = b"".join([*parts, line]) if parts else line
        parts = []
        if record.strip():
            block.records.append(record)
            block.lines.append(start)
        if len(block.records) >= max_rows or num_bytes >= max_bytes:
            yield Block(block.records, block.lines, num_bytes, number - block_line, number)
            block, block_line, num_bytes = Block(end_line=number), number, 0
    if parts:
        block.records.append(b"".join(parts))
        block.lines.append(start)
    if block.records:
        yield Block(block.records, block.lines, num_bytes, number - block_line, number)


def take_bytes(lines: Iterator[bytes], num_bytes: int) -> Iterator[bytes]:
    """The lines that the next bytes hold."""
    for line in lines:
        yield line
        num_bytes -= len(line)
        if num_bytes <= 0:
            return


def _split_lines(source: "BinaryIO | pa.NativeFile") -> Iterator[bytes]:
    held: list[bytes] = []
    num_held = 0
    while chunk := source.read(_CHUNK_BYTES):
        first, *others = chunk.split(b"\n")
        held.append(first)
        num_held += len(first)
        if others:
            yield b"".join(held) + b"\n"
            for line in others[:-1]:
                yield line + b"\n"
            held, num_held = [others[-1]], len(others[-1])
        elif num_held > MAX_RECORD_BYTES:
            raise pa.ArrowInvalid(f"expected lines of at most {MAX_RECORD_BYTES >> 20} MiB, found a longer one")
    if num_held:
        yield b"".join(held)
