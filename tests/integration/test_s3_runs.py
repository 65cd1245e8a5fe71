"""Whole runs on a real S3 server: job file, input, schema, script, prices, checkpoint and output in one bucket."""

import base64
import bz2
import contextlib
import multiprocessing
import random
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import apache_beam as beam
import fsspec
import pyarrow.parquet as pq
import pytest

from moebeam.jobs.check.job_file import load_job
from moebeam.jobs.check.preflight import check_job
from moebeam.jobs.run.main_job import make_main_job
from moebeam.pipelines.main_job import build
from moebeam.schemas.errors import JobError
from moebeam.schemas.store import storage
from moebeam.schemas.store.object_store import StoreError
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.schemas.tables import LEDGER_SCHEMA, RESULT_SCHEMA
from moebeam.transforms.durable.commit import commit_shard
from moebeam.transforms.read.input_rows import read_unit
from moebeam.transforms.read.input_scan import scan_input
from tests.support.jobs.s3_jobs import (
    NUM_ROWS,
    Ended,
    assert_no_secret,
    run_moebeam,
    start_moebeam,
    tables,
    upload,
    wait_for,
    write_job,
)
from tests.support.servers.s3_server import S3Server

pytestmark = pytest.mark.integration

LATENCY_MS = 40
POLL_S = 0.002


@pytest.fixture(scope="module")
def job_folder(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Path:
    return write_job(tmp_path_factory.mktemp("job") / "job", tiny_checkpoint, latency_ms=LATENCY_MS)


@pytest.fixture(scope="module")
def on_disk(job_folder: Path) -> dict[str, list[dict[str, Any]]]:
    """The tables of the job when it runs undisturbed on disk."""
    output = job_folder.with_name("out")
    ended = run_moebeam("run", str(job_folder / "job.toml"), "--json", "--set", f"output.path={output}")
    assert ended.exit_code == 0, ended.errors
    found = tables(output)
    assert len(found["results"]) + len(found["rejects"]) == NUM_ROWS
    assert found["rejects"]
    assert len({row["output_text"] for row in found["results"]}) > NUM_ROWS // 3
    return found


@pytest.fixture
def url(job_folder: Path, bucket: str) -> str:
    """The job's folder in a bucket of its own."""
    return upload(job_folder, f"{bucket}/team a/job")


class _Reader(threading.Thread):
    """Looks for Parquet files below a URL again and again, and reads every one that it finds."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self.num_files: set[int] = set()
        self.failures: list[str] = []
        self._url = url
        self._stop_it = threading.Event()

    def run(self) -> None:
        fs = fsspec.filesystem("s3", use_listings_cache=False)
        while not self._stop_it.wait(POLL_S):
            found = fs.glob(f"{self._url}/**/*.parquet")
            self.num_files.add(len(found))
            for path in found:
                try:
                    pq.read_table(path, filesystem=fs)
                except Exception as error:  # whatever it is, a reader should not have met it
                    self.failures.append(f"{path}: {error!r}")

    def stop(self) -> None:
        self._stop_it.set()
        self.join()


def test_a_run_on_s3_gives_what_a_run_on_disk_gives_and_shows_readers_only_whole_files(
    s3: S3Server, url: str, on_disk: dict[str, list[dict[str, Any]]]
) -> None:
    reader = _Reader(f"{url}/out")
    reader.start()
    try:
        first = run_moebeam("run", f"{url}/job.toml", "--json", "--debug")
    finally:
        reader.stop()
    assert first.exit_code == 0, first.errors
    assert first.summary["status"] == "succeeded"
    assert tables(s3.path(f"{url}/out")) == on_disk
    assert reader.failures == []
    assert len(reader.num_files) >= 2
    assert max(reader.num_files) > 3
    _assert_published_alone(s3, f"{url}/out")

    before = _snapshot(s3, f"{url}/out")
    again = run_moebeam("run", f"{url}/job.toml", "--json")
    assert (again.exit_code, again.summary["status"]) == (0, "already_done")
    assert again.summary["num_results"] == first.summary["num_results"]
    assert _snapshot(s3, f"{url}/out") == before
    for ended in (first, again):
        assert_no_secret(s3.credentials, ended.output, ended.errors)
    _assert_no_secret_below(s3, url)


def test_a_run_killed_at_every_stage_and_at_random_loses_and_doubles_nothing(
    s3: S3Server, url: str, on_disk: dict[str, list[dict[str, Any]]]
) -> None:
    out = s3.path(f"{url}/out")
    state = out / "_moebeam"
    random_s = random.Random(6)
    moments: list[tuple[str, Callable[[], bool]]] = [
        ("planning", lambda: any(state.glob("plan/*"))),
        ("planned", lambda: (state / "plan" / "plan.json").exists()),
        ("three commits", lambda: len(list(state.glob("commits/*.json"))) >= 3),
        ("at random", _after(random_s.uniform(0, 3), lambda: (state / "job.json").exists())),
        ("publishing", lambda: any(out.glob("results/*.parquet"))),
        ("at the manifest", lambda: (out / "manifest.json").exists()),
    ]
    commits: dict[str, bytes] = {}
    for name, has_come in moments:
        _run_until(f"{url}/job.toml", has_come)
        for path in out.rglob("*.parquet"):
            pq.read_table(path)
        now = {path.name: path.read_bytes() for path in state.glob("commits/*.json")}
        assert {shard: now.get(shard) for shard in commits} == commits, f"a commit changed or went: {name}"
        commits = now
        _assert_no_secret_below(s3, url)  # heartbeats and leases are there now, and gone in the end
    ended = run_moebeam("run", f"{url}/job.toml", "--json")
    assert ended.exit_code == 0, ended.errors
    assert tables(out) == on_disk
    _assert_published_alone(s3, f"{url}/out")


def _after(seconds: float, has_come: Callable[[], bool]) -> Callable[[], bool]:
    """True so long after something has come."""
    came: list[float] = []

    def is_past() -> bool:
        if not came and has_come():
            came.append(time.monotonic())
        return bool(came) and time.monotonic() - came[0] >= seconds

    return is_past


def _run_until(job: str, has_come: Callable[[], bool]) -> None:
    """Run a job and kill it at a moment; a run that ends before is left as it is."""
    process = start_moebeam("run", job, "--quiet")
    try:
        deadline = time.monotonic() + 120
        while process.poll() is None and not has_come():
            assert time.monotonic() < deadline
            time.sleep(POLL_S)
    finally:
        process.kill()
        process.communicate()


def _one_commit(output: str, number: int, start_at: float) -> tuple[str, tuple[str, ...]]:
    empty = {"results": RESULT_SCHEMA.empty_table(), "rejects": RESULT_SCHEMA.empty_table()}
    layout = RunLayout(output)
    storage.exists(layout.job)
    time.sleep(max(0.0, start_at - time.time()))
    commit = commit_shard(layout, f"racer {number}", "s0", {**empty, "ledger": LEDGER_SCHEMA.empty_table()})
    return commit.attempt, tuple(file.path for file in commit.files)


def test_of_processes_that_commit_the_same_shard_one_wins_and_all_get_its_record(bucket: str) -> None:
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(4, mp_context=spawn) as pool:
        start_at = time.time() + 8
        races = [pool.submit(_one_commit, f"{bucket}/out", number, start_at) for number in range(4)]
        assert len({race.result() for race in races}) == 1
    assert storage.list_names(f"{bucket}/out/_moebeam/commits") == ["s0.json"]


def test_a_store_that_stops_in_mid_run_ends_it_clearly_and_the_next_run_goes_on(
    s3: S3Server, url: str, on_disk: dict[str, list[dict[str, Any]]]
) -> None:
    commits = s3.path(f"{url}/out/_moebeam/commits")
    process = start_moebeam("run", f"{url}/job.toml", "--json", env={"AWS_MAX_ATTEMPTS": "2"})
    _wait_until(process, lambda: len(list(commits.glob("*.json"))) >= 2)
    s3.kill()
    failed = wait_for(process)
    num_committed = len(list(commits.glob("*.json")))
    s3.start()
    assert failed.exit_code == 1, failed.errors
    _assert_told_clearly(failed, "127.0.0.1", url)
    assert_no_secret(s3.credentials, failed.output, failed.errors)
    assert 2 <= num_committed < len(on_disk["results"]) // 5
    ended = run_moebeam("run", f"{url}/job.toml", "--json")
    assert ended.exit_code == 0, ended.errors
    assert tables(s3.path(f"{url}/out")) == on_disk
    _assert_published_alone(s3, f"{url}/out")


def test_a_store_that_hangs_for_a_while_is_waited_for(
    s3: S3Server, url: str, on_disk: dict[str, list[dict[str, Any]]]
) -> None:
    commits = s3.path(f"{url}/out/_moebeam/commits")
    process = start_moebeam("run", f"{url}/job.toml", "--json")
    _wait_until(process, lambda: any(commits.glob("*.json")))
    s3.pause()
    time.sleep(5)
    s3.resume()
    ended = wait_for(process)
    assert ended.exit_code == 0, ended.errors
    assert tables(s3.path(f"{url}/out")) == on_disk


def _wait_until(process: Any, has_come: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not has_come():
        if process.poll() is not None or time.monotonic() > deadline:
            pytest.fail(f"the run ended too early: {wait_for(process).errors}")
        time.sleep(POLL_S)


@pytest.mark.parametrize(
    # versitygw answers an unknown access key with 404, where S3 itself denies access.
    ("wrong", "words"),
    [("AWS_SECRET_ACCESS_KEY", "access denied"), ("AWS_ACCESS_KEY_ID", "No user exists with the provided access key")],
)
def test_wrong_credentials_end_a_run_with_the_path_and_that_access_was_denied(
    s3: S3Server, url: str, wrong: str, words: str
) -> None:
    ended = run_moebeam("run", f"{url}/job.toml", "--json", env={wrong: "wr0ng-and-secret"})
    assert ended.exit_code == 2, ended.errors
    _assert_told_clearly(ended, words, f"{url}/job.toml")
    assert_no_secret([*s3.credentials, "wr0ng-and-secret"], ended.output, ended.errors)


@pytest.mark.parametrize(
    ("key", "path"),
    [
        ("input.path", "in/*.parquet"),
        ("output.path", "out"),
        ("output.schema", "answer.schema.json"),
        ("model.path", "checkpoint"),
        ("model.script", "script.json"),
        ("accounting.price_book", "prices.csv"),
    ],
)
@pytest.mark.parametrize("problem", ["denied", "unreachable", "no such bucket"])
def test_a_path_that_the_store_refuses_is_named_before_anything_runs(
    s3: S3Server, job_folder: Path, url: str, monkeypatch: pytest.MonkeyPatch, key: str, path: str, problem: str
) -> None:
    words = "access denied"
    if problem == "denied":
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wr0ng-and-secret")
    elif problem == "unreachable":
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
        words = "127.0.0.1:1"
    else:
        url, words = "s3://no-such-bucket", "no"
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    # Everything else lies on disk.
    elsewhere = f"output.path={job_folder.with_name(f'out-{problem}')}"
    job = load_job(str(job_folder / "job.toml"), [elsewhere, f"{key}={url}/{path}"])
    with pytest.raises(JobError) as caught:
        checked = check_job(job)
        checked.claim_output()
    message = str(caught.value)
    assert f"{url}/{path}" in message
    assert words in message
    assert "\n" not in message
    assert_no_secret([*s3.credentials, "wr0ng-and-secret"], message)


def test_a_store_that_fails_while_rows_are_read_rejects_none_of_them(
    s3: S3Server, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    checked = check_job(load_job(f"{url}/job.toml"))
    unit = checked.scan.units[0]
    s3.kill()
    with pytest.raises(StoreError, match=unit.path):
        list(read_unit(unit, checked.columns))


def test_a_store_that_fails_while_footers_are_read_leaves_no_file_out(
    s3: S3Server, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    job = load_job(f"{url}/job.toml")
    real = storage.list_files

    def list_and_fail(pattern: str) -> list[tuple[str, dict[str, Any]]]:
        found = real(pattern)
        s3.kill()
        return found

    monkeypatch.setattr(storage, "list_files", list_and_fail)
    with pytest.raises(JobError, match=f"{url}/in/a.parquet"):
        scan_input(job.input)


def test_the_pickled_pipeline_holds_no_credential(s3: S3Server, url: str) -> None:
    checked = check_job(load_job(f"{url}/job.toml"))
    pipeline = beam.Pipeline()
    build(pipeline, make_main_job(checked, None))
    proto = pipeline.to_runner_api()
    pickles = [_unpacked(payload) for payload in _payloads(proto)]
    assert sum(f"{url}/out".encode() in pickle for pickle in pickles) >= 3
    texts = [pickle.decode("latin-1") for pickle in pickles]
    assert_no_secret(s3.credentials, proto.SerializeToString().decode("latin-1"), *texts)


def _payloads(message: Any) -> Iterator[bytes]:
    """All byte strings of a protocol buffer."""
    for descriptor, value in message.ListFields():
        values = value if descriptor.is_repeated else [value]
        if descriptor.message_type is not None and descriptor.message_type.GetOptions().map_entry:
            values = value.values()
        for item in values:
            if isinstance(item, bytes):
                yield item
            elif hasattr(item, "ListFields"):
                yield from _payloads(item)


def _unpacked(payload: bytes) -> bytes:
    """A payload with the pickles in it out of Beam's base64 and bzip2."""
    unpacked = payload
    for start in range(len(payload)):
        # bzip2's first bytes, `BZh9`, in base64
        if payload.startswith(b"QlpoO", start):
            with contextlib.suppress(ValueError, OSError):
                end = next((at for at in range(start, len(payload)) if payload[at] not in _BASE64), len(payload))
                unpacked += bz2.BZ2Decompressor().decompress(base64.b64decode(payload[start:end] + b"=="))
    return unpacked


_BASE64 = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/=")


def _assert_told_clearly(ended: Ended, *words: str) -> None:
    assert "Traceback" not in ended.errors
    assert "error:" in ended.errors
    for word in words:
        assert word in ended.errors
        assert word in ended.summary["error"]


def _assert_published_alone(s3: S3Server, output: str) -> None:
    """Beside the tables there is what a finished run keeps: its identity, plan and commits."""
    below = {path.relative_to(s3.path(output)).as_posix() for path in s3.path(output).rglob("*") if path.is_file()}
    folders = {name.rpartition("/")[0] for name in below}
    assert folders == {"", "results", "rejects", "ledger", "_moebeam", "_moebeam/plan", "_moebeam/commits"}
    assert {name for name in below if "/" not in name} == {"manifest.json", "views.sql"}
    assert storage.list_files(f"{output}/_moebeam/staging") == []


def _snapshot(s3: S3Server, output: str) -> dict[str, tuple[int, bytes]]:
    files = (path for path in s3.path(output).rglob("*") if path.is_file())
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def _assert_no_secret_below(s3: S3Server, url: str) -> None:
    files = [path for path in s3.path(url).rglob("*") if path.is_file()]
    assert len(files) > 10
    assert_no_secret(s3.credentials, *(path.read_bytes().decode("latin-1") for path in files))
