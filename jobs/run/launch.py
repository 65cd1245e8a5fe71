"""Checks a job, runs its pipeline, watches it through the store, and summarizes the outcome."""

import contextlib
import json
import logging
import threading
import time
from collections.abc import Callable, Generator, Sequence
from typing import Any

import apache_beam as beam
import grpc

from moebeam.jobs.check.beam_options import parse_beam_options, runs_here
from moebeam.jobs.check.preflight import CheckedJob, check_job
from moebeam.jobs.check.reuse import save_fences
from moebeam.jobs.console.summary import PIPELINE_THREAD, ProgressSnapshot, RunStatus, RunSummary, choose_exit_code
from moebeam.jobs.deploy.dataflow.dataflow_options import complete_dataflow_options
from moebeam.jobs.deploy.dataflow.job_template import summarize_template, template_location, write_template
from moebeam.jobs.deploy.job_service import format_rpc_error, prepare_job_service
from moebeam.jobs.output.run_record import RetryOf, RunRecord, save_input
from moebeam.jobs.output.run_state import RunWatch, announce_presence, read_manifest, remove_dead_launchers
from moebeam.jobs.run.main_job import make_main_job
from moebeam.jobs.run.retry_failed import write_retry_plan
from moebeam.model_runner.protocol import require_packages
from moebeam.pipelines.main_job import build
from moebeam.schemas.answers import Totals
from moebeam.schemas.errors import JobInterrupted, OutputError, PipelineFailed
from moebeam.schemas.job.sections import Job
from moebeam.schemas.store import storage
from moebeam.schemas.store.record_json import RecordJson
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.transforms.answer.reuse import ReuseSource
from moebeam.transforms.durable.failure import WorkerWatch, read_failure
from moebeam.transforms.durable.stop import BY_SIGNAL, ON_ERROR, StopReason, request_stop
from moebeam.transforms.plan.plan_record import read_plan
from moebeam.transforms.publish.manifest import find_cost, find_sole_amount
from moebeam.transforms.read.input_scan import InputScan

POLL_S = 0.25
LOST_WORKER_S = 15.0
"""How long Beam's local runner may take to notice that a worker process died."""

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
        stop: once set, running shards finish and no further one starts.
        progress: called a few times per second.
        retry_of: answer these rejects of an earlier run instead of the input.
        retried: from `moebeam.jobs.run.retry_failed.prepare_retry`; not needed once the output holds it.
        reuse: reuse the answers of this earlier run.
    Raises:
        JobError: the job cannot run, or a step of it failed.
    """
    started = time.monotonic()
    options = parse_beam_options(beam_args)
    complete_dataflow_options(options, job, reuse and reuse.output)
    prepare_job_service(options)
    with _store_errors(job.output.path):
        checked = check_job(job, limit=limit, retry_of=retry_of, retried=retried, reuse=reuse)
        layout = RunLayout(job.output.path)
        for warning in checked.warnings:
            _LOGGER.warning("%s", warning)
        manifest = read_manifest(layout)
        if manifest is not None and manifest["status"] == "complete":
            # The last launcher may have been killed right after writing the manifest.
            remove_dead_launchers(layout)
            return summarize_run(manifest, job, "already_done", started)
        if runs_here(options):
            require_packages(job.model)
        checked.claim_output()
        save_input(layout, checked.request, checked.scan)
        storage.remove_files([layout.stop, layout.failure])
        if reuse is not None:
            save_fences(layout, reuse)
        planned = read_plan(layout)
        if planned is None and retry_of is not None:
            # A retry reads no input: its plan is taken from its source's plan.
            planned = write_retry_plan(
                layout, retry_of, job, parts=checked.identity.parts, encoder=checked.engine.encoder
            )
    pipeline = beam.Pipeline(options=options)
    build(pipeline, main_job := make_main_job(checked, planned))
    if (location := template_location(options)) is not None:
        write_template(pipeline, location)
        return summarize_template(checked, location, started)
    run = _PipelineThread(pipeline)
    _wait_for(run, checked, main_job.answer.limits.deadline_at, stop, progress)
    run.raise_failure(layout)
    with _store_errors(layout.output):
        storage.remove_files([layout.stop])
        manifest = read_manifest(layout)
    assert manifest is not None, "a pipeline that succeeded has written its manifest"
    if manifest.get("reason") == ON_ERROR:
        raise PipelineFailed(f"{manifest['reason_message']}; what is committed is kept, run again to continue")
    return summarize_run(manifest, job, "succeeded" if manifest["status"] == "complete" else "incomplete", started)


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
        return summarize_run(manifest, job, "already_done", started)
    return launch(
        job,
        limit=record.request.limit,
        beam_args=beam_args,
        stop=stop,
        progress=progress,
        retry_of=record.request.retry_of,
        reuse=record.request.reuse,
    )


@contextlib.contextmanager
def _store_errors(output: str) -> Generator[None]:
    """Turn the store's errors before and after the pipeline into `OutputError`."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"[output] path {output!r}: cannot be used: {error}") from error


def _wait_for(
    run: "_PipelineThread",
    checked: CheckedJob,
    deadline_at: float | None,
    stop: threading.Event | None,
    progress: OnProgress | None,
) -> None:
    """Run the pipeline and watch it until it ends or must be abandoned."""
    layout = RunLayout(checked.request.job.output.path)
    watch = RunWatch(layout, rows_total=checked.scan.num_rows, currency=checked.currency)
    is_draining = False
    with announce_presence(layout) as presence, WorkerWatch() as workers:
        run.start()
        while run.is_alive():
            run.join(POLL_S)
            presence.renew()
            reason = _reason_to_stop(stop, deadline_at)
            if reason is not None and not is_draining:
                with _store_errors(layout.output):
                    request_stop(layout, reason)
                    is_planned = read_plan(layout) is not None
                if not is_planned:
                    raise JobInterrupted(f"{reason.message} while planning; nothing was asked of the model yet")
                is_draining = True
            if progress is not None:
                # Files may vanish during a read; the next snapshot follows soon.
                with contextlib.suppress(OSError):
                    progress(watch.snapshot())
            if workers.has_lost_a_worker_for(LOST_WORKER_S):
                raise PipelineFailed(
                    f"a worker process died ({workers.reason}); what is committed is kept, run again to continue"
                )


def _reason_to_stop(stop: threading.Event | None, deadline_at: float | None) -> StopReason | None:
    if stop is not None and stop.is_set():
        return BY_SIGNAL
    if deadline_at is not None and time.time() >= deadline_at:
        return StopReason("deadline", "[limits] deadline: is past")
    return None


class _PipelineThread(threading.Thread):
    """Runs the pipeline while the launcher shows progress and handles signals."""

    def __init__(self, pipeline: beam.Pipeline) -> None:
        super().__init__(name=PIPELINE_THREAD, daemon=True)
        self._pipeline = pipeline
        self._failure: Exception | None = None

    def run(self) -> None:
        try:
            self._pipeline.run().wait_until_finish()
        except Exception as error:  # the launcher reports whatever a runner raises
            self._failure = error

    def raise_failure(self, layout: RunLayout) -> None:
        """Raise the pipeline's failure, with the failed step's record if there is one."""
        if self._failure is None:
            return
        recorded = read_failure(layout)
        if recorded is None:
            raise PipelineFailed(f"the pipeline failed: {_last_line(self._failure)}") from self._failure
        message = f"{recorded.step}: {recorded.error}: {recorded.message}"
        raise PipelineFailed(f"{message}; what is committed is kept, run again to continue") from self._failure


def summarize_run(manifest: dict[str, Any], job: Job, status: RunStatus, started: float) -> RunSummary:
    """Summarize a manifest at the end of an attempt.

    Args:
        started: start of this attempt, on the monotonic clock.
    """
    totals = RecordJson(Totals).decode(json.dumps(manifest["totals"]).encode())
    wasted = RecordJson(Totals).decode(json.dumps(manifest["wasted"]).encode()) if "wasted" in manifest else Totals()
    cost, currency = find_cost(totals)
    cached = totals.cached_tokens
    is_complete = manifest["status"] == "complete"
    message = None
    if not is_complete:
        left = manifest["num_shards"] - manifest["num_committed_shards"]
        why = manifest.get("reason_message") or "stopped"
        message = f"{why}; {left} of {manifest['num_shards']} shards left; moebeam resume {job.output.path} goes on"
    return RunSummary(
        status=status,
        exit_code=choose_exit_code(
            is_complete=is_complete,
            rows_in=manifest["rows_in"],
            num_rejects=totals.num_rejects,
            num_unreadable=totals.num_unreadable,
            max_reject_share=job.output.max_reject_share,
        ),
        run_id=manifest["run_id"],
        output=job.output.path,
        rows_in=manifest["rows_in"],
        num_results=totals.num_results,
        num_reused=totals.num_reused,
        num_rejects=totals.num_rejects,
        num_unreadable=totals.num_unreadable,
        rejects_by_type=totals.rejects_by_type or {},
        prompt_tokens=totals.prompt_tokens,
        cached_tokens=cached,
        computed_tokens=None if cached is None else totals.prompt_tokens - cached,
        completion_tokens=totals.completion_tokens,
        reasoning_tokens=totals.reasoning_tokens,
        max_hit_rate=manifest["max_hit_rate"],
        cost=cost,
        cost_allocated=cost,
        cost_basis=None if cost is None else ("upper_bound" if totals.num_upper_bound else "exact"),
        currency=currency or find_cost(wasted)[1],
        price_book=manifest["price_book"],
        elapsed_s=time.monotonic() - started,
        message=message,
        reason=manifest.get("reason"),
        cost_wasted=find_cost(wasted)[0],
        num_lost_calls=totals.num_lost_calls + wasted.num_lost_calls,
        lost_cost_at_most=find_sole_amount((totals + wasted).lost_costs_at_most)[0],
    )


def _last_line(error: Exception) -> str:
    if isinstance(error, grpc.RpcError):
        return f"the job server is gone: {format_rpc_error(error)}; the job may still run on its cluster"
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
