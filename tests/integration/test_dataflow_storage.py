"""gs:// as the place of everything: a whole run through gcsfs on a GCS server here, and what a commit rests on."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest

from moebeam.schemas.store import storage
from tests.support.jobs.s3_jobs import run_moebeam, tables, upload, write_job
from tests.support.servers.gcs_server import GcsServer

pytestmark = pytest.mark.integration

NUM_RACERS = 6


@pytest.fixture(scope="module")
def running_gcs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GcsServer]:
    server = GcsServer(tmp_path_factory.mktemp("gcs"))
    server.start()
    try:
        yield server
    finally:
        server.kill()


@pytest.fixture
def gcs(running_gcs: GcsServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[GcsServer]:
    for name, value in running_gcs.environment.items():
        monkeypatch.setenv(name, value)
    # fsspec reads its variables when it is imported.
    for protocol in ("gs", "gcs"):
        monkeypatch.setitem(fsspec.config.conf, protocol, {"token": "anon"})
    try:
        yield running_gcs
    finally:
        fsspec.get_filesystem_class("gs").clear_instance_cache()


@pytest.fixture
def bucket(gcs: GcsServer, new_bucket_name: Callable[[], str]) -> str:
    return gcs.bucket(new_bucket_name())


def copied(url: str, folder: Path) -> Path:
    """All below a URL, on disk."""
    for path, _ in storage.list_files(url):
        target = folder / path.removeprefix(f"{url}/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(storage.read_bytes(path))
    return folder


def test_the_store_refuses_to_create_a_file_twice(bucket: str) -> None:
    storage.check_exclusive(f"{bucket}/out")
    assert storage.list_files(f"{bucket}/out") == []


def test_of_racing_writers_exactly_one_creates_a_file(bucket: str) -> None:
    path, barrier = f"{bucket}/commits/s0", threading.Barrier(NUM_RACERS)
    winners: list[int] = []

    def race(racer: int) -> None:
        barrier.wait()
        if storage.create_exclusive(path, f"racer {racer}".encode()):
            winners.append(racer)

    threads = [threading.Thread(target=race, args=(racer,)) for racer in range(NUM_RACERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = winners
    assert storage.read_bytes(path) == f"racer {winner}".encode()


def test_missing_files_and_buckets_are_file_not_found_errors(bucket: str) -> None:
    for path in (f"{bucket}/nothing", "gs://no-such-bucket/nothing"):
        assert not storage.exists(path)
        with pytest.raises(FileNotFoundError, match="nothing"):
            storage.read_bytes(path)


def test_a_whole_run_on_gcs_gives_the_tables_of_one_on_disk(bucket: str, tmp_path: Path, tiny_checkpoint: Path) -> None:
    job = write_job(tmp_path / "job", tiny_checkpoint)
    on_disk = run_moebeam("run", str(job / "job.toml"), "--set", f"output.path={tmp_path}/disk")
    assert on_disk.exit_code == 0, on_disk.errors
    url = upload(job, f"{bucket}/team a/job")
    on_gcs = run_moebeam("run", f"{url}/job.toml", "--json")
    assert on_gcs.exit_code == 0, on_gcs.errors
    again: dict[str, Any] = run_moebeam("run", f"{url}/job.toml", "--json").summary
    assert (on_gcs.summary["status"], again["status"]) == ("succeeded", "already_done")
    assert tables(copied(f"{url}/out", tmp_path / "gcs")) == tables(tmp_path / "disk")
