"""A file that is written piece by piece and seen whole or not at all, for what is too long to be held.

Beside `schemas/store/storage.py`, whose whole files come from one value in memory.
"""

import contextlib
import os
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

from moebeam.schemas.store.object_store import is_local, named_errors
from moebeam.schemas.store.storage import file_system, spelled, sync_folder, temporary_of

_BUFFER_BYTES = 1024 * 1024
_PART_BYTES = 16 * 1024 * 1024
"""S3 takes at most 10,000 parts a file, so the longest file has 160 GiB."""

Write: TypeAlias = Callable[[bytes], object]


@contextmanager
def streamed_file(path: str) -> Generator[Write]:
    """Write a file that appears when the block ends; an older one is replaced, or stays if the block fails.

    Raises:
        OSError: the store failed; the file is as it was. On disk it is durable otherwise.
    """
    with _on_disk(Path(spelled(path))) if is_local(path) else _in_store(path) as write:
        yield write


@contextmanager
def _on_disk(target: Path) -> Generator[Write]:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_of(target)
    try:
        with temporary.open("xb", buffering=_BUFFER_BYTES) as sink:
            yield sink.write
            sink.flush()
            os.fsync(sink.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(str(target.parent))


@contextmanager
def _in_store(path: str) -> Generator[Write]:
    with named_errors(path):
        fs, inner = file_system(path)
        # fsspec's files commit what they have when they are closed, after an error too, unless they are told not to.
        sink = fs.open(inner, "wb", autocommit=False, block_size=_PART_BYTES)

    def write(content: bytes) -> None:
        with named_errors(path):
            sink.write(content)

    try:
        yield write
        with named_errors(path):
            sink.close()
            sink.commit()
    except BaseException:
        # A file that is still open would be closed later, when nobody could discard it any more.
        with contextlib.suppress(Exception):
            sink.close()
        with contextlib.suppress(Exception):
            sink.discard()
        raise
