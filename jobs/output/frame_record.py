"""The digest of a data frame's file, kept beside it: the frame is the input of a run, and holds no checksum itself."""

import hashlib
from dataclasses import dataclass

from moebeam.schemas.errors import FileDamaged
from moebeam.schemas.store import storage
from moebeam.schemas.store.checked_file import open_checked
from moebeam.schemas.store.record_json import encode_record, read_record
from moebeam.schemas.store.run_layout import find_frame_digest


@dataclass(frozen=True, slots=True)
class FrameRecord:
    """`frame.json`."""

    sha256: str


def write_frame(path: str, content: bytes) -> None:
    """Write a frame's file and its record.

    Raises:
        OSError: the store failed.
    """
    storage.write_whole(_record_path(path), encode_record(FrameRecord(hashlib.sha256(content).hexdigest())))
    storage.write_whole(path, content)


def check_frame(path: str) -> None:
    """Check that the file of a frame is what was written; any other file, and one without a record, is not looked at.

    Raises:
        FileDamaged: it, or its record, is not.
        OSError: the store failed.
    """
    if find_frame_digest(path) is None:
        return
    record = read_record(_record_path(path), FrameRecord, "the digest of a data frame")
    if record is not None:
        open_checked(path, record.sha256).close()


def is_frame_whole(path: str) -> bool:
    """Whether the file of a frame is there, and as far as can be told what was written.

    Raises:
        OSError: the store failed.
    """
    try:
        check_frame(path)
    except (FileDamaged, FileNotFoundError):
        return False
    return storage.exists(path)


def _record_path(path: str) -> str:
    return storage.join(path.rpartition("/")[0], "frame.json")
