"""The launcher's thread in which a pipeline runs, while the main one shows progress and handles signals."""

import contextlib
import re
import threading
from typing import Any

import apache_beam as beam
import grpc

from moebeam.jobs.console.summary import PIPELINE_THREAD
from moebeam.jobs.deploy.job_service import format_rpc_error
from moebeam.schemas.errors import CommitError, FileDamaged, InputChanged, PipelineFailed
from moebeam.schemas.redaction.hide import hide_in_exception
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.transforms.durable.failure import read_failure

CANCEL_TIMEOUT_S = 20.0
"""How long a cluster may take to end a job."""


class PipelineThread(threading.Thread):
    """Runs a pipeline.

    Args:
        is_remote: whether its job lives on a cluster, and goes on there unless it is cancelled. A local one ends with
            the process.
    """

    def __init__(self, pipeline: beam.Pipeline, *, is_remote: bool) -> None:
        super().__init__(name=PIPELINE_THREAD, daemon=True)
        self._pipeline = pipeline
        self._is_remote = is_remote
        self._result: Any = None
        self._is_cancelled = False
        self._failure: BaseException | None = None

    def run(self) -> None:
        try:
            self._result = self._pipeline.run()
            if self._is_cancelled:
                self._cancel_job()
            self._result.wait_until_finish()
        except BaseException as error:  # the launcher reports whatever a runner raises; a panic in Rust is no Exception
            hide_in_exception(error)
            self._failure = error

    def cancel(self) -> None:
        """End the job on its cluster, now or as soon as it is submitted, and wait for that."""
        self._is_cancelled = True
        if self._is_remote:
            self._cancel_job()
            self.join(CANCEL_TIMEOUT_S)

    @property
    def has_failed(self) -> bool:
        return self._failure is not None

    def raise_failure(self, layout: RunLayout) -> None:
        """Raise the pipeline's failure, with the failed step's record if there is one.

        Raises:
            InputChanged: a worker found that a file of the input is not what the run began with.
            PipelineFailed: whatever else failed.
        """
        if self._failure is None:
            return
        recorded = read_failure(layout)
        if recorded is None:
            raise PipelineFailed(f"the pipeline failed: {_last_line(self._failure)}") from self._failure
        if recorded.error == InputChanged.__name__:
            raise InputChanged(_STAGE_SUFFIX.sub("", recorded.message)) from self._failure
        message = _STAGE_SUFFIX.sub("", f"{recorded.step}: {recorded.error}: {recorded.message}")
        if recorded.error == FileDamaged.__name__ and "/_moebeam/plan/" in recorded.message:
            raise PipelineFailed(f"{message}; or run again: the plan is made again from the input") from self._failure
        if recorded.error in _LASTING:
            raise PipelineFailed(f"{message}; what is committed is kept") from self._failure
        raise PipelineFailed(f"{message}; what is committed is kept, run again to continue") from self._failure

    def _cancel_job(self) -> None:
        # The job may have ended meanwhile, or its server; the run is stopped either way.
        with contextlib.suppress(Exception):
            if self._result is not None:
                self._result.cancel()


_LASTING = (CommitError.__name__, FileDamaged.__name__)
"""Errors that running again meets again."""

_STAGE_SUFFIX = re.compile(r" \[while running '[^']*'\]")
"""Beam's own name of the step, which it adds to messages: `Answer/AnswerShard-ptransform-12`."""


def _last_line(error: BaseException) -> str:
    """The message of an error that no step recorded: Beam raises it with the worker's traceback in front."""
    if isinstance(error, grpc.RpcError):
        return f"the job server is gone: {format_rpc_error(error)}; the job may still run on its cluster"
    lines = [line for line in _STAGE_SUFFIX.sub("", str(error)).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
