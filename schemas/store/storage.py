"""A thin typed adapter over fsspec: inputs, outputs and the state of a run, on disk or in an object store.

A path may be local or an object-store URL. Durable state is written whole or not at all. Errors of a store are OSErrors
that name the path, whatever its library raises. Retries and time-outs are the library's own, set through its variables
(S3: `AWS_MAX_ATTEMPTS`, `AWS_ENDPOINT_URL`, `AWS_PROFILE`); credentials come from the environment alone.
Copies of checkpoints, logs of engine processes and a host's cache are local files that do not pass through here.
"""

import contextlib
import errno
import io
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
import fsspec.core

from moebeam.schemas.errors import CommitError
from moebeam.schemas.store.disk_files import (
    TEMPORARY,
    link_published,
    make_folder,
    make_temporary_path,
    sync_names,
    write_temporary,
)
from moebeam.schemas.store.object_store import READ_BYTES, StoredFile, StoreError, is_local, map_errors, store_code

_MAX_CONFLICTS = 5
_MIN_BLOCK_BYTES = 5 * 1024 * 1024
_MAX_REMOVALS = 3
_PROBE = "probe-"


def join(folder: str, *parts: str) -> str:
    """A path below a folder, whatever the store."""
    return "/".join([folder.rstrip("/"), *parts])


def file_system(path: str) -> tuple[Any, str]:
    """The fsspec file system of a path, and the path as that file system writes it.

    Listings are not cached: other processes write to the same folders.

    Raises:
        StoreError: nothing that is installed reads such paths.
    """
    try:
        found: tuple[Any, str] = fsspec.core.url_to_fs(path, use_listings_cache=False)
    except (ImportError, ValueError) as error:
        extra = {"s3": "s3", "s3a": "s3", "gs": "gcp", "gcs": "gcp"}.get(path.partition("://")[0])
        mend = f"; pip install 'moebeam[{extra}]'" if extra else ""
        reason = f"no reader for such a path ({error}){mend}"
        raise StoreError(errno.EPROTONOSUPPORT, reason, path) from error
    if path.startswith("hf://"):  # the Hub's library caches listings whatever one asks for
        found[0].invalidate_cache(found[1])
    return found


def open_input(path: str) -> BinaryIO:
    """Open a file for random-access reading.

    Raises:
        OSError: FileNotFoundError where the file is missing, `StoreError` where a store failed, here or while reading.
    """
    if is_local(path):
        return Path(_local(path)).open("rb")
    with map_errors(path):
        fs, inner = file_system(path)
        source = fs.open(inner, "rb", cache_type="none")
        if (getattr(source, "details", None) or {}).get("type") == "directory":
            raise IsADirectoryError
        return io.BufferedReader(StoredFile(path, source), READ_BYTES)


def read_bytes(path: str) -> bytes:
    with open_input(path) as source:
        return source.read()


def read_range(path: str, start: int, end: int) -> bytes:
    """Bytes `start` to `end` (exclusive, may lie beyond the last) of a store's file; thread-safe."""
    with map_errors(path):
        fs, inner = file_system(path)
        return bytes(fs.cat_file(inner, start=start, end=end))


def exists(path: str) -> bool:
    with map_errors(path):
        fs, inner = file_system(path)
        return bool(fs.exists(inner)) if is_local(path) else _kind(fs, inner) is not None


def is_folder(path: str) -> bool:
    with map_errors(path):
        fs, inner = file_system(path)
        return bool(fs.isdir(inner)) if is_local(path) else _kind(fs, inner) == "directory"


def _kind(fs: Any, inner: str) -> str | None:
    """`file`, `directory` or None, in a store; fsspec's `exists`, `isfile` and `isdir` report failures as False."""
    with contextlib.suppress(FileNotFoundError):
        return str(fs.info(inner)["type"])
    return None


def list_names(folder: str, suffix: str = "") -> list[str]:
    """Names of the files right below a folder that end in `suffix`, sorted; empty if there is no such folder.

    A link on disk is a file unless it leads to a folder, as for `list_files`.
    """
    found: list[Mapping[str, Any]] = []
    with map_errors(folder), contextlib.suppress(FileNotFoundError):
        fs, inner = file_system(folder)
        found = fs.ls(inner, detail=True)
    paths = (str(entry["name"]) for entry in found if entry["type"] == "file" or _is_link_to_file(entry))
    names = (path.rpartition("/")[2] for path in paths if not path.endswith("/"))
    return sorted(name for name in names if name.endswith(suffix))


def _is_link_to_file(entry: Mapping[str, Any]) -> bool:
    return bool(entry.get("islink")) and not Path(entry["name"]).is_dir()


def normalize_path(path: str) -> str:
    """A path as `list_files` returns it: without a protocol on disk, with one elsewhere."""
    fs, inner = file_system(path)
    return inner if is_local(path) else str(fs.unstrip_protocol(inner))


def list_files(pattern: str) -> list[tuple[str, Mapping[str, Any]]]:
    """Files matching a glob, or all files below a folder, sorted: (path, fsspec's info).

    Links on disk are followed; a broken one is listed, so that opening it raises.
    """
    with map_errors(pattern):
        fs, inner = file_system(pattern)
        if is_local(pattern):
            files = dict(_find_on_disk(fs, inner, {os.path.realpath(inner)}))
        else:
            files = dict(_find_in_store(fs, inner))
    return [(name if is_local(pattern) else str(fs.unstrip_protocol(name)), files[name]) for name in sorted(files)]


def _find_on_disk(fs: Any, inner: str, folders: set[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    entries: Mapping[str, Mapping[str, Any]] = {}
    if any(mark in inner for mark in "*?[") and not fs.exists(inner):
        entries = fs.glob(inner, detail=True)
    elif fs.isdir(inner):
        entries = fs.find(inner, detail=True)
    elif fs.exists(inner):
        entries = {inner: fs.info(inner)}
    for name, info in entries.items():
        if not info.get("islink"):
            if info.get("type", "file") == "file":
                yield name, info
        elif _is_link_to_file(info):
            yield name, _follow_link(name, info)
        elif (real := os.path.realpath(name)) not in folders:
            folders.add(real)
            yield from _find_on_disk(fs, name, folders)


def _find_in_store(fs: Any, inner: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    entries: Mapping[str, Mapping[str, Any]] = {}
    kind = _kind(fs, inner)
    if kind == "file":
        entries = {inner: fs.info(inner)}
    elif kind == "directory":
        entries = fs.find(inner, detail=True)
    elif any(mark in inner for mark in "*?["):
        entries = fs.glob(inner, detail=True)
    for name, info in entries.items():
        # An S3 console makes a folder by an empty object whose name ends in a slash.
        if info["type"] == "file" and not name.endswith("/"):
            yield name, info


def _follow_link(name: str, info: Mapping[str, Any]) -> Mapping[str, Any]:
    """The info of a link's target; of the link itself where it is broken."""
    with contextlib.suppress(OSError):
        found = Path(name).stat()
        return {**info, "size": found.st_size, "mtime": found.st_mtime}
    return info


_MAX_SWEEPS = 5
"""Most times that a temporary file may vanish before it is in place."""


def write_whole(path: str, content: bytes) -> None:
    """Write a file that readers see whole or not at all; an older one is replaced.

    Raises:
        OSError: nothing was written.
    """
    if not is_local(path):
        with map_errors(path):
            fs, inner = file_system(path)
            fs.pipe_file(inner, content)
        return
    target = Path(_local(path))
    make_folder(target.parent)
    for num_left in reversed(range(_MAX_SWEEPS)):
        temporary = write_temporary(target, content)
        try:
            temporary.replace(target)
            break
        except FileNotFoundError:
            # Another launcher has just finished the run and swept up temporary files.
            if not num_left:
                raise
        except OSError:
            temporary.unlink(missing_ok=True)
            raise
    sync_names(target.parent)


def is_passing(path: str) -> bool:
    """Whether a file is a temporary one of this module, which a killed writer may leave behind."""
    name = path.rpartition("/")[2]
    return name.startswith(_PROBE) or (name.startswith(".") and name.endswith(TEMPORARY))


def write_note(path: str, content: bytes) -> None:
    """Write a file without fsync: readers see it whole or not at all, but it may be lost when the machine fails.

    Raises:
        OSError: nothing was written.
    """
    if not is_local(path):
        write_whole(path, content)
        return
    target = Path(_local(path))
    make_folder(target.parent)
    temporary = write_temporary(target, content, is_durable=False)
    try:
        temporary.replace(target)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def create_exclusive(path: str, content: bytes) -> bool:
    """Create a file whole, unless it exists: of any number of racing writers exactly one gets True.

    The winner is recognized by its content, which must not be empty: a request whose response was lost is sent again
    and finds its own file. Writers of equal content all get True.

    On local disk by a temporary file, fsync and `os.link` (mode `xb` there leaves an empty winner behind when the
    process is killed); elsewhere by fsspec's mode `xb`, which S3 and GCS map onto a precondition.

    Raises:
        CommitError: the store cannot create exclusively.
        OSError: the store failed; on disk nothing was created, elsewhere it may have been.
    """
    assert content, f"{path}: an exclusive file without content names no winner"
    if is_local(path):
        target = Path(_local(path))
        make_folder(target.parent)
        temporary = write_temporary(target, content)
        try:
            os.link(temporary, target)
        except FileExistsError:
            return _holds(path, content)
        finally:
            temporary.unlink(missing_ok=True)
        sync_names(target.parent)
        return True
    with map_errors(path):
        return _create_in_store(path, content)


def _create_in_store(path: str, content: bytes) -> bool:
    fs, inner = file_system(path)
    # In one request: of a file in several parts, s3fs leaves a loser's parts behind, unseen and paid for.
    block_size = (len(content) // _MIN_BLOCK_BYTES + 1) * _MIN_BLOCK_BYTES
    for _ in range(_MAX_CONFLICTS):
        try:
            with fs.open(inner, "xb", block_size=block_size) as sink:
                sink.write(content)
            return True
        except FileExistsError:
            return _holds(path, content)
        except (NotImplementedError, ValueError) as error:
            raise CommitError(
                f"{path}: this store cannot create a file exclusively ({error}); use S3, GCS or a disk"
            ) from error
        except OSError as error:
            code = store_code(error)
            if code == "PreconditionFailed":
                return _holds(path, content)
            if code != "ConditionalRequestConflict":
                raise
    raise StoreError(errno.EBUSY, f"the store reported a conflict {_MAX_CONFLICTS} times", path)


def _holds(path: str, content: bytes) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return read_bytes(path) == content
    return False


def check_exclusive(folder: str) -> None:
    """Make sure that a store refuses to create a file twice; some S3 look-alikes ignore the precondition.

    Raises:
        CommitError: it does not.
        OSError: the store failed.
    """
    if is_local(folder):
        return
    probe = join(folder, f"{_PROBE}{uuid.uuid4().hex}")
    try:
        is_first, is_second = create_exclusive(probe, b"first"), create_exclusive(probe, b"second")
    finally:
        remove_files([probe])
    if not is_first or is_second:
        raise CommitError(
            f"{folder}: expected a store that refuses to create a file twice, found one that overwrites it; "
            "use S3, GCS or a disk"
        )


def copy_whole(source: str, target: str) -> None:
    """Copy within one store so that readers see the target whole or not at all; idempotent.

    On disk the copy is a hard link to content that is durable already; call `sync_folder` to make its name durable.
    """
    if is_local(target) and is_local(source):
        destination = Path(_local(target))
        make_folder(destination.parent)
        link = make_temporary_path(destination)
        try:
            link_published(Path(_local(source)), link)
            link.replace(destination)
        finally:
            link.unlink(missing_ok=True)
        return
    with map_errors(source):
        fs, inner = file_system(source)
        _, inner_target = file_system(target)
        fs.cp_file(inner, inner_target)


def sync_folder(folder: str) -> None:
    """Make the names in a folder on disk durable; a no-op for object stores."""
    if is_local(folder) and is_folder(folder):
        sync_names(Path(_local(folder)))


def remove_tree(path: str) -> None:
    """Remove a folder and all below it; no error if it is not there.

    Raises:
        OSError: something is left.
    """
    with map_errors(path), contextlib.suppress(FileNotFoundError):
        fs, inner = file_system(path)
        for _ in range(_MAX_REMOVALS):
            fs.rm(inner, recursive=True)
            # s3fs does not look at which of many objects S3 refused to delete.
            if is_local(path) or not fs.find(inner):
                return
        raise StoreError(errno.EACCES, "expected the folder to be removed, found files left in it", path)


def remove_files(paths: Sequence[str]) -> None:
    """Remove files; those already gone are no error."""
    for path in paths:
        with map_errors(path), contextlib.suppress(FileNotFoundError):
            fs, inner = file_system(path)
            fs.rm_file(inner)


def _local(path: str) -> str:
    return str(fsspec.core.strip_protocol(path))
