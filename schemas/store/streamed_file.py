"""A file written in pieces that readers see whole or not at all, for content too long for memory.

`schemas/store/storage.py` writes whole files from one value in memory.
"""

import contextlib
import os
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

from moebeam.schemas.store.disk_files import make_folder, make_temporary_path, open_new_stream
from moebeam.schemas.store.named_errors import naming_file
from moebeam.schemas.store.object_store import is_local, map_errors
from moebeam.schemas.store.storage import file_system, normalize_path, sync_folder

_BUFFER_BYTES = 1024 * 1024
_PART_BYTES = 16 * 1024 * 1024
"""S3 takes at most 10,000 parts a file, so the longest file has 160 GiB."""

Write: TypeAlias = Callable[[bytes], object]


@contextmanager
def streamed_file(path: str) -> Generator[Write]:
    """Write a file that appears, durably, when the block ends; an older one is replaced, or stays if the block fails.

    Raises:
        OSError: the store failed; the file is as it was.
    """
    with _on_disk(Path(normalize_path(path))) if is_local(path) else _in_store(path) as write:
        yield write


@contextmanager
def _on_disk(target: Path) -> Generator[Write]:
    make_folder(target.parent)
    temporary = make_temporary_path(target)
    try:
        with open_new_stream(temporary, _BUFFER_BYTES) as sink:

            def write(content: bytes) -> None:
                with naming_file(target):
                    sink.write(content)

            yield write
            with naming_file(target):
                sink.flush()
                os.fsync(sink.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(str(target.parent))


@contextmanager
def _in_store(path: str) -> Generator[Write]:
    with map_errors(path):
        fs, inner = file_system(path)
        # Without autocommit=False, fsspec commits a partial file when it is closed after an error.
        sink = fs.open(inner, "wb", autocommit=False, block_size=_PART_BYTES)

    def write(content: bytes) -> None:
        with map_errors(path):
            sink.write(content)

    try:
        yield write
        with map_errors(path):
            sink.close()
            sink.commit()
    except BaseException:
        # Left open, the file would be closed by the garbage collector, too late to discard it.
        with contextlib.suppress(Exception):
            sink.close()
        with contextlib.suppress(Exception):
            sink.discard()
        raise
