"""A thin typed adapter over fsspec: the only place that touches a file system by path.

Local paths and object-store URLs are treated alike. Durable state is written whole or not at all.
"""

import contextlib
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

import fsspec
import fsspec.core

from schemas.errors import CommitError


def is_local(path: str) -> bool:
    """Whether a path is on a local disk: no protocol, or `file://`."""
    return "://" not in path or path.startswith(("file://", "local://"))


def join(folder: str, *parts: str) -> str:
    """A path below a folder, whatever the store."""
    return "/".join([folder.rstrip("/"), *parts])


def file_system(path: str) -> tuple[Any, str]:
    """The fsspec file system of a path, and the path in that file system's own spelling."""
    found: tuple[Any, str] = fsspec.core.url_to_fs(path)
    return found


def open_input(path: str) -> BinaryIO:
    """Open a file for random-access reading.

    Raises:
        OSError: as the store says it; FileNotFoundError where the file is missing.
    """
    if is_local(path):
        return Path(_local(path)).open("rb")
    fs, inner = file_system(path)
    return cast("BinaryIO", fs.open(inner, "rb"))


def read_bytes(path: str) -> bytes:
    with open_input(path) as source:
        return source.read()


def exists(path: str) -> bool:
    fs, inner = file_system(path)
    return bool(fs.exists(inner))


def is_folder(path: str) -> bool:
    fs, inner = file_system(path)
    return bool(fs.isdir(inner))


def holds_anything(folder: str) -> bool:
    """Whether a folder holds any file or folder."""
    fs, inner = file_system(folder)
    fs.invalidate_cache(inner)
    return bool(fs.ls(inner, detail=False))


def make_folder(path: str) -> None:
    fs, inner = file_system(path)
    fs.makedirs(inner, exist_ok=True)


def list_names(folder: str, suffix: str = "") -> list[str]:
    """Names of the files right below a folder that end in `suffix`, sorted; empty if there is no such folder."""
    fs, inner = file_system(folder)
    with contextlib.suppress(FileNotFoundError):
        fs.invalidate_cache(inner)
        found = cast("list[Mapping[str, Any]]", fs.ls(inner, detail=True))
        names = (str(entry["name"]).rstrip("/").rpartition("/")[2] for entry in found if entry["type"] == "file")
        return sorted(name for name in names if name.endswith(suffix))
    return []


def spelled(path: str) -> str:
    """A path as `list_files` spells it: without a protocol on disk, with one elsewhere."""
    fs, inner = file_system(path)
    return inner if is_local(path) else str(fs.unstrip_protocol(inner))


def list_files(pattern: str) -> list[tuple[str, Mapping[str, Any]]]:
    """Files matching a glob, or all files below a folder, sorted: (path, fsspec's info).

    Links on disk are followed; a broken one is listed, so that whoever opens it says so.
    """
    fs, inner = file_system(pattern)
    files = dict(_found(fs, inner, {os.path.realpath(inner)}))
    return [(name if is_local(pattern) else str(fs.unstrip_protocol(name)), files[name]) for name in sorted(files)]


def _found(fs: Any, inner: str, folders: set[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    entries: Mapping[str, Mapping[str, Any]] = {}
    if any(mark in inner for mark in "*?[") and not fs.isfile(inner):
        entries = fs.glob(inner, detail=True)
    elif fs.isdir(inner):
        entries = fs.find(inner, detail=True)
    elif fs.exists(inner):
        entries = {inner: fs.info(inner)}
    for name, info in entries.items():
        if not info.get("islink"):
            if info.get("type", "file") == "file":
                yield name, info
        elif not Path(name).is_dir():
            yield name, _followed(name, info)
        elif (real := os.path.realpath(name)) not in folders:
            folders.add(real)
            yield from _found(fs, name, folders)


def _followed(name: str, info: Mapping[str, Any]) -> Mapping[str, Any]:
    """What is known of a link's file; of a broken link, the link itself."""
    with contextlib.suppress(OSError):
        found = Path(name).stat()
        return {**info, "size": found.st_size, "mtime": found.st_mtime}
    return info


def write_whole(path: str, content: bytes) -> None:
    """Write a file that readers see whole or not at all; an older one is replaced.

    Raises:
        OSError: nothing was written.
    """
    if not is_local(path):
        fs, inner = file_system(path)
        fs.pipe_file(inner, content)
        return
    target = Path(_local(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _write_temporary(target, content)
    try:
        temporary.replace(target)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(target.parent)


def write_note(path: str, content: bytes) -> None:
    """Write a file that may be lost when the machine fails: whole for its readers, but not made durable.

    Raises:
        OSError: nothing was written.
    """
    if not is_local(path):
        write_whole(path, content)
        return
    target = Path(_local(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(target)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def create_exclusive(path: str, content: bytes) -> bool:
    """Create a file whole, unless it exists: of any number of racing writers exactly one gets True.

    On local disk by a temporary file, fsync and `os.link` (mode `xb` there leaves an empty winner behind when the
    process is killed); elsewhere by fsspec's mode `xb`, which S3 and GCS map onto a precondition.

    Raises:
        CommitError: the store cannot create exclusively.
        OSError: the store failed; nothing was created.
    """
    if is_local(path):
        target = Path(_local(path))
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = _write_temporary(target, content)
        try:
            os.link(temporary, target)
        except FileExistsError:
            return False
        finally:
            temporary.unlink(missing_ok=True)
        _sync_folder(target.parent)
        return True
    fs, inner = file_system(path)
    try:
        with fs.open(inner, "xb") as sink:
            sink.write(content)
    except FileExistsError:
        return False
    except (NotImplementedError, ValueError) as error:
        raise CommitError(
            f"{path}: this store cannot create a file exclusively ({error}); use S3, GCS or a disk"
        ) from error
    return True


def copy_whole(source: str, target: str) -> None:
    """Copy within a store so that readers see the target whole or not at all; can be repeated.

    On disk the copy is a link to what is durable already; its name is after `sync_folder`.
    """
    if is_local(target) and is_local(source):
        destination = Path(_local(target))
        destination.parent.mkdir(parents=True, exist_ok=True)
        link = destination.with_name(f".{destination.name}.{uuid.uuid4().hex}.tmp")
        try:
            os.link(_local(source), link)
            link.replace(destination)
        finally:
            link.unlink(missing_ok=True)
        return
    fs, inner = file_system(source)
    _, inner_target = file_system(target)
    fs.cp_file(inner, inner_target)


def sync_folder(folder: str) -> None:
    """Make the names in a folder on disk durable; other stores need no such thing."""
    if is_local(folder) and is_folder(folder):
        _sync_folder(Path(_local(folder)))


def remove_tree(path: str) -> None:
    """Remove a folder and all below it; no error if it is not there."""
    fs, inner = file_system(path)
    with contextlib.suppress(FileNotFoundError):
        fs.rm(inner, recursive=True)


def remove_files(paths: Sequence[str]) -> None:
    """Remove files; those already gone are no error."""
    for path in paths:
        fs, inner = file_system(path)
        with contextlib.suppress(FileNotFoundError):
            fs.rm_file(inner)


def _local(path: str) -> str:
    return str(fsspec.core.strip_protocol(path))


def _write_temporary(target: Path, content: bytes) -> Path:
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("xb") as sink:
            sink.write(content)
            sink.flush()
            os.fsync(sink.fileno())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
