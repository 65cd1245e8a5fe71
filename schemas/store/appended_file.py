"""A file on disk that grows by appending; object stores have no such thing.

Unlike the files of `schemas/store/storage.py` it can be partial: a reader may find the last write cut off. Written
bytes survive the death of the process; synced bytes survive that of the machine.
"""

import os
from pathlib import Path

from moebeam.schemas.store.storage import sync_folder


class AppendedFile:
    """A new file that only grows.

    Raises:
        OSError: it exists already, or cannot be created.
    """

    def __init__(self, path: str) -> None:
        folder = Path(path.removeprefix("file://")).parent
        missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(
            path.removeprefix("file://"), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o666
        )
        for changed in {folder, *(parent.parent for parent in missing)}:
            sync_folder(str(changed))

    def write(self, content: bytes) -> None:
        """Append bytes; after an error the file may end within them.

        Raises:
            OSError: not all could be written.
        """
        left = memoryview(content)
        while left:
            left = left[os.write(self._descriptor, left) :]

    def sync(self) -> None:
        """Make durable what was written so far."""
        os.fsync(self._descriptor)

    def close(self) -> None:
        os.close(self._descriptor)
