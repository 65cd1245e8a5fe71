"""Whoever reads of a full disk reads which file did not fit."""

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moebeam.schemas.store import storage
from moebeam.schemas.store.appended_file import AppendedFile
from moebeam.schemas.store.streamed_file import streamed_file


def append(path: str) -> None:
    AppendedFile(path).write(b"x")


def stream(path: str) -> None:
    with streamed_file(path) as write:
        write(b"x")


def write_whole(path: str) -> None:
    storage.write_whole(path, b"x")


def create_exclusive(path: str) -> None:
    storage.create_exclusive(path, b"x")


@pytest.mark.parametrize("write", [append, stream, write_whole, create_exclusive])
def test_an_error_of_a_full_disk_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Callable[[str], object]
) -> None:
    def full(descriptor: int, *unused: Any) -> int:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            return 0
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    monkeypatch.setattr(os, "fsync", full)
    path = tmp_path / "file.bin"
    with pytest.raises(OSError, match=r"No space left on device: '.*/file.bin'"):
        write(str(path))
