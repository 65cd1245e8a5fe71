"""Storage: whole files, exclusive creation, listings; on disk and on another fsspec store."""

import threading
from pathlib import Path

import fsspec
import pytest

from schemas import storage
from schemas.errors import CommitError


@pytest.fixture(params=["disk", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "disk":
        return str(tmp_path)
    fsspec.filesystem("memory").store.clear()
    return "memory://bucket"


def test_written_files_are_read_listed_copied_and_removed(folder: str) -> None:
    path = storage.join(folder, "sub", "a.json")
    storage.write_whole(path, b"one")
    storage.write_whole(path, b"two")
    storage.copy_whole(path, storage.join(folder, "sub", "b.json"))
    storage.copy_whole(path, storage.join(folder, "sub", "b.json"))
    assert storage.read_bytes(storage.join(folder, "sub", "b.json")) == b"two"
    assert storage.list_names(storage.join(folder, "sub"), ".json") == ["a.json", "b.json"]
    assert [name.rpartition("/")[2] for name, _ in storage.list_files(storage.join(folder, "**", "*.json"))] == [
        "a.json",
        "b.json",
    ]
    storage.remove_files([path, path])
    assert not storage.exists(path)
    storage.remove_tree(storage.join(folder, "sub"))
    storage.remove_tree(storage.join(folder, "sub"))
    assert storage.list_names(storage.join(folder, "sub")) == []


def test_of_racing_creators_exactly_one_wins_with_its_whole_content(tmp_path: Path) -> None:
    path = str(tmp_path / "commits" / "s0.json")
    won: list[int] = []
    barrier = threading.Barrier(8)

    def create(number: int) -> None:
        barrier.wait()
        if storage.create_exclusive(path, str(number).encode() * 10_000):
            won.append(number)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert Path(path).read_bytes() == str(won[0]).encode() * 10_000
    assert [name.name for name in Path(path).parent.iterdir()] == ["s0.json"]


def test_a_failed_write_raises_and_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path / "a.json")
    storage.write_whole(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        storage.write_whole(path, b"new")
    with pytest.raises(OSError, match="No space left"):
        storage.create_exclusive(str(tmp_path / "b.json"), b"new")
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("a.json", b"old")]


def test_a_store_that_cannot_create_exclusively_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = fsspec.filesystem("memory")

    def refuse(self: object, path: str, mode: str = "rb", **_: object) -> None:
        raise ValueError(f"mode {mode} is not supported")

    monkeypatch.setattr(type(memory), "open", refuse)
    with pytest.raises(CommitError, match="cannot create a file exclusively"):
        storage.create_exclusive("memory://bucket/a", b"x")


@pytest.mark.parametrize(
    ("path", "is_local"), [("/a/b", True), ("a", True), ("file:///a", True), ("s3://a/b", False), ("memory://a", False)]
)
def test_local_paths_are_told_from_urls(path: str, is_local: bool) -> None:
    assert storage.is_local(path) is is_local
