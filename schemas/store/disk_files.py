"""How files and folders on disk are made: under temporary names, and below `_moebeam/` for their user alone.

Prompts and answers stand in a run's state, which is for nobody but the user who runs it; tables and the manifest beside
it get what the umask allows. A stricter umask holds for both.
"""

import os
import uuid
from pathlib import Path
from typing import BinaryIO

from moebeam.schemas.store.named_errors import naming_file

STATE_FOLDER = "_moebeam"
TEMPORARY = ".tmp"


def is_private(path: Path) -> bool:
    """Whether a path is a run's state folder, or in it."""
    return STATE_FOLDER in path.parts


def make_folder(folder: Path) -> None:
    """Make a folder and those above it that are missing."""
    mode = 0o700 if is_private(folder) else 0o777
    try:
        folder.mkdir(mode, exist_ok=True)
    except FileNotFoundError:
        make_folder(folder.parent)
        folder.mkdir(mode, exist_ok=True)


def open_new(path: Path, flags: int = 0) -> int:
    """Create a file for writing and return its descriptor.

    Raises:
        FileExistsError: there is one.
    """
    mode = 0o600 if is_private(path) else 0o666
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | flags, mode)


def make_temporary_path(target: Path) -> Path:
    """Where a file on disk is written before it is renamed."""
    return target.with_name(f".{target.name}.{uuid.uuid4().hex}{TEMPORARY}")


def write_temporary(target: Path, content: bytes, *, is_durable: bool = True) -> Path:
    """Write a new file under a temporary name beside `target`.

    Raises:
        OSError: nothing was written.
    """
    temporary = make_temporary_path(target)
    try:
        with naming_file(target), open_new_stream(temporary) as sink:
            sink.write(content)
            if is_durable:
                sink.flush()
                os.fsync(sink.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def open_new_stream(path: Path, buffering: int = -1) -> BinaryIO:
    """`open_new` as a stream."""
    return open(open_new(path), "wb", buffering=buffering)


def link_published(source: Path, target: Path) -> None:
    """Link a file of the run's state under a name beside `target`, readable for whom the umask lets read new files.

    Both names then have that mode; the folder of the first still keeps others out.
    """
    if is_private(source) and not is_private(target):
        probe = open_new(target)
        try:
            mode = os.fstat(probe).st_mode
        finally:
            os.close(probe)
            target.unlink()
        source.chmod(mode & 0o777)
    os.link(source, target)


def sync_names(folder: Path) -> None:
    """Make the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
