"""Files that check themselves: the content, then a checksum of each of its blocks, verified when a block is read.

For files of the run's own folder that are read in parts: plans, sorted runs, records of waste. What a damaged block
holds is never seen by a parser, which might crash on it. Memory holds one read at a time, and each byte is read once.

    content | CRC-32 of each block | length, block length, CRC-32 of this trailer, MAGIC

Arrow's files have no checksums, and Parquet's cover pages, not footers. Tables that others read are whole Parquet files
without a seal; `checked_file.py` holds them against the digest in their commit or manifest.
"""

import io
import struct
import zlib
from typing import Any, BinaryIO

from moebeam.schemas.store import storage
from moebeam.schemas.store.damage import describe_damage
from moebeam.schemas.store.object_store import READ_BYTES, is_local

BLOCK_BYTES = 64 * 1024
MAGIC = b"MOEBSEAL"

ARROW_END = b"ARROW1"
PARQUET_END = b"PAR1"

_HEAD = struct.Struct("<QI")
_SUM = struct.Struct("<I")
_END_BYTES = _HEAD.size + _SUM.size + len(MAGIC)


def seal(content: bytes) -> bytes:
    """The content of a file with its checksums."""
    view = memoryview(content)
    sums = [zlib.crc32(view[start : start + BLOCK_BYTES]) for start in range(0, len(content), BLOCK_BYTES)]
    trailer = b"".join(map(_SUM.pack, sums)) + _HEAD.pack(len(content), BLOCK_BYTES)
    return b"".join((content, trailer, _SUM.pack(zlib.crc32(trailer)), MAGIC))


def open_sealed(path: str, unsealed_end: bytes) -> BinaryIO:
    """Open a sealed file for random-access reading of its content.

    Args:
        unsealed_end: how files of older versions, which have no seal, end; they are read as they are.
    Raises:
        FileDamaged: the file is not what was written; here, or while a damaged block is read.
        OSError: FileNotFoundError where the file is missing, `StoreError` where a store failed.
    """
    source = storage.open_input(path)
    try:
        seal_of = _read_seal(path, source, unsealed_end)
    except BaseException:
        source.close()
        raise
    if seal_of is None:
        source.seek(0)
        return source
    return io.BufferedReader(_SealedContent(path, source, *seal_of), BLOCK_BYTES)


def read_sealed(path: str, unsealed_end: bytes) -> bytes:
    """The whole content of a sealed file; raises as `open_sealed`."""
    with open_sealed(path, unsealed_end) as source:
        return source.read()


def check_sealed(path: str, unsealed_end: bytes) -> None:
    """Check every block of a sealed file; raises as `open_sealed`."""
    with open_sealed(path, unsealed_end) as source:
        while source.read(READ_BYTES):
            pass


def _read_seal(path: str, source: BinaryIO, unsealed_end: bytes) -> tuple[int, int, tuple[int, ...]] | None:
    """Length of the content, length of a block, and the blocks' checksums; None for a file without a seal."""
    num_bytes = source.seek(0, io.SEEK_END)
    # In an object store a request takes as long as a megabyte, and an Arrow file's footer is read next.
    start = source.seek(max(0, num_bytes - (BLOCK_BYTES if is_local(path) else READ_BYTES)))
    tail = source.read()
    if tail.endswith(unsealed_end):
        return None
    if not tail.endswith(MAGIC) or len(tail) < _END_BYTES:
        raise describe_damage(path, f"its last bytes are {tail[-len(MAGIC) :]!r}, not those of a file of this kind")
    num_content, num_block = _HEAD.unpack_from(tail, len(tail) - _END_BYTES)
    num_blocks = -(-num_content // num_block) if num_block else 0
    if num_content + num_blocks * _SUM.size + _END_BYTES != num_bytes:
        raise describe_damage(path, f"its seal tells of {num_content:,} bytes, the file has {num_bytes:,}")
    if num_content < start:
        source.seek(num_content)
        tail = source.read()
    trailer = tail[len(tail) - (num_bytes - num_content) : -_SUM.size - len(MAGIC)]
    if zlib.crc32(trailer) != _SUM.unpack_from(tail, len(tail) - _SUM.size - len(MAGIC))[0]:
        raise describe_damage(path, "the checksums at its end are damaged themselves")
    return num_content, num_block, struct.unpack_from(f"<{num_blocks}I", trailer)


class _SealedContent(io.RawIOBase):
    """The content of a sealed file; the blocks of each read are checked before it returns."""

    def __init__(self, path: str, source: BinaryIO, num_bytes: int, block_bytes: int, sums: tuple[int, ...]) -> None:
        super().__init__()
        self._path = path
        self._source = source
        self._num_bytes = num_bytes
        self._block_bytes = block_bytes
        self._sums = sums
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._num_bytes}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: Any, /) -> int:
        content = self._read(len(buffer))
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)

    def readall(self) -> bytes:
        content = bytes(self._read(self._num_bytes))
        self._position += len(content)
        return content

    def close(self) -> None:
        if not self.closed:
            self._source.close()
        super().close()

    def _read(self, num_bytes: int) -> "memoryview[int]":
        """Up to so many bytes from the position on, with the blocks around them read and checked."""
        start, stop = self._position, min(self._position + num_bytes, self._num_bytes)
        if start >= stop:
            return memoryview(b"")
        size = self._block_bytes
        first = start // size
        self._source.seek(first * size)
        wanted = min(-(-stop // size) * size, self._num_bytes) - first * size
        blocks = memoryview(self._source.read(wanted))
        if len(blocks) != wanted:
            raise describe_damage(
                self._path, f"expected {wanted:,} bytes at byte {first * size:,}, found {len(blocks)}"
            )
        for place in range(0, wanted, size):
            if zlib.crc32(blocks[place : place + size]) != self._sums[first + place // size]:
                begin = first * size + place
                end = min(begin + size, self._num_bytes)
                raise describe_damage(self._path, f"bytes {begin:,} to {end:,} do not have their checksum")
        return blocks[start - first * size : stop - first * size]
