"""Whether a failed read of input tells something of the file, or only that the way to it failed for a moment.

Part of *read* and of the scan before the run. What is wrong with a file becomes rejects, and only that: a time-out must
never cost a row.
"""

import errno
import time
from collections.abc import Callable
from typing import TypeVar

from moebeam.schemas.store.object_store import StoreError

RETRY_DELAYS_S = (0.2, 1.0)
"""Waits before another look at a file that could not be read."""

_OF_THE_FILE = {
    errno.EACCES,
    errno.EINVAL,
    errno.EIO,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.EPERM,
}

Read = TypeVar("Read")


def is_permanent(error: Exception) -> bool:
    """Whether an error that stays says that the file itself cannot be read: damaged, missing or not allowed.

    pyarrow tells damage by OSErrors without a number.
    """
    if isinstance(error, (StoreError, TimeoutError, ConnectionError)):
        return False
    return not isinstance(error, OSError) or error.errno is None or error.errno in _OF_THE_FILE


def is_transient(error: Exception) -> bool:
    """Whether another look may help: anything the system or the network reported but that a file is not there or not
    ours to read. Object stores have been tried again by their own libraries already.
    """
    if isinstance(error, (StoreError, FileNotFoundError, PermissionError)):
        return False
    return isinstance(error, (TimeoutError, ConnectionError)) or (
        isinstance(error, OSError) and error.errno is not None
    )


def retry_transient(read: Callable[[], Read]) -> Read:
    """What `read` returns; it is called again after an error that may pass.

    Raises:
        Exception: the last error of `read`.
    """
    for pause_s in RETRY_DELAYS_S:
        try:
            return read()
        except OSError as error:
            if not is_transient(error):
                raise
        time.sleep(pause_s)
    return read()
