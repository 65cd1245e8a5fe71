"""Beam's local runner, with worker processes that keep their output to themselves.

Beam starts a worker process with the launcher's own standard streams, and prints the traceback of a failing step there
from every worker and for every try. Here it goes to a log file for each worker, and the launcher says once what failed.
"""

import contextlib
import os
import shlex
from collections.abc import Generator
from pathlib import Path
from typing import Any

from apache_beam.options.pipeline_options import DirectOptions, PipelineOptions
from apache_beam.transforms.environments import SubprocessSDKEnvironment

from moebeam.jobs.check.beam_options import runs_here
from moebeam.jobs.run import local_worker
from moebeam.jobs.run.private_runner import PrivateRunner
from moebeam.model_runner.host_folder import host_folder
from moebeam.model_runner.python_process import python_command
from moebeam.schemas.redaction.guard_logs import HidingStream
from moebeam.schemas.store import storage
from moebeam.schemas.store.run_layout import RunLayout

_PROCESSES, _THREADS = "multi_processing", "multi_threading"


def make_local_runner(options: PipelineOptions, logs: Path) -> PrivateRunner | None:
    """The runner for this machine; None where Beam finds the right one by its options.

    Args:
        options: of the pipeline; says nothing of processes afterwards, for Beam would start them in its own way.
        logs: the folder of the workers' log files.
    """
    direct = options.view_as(DirectOptions)
    if not runs_here(options):
        return None
    if direct.direct_running_mode != _PROCESSES:
        return PrivateRunner()
    direct.direct_running_mode = None
    words = python_command(local_worker.__name__, str(logs))
    environment: Any = SubprocessSDKEnvironment
    return PrivateRunner(default_environment=environment.from_command_string(shlex.join(words)))


def find_logs_folder(layout: RunLayout, run_id: str) -> Path:
    """Where workers on this machine keep their output: below the run's folder, or on the host if that is in a store."""
    if storage.is_local(layout.logs):
        return Path(storage.normalize_path(layout.logs))
    return host_folder() / "logs" / run_id


@contextlib.contextmanager
def keeping_threads_output(options: PipelineOptions, logs: Path) -> Generator[None]:
    """Send what Beam's worker threads print to a log file, if they are of the kind that does."""
    if not runs_here(options) or options.view_as(DirectOptions).direct_running_mode != _THREADS:
        yield
        return
    logs.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = logs / f"threads-{os.getpid()}.log"
    with path.open("a", encoding="utf-8", errors="backslashreplace") as file:
        path.chmod(0o600)
        with contextlib.closing(HidingStream(file)) as log, contextlib.redirect_stderr(log):
            yield
