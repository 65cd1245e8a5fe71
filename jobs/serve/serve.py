"""Starts the batch server of a folder: `moebeam serve`."""

import ipaddress
import signal
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from filelock import FileLock, Timeout

from moebeam.jobs.check.job_file import load_job
from moebeam.jobs.serve.keys import Keys
from moebeam.jobs.serve.upload import UploadLimits
from moebeam.schemas.errors import JobFileError, OutputError
from moebeam.schemas.store import storage


def serve(
    folder: str,
    job: str,
    *,
    host: str,
    port: int,
    keys: str | None,
    num_runs: int,
    limits: UploadLimits | None = None,
) -> None:
    """Serve until a signal ends it; runs that are at work then stop, and go on at the next start.

    Args:
        job: job file that batches run; its `[input]` and `[output] path` are replaced.
        keys: file of `moebeam serve-key`; None serves this machine alone.
    Raises:
        JobFileError: the job file or an option is wrong.
        OutputError: the folder cannot be used, or another server has it.
    """
    import uvicorn

    from moebeam.jobs.serve.app import BatchServer, ServerSettings
    from moebeam.jobs.serve.shelf import Shelf

    if not storage.is_local(folder):
        raise JobFileError(f"FOLDER: expected a folder on disk, found {folder!r}; runs may write elsewhere by export")
    if keys is None and not _is_loopback(host):
        raise JobFileError(
            f"--host: expected 127.0.0.1 or another address of this machine alone, found {host!r}; "
            "to be reached from elsewhere it needs --keys FILE, which moebeam serve-key makes"
        )
    load_job(job, ['input.path="batch.jsonl"', 'input.format="jsonl"', 'output.path="run"'])
    known_keys = Keys(keys)
    root = Path(folder).absolute()
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock = FileLock(root / ".serve.lock")
        lock.acquire(timeout=0)
    except Timeout as error:
        raise OutputError(f"{folder}: another server has this folder") from error
    except OSError as error:
        raise OutputError(f"{folder}: cannot be used as a server's folder: {error}") from error
    with lock:
        settings = ServerSettings(
            job=str(Path(job).absolute()) if storage.is_local(job) else job,
            keys=known_keys,
            limits=limits or UploadLimits(),
            num_runs=num_runs,
        )
        app = BatchServer(Shelf.open(root), settings).make_app()
        with _ending_in_order():
            uvicorn.run(app, host=host, port=port, log_level="warning", access_log=False, server_header=False)


def _do_nothing(number: int, frame: FrameType | None) -> None:
    pass


@contextmanager
def _ending_in_order() -> Generator[None]:
    """Let the signal that ended the server, which uvicorn raises once more behind itself, do nothing further."""
    before = {number: signal.signal(number, _do_nothing) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
