"""The thread of a pipeline: a job on a cluster does not outlive a run that was stopped."""

import threading
from typing import Any

import pytest

from moebeam.jobs.run.pipeline_thread import PipelineThread
from moebeam.schemas.errors import InputChanged, PipelineFailed
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.transforms.durable.failure import record_failure

TIMEOUT_S = 30


class Job:
    """A job on a cluster, which runs until it is cancelled; `is_submitted` lets its submission through."""

    def __init__(self) -> None:
        self.is_submitted = threading.Event()
        self.is_cancelled = threading.Event()

    def run(self) -> "Job":
        assert self.is_submitted.wait(TIMEOUT_S)
        return self

    def wait_until_finish(self) -> None:
        assert self.is_cancelled.wait(TIMEOUT_S)

    def cancel(self) -> None:
        self.is_cancelled.set()
        raise RuntimeError("the job server says something about it")


def started(job: Any, *, is_remote: bool) -> PipelineThread:
    run = PipelineThread(job, is_remote=is_remote)
    run.start()
    return run


@pytest.mark.parametrize("is_submitted", [True, False])
def test_a_job_on_a_cluster_is_cancelled_now_or_as_soon_as_it_is_there(is_submitted: bool) -> None:
    job = Job()
    if is_submitted:
        job.is_submitted.set()
    run = started(job, is_remote=True)
    threading.Timer(0.1, job.is_submitted.set).start()
    run.cancel()
    assert job.is_cancelled.is_set() and not run.is_alive()


def test_a_local_pipeline_ends_with_its_process_and_is_not_waited_for() -> None:
    job = Job()
    run = started(job, is_remote=False)
    run.cancel()
    assert run.is_alive()
    job.is_cancelled.set()
    job.is_submitted.set()
    run.join(TIMEOUT_S)


def test_what_a_runner_raises_is_told_on_one_line(tmp_path: Any) -> None:
    class Broken:
        def run(self) -> None:
            raise RuntimeError("first\n\nlast")

    run = started(Broken(), is_remote=False)
    run.join(TIMEOUT_S)
    with pytest.raises(PipelineFailed, match="the pipeline failed: last"):
        run.raise_failure(RunLayout(str(tmp_path)))


def test_what_is_no_exception_is_a_failure_too(tmp_path: Any) -> None:
    class Panic(BaseException):
        """As libraries in Rust raise it."""

    class Broken:
        def run(self) -> None:
            raise Panic("the global thread pool has not been initialized")

    run = started(Broken(), is_remote=False)
    run.join(TIMEOUT_S)
    assert run.has_failed
    with pytest.raises(PipelineFailed, match="the pipeline failed: the global thread pool"):
        run.raise_failure(RunLayout(str(tmp_path)))


def test_an_input_that_changed_is_told_as_such_and_not_to_be_run_again_as_it_is(tmp_path: Any) -> None:
    layout = RunLayout(str(tmp_path))

    class Broken:
        def run(self) -> None:
            with record_failure(layout, "read"):
                raise InputChanged("a.parquet: changed [while running 'Read/ReadUnits-ptransform-1']")

    run = started(Broken(), is_remote=False)
    run.join(TIMEOUT_S)
    with pytest.raises(InputChanged, match=r"^a\.parquet: changed$"):
        run.raise_failure(layout)
