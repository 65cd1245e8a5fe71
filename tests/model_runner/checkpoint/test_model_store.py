"""Checkpoints of object stores: copied once a host, resumed, checked, and refused when they changed."""

import hashlib
import multiprocessing
import shutil
from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from moebeam.model_runner.checkpoint import model_store
from moebeam.model_runner.checkpoint.files import compute_checkpoint_revision, list_checkpoint_files
from moebeam.model_runner.checkpoint.model_store import FOLDER_VARIABLE, local_checkpoint
from moebeam.schemas.errors import EngineLoadError
from moebeam.schemas.store import storage


@pytest.fixture(autouse=True)
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path / "models"))
    monkeypatch.setattr(model_store, "RANGE_BYTES", 1000)
    return tmp_path / "models"


@pytest.fixture
def remote(tiny_checkpoint: Path) -> Iterator[str]:
    """A checkpoint in fsspec's store in memory."""
    store = fsspec.filesystem("memory")
    store.put(f"{tiny_checkpoint}/", "/bucket/tiny/", recursive=True)
    store.pipe_file("/bucket/tiny/README.md", b"not needed")
    yield "memory://bucket/tiny"
    store.rm("/bucket", recursive=True)


class Asked(list[tuple[str, int]]):
    """Ranges that were read: file and first byte."""


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    real, ranges = storage.read_range, Asked()

    def read_range(path: str, start: int, end: int) -> bytes:
        ranges.append((path.rpartition("/")[2], start))
        return real(path, start, end)

    monkeypatch.setattr(storage, "read_range", read_range)
    return ranges


def test_a_remote_checkpoint_is_copied_once_and_then_found(remote: str, models: Path, asked: Asked) -> None:
    revision = compute_checkpoint_revision(remote)
    folder = Path(local_checkpoint(remote, revision))
    assert folder == models / revision
    assert compute_checkpoint_revision(str(folder)) == revision
    assert {path.name for path in folder.iterdir()} == {*list_checkpoint_files(remote), "copied.json"}
    num_asked = len(asked)
    assert num_asked > 2
    assert local_checkpoint(remote, revision) == str(folder)
    assert len(asked) == num_asked


def test_without_a_revision_what_is_there_is_taken(remote: str, tiny_checkpoint: Path) -> None:
    assert local_checkpoint(remote, "") == local_checkpoint(remote, compute_checkpoint_revision(remote))
    assert local_checkpoint(str(tiny_checkpoint), "") == str(tiny_checkpoint)


def test_a_local_checkpoint_is_used_where_it_is(tiny_checkpoint: Path, models: Path) -> None:
    path = str(tiny_checkpoint)
    assert local_checkpoint(path, compute_checkpoint_revision(path)) == path
    assert not models.exists()


def test_a_copy_that_was_broken_off_goes_on_where_it_ended(
    remote: str, models: Path, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    revision = compute_checkpoint_revision(remote)
    counted = storage.read_range

    def breaks(path: str, start: int, end: int) -> bytes:
        if path.endswith("tokenizer.json") and start == 3000:
            raise OSError("the line went dead")
        return counted(path, start, end)

    with monkeypatch.context() as broken:
        broken.setattr(storage, "read_range", breaks)
        with pytest.raises(EngineLoadError, match=r"cannot be copied.*the line went dead"):
            local_checkpoint(remote, revision)
    assert (models / revision / "tokenizer.json.part").stat().st_size == 3000
    asked.clear()
    local_checkpoint(remote, revision)
    assert min(start for name, start in asked if name == "tokenizer.json") == 3000
    assert "config.json" not in {name for name, _ in asked}
    assert not (models / revision / "tokenizer.json.part").exists()


def test_a_part_that_is_longer_than_the_file_is_thrown_away(remote: str, models: Path) -> None:
    revision = compute_checkpoint_revision(remote)
    (models / revision).mkdir(parents=True)
    (models / revision / "config.json.part").write_bytes(b"x" * 1_000_000)
    assert compute_checkpoint_revision(local_checkpoint(remote, revision)) == revision


def test_a_store_that_gives_fewer_bytes_is_named(remote: str, monkeypatch: pytest.MonkeyPatch) -> None:
    revision = compute_checkpoint_revision(remote)
    monkeypatch.setattr(storage, "read_range", lambda path, start, end: b"")
    with pytest.raises(EngineLoadError, match=r"config\.json: expected \d+ bytes at byte 0, found 0"):
        local_checkpoint(remote, revision)


def test_a_copy_whose_bytes_are_wrong_is_refused_and_made_anew(
    remote: str, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    revision = compute_checkpoint_revision(remote)
    with monkeypatch.context() as broken:
        broken.setattr(storage, "read_range", lambda path, start, end: b"x" * (end - start))
        with pytest.raises(EngineLoadError, match=f"revision {revision}, found revision"):
            local_checkpoint(remote, revision)
    assert not (models / revision).exists()
    assert compute_checkpoint_revision(local_checkpoint(remote, revision)) == revision


def test_a_finished_copy_that_lost_a_file_is_mended(remote: str, models: Path) -> None:
    revision = compute_checkpoint_revision(remote)
    folder = Path(local_checkpoint(remote, revision))
    (folder / "config.json").unlink()
    (folder / "tokenizer.json").write_bytes(b"short")
    assert compute_checkpoint_revision(local_checkpoint(remote, revision)) == revision


@pytest.mark.parametrize("is_remote", [True, False])
def test_a_model_that_changed_since_the_job_began_is_refused(
    remote: str, tiny_checkpoint: Path, tmp_path: Path, is_remote: bool
) -> None:
    path = remote if is_remote else str(tmp_path / "copy")
    if not is_remote:
        shutil.copytree(tiny_checkpoint, path)
    revision = compute_checkpoint_revision(path)
    storage.write_whole(storage.join(path, "config.json"), b'{"model_type": "other"}')
    with pytest.raises(EngineLoadError, match=f"{path}: expected the checkpoint that the job began with.*{revision}"):
        local_checkpoint(path, revision)


def test_checksums_beside_the_weights_are_held(remote: str, models: Path) -> None:
    revision = compute_checkpoint_revision(remote)
    digest = hashlib.sha256(storage.read_bytes(f"{remote}/config.json")).hexdigest()
    storage.write_whole(f"{remote}/SHA256SUMS", f"{digest} *./config.json\n{'0' * 64}  README.md\n".encode())
    local_checkpoint(remote, revision)
    shutil.rmtree(models)
    storage.write_whole(f"{remote}/SHA256SUMS", f"{'1' * 64}  config.json\n".encode())
    with pytest.raises(EngineLoadError, match=rf"config\.json: expected SHA-256 {'1' * 64} .*line 1.*found {digest}"):
        local_checkpoint(remote, revision)
    assert not (models / revision).exists()


def test_a_disk_that_is_too_small_is_told_before_the_copy(
    remote: str, models: Path, asked: Asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**6, 10**6, 0))
    with pytest.raises(EngineLoadError, match=rf"expected 0\.3 GB free in .*found 0\.0 GB; {FOLDER_VARIABLE}"):
        local_checkpoint(remote, compute_checkpoint_revision(remote))
    assert asked == []


def _wait_and_copy(path: str, revision: str, log: str) -> None:
    real = storage.read_range

    def read_range(path: str, start: int, end: int) -> bytes:
        with Path(log).open("a") as sink:
            sink.write("x")
        return real(path, start, end)

    fsspec.register_implementation("local-store", DiskStore, clobber=True)
    storage.read_range = read_range
    local_checkpoint(path, revision)


@pytest.mark.integration
def test_processes_that_start_at_once_copy_once(tiny_checkpoint: Path, tmp_path: Path) -> None:
    # `memory://` is one process's own; a store that several see is a disk under another name.
    path = f"local-store://{tiny_checkpoint}"
    fsspec.register_implementation("local-store", DiskStore, clobber=True)
    revision = compute_checkpoint_revision(path)
    context = multiprocessing.get_context("spawn")
    log = tmp_path / "log"
    processes = [context.Process(target=_wait_and_copy, args=(path, revision, str(log))) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert len(log.read_text()) == len(list_checkpoint_files(path))


class DiskStore(fsspec.get_filesystem_class("file")):
    protocol = "local-store"

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return str(path).removeprefix("local-store://").rstrip("/")

    def unstrip_protocol(self, name: str) -> str:
        return f"local-store://{name}"
