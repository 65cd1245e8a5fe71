"""Storage: whole files, exclusive creation, listings; on disk and on another fsspec store."""

import errno
import io
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from moebeam.schemas.errors import CommitError
from moebeam.schemas.store import storage
from moebeam.schemas.store.object_store import StoreAccessDenied, StoreError


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


class _Refusal(Exception):
    """What botocore raises when a store refuses, as far as it is looked at."""

    def __init__(self, code: str, status: int) -> None:
        super().__init__(code)
        self.response = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}


def _failing(*failures: Exception) -> Any:
    """A method of a file system that raises these, one a call, and then does what it should."""
    memory = type(fsspec.filesystem("memory"))
    real, left = memory.open, list(failures)

    def opened(self: object, path: str, mode: str = "rb", **options: object) -> Any:
        if mode == "xb" and left:
            raise left.pop(0)
        return real(self, path, mode, **options)

    return opened


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[type]:
    """The class of the file system in memory, empty."""
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    yield type(fs)
    fs.store.clear()


def _refused(code: str, status: int) -> OSError:
    """As s3fs raises what it has no type for."""
    error = OSError(errno.EIO, code)
    error.__cause__ = _Refusal(code, status)
    return error


def test_a_creation_that_the_store_carried_out_before_it_failed_has_won(
    memory: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.write_whole("memory://b/mine", b"attempt a")
    storage.write_whole("memory://b/theirs", b"attempt b")
    for path, is_ours in (("memory://b/mine", True), ("memory://b/theirs", False)):
        for failure in (FileExistsError(), _refused("PreconditionFailed", 412)):
            monkeypatch.setattr(memory, "open", _failing(failure))
            assert storage.create_exclusive(path, b"attempt a") is is_ours
            monkeypatch.undo()


def test_a_creation_in_conflict_is_repeated_a_few_times(memory: type, monkeypatch: pytest.MonkeyPatch) -> None:
    conflict = _refused("ConditionalRequestConflict", 409)
    monkeypatch.setattr(memory, "open", _failing(conflict, conflict))
    assert storage.create_exclusive("memory://b/a", b"x")
    monkeypatch.undo()
    monkeypatch.setattr(memory, "open", _failing(*[conflict] * 100))
    with pytest.raises(StoreError, match="conflict"):
        storage.create_exclusive("memory://b/c", b"x")
    assert not storage.exists("memory://b/c")


def test_a_store_that_overwrites_is_found_out(memory: type, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.check_exclusive("memory://b")
    real = memory.open  # type: ignore[attr-defined]
    monkeypatch.setattr(
        memory, "open", lambda self, path, mode="rb", **o: real(self, path, mode.replace("x", "w"), **o)
    )
    with pytest.raises(CommitError, match="refuses to create a file twice"):
        storage.check_exclusive("memory://b")
    assert storage.list_files("memory://b") == []


@pytest.mark.parametrize(
    ("failure", "kind"),
    [
        (FileNotFoundError("NoSuchKey"), FileNotFoundError),
        (PermissionError("Forbidden"), StoreAccessDenied),
        (_refused("ThatUserIsUnknown", 403), StoreAccessDenied),
        (_refused("SlowDown", 503), StoreError),
        (TimeoutError(), StoreError),
        (RuntimeError("a library's own tree"), StoreError),
    ],
)
def test_errors_of_a_store_are_os_errors_that_name_the_path(
    memory: type, monkeypatch: pytest.MonkeyPatch, failure: Exception, kind: type[OSError]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise failure

    monkeypatch.setattr(memory, "open", fail)
    with pytest.raises(kind, match="memory://b/a") as caught:
        storage.read_bytes("memory://b/a")
    assert type(caught.value) is kind
    assert caught.value.filename == "memory://b/a"


def test_fewer_bytes_than_the_store_promised_are_an_error(memory: type, monkeypatch: pytest.MonkeyPatch) -> None:
    class _Short(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            return super().read(size)[:-1]

    monkeypatch.setattr(memory, "open", lambda *_, **__: _Short(b"x" * 100))
    with pytest.raises(StoreError, match="short read: expected 100 bytes at byte 0, found 99"):
        storage.read_bytes("memory://b/a")


def test_files_that_a_store_did_not_remove_are_an_error(memory: type, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.write_whole("memory://b/folder/a", b"x")
    monkeypatch.setattr(memory, "rm", lambda *_, **__: None)
    with pytest.raises(StoreError, match="found files left in it"):
        storage.remove_tree("memory://b/folder")


@pytest.mark.parametrize("path", ["nothing://b/a", "s4://b/a"])
def test_a_protocol_that_nothing_reads_is_told(path: str) -> None:
    with pytest.raises(StoreError, match=path):
        storage.read_bytes(path)


@pytest.mark.parametrize(
    ("path", "is_local"), [("/a/b", True), ("a", True), ("file:///a", True), ("s3://a/b", False), ("memory://a", False)]
)
def test_local_paths_are_told_from_urls(path: str, is_local: bool) -> None:
    assert storage.is_local(path) is is_local


def test_a_whole_write_survives_that_its_temporary_file_is_swept_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace, swept = Path.replace, []

    def sweep_first(self: Path, target: Path) -> Path:
        if len(swept) < 2:
            swept.append(self.unlink())
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", sweep_first)
    storage.write_whole(str(tmp_path / "manifest.json"), b"{}")
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]
    assert len(swept) == 2
    monkeypatch.setattr(Path, "replace", lambda self, target: replace(self.with_name("gone"), target))
    with pytest.raises(FileNotFoundError):
        storage.write_whole(str(tmp_path / "other.json"), b"{}")
