"""The folder in which processes of one user on one host find each other: locks and sockets, nothing that must last."""

import os
import tempfile
from pathlib import Path


def host_folder() -> Path:
    """The user's own folder; nobody else may look into it.

    Raises:
        PermissionError: somebody else made it first.
    """
    folder = Path(tempfile.gettempdir()) / f"moebeam-{os.getuid()}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder}: expected a folder of user {os.getuid()}, found one of {folder.stat().st_uid}")
    return folder
