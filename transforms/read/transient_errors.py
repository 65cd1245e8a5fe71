"""Tells damaged or missing input files from transient failures of a store or disk, and retries the latter.

Part of *read* and of the scan before the run. Only a file's permanent error becomes rejects: a time-out must never cost
a row.
"""

import errno
import time
from collections.abc import Callable
from typing import TypeVar

from moebeam.schemas.store.object_store import StoreError

RETRY_DELAYS_S = (0.2, 1.0)
"""Seconds to wait before each retry of a failed read."""

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
    """Whether an error that persists means that the file itself is damaged, missing or forbidden.

    pyarrow reports damage as an OSError without errno.
    """
    if isinstance(error, (StoreError, TimeoutError, ConnectionError)):
        return False
    return not isinstance(error, OSError) or error.errno is None or error.errno in _OF_THE_FILE


def is_transient(error: Exception) -> bool:
    """Whether a retry may help: any error of system or network, except that the file is missing or forbidden.

    Not for object stores, whose own libraries have already retried.
    """
    if isinstance(error, (StoreError, FileNotFoundError, PermissionError)):
        return False
    return isinstance(error, (TimeoutError, ConnectionError)) or (
        isinstance(error, OSError) and error.errno is not None
    )


def retry_transient(read: Callable[[], Read]) -> Read:
    """Call `read` again after each transient error.

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
