"""A checkpoint where its weights can be mapped: on this host's disk, copied there once from an object store.

Used before an engine is loaded. All processes of a host share one copy, in a folder named by the revision that the job
was planned with; an interrupted copy is resumed. What is loaded is checked against that revision, so that a model that
was changed meanwhile, or that differs on one of many hosts, answers nothing.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from filelock import FileLock

from moebeam.model_runner.checkpoint.files import compute_checkpoint_revision, list_checkpoint_files
from moebeam.schemas.errors import EngineLoadError
from moebeam.schemas.store import storage
from moebeam.schemas.store.named_errors import naming_file

FOLDER_VARIABLE = "MOEBEAM_MODEL_FOLDER"
"""Environment variable that names the folder for copies; else they lie in the user's cache."""

CHECKSUMS = "SHA256SUMS"
"""A file beside the weights, as `sha256sum *` writes it; each line of it is checked after the copy."""

RANGE_BYTES = 16 * 1024 * 1024
NUM_RANGES = 8
"""Ranges of one file that are requested at a time."""

_COMPLETE = "copied.json"
_PART = ".part"
_SPARE_BYTES = 256 * 1024 * 1024

_LOGGER = logging.getLogger(__name__)


def models_folder() -> Path:
    """Where this host keeps copies of checkpoints; any of them may be removed while no run needs it."""
    named = os.environ.get(FOLDER_VARIABLE)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(named) if named else cache / "moebeam" / "models"


def local_checkpoint(path: str, revision: str) -> str:
    """A folder on this host's disk that holds the checkpoint of a revision.

    Args:
        path: a folder, on disk or in an object store. One on disk is used as it is.
        revision: as `compute_checkpoint_revision` gave it when the job began; empty takes what is there now.
    Raises:
        EngineLoadError: the checkpoint has another revision by now, cannot be read, fails its checksums, or does not
            fit on the disk.
    """
    if storage.is_local(path):
        if revision:
            _check_revision(path, compute_checkpoint_revision(path), revision)
        return path
    revision = revision or compute_checkpoint_revision(path)
    folder = models_folder() / revision
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        # Other processes of this host wait here, and find it done.
        with FileLock(f"{folder}.lock"):
            if not _is_whole(folder):
                _copy_checkpoint(path, revision, folder)
    except OSError as error:
        raise EngineLoadError(f"{path}: cannot be copied to {folder}: {error}") from error
    return str(folder)


def _is_whole(folder: Path) -> bool:
    """Whether a copy was finished, and every file of it still has its size."""
    try:
        sizes: Mapping[str, int] = json.loads((folder / _COMPLETE).read_bytes())["sizes"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _copy_checkpoint(path: str, revision: str, folder: Path) -> None:
    (folder / _COMPLETE).unlink(missing_ok=True)
    sizes = _sizes(path, list_checkpoint_files(path))
    _check_space(path, sizes, folder)
    for name, size in sizes.items():
        target = folder / name
        if not target.exists() or target.stat().st_size != size:
            _LOGGER.info("copying %s (%d bytes) to %s", storage.join(path, name), size, folder)
            _copy(storage.join(path, name), size, target)
    try:
        _check_sums(path, folder, sizes)
        _check_revision(path, compute_checkpoint_revision(str(folder)), revision)
    except EngineLoadError:
        # Which bytes are wrong is unknown: the next attempt must not resume from them.
        shutil.rmtree(folder)
        raise
    storage.write_whole(str(folder / _COMPLETE), json.dumps({"from": path, "sizes": sizes}).encode())


def _sizes(path: str, names: Sequence[str]) -> dict[str, int]:
    found = {file: int(info["size"]) for file, info in storage.list_files(path)}
    root = storage.normalize_path(path).rstrip("/")
    return {name: found[f"{root}/{name}"] for name in names}


def _check_space(path: str, sizes: Mapping[str, int], folder: Path) -> None:
    there = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    needed = sum(sizes.values()) - there + _SPARE_BYTES
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise EngineLoadError(
            f"{path}: expected {needed / 1e9:.1f} GB free in {folder.parent} for a copy of the checkpoint, found "
            f"{free / 1e9:.1f} GB; {FOLDER_VARIABLE} names another folder"
        )


def _copy(source: str, size: int, target: Path) -> None:
    """Copy one file, resuming where an earlier attempt ended."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + _PART)
    start = part.stat().st_size if part.exists() else 0
    with part.open("ab") as sink:
        if start > size:
            start = sink.truncate(0)
        for piece in _ranges(source, start, size):
            with naming_file(part):
                sink.write(piece)
        with naming_file(part):
            sink.flush()
            os.fsync(sink.fileno())
    part.replace(target)


def _ranges(source: str, start: int, size: int) -> Iterator[bytes]:
    """A file's bytes from `start` on, in order, while further ranges are in flight.

    Raises:
        OSError: the store failed, or gave fewer bytes than it had promised.
    """
    ends = iter([(first, min(first + RANGE_BYTES, size)) for first in range(start, size, RANGE_BYTES)])
    with ThreadPoolExecutor(NUM_RANGES) as pool:
        in_flight: list[tuple[int, int, Future[bytes]]] = []

        def ask() -> None:
            for first, end in ends:
                in_flight.append((first, end, pool.submit(storage.read_range, source, first, end)))
                if len(in_flight) == NUM_RANGES:
                    return

        ask()
        while in_flight:
            first, end, asked = in_flight.pop(0)
            piece = asked.result()
            if len(piece) != end - first:
                raise OSError(f"{source}: expected {end - first} bytes at byte {first}, found {len(piece)}")
            ask()
            yield piece


def _check_sums(path: str, folder: Path, sizes: Mapping[str, int]) -> None:
    """Check the copied files against the checkpoint's own checksums, where it has any."""
    sums = storage.join(path, CHECKSUMS)
    if not storage.exists(sums):
        return
    for number, line in enumerate(storage.read_bytes(sums).decode(errors="replace").splitlines(), start=1):
        expected, _, name = line.partition(" ")
        name = name.lstrip(" *").removeprefix("./")
        if name not in sizes:
            continue
        with (folder / name).open("rb") as source:
            found = hashlib.file_digest(source, "sha256").hexdigest()
        if found != expected.lower():
            raise EngineLoadError(
                f"{storage.join(path, name)}: expected SHA-256 {expected} ({sums}, line {number}), found {found}"
            )


def _check_revision(path: str, found: str, expected: str) -> None:
    if found != expected:
        raise EngineLoadError(
            f"{path}: expected the checkpoint that the job began with, revision {expected}, found revision {found}; "
            "restore it, or begin a new run"
        )
