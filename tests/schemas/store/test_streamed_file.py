"""Streamed files: seen whole or not at all on disk; pieces and errors in another fsspec store.

That a store shows nothing before the end is `tests/integration/test_s3_streamed_file.py`: fsspec's memory cannot.
"""

import os
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFile

from moebeam.schemas.store import storage
from moebeam.schemas.store.object_store import StoreError
from moebeam.schemas.store.streamed_file import streamed_file


@pytest.fixture(params=["disk", "memory"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "disk":
        return str(tmp_path / "new" / "a.jsonl")
    fsspec.filesystem("memory").store.clear()
    return "memory://bucket/new/a.jsonl"


def test_pieces_become_one_file(path: str) -> None:
    with streamed_file(path) as write:
        for piece in (b"one\n", b"", b"two\n"):
            write(piece)
    assert storage.read_bytes(path) == b"one\ntwo\n"


def test_a_file_on_disk_appears_at_the_end(tmp_path: Path) -> None:
    with streamed_file(str(tmp_path / "a")) as write:
        write(b"one")
        assert not (tmp_path / "a").exists()
    assert (tmp_path / "a").read_bytes() == b"one"


def test_a_file_without_pieces_is_empty_but_there(path: str) -> None:
    with streamed_file(path):
        pass
    assert storage.read_bytes(path) == b""


def test_a_failed_block_leaves_the_older_file_on_disk_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"older")
    with pytest.raises(RuntimeError, match="boom"), streamed_file(str(path)) as write:
        write(b"newer")
        raise RuntimeError("boom")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"a": b"older"}


def test_a_failed_block_is_told_to_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(MemoryFile, "discard", lambda self: told.append("discard"))
    monkeypatch.setattr(MemoryFile, "commit", lambda self: told.append("commit"))
    with pytest.raises(RuntimeError, match="boom"), streamed_file("memory://bucket/a"):
        told.clear()
        raise RuntimeError("boom")
    assert told == ["discard"]


def test_a_disk_s_file_is_synced_before_it_takes_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, synced = tmp_path / "a", list[bool]()
    real = os.fsync

    def watch(descriptor: int) -> None:
        synced.append(path.exists())
        real(descriptor)

    monkeypatch.setattr(os, "fsync", watch)
    with streamed_file(f"file://{path}") as write:
        write(b"x")
    assert synced == [False, True], "the file before it has its name, the folder after"
    assert path.read_bytes() == b"x"


def test_a_store_s_own_errors_become_oserrors_with_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Any, content: bytes) -> None:
        raise RuntimeError("the store is tired")

    monkeypatch.setattr(MemoryFile, "write", refuse)
    with (
        pytest.raises(StoreError, match="the store is tired") as found,
        streamed_file("memory://bucket/tired") as write,
    ):
        write(b"x")
    assert found.value.filename == "memory://bucket/tired"
