"""Reads parts of files into buffers, around the page cache where keeping the files there would evict other pages."""

import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass

from moebeam.model_runner.torch_engine.streaming.units import FileRange
from moebeam.schemas.errors import EngineLoadError

_MAX_READ_BYTES = 64 << 20
_DIRECT = getattr(os, "O_DIRECT", 0)  # Linux has it


@dataclass(frozen=True, slots=True)
class _OpenFile:
    descriptor: int
    num_bytes: int
    is_direct: bool


class RangeReader:
    """The open files of a checkpoint. Used by one thread.

    Args:
        bypasses_cache: whether what was read shall not stay in the page cache.
    """

    def __init__(self, *, bypasses_cache: bool) -> None:
        self._bypasses_cache = bypasses_cache
        self._files: dict[str, _OpenFile] = {}

    def read(self, ranges: Sequence[FileRange], target: memoryview) -> None:
        """Read ranges to their places in a buffer that begins at a page.

        Raises:
            EngineLoadError: a file cannot be read.
        """
        for part in ranges:
            try:
                num_read = self._read(part, target)
            except OSError as error:
                raise EngineLoadError(f"{part.file}: expected weights to read, found: {error}") from error
            if part.begin + num_read < part.last_byte:
                raise EngineLoadError(
                    f"{part.file}: expected weights up to byte {part.last_byte:,}, found {part.begin + num_read:,}: "
                    "the file has changed since the model was loaded"
                )

    def close(self) -> None:
        """Close all files."""
        while self._files:
            os.close(self._files.popitem()[1].descriptor)

    def _read(self, part: FileRange, target: memoryview) -> int:
        if part.file not in self._files:
            self._files[part.file] = _open(part.file, is_direct=self._bypasses_cache and bool(_DIRECT))
        file = self._files[part.file]
        done, num_bytes = 0, part.end - part.begin
        while done < num_bytes:
            piece = target[part.place + done : part.place + min(num_bytes, done + _MAX_READ_BYTES)]
            num_read = os.preadv(file.descriptor, [piece], part.begin + done)
            done += num_read
            if not num_read or part.begin + done >= file.num_bytes:
                break
        if self._bypasses_cache and not file.is_direct and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.descriptor, part.begin, num_bytes, os.POSIX_FADV_DONTNEED)
        return done


def _open(path: str, *, is_direct: bool) -> _OpenFile:
    descriptor = -1
    if is_direct:
        try:
            descriptor = os.open(path, os.O_RDONLY | _DIRECT)
            # Some file systems open a file so and then refuse to read it.
            os.preadv(descriptor, [mmap.mmap(-1, mmap.PAGESIZE)], 0)
        except OSError:
            is_direct = False
            if descriptor >= 0:
                os.close(descriptor)
    if not is_direct:
        descriptor = os.open(path, os.O_RDONLY)
    return _OpenFile(descriptor, os.fstat(descriptor).st_size, is_direct)
