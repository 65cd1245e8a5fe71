"""Who may read what a run leaves on disk."""

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from moebeam.schemas.store import storage
from moebeam.schemas.store.appended_file import AppendedFile
from moebeam.schemas.store.streamed_file import streamed_file


def write_streamed(path: str, content: bytes) -> None:
    with streamed_file(path) as write:
        write(content)


def append(path: str, content: bytes) -> None:
    file = AppendedFile(path)
    file.write(content)
    file.close()


WRITERS: list[Callable[[str, bytes], object]] = [
    storage.write_whole,
    storage.write_note,
    storage.create_exclusive,
    write_streamed,
    append,
]


@pytest.fixture(params=[0o022, 0o007, 0o077])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("write", WRITERS)
def test_state_is_its_users_alone_and_tables_have_the_umasks_mode(
    tmp_path: Path, umask: int, write: Callable[[str, bytes], object]
) -> None:
    output = tmp_path / "new" / "out"
    write(str(output / "_moebeam" / "journal" / "00001" / "a.journal"), b"content")
    write(str(output / "results" / "part.parquet"), b"content")
    assert mode(output / "_moebeam" / "journal" / "00001" / "a.journal") == 0o600 & ~umask
    for folder in ("_moebeam", "_moebeam/journal", "_moebeam/journal/00001"):
        assert mode(output / folder) == 0o700 & ~umask
    assert mode(output) == mode(output / "results") == 0o777 & ~umask
    assert mode(output / "results" / "part.parquet") == 0o666 & ~umask
    assert (output / "results" / "part.parquet").read_bytes() == b"content"


def test_a_published_table_is_readable_as_the_umask_says(tmp_path: Path, umask: int) -> None:
    staged, target = tmp_path / "_moebeam" / "staging" / "a", tmp_path / "results" / "a.parquet"
    storage.write_whole(str(staged), b"table")
    for _ in range(2):
        storage.copy_whole(str(staged), str(target))
    assert mode(target) == 0o666 & ~umask
    assert target.read_bytes() == b"table"
    assert [path.name for path in target.parent.iterdir()] == ["a.parquet"]
