"""Marks of files: which two are of one state."""

from datetime import UTC, datetime
from pathlib import Path

import pytest

from moebeam.schemas.store import storage
from moebeam.schemas.store.file_mark import FileMark, mark_listed, mark_now, mark_open

LISTED = {"size": 3, "ETag": '"a"', "LastModified": datetime(2026, 1, 1, microsecond=5000, tzinfo=UTC)}


@pytest.mark.parametrize(
    ("ours", "theirs", "is_same"),
    [
        (FileMark(3, time="1.5"), FileMark(3, time="1.5"), True),
        (FileMark(3, time="1.5"), FileMark(3, time="2.5"), False),
        (FileMark(3, time="1.5"), FileMark(4, time="1.5"), False),
        (FileMark(3, etag="a", time="listed"), FileMark(3, etag="a", time="looked up"), True),
        (FileMark(3, etag="a", time="1"), FileMark(3, etag="b", time="1"), False),
        (FileMark(3, generation="1", etag="a"), FileMark(3, generation="2", etag="a"), False),
        (FileMark(3, etag="a"), FileMark(3), True),
    ],
)
def test_the_strongest_mark_that_both_have_decides(ours: FileMark, theirs: FileMark, is_same: bool) -> None:
    assert ours.is_same(theirs) is is_same


def test_one_object_has_one_mark_however_its_time_is_written() -> None:
    listed = mark_listed("s3://b/a", LISTED)
    looked_up = mark_listed("s3://b/a", {"size": 3, "ETag": "a", "LastModified": datetime(2026, 1, 1, tzinfo=UTC)})
    assert listed is not None and looked_up is not None
    assert listed.is_same(looked_up)
    assert listed.describe() == "3 bytes, ETag a"


def test_a_file_on_disk_has_one_mark_listed_opened_and_looked_up(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"abc")
    (tmp_path / "link").symlink_to(path)
    for name in ("a", "link"):
        ((found, info),) = storage.list_files(str(tmp_path / name))
        with storage.open_input(found) as source:
            assert mark_listed(found, info) == mark_open(found, source) == mark_now(found)
