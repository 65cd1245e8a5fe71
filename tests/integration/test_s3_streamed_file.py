"""Streamed files on a real S3 server: one part, several parts, none, and a writer that fails."""

import fsspec
import pytest

from moebeam.schemas.store import storage
from moebeam.schemas.store.streamed_file import streamed_file

pytestmark = pytest.mark.integration

PIECE = bytes(range(256)) * 4096


@pytest.mark.parametrize("num_pieces", [0, 1, 40], ids=["empty", "one part", "several parts"])
def test_pieces_become_one_object_that_appears_at_the_end(bucket: str, num_pieces: int) -> None:
    path = f"{bucket}/files/output.jsonl"
    with streamed_file(path) as write:
        for _ in range(num_pieces):
            write(PIECE)
        assert not storage.exists(path)
    assert storage.read_bytes(path) == PIECE * num_pieces


@pytest.mark.parametrize("num_pieces", [0, 1, 40], ids=["nothing", "one part", "several parts"])
def test_a_failed_writer_leaves_the_older_object_and_no_parts(bucket: str, num_pieces: int) -> None:
    path = f"{bucket}/files/output.jsonl"
    storage.write_whole(path, b"older")
    with pytest.raises(RuntimeError, match="boom"), streamed_file(path) as write:
        for _ in range(num_pieces):
            write(PIECE)
        raise RuntimeError("boom")
    assert storage.read_bytes(path) == b"older"
    uploads = fsspec.filesystem("s3").call_s3("list_multipart_uploads", Bucket=bucket.removeprefix("s3://"))
    assert uploads.get("Uploads", []) == []
