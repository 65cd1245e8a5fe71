"""A file on disk that grows by appending; object stores have no such thing.

Unlike the files of `schemas/store/storage.py` it can be partial: a reader may find the last write cut off. Written
bytes survive the death of the process; synced bytes survive that of the machine.
"""

import os
from pathlib import Path

from moebeam.schemas.store.disk_files import make_folder, open_new
from moebeam.schemas.store.named_errors import name_file, naming_file
from moebeam.schemas.store.storage import sync_folder


class AppendedFile:
    """A new file that only grows.

    Raises:
        OSError: it exists already, or cannot be created.
    """

    def __init__(self, path: str) -> None:
        self._path = path.removeprefix("file://")
        folder = Path(self._path).parent
        missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
        make_folder(folder)
        self._descriptor = open_new(Path(self._path), os.O_APPEND)
        for changed in {folder, *(parent.parent for parent in missing)}:
            sync_folder(str(changed))

    def write(self, content: bytes) -> None:
        """Append bytes; after an error the file may end within them.

        Raises:
            OSError: not all could be written.
        """
        left = memoryview(content)
        try:
            while left:
                left = left[os.write(self._descriptor, left) :]
        except OSError as error:
            name_file(error, self._path)
            raise

    def sync(self) -> None:
        """Make durable what was written so far."""
        with naming_file(self._path):
            os.fsync(self._descriptor)

    def close(self) -> None:
        os.close(self._descriptor)
