"""A per-user folder on each host for locks and sockets; nothing in it is permanent."""

import os
import tempfile
from pathlib import Path


def host_folder() -> Path:
    """Return the folder, which only its user can read.

    Raises:
        PermissionError: the folder belongs to another user.
    """
    folder = Path(tempfile.gettempdir()) / f"moebeam-{os.getuid()}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder}: expected a folder of user {os.getuid()}, found one of {folder.stat().st_uid}")
    return folder
