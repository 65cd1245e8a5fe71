"""Runs in processes forked from a server that has imported everything, so that hundreds can be killed or stopped."""

import contextlib
import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

from moebeam.jobs.check.job_file import load_job
from moebeam.jobs.run.launch import launch
from moebeam.transforms.durable import lease as lease_module

RUN_TIMEOUT_S = 900.0

SHORT_LEASE: Mapping[str, float] = {"LEASE_S": 3.0, "RENEWAL_S": 0.7, "CERTAIN_S": 1.2, "MAX_CLOCK_SKEW_S": 0.5}
"""Times of a lease that a test can wait for, in the proportions of the real ones."""


@dataclass(frozen=True)
class ForkedRun:
    """A run in a process group of its own; its output goes to a file beside the job file."""

    process: BaseProcess

    @property
    def is_over(self) -> bool:
        return self.process.exitcode is not None

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to all its processes."""
        assert self.process.pid is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def wait(self) -> int:
        """The exit code.

        Raises:
            TimeoutError: it does not end; it is killed.
        """
        self.process.join(RUN_TIMEOUT_S)
        if self.process.exitcode is None:
            self.signal(signal.SIGKILL)
            raise TimeoutError(f"expected an end within {RUN_TIMEOUT_S:g} s")
        return self.process.exitcode


def start_run(job_file: Path, environment: Mapping[str, str]) -> ForkedRun:
    """Start a run with short leases."""
    context = get_context("forkserver")
    context.set_forkserver_preload(
        ["tests.support.disturbances.forked_runs", "moebeam.model_runner.openai_engine.runner"]
    )
    process = context.Process(target=_run, args=(job_file, dict(environment)))
    process.start()
    return ForkedRun(process)


def _run(job_file: Path, environment: Mapping[str, str]) -> None:
    os.setsid()
    log = os.open(job_file.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.environ.update(environment)
    for name, value in SHORT_LEASE.items():
        setattr(lease_module, name, value)
    launch(load_job(str(job_file)))
