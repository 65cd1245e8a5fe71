"""Errors of object stores and reading of their files; everything else uses `storage.py`.

Each store's library has its own errors, most of them no OSErrors. Here they are mapped to OSErrors, by type.
"""

import contextlib
import errno
import io
import os
from collections.abc import Generator, Mapping
from typing import Any, cast

from moebeam.schemas.errors import CommitError

READ_BYTES = 1024 * 1024
"""Smallest read from an object store: a request takes about as long as a megabyte."""


def is_local(path: str) -> bool:
    """Whether a path is on a local disk: no protocol, or `file://`."""
    return "://" not in path or path.startswith(("file://", "local://"))


class StoreError(OSError):
    """An object store failed, could not be reached or refused; says nothing about the file itself."""


class StoreAccessDenied(StoreError, PermissionError):
    """An object store refused these credentials, or they lack the right to do this."""


@contextlib.contextmanager
def map_errors(path: str) -> Generator[None]:
    """Raise a store's errors as OSErrors with the path; a disk's pass through unchanged."""
    try:
        yield
    except Exception as error:
        if is_local(path) or isinstance(error, (StoreError, CommitError)):
            raise
        raise _map_error(error, path) from error


def _map_error(error: Exception, path: str) -> OSError:
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
    if isinstance(error, FileExistsError):
        return FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
    if isinstance(error, IsADirectoryError):
        return IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    reason = " ".join(str(error.strerror if isinstance(error, OSError) and error.strerror else error).split())
    if isinstance(error, PermissionError) or _response(error).get("HTTPStatusCode") in (401, 403):
        return StoreAccessDenied(errno.EACCES, f"access denied by the store: {reason or 'no reason given'}", path)
    if isinstance(error, OSError):
        return StoreError(error.errno or errno.EIO, reason or type(error).__name__, path)
    return StoreError(errno.EIO, f"{type(error).__name__}: {reason}", path)


class StoredFile(io.RawIOBase):
    """An object of a store, read by ranges; a short read before the end of the file raises."""

    def __init__(self, path: str, source: Any) -> None:
        super().__init__()
        self._path = path
        self._source = source
        self._num_bytes: int = source.seek(0, io.SEEK_END)
        source.seek(0)

    @property
    def info(self) -> Mapping[str, Any] | None:
        """What the store said of the object when it was opened; None where its library does not keep that."""
        return getattr(self._source, "details", None)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return int(self._source.tell())

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        return int(self._source.seek(offset, whence))

    def readinto(self, buffer: Any, /) -> int:
        content = self._read(len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def readall(self) -> bytes:
        return self._read(self._num_bytes)

    def close(self) -> None:
        if not self.closed:
            self._source.close()
        super().close()

    def _read(self, num_bytes: int) -> bytes:
        start = self.tell()
        expected = max(0, min(num_bytes, self._num_bytes - start))
        with map_errors(self._path):
            content = cast("bytes", self._source.read(expected)) if expected else b""
        if len(content) != expected:
            reason = f"short read: expected {expected} bytes at byte {start}, found {len(content)}"
            raise StoreError(errno.EIO, reason, self._path)
        return content


def store_code(error: OSError) -> str | None:
    """The S3 error code; s3fs maps only the most common ones to types of their own."""
    return _response(error).get("Code")


def _response(error: BaseException) -> Mapping[str, Any]:
    """Botocore's record of a refusal: `Code` and `HTTPStatusCode`, among others."""
    response: object = getattr(error.__cause__, "response", None)
    if not isinstance(response, Mapping):
        return {}
    parts = cast("Mapping[str, Mapping[str, Any]]", response)
    return {**parts.get("ResponseMetadata", {}), **parts.get("Error", {})}
