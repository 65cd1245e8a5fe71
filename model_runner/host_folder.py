"""A per-user folder on each host for locks and sockets; nothing in it is permanent."""

import os
import stat
import tempfile
from pathlib import Path

_OTHERS = 0o077


def host_folder() -> Path:
    """Return the folder, which only its user can enter.

    Raises:
        PermissionError: it is a link, belongs to another user, or others may enter it.
    """
    folder = Path(tempfile.gettempdir()) / f"moebeam-{os.getuid()}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = _check_own(folder)
    if stat.S_IMODE(found.st_mode) & _OTHERS:
        raise PermissionError(
            f"{folder}: expected a folder that only its user may enter, found mode "
            f"{stat.S_IMODE(found.st_mode):04o}; remove it, or set TMPDIR to another place"
        )
    return folder


def make_private_folder(folder: Path) -> Path:
    """Make a folder below `host_folder()`, for its user alone, and return it.

    Raises:
        PermissionError: what is there is a link or another user's.
    """
    folder.mkdir(mode=0o700, exist_ok=True)
    if stat.S_IMODE(_check_own(folder).st_mode) & _OTHERS:
        # Made by an older version, in a folder that nobody else could enter.
        folder.chmod(0o700)
    return folder


def check_own_socket(path: Path) -> None:
    """Make sure that a path is a socket of this user.

    Raises:
        FileNotFoundError: there is nothing.
        PermissionError: it is something else, such as a link, or another user's.
    """
    found = path.lstat()
    if not stat.S_ISSOCK(found.st_mode) or found.st_uid != os.getuid():
        raise PermissionError(
            f"{path}: expected a socket of user {os.getuid()}, found {stat.filemode(found.st_mode)} of user "
            f"{found.st_uid}; remove it"
        )


def _check_own(folder: Path) -> os.stat_result:
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise PermissionError(
            f"{folder}: expected a folder of user {os.getuid()}, found {stat.filemode(found.st_mode)} of user "
            f"{found.st_uid}; remove it, or set TMPDIR to another place"
        )
    return found
