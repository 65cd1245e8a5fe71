"""Checks a job, runs its pipeline, watches it through the store, and summarizes the outcome."""

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import replace

import apache_beam as beam

from moebeam.jobs.check.beam_options import parse_beam_options, runs_here
from moebeam.jobs.check.preflight import CheckedJob, check_job
from moebeam.jobs.check.process_limits import check_process_limits
from moebeam.jobs.check.reuse import save_fences
from moebeam.jobs.console.signals import StopSignal
from moebeam.jobs.console.summary import ProgressSnapshot, RunSummary
from moebeam.jobs.deploy.dataflow.dataflow_options import complete_dataflow_options
from moebeam.jobs.deploy.dataflow.job_template import summarize_template, template_location, write_template
from moebeam.jobs.deploy.job_service import prepare_job_service
from moebeam.jobs.output.current_run import bring_up_to_date
from moebeam.jobs.output.frame_record import check_frame
from moebeam.jobs.output.run_record import RetryOf, RunRecord
from moebeam.jobs.output.run_state import RunWatch, announce_presence, read_manifest, remove_dead_launchers
from moebeam.jobs.run.begin_attempt import begin_attempt
from moebeam.jobs.run.finish import finish_run
from moebeam.jobs.run.local_runner import find_logs_folder, keeping_threads_output, make_local_runner
from moebeam.jobs.run.main_job import make_main_job
from moebeam.jobs.run.pipeline_thread import PipelineThread
from moebeam.jobs.run.retry_failed import write_retry_plan
from moebeam.model_runner.protocol import require_packages
from moebeam.pipelines.main_job import build
from moebeam.schemas.errors import FileDamaged, JobInterrupted, OutputError, PipelineFailed
from moebeam.schemas.job.sections import Job
from moebeam.schemas.redaction.guard_logs import guard_logs
from moebeam.schemas.redaction.known_secrets import learn_environment
from moebeam.schemas.store import storage
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.transforms.answer.reuse import ReuseSource
from moebeam.transforms.durable.failure import WorkerWatch, read_failure
from moebeam.transforms.durable.lease import read_leases
from moebeam.transforms.durable.stop import (
    ON_ERROR,
    SIGNAL,
    StopReason,
    announce_stop,
    forget_stop,
    read_stop,
    request_stop,
)
from moebeam.transforms.plan.mend_plan import mend_record, set_plan_aside
from moebeam.transforms.plan.plan_record import read_plan
from moebeam.transforms.publish.publish_spec import save_spec
from moebeam.transforms.read.input_scan import InputScan

POLL_S = 0.25
LOST_WORKER_S = 5.0
"""How long Beam's local runner may take to notice that a worker process died."""

ABANDON_S = 10.0
"""How long shards at work may take to end once answers are no longer awaited; a model that loads may take minutes."""

_LOGGER = logging.getLogger(__name__)

OnProgress = Callable[[ProgressSnapshot], None]


def launch(
    job: Job,
    *,
    limit: int | None = None,
    beam_args: Sequence[str] = (),
    stop: threading.Event | None = None,
    progress: OnProgress | None = None,
    retry_of: RetryOf | None = None,
    retried: InputScan | None = None,
    reuse: ReuseSource | None = None,
) -> RunSummary:
    """Run a job until it ends or is stopped.

    Args:
        limit: answer only this many rows from the start.
        beam_args: Beam options in Beam's snake_case.
        stop: once set, no request leaves any more, and the run ends with what has arrived within `[failures] drain_s`.
        progress: called a few times per second.
        retry_of: answer these rejects of an earlier run instead of the input.
        retried: from `moebeam.jobs.run.retry_failed.prepare_retry`; not needed once the output holds it.
        reuse: reuse the answers of this earlier run.
    Raises:
        JobError: the job cannot run, or a step of it failed.
    """
    started = time.monotonic()
    guard_logs()
    learn_environment()
    check_process_limits()
    options = parse_beam_options(beam_args)
    complete_dataflow_options(options, job, reuse and reuse.output)
    prepare_job_service(options)
    layout = RunLayout(job.output.path)
    with _store_errors(job.output.path):
        _mend_plan(layout)
        if not storage.exists(layout.plan_record):
            for path in job.input.paths:
                check_frame(path)
        checked = check_job(job, limit=limit, retry_of=retry_of, retried=retried, reuse=reuse, is_launch=True)
        for warning in checked.warnings:
            _LOGGER.warning("%s", warning)
        manifest = read_manifest(layout)
        if manifest is not None and manifest["status"] == "complete":
            # The last launcher may have been killed right after writing the manifest.
            remove_dead_launchers(layout)
            return finish_run(bring_up_to_date(layout) or manifest, job, "already_done", started)
        if runs_here(options):
            require_packages(job.model)
        checked, run_key = begin_attempt(checked)
        if reuse is not None:
            save_fences(layout, reuse)
        planned = mend_record(layout)
        if planned is None and retry_of is not None:
            # A retry reads no input: its plan is taken from its source's plan.
            planned = write_retry_plan(
                layout, retry_of, job, parts=checked.identity.parts, encoder=checked.engine.encoder
            )
    logs = find_logs_folder(layout, checked.identity.run_id)
    pipeline = beam.Pipeline(make_local_runner(options, logs), options=options)
    build(pipeline, main_job := make_main_job(checked, planned, run_key))
    with _store_errors(layout.output):
        save_spec(main_job.publish)
    if (location := template_location(options)) is not None:
        write_template(pipeline, location)
        return summarize_template(checked, location, started)
    run = PipelineThread(pipeline, is_remote=not runs_here(options))
    try:
        with keeping_threads_output(options, logs):
            _wait_for(run, checked, main_job.answer.limits.deadline_at, stop, progress)
    except KeyboardInterrupt:
        with contextlib.suppress(OSError):
            request_stop(
                layout, StopReason(SIGNAL, f"stopped by {_name_signal(stop)}; a second signal ended it at once")
            )
        raise
    if run.has_failed:
        # Where the store is what failed, the pipeline's own words say so.
        with contextlib.suppress(OSError):
            stopped = read_stop(layout)
            if stopped is not None and read_plan(layout) is None:
                # Another launcher of this run was told to.
                raise JobInterrupted(stopped.message)
    run.raise_failure(layout)
    forget_stop(layout)
    with _store_errors(layout.output):
        storage.remove_files([layout.stop])
        manifest = read_manifest(layout)
    assert manifest is not None, "a pipeline that succeeded has written its manifest"
    if manifest.get("reason") == ON_ERROR:
        raise PipelineFailed(f"{manifest['reason_message']}; what is committed is kept, run again to continue")
    with _store_errors(layout.output):
        return finish_run(manifest, job, "succeeded" if manifest["status"] == "complete" else "incomplete", started)


def resume(
    record: RunRecord,
    job: Job,
    *,
    beam_args: Sequence[str] = (),
    stop: threading.Event | None = None,
    progress: OnProgress | None = None,
) -> RunSummary:
    """Resume a run from its output folder; a finished run is only summarized, without checks.

    Args:
        job: the record's job, with allowed changes.
    Raises:
        JobError: as in `launch`.
    """
    started = time.monotonic()
    with _store_errors(record.layout.output):
        manifest = read_manifest(record.layout)
        if manifest is not None and manifest["status"] == "complete":
            return finish_run(bring_up_to_date(record.layout) or manifest, job, "already_done", started)
    return launch(
        job,
        limit=record.request.limit,
        beam_args=beam_args,
        stop=stop,
        progress=progress,
        retry_of=record.request.retry_of,
        reuse=record.request.reuse,
    )


def _mend_plan(layout: RunLayout) -> None:
    """Set the plan aside if it is why the last launch failed; this one then makes it again from the input.

    Raises:
        CommitError: its record is damaged, too.
        OSError: the store failed.
    """
    failure = read_failure(layout)
    if failure is not None and failure.error == FileDamaged.__name__ and set_plan_aside(layout):
        _LOGGER.warning("%s: the plan is damaged (%s); it is made again from the input", layout.plan, failure.message)


@contextlib.contextmanager
def _store_errors(output: str) -> Generator[None]:
    """Turn the store's errors before and after the pipeline into `OutputError`."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"[output] path {output!r}: cannot be used: {error}") from error


def _wait_for(
    run: PipelineThread,
    checked: CheckedJob,
    deadline_at: float | None,
    stop: threading.Event | None,
    progress: OnProgress | None,
) -> None:
    """Run the pipeline and watch it until it ends or must be abandoned.

    Raises:
        JobInterrupted: it was stopped while it planned, or its shards did not end.
        PipelineFailed: a worker process died.
    """
    job = checked.request.job
    layout, drain_s = RunLayout(job.output.path), job.failures.drain_s
    watch = RunWatch(layout, rows_total=checked.scan.num_rows, currency=checked.currency)
    reason: StopReason | None = None
    stopped_at = 0.0
    if isinstance(stop, StopSignal):
        stop.is_awaited = True
    with announce_presence(layout) as presence, WorkerWatch() as workers:
        run.start()
        while run.is_alive():
            presence.renew()
            if reason is None and (reason := _reason_to_stop(stop, deadline_at, drain_s)) is not None:
                stopped_at = time.monotonic()
                _stop(run, layout, reason)
            if progress is not None:
                # Files may vanish during a read; the next snapshot follows soon.
                with contextlib.suppress(OSError):
                    progress(replace(watch.snapshot(), stop=reason and f"stopping: {reason.message}"))
            if workers.has_lost_a_worker_for(LOST_WORKER_S):
                raise PipelineFailed(
                    f"a worker process died ({workers.reason}); what is committed is kept, run again to continue"
                )
            is_late = reason is not None and time.monotonic() - stopped_at > drain_s + ABANDON_S
            if is_late and reason is not None and reason.kind == SIGNAL and _is_answering(layout):
                run.cancel()
                raise JobInterrupted(
                    f"{reason.message}; the shards at work did not end within {drain_s + ABANDON_S:g} s; what is "
                    "committed and journaled is kept"
                )
            run.join(POLL_S)


def _stop(run: PipelineThread, layout: RunLayout, reason: StopReason) -> None:
    """Ask all workers to stop; a run that plans is ended here, since nothing of it was asked or paid.

    Raises:
        JobInterrupted: the run was planning. The note stays: it says why the run is not finished.
    """
    announce_stop(layout, reason)
    with _store_errors(layout.output):
        is_planned = read_plan(layout) is not None
        if not is_planned:
            by = reason.message.partition(":")[0] if reason.kind == SIGNAL else reason.message
            reason = StopReason(reason.kind, f"{by} while planning; nothing was asked of the model yet")
        request_stop(layout, reason)
    if not is_planned:
        run.cancel()
        raise JobInterrupted(reason.message)


def _reason_to_stop(stop: threading.Event | None, deadline_at: float | None, drain_s: float) -> StopReason | None:
    if stop is not None and stop.is_set():
        kept = f"no further request left, and answers that arrived within {drain_s:g} s are kept"
        return StopReason(SIGNAL, f"stopped by {_name_signal(stop)}: {kept}")
    if deadline_at is not None and time.time() >= deadline_at:
        return StopReason("deadline", "[limits] deadline: is past")
    return None


def _name_signal(stop: threading.Event | None) -> str:
    return stop.name if isinstance(stop, StopSignal) else "a signal"


def _is_answering(layout: RunLayout) -> bool:
    """Whether a worker still holds a shard; one that publishes does not, and is not disturbed."""
    with contextlib.suppress(OSError):
        return any(lease.is_at_work for lease in read_leases(layout).values())
    return False
