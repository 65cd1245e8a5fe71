"""Reads files whose digest is recorded elsewhere: the tables of a run, by the SHA-256 in their commit or manifest.

A file is held against its digest before a parser sees any of it. On disk it is hashed block by block and then read from
the page cache; out of an object store it comes once, into memory or, if it is long, into a temporary file.
"""

import hashlib
import io
import tempfile
from typing import BinaryIO, cast

from moebeam.schemas.store import storage
from moebeam.schemas.store.damage import describe_damage
from moebeam.schemas.store.named_errors import naming_file
from moebeam.schemas.store.object_store import READ_BYTES, is_local

_MEMORY_BYTES = 64 * 1024 * 1024
"""Longest file of an object store that is held in memory."""


def open_checked(path: str, sha256: str) -> BinaryIO:
    """Open a file for random-access reading, after checking all of it.

    Raises:
        FileDamaged: it has another digest.
        OSError: FileNotFoundError where the file is missing, `StoreError` where a store failed.
    """
    source = storage.open_input(path)
    try:
        if is_local(path):
            found = hashlib.file_digest(cast("io.BufferedReader", source), "sha256").hexdigest()
        else:
            found, source = _fetch(source)
        _check(path, found, sha256)
        source.seek(0)
    except BaseException:
        source.close()
        raise
    return source


def read_checked(path: str, sha256: str) -> bytes:
    """All bytes of a file, checked; raises as `open_checked`."""
    content = storage.read_bytes(path)
    _check(path, hashlib.sha256(content).hexdigest(), sha256)
    return content


def _check(path: str, found: str, sha256: str) -> None:
    if found != sha256:
        raise describe_damage(path, f"expected content with SHA-256 {sha256}, found {found}")


def _fetch(source: BinaryIO) -> tuple[str, BinaryIO]:
    """The digest of an object and a copy of it."""
    digest = hashlib.sha256()
    copy = cast("BinaryIO", tempfile.SpooledTemporaryFile(_MEMORY_BYTES))  # noqa: SIM115 - the caller closes it
    with source:
        while block := source.read(READ_BYTES):
            digest.update(block)
            with naming_file(tempfile.gettempdir()):
                copy.write(block)
    return digest.hexdigest(), copy
