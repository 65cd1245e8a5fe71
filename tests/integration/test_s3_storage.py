"""Storage on a real S3 server: what several processes see at once, and what its failures look like."""

import concurrent.futures
import errno
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moebeam.schemas.errors import CommitError
from moebeam.schemas.store import storage
from moebeam.schemas.store.object_store import StoreAccessDenied, StoreError
from tests.support.paths import ROOT
from tests.support.servers.s3_server import S3Server

pytestmark = pytest.mark.integration

NUM_RACERS = 6


def _race(path: str, number: int, num_bytes: int, start_at: float) -> bool:
    content = f"{number:08d}".encode() * (num_bytes // 8)
    storage.exists(path)  # connects, so that all of them write at about the same instant
    time.sleep(max(0.0, start_at - time.time()))
    return storage.create_exclusive(path, content)


@pytest.mark.parametrize("num_bytes", [64, 120 << 20], ids=["small", "large"])
def test_of_racing_processes_exactly_one_creates_a_file(bucket: str, num_bytes: int) -> None:
    path = f"{bucket}/commits/s0.json"
    spawn = multiprocessing.get_context("spawn")
    num_racers = NUM_RACERS if num_bytes < 1 << 20 else 2
    with concurrent.futures.ProcessPoolExecutor(num_racers, mp_context=spawn) as pool:
        start_at = time.time() + 4
        races = [pool.submit(_race, path, number, num_bytes, start_at) for number in range(num_racers)]
        won = [race.result() for race in races]
    assert won.count(True) == 1
    assert storage.read_bytes(path) == f"{won.index(True):08d}".encode() * (num_bytes // 8)
    assert storage.list_names(f"{bucket}/commits") == ["s0.json"]
    uploads = fsspec.filesystem("s3").call_s3("list_multipart_uploads", Bucket=bucket.removeprefix("s3://"))
    assert uploads.get("Uploads", []) == []


def test_a_creation_that_was_sent_twice_has_won(bucket: str) -> None:
    path = f"{bucket}/commits/s0.json"
    assert storage.create_exclusive(path, b"attempt a")
    assert storage.create_exclusive(path, b"attempt a")
    assert not storage.create_exclusive(path, b"attempt b")
    assert storage.read_bytes(path) == b"attempt a"


def test_the_server_proves_that_it_creates_exclusively(bucket: str) -> None:
    storage.check_exclusive(bucket)
    assert storage.list_files(bucket) == []


def test_a_store_that_overwrites_is_found_out(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fs = fsspec.get_filesystem_class("s3")
    real = fs.call_s3

    def forgetful(self: object, method: str, *args: object, **kwargs: object) -> object:
        kwargs.pop("IfNoneMatch", None)
        return real(self, method, *args, **kwargs)

    monkeypatch.setattr(fs, "call_s3", forgetful)
    with pytest.raises(CommitError, match="refuses to create a file twice"):
        storage.check_exclusive(bucket)
    assert storage.list_files(bucket) == []


def test_what_another_process_writes_is_seen_at_once(s3: S3Server, bucket: str) -> None:
    folder = f"{bucket}/out/commits"
    assert storage.list_names(folder) == []
    assert storage.list_files(f"{bucket}/out/**/*.json") == []
    assert not storage.exists(f"{folder}/a.json")
    assert not storage.is_folder(folder)
    code = "import sys; from moebeam.schemas.store import storage; storage.write_whole(sys.argv[1], b'one')"
    subprocess.run([sys.executable, "-c", code, f"{folder}/a.json"], check=True, cwd=ROOT)
    assert storage.list_names(folder, ".json") == ["a.json"]
    assert [path for path, _ in storage.list_files(f"{bucket}/out/**/*.json")] == [f"{folder}/a.json"]
    assert storage.exists(f"{folder}/a.json")
    assert storage.is_folder(folder)
    s3.path(f"{folder}/a.json").unlink()
    assert not storage.exists(f"{folder}/a.json")
    assert storage.list_names(folder) == []


def test_files_are_written_copied_and_removed_whole(bucket: str) -> None:
    path = f"{bucket}/sub/a.json"
    storage.write_whole(path, b"one")
    storage.write_whole(path, b"two")
    storage.write_note(f"{bucket}/sub/empty", b"")
    storage.copy_whole(path, f"{bucket}/sub/b.json")
    storage.copy_whole(path, f"{bucket}/sub/b.json")
    assert storage.read_bytes(f"{bucket}/sub/b.json") == b"two"
    assert storage.read_bytes(f"{bucket}/sub/empty") == b""
    assert storage.list_names(f"{bucket}/sub", ".json") == ["a.json", "b.json"]
    storage.remove_files([path, path])
    assert storage.list_names(f"{bucket}/sub", ".json") == ["b.json"]
    storage.remove_tree(f"{bucket}/sub")
    storage.remove_tree(f"{bucket}/sub")
    assert storage.list_files(bucket) == []


def test_a_file_of_several_parts_is_written_whole_and_read_by_ranges(bucket: str) -> None:
    content = os.urandom(1 << 20) * 120
    storage.write_whole(f"{bucket}/large", content)
    with storage.open_input(f"{bucket}/large") as source:
        source.seek(50_000_000)
        assert source.read(10) == content[50_000_000:50_000_010]
        assert source.read(3 << 20) == content[50_000_010 : 50_000_010 + (3 << 20)]
        source.seek(-5, os.SEEK_END)
        assert source.read(100) == content[-5:]
        assert source.read(1) == b""
    assert storage.read_bytes(f"{bucket}/large") == content


def test_lines_are_read_without_asking_for_each(bucket: str) -> None:
    lines = [f"line {number}\n".encode() for number in range(20_000)]
    storage.write_whole(f"{bucket}/a.jsonl", b"".join(lines))
    with storage.open_input(f"{bucket}/a.jsonl") as source:
        assert list(source) == lines


@pytest.mark.parametrize("name", ["a b+c%20.json", "naïve-文.json", "a=1/x#y.json", "[1].json", "-.json", "a&b'c.json"])
def test_paths_are_spelled_as_given(bucket: str, name: str) -> None:
    path = f"{bucket}/in put/{name}"
    storage.write_whole(path, b"x")
    assert storage.read_bytes(path) == b"x"
    assert [found for found, _ in storage.list_files(f"{bucket}/in put/")] == [path]
    assert [found for found, _ in storage.list_files(path)] == [path]
    assert storage.normalize_path(f"{bucket}/in put/") == f"{bucket}/in put"
    assert storage.exists(path)
    storage.copy_whole(path, f"{bucket}/copy/{name}")
    assert storage.read_bytes(f"{bucket}/copy/{name}") == b"x"
    storage.remove_tree(f"{bucket}/in put")
    assert not storage.exists(path)


def test_the_empty_object_that_stands_for_a_folder_is_no_file(bucket: str) -> None:
    fs = fsspec.filesystem("s3")
    fs.call_s3("put_object", Bucket=bucket.removeprefix("s3://"), Key="out/", Body=b"")
    assert storage.is_folder(f"{bucket}/out")
    assert storage.list_files(f"{bucket}/out") == []
    assert storage.list_names(f"{bucket}/out") == []
    storage.write_whole(f"{bucket}/out/a", b"x")
    assert [path for path, _ in storage.list_files(f"{bucket}/out")] == [f"{bucket}/out/a"]
    assert [path for path, _ in storage.list_files(f"{bucket}/*/*")] == [f"{bucket}/out/a"]


def test_a_folder_cannot_be_opened_as_a_file(bucket: str) -> None:
    storage.write_whole(f"{bucket}/folder/a", b"x")
    with pytest.raises(IsADirectoryError, match=f"{bucket}/folder"):
        storage.open_input(f"{bucket}/folder")


def test_a_file_replaced_while_it_is_read_is_an_error(bucket: str) -> None:
    path = f"{bucket}/in.bin"
    storage.write_whole(path, b"a" * (4 << 20))
    with storage.open_input(path) as source:
        source.read(10)
        storage.write_whole(path, b"b" * (4 << 20))
        with pytest.raises(StoreError):
            source.read()


def test_missing_files_and_buckets_are_told_by_their_path(bucket: str) -> None:
    for path in (f"{bucket}/none", "s3://no-such-bucket/none"):
        with pytest.raises(FileNotFoundError, match=path):
            storage.read_bytes(path)
        assert not storage.exists(path)
        assert not storage.is_folder(path)
        assert storage.list_names(path) == []
        storage.remove_tree(path)
    with pytest.raises(FileNotFoundError, match="s3://no-such-bucket/a"):
        storage.write_whole("s3://no-such-bucket/a", b"x")
    with pytest.raises(FileNotFoundError, match="s3://no-such-bucket/a"):
        storage.create_exclusive("s3://no-such-bucket/a", b"x")
    assert not storage.exists("s3://no-such-bucket")


def test_wrong_credentials_are_told_as_denied_access_by_every_operation(
    s3: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.write_whole(f"{bucket}/a", b"x")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret")
    operations = _operations(f"{bucket}/a")
    for name, operation in operations.items():
        with pytest.raises(StoreAccessDenied, match=f"access denied by the store: .*{bucket}/a") as caught:
            operation()
        assert isinstance(caught.value, PermissionError)
        for secret in (*s3.credentials, "not-the-secret"):
            assert secret not in str(caught.value), name


def test_a_store_that_is_down_is_told_by_every_operation(
    s3: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    storage.write_whole(f"{bucket}/a", b"x")
    source = storage.open_input(f"{bucket}/a")
    s3.kill()
    for name, operation in {**_operations(f"{bucket}/a"), "read": source.read}.items():
        with pytest.raises(StoreError, match=f"{bucket}/a") as caught:
            operation()
        assert not isinstance(caught.value, (PermissionError, FileNotFoundError)), name
    s3.start()
    assert storage.read_bytes(f"{bucket}/a") == b"x"


def _operations(path: str) -> dict[str, object]:
    return {
        "read_bytes": lambda: storage.read_bytes(path),
        "exists": lambda: storage.exists(path),
        "is_folder": lambda: storage.is_folder(path),
        "list_names": lambda: storage.list_names(path),
        "list_files": lambda: storage.list_files(path),
        "glob": lambda: storage.list_files(f"{path}*/*"),
        "write_whole": lambda: storage.write_whole(path, b"y"),
        "create_exclusive": lambda: storage.create_exclusive(path, b"y"),
        "copy_whole": lambda: storage.copy_whole(path, f"{path}-copy"),
        "remove_tree": lambda: storage.remove_tree(path),
        "remove_files": lambda: storage.remove_files([path]),
    }


def test_a_store_that_hangs_for_a_moment_is_waited_for(s3: S3Server, bucket: str) -> None:
    storage.write_whole(f"{bucket}/a", b"x")
    s3.pause()
    wake = threading.Timer(2, s3.resume)
    wake.start()
    try:
        assert storage.read_bytes(f"{bucket}/a") == b"x"
    finally:
        wake.join()


def test_an_error_met_by_arrow_while_it_reads_keeps_its_type(
    s3: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    pq.write_table(pa.table({"a": list(range(1_000_000))}), tmp_path / "a.parquet", compression="none")
    storage.write_whole(f"{bucket}/a.parquet", (tmp_path / "a.parquet").read_bytes())
    with storage.open_input(f"{bucket}/a.parquet") as source, pq.ParquetFile(source) as parquet:
        s3.kill()
        with pytest.raises(StoreError, match=f"{bucket}/a.parquet") as caught:
            parquet.read()
        assert caught.value.errno == errno.EIO
