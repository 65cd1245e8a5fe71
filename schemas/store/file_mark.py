"""What tells one state of a file from another without reading it: its size, and its version or time of change.

An object store's version (GCS's generation, an ETag, the git object of Hugging Face's Hub) is compared where both marks
have one, a time elsewhere: of one object, listings and single look-ups may write the time differently. On disk a file
that is written again with the same size and the same time counts as the same.
"""

import io
import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from moebeam.schemas.store.object_store import StoredFile, is_local, map_errors
from moebeam.schemas.store.storage import file_system, normalize_path


@dataclass(frozen=True, slots=True)
class FileMark:
    """Size in bytes, and what else the store says of a file's state; `time` as it writes it, in seconds on disk."""

    size: int
    generation: str | None = None
    etag: str | None = None
    time: str | None = None

    def is_same(self, other: "FileMark") -> bool:
        """Whether both are of one state of a file."""
        versions = zip((self.generation, self.etag, self.time), (other.generation, other.etag, other.time), strict=True)
        known = ((ours, theirs) for ours, theirs in versions if ours is not None and theirs is not None)
        ours, theirs = next(known, (None, None))
        return self.size == other.size and ours == theirs

    def describe(self) -> str:
        """The mark for people, times on disk as ISO 8601."""
        version = f"generation {self.generation}" if self.generation else f"ETag {self.etag}" if self.etag else None
        time = self.time
        if time is not None and time.replace(".", "", 1).isdecimal():
            time = datetime.fromtimestamp(float(time), UTC).isoformat()
        parts = [f"{self.size:,} bytes", *([version] if version else [f"of {time}"] if time else [])]
        return ", ".join(parts) if version else " ".join(parts)


def mark_listed(path: str, info: Mapping[str, Any]) -> FileMark | None:
    """The mark of a file as `storage.list_files` describes it; None for a link on disk that leads nowhere."""
    if info.get("islink") and is_local(path) and not Path(path).exists():
        return None
    return _read_mark(info)


def mark_open(path: str, source: BinaryIO) -> FileMark:
    """The mark of what `storage.open_input` has opened, whatever lies at its path by now.

    Raises:
        OSError: the store failed.
    """
    if is_local(path):
        return _mark_stat(os.fstat(source.fileno()))
    raw: object = source.raw if isinstance(source, io.BufferedReader) else None
    info = raw.info if isinstance(raw, StoredFile) else None
    return mark_now(path) if info is None else _read_mark(info)


def mark_now(path: str) -> FileMark:
    """The mark of what lies at a path now.

    Raises:
        OSError: FileNotFoundError where nothing does.
    """
    if is_local(path):
        return _mark_stat(Path(normalize_path(path)).stat())
    with map_errors(path):
        fs, inner = file_system(path)
        return _read_mark(fs.info(inner))


def _mark_stat(found: os.stat_result) -> FileMark:
    return FileMark(found.st_size, time=str(found.st_mtime))


def _read_mark(info: Mapping[str, Any]) -> FileMark:
    def find(*keys: str) -> str | None:
        return next((str(info[key]).strip('"') for key in keys if info.get(key)), None)

    return FileMark(
        size=int(info.get("size") or 0),
        generation=find("generation"),
        etag=find("ETag", "etag", "blob_id"),
        time=find("mtime", "LastModified", "last_modified"),
    )
