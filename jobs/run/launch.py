"""Run a checked job: start the pipeline, watch it through the store, and say how it ended."""

import contextlib
import json
import logging
import threading
import time
from collections.abc import Callable, Generator, Sequence
from typing import Any

import apache_beam as beam
import grpc

from moebeam.jobs.check.beam_options import beam_options
from moebeam.jobs.check.preflight import CheckedJob, check_job
from moebeam.jobs.check.reuse import keep_fences
from moebeam.jobs.console.summary import PIPELINE_THREAD, ProgressSnapshot, RunStatus, RunSummary, exit_code_of
from moebeam.jobs.deploy.dataflow.dataflow_options import settle_options
from moebeam.jobs.deploy.dataflow.job_template import staged_summary, template_location, write_template
from moebeam.jobs.deploy.job_service import prepare_job_service, spell_rpc_error
from moebeam.jobs.output.run_record import RetryOf, RunRecord, keep_input
from moebeam.jobs.output.run_state import Watch, forget_gone_launchers, present, read_manifest
from moebeam.jobs.run.retry_failed import write_retry_plan
from moebeam.model_runner.encoding.remote_prompts import load_encoder
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
from moebeam.transforms.plan.plan_record import PlanRecord, read_plan
from moebeam.transforms.publish.manifest import cost_of, sole_amount
from moebeam.transforms.read.input_scan import InputScan

POLL_S = 0.25
LOST_WORKER_S = 15.0
"""How long Beam's local runner has to notice that one of its worker processes died."""

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
    """Run a job to its end, or to where it is stopped.

    Args:
        limit: answer only the first so many rows.
        beam_args: Beam options in Beam's snake_case.
        stop: when set, shards under way are finished and no further one is started.
        progress: called a few times a second.
        retry_of: answer these rejects of an earlier run instead of the input.
        retried: what `moebeam.jobs.run.retry_failed.prepare_retry` found of them; not needed once the output keeps it.
        reuse: take over what this earlier run answered.
    Raises:
        JobError: the job cannot run, or a step of it failed.
    """
    started = time.monotonic()
    options = beam_options(beam_args)
    settle_options(options, job, reuse and reuse.output)
    prepare_job_service(options)
    with _store_errors(job.output.path):
        checked = check_job(job, limit=limit, retry_of=retry_of, retried=retried, reuse=reuse)
        layout = checked.layout
        for warning in checked.warnings:
            _LOGGER.warning("%s", warning)
        manifest = read_manifest(layout)
        if manifest is not None and manifest["status"] == "complete":
            # The last launcher may have been killed right after it wrote the manifest.
            forget_gone_launchers(layout)
            return summary_of(manifest, job, "already_done", started)
        checked.identity.claim_output(layout, checked.kept)
        keep_input(layout, job.input, limit, checked.scan, is_retry=retry_of is not None)
        storage.remove_files([layout.stop, layout.failure])
        if reuse is not None:
            keep_fences(layout, reuse)
        planned = _plan_of(checked)
    pipeline = beam.Pipeline(options=options)
    build(pipeline, main_job := checked.main_job(planned))
    if (location := template_location(options)) is not None:
        write_template(pipeline, location)
        return staged_summary(checked, location, started)
    run = _PipelineThread(pipeline)
    _wait_for(run, checked, main_job.answer.limits.deadline_at, stop, progress)
    run.raise_failure(layout)
    with _store_errors(layout.output):
        storage.remove_files([layout.stop])
        manifest = read_manifest(layout)
    assert manifest is not None, "a pipeline that succeeded has written its manifest"
    if manifest.get("reason") == ON_ERROR:
        raise PipelineFailed(f"{manifest['reason_message']}; what is committed is kept, run again to continue")
    return summary_of(manifest, job, "succeeded" if manifest["status"] == "complete" else "incomplete", started)


def resume(
    record: RunRecord,
    job: Job,
    *,
    beam_args: Sequence[str] = (),
    stop: threading.Event | None = None,
    progress: OnProgress | None = None,
) -> RunSummary:
    """Go on with a run from what its output folder keeps; one that is finished is summed up, and nothing is looked at.

    Args:
        job: the record's, with what may change changed.
    Raises:
        JobError: as of `launch`.
    """
    started = time.monotonic()
    with _store_errors(record.layout.output):
        manifest = read_manifest(record.layout)
    if manifest is not None and manifest["status"] == "complete":
        return summary_of(manifest, job, "already_done", started)
    return launch(
        job,
        limit=record.limit,
        beam_args=beam_args,
        stop=stop,
        progress=progress,
        retry_of=record.retry_of,
        reuse=record.reuse,
    )


@contextlib.contextmanager
def _store_errors(output: str) -> Generator[None]:
    """What the output's store reports before and after the pipeline, as an error of the job."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"[output] path {output!r}: cannot be used: {error}") from error


def _plan_of(checked: CheckedJob) -> PlanRecord | None:
    """The plan of an earlier attempt; of a retry it is made here, from the plan of the run it retries."""
    planned = read_plan(checked.layout)
    if planned is not None or checked.retry_of is None:
        return planned
    engine = checked.engine
    return write_retry_plan(
        checked.layout,
        checked.retry_of,
        checked.job,
        parts=checked.identity.parts,
        encoder=load_encoder(engine.path, engine.options.encoding, engine.name),
    )


def _wait_for(
    run: "_PipelineThread",
    checked: CheckedJob,
    deadline_at: float | None,
    stop: threading.Event | None,
    progress: OnProgress | None,
) -> None:
    """Start the pipeline and watch it until it ends, or until it is not worth waiting for."""
    layout = checked.layout
    currency = checked.price_line.currency if checked.price_line is not None else None
    watch = Watch(layout, rows_total=checked.scan.num_rows, currency=currency)
    is_draining = False
    with present(layout) as presence, WorkerWatch() as workers:
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
                # A look that fails while files come and go is only a look; the next one is soon.
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
    """The pipeline beside the launcher, which shows progress and listens to signals meanwhile."""

    def __init__(self, pipeline: beam.Pipeline) -> None:
        super().__init__(name=PIPELINE_THREAD, daemon=True)
        self._pipeline = pipeline
        self._failure: Exception | None = None

    def run(self) -> None:
        try:
            self._pipeline.run().wait_until_finish()
        except Exception as error:  # whatever a runner raises is shown by the launcher
            self._failure = error

    def raise_failure(self, layout: RunLayout) -> None:
        """Raise what the pipeline failed with, in the words of the step that failed where it left any."""
        if self._failure is None:
            return
        recorded = read_failure(layout)
        if recorded is None:
            raise PipelineFailed(f"the pipeline failed: {_last_line(self._failure)}") from self._failure
        message = f"{recorded.step}: {recorded.error}: {recorded.message}"
        raise PipelineFailed(f"{message}; what is committed is kept, run again to continue") from self._failure


def summary_of(manifest: dict[str, Any], job: Job, status: RunStatus, started: float) -> RunSummary:
    """What a manifest says of a run, as the end of an attempt.

    Args:
        started: of this attempt, by the monotonic clock.
    """
    totals = RecordJson(Totals).decode(json.dumps(manifest["totals"]).encode())
    wasted = RecordJson(Totals).decode(json.dumps(manifest["wasted"]).encode()) if "wasted" in manifest else Totals()
    cost, currency = cost_of(totals)
    cached = totals.cached_tokens
    is_complete = manifest["status"] == "complete"
    message = None
    if not is_complete:
        left = manifest["num_shards"] - manifest["num_committed_shards"]
        why = manifest.get("reason_message") or "stopped"
        message = f"{why}; {left} of {manifest['num_shards']} shards left; moebeam resume {job.output.path} goes on"
    return RunSummary(
        status=status,
        exit_code=exit_code_of(
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
        currency=currency or cost_of(wasted)[1],
        price_book=manifest["price_book"],
        elapsed_s=time.monotonic() - started,
        message=message,
        reason=manifest.get("reason"),
        cost_wasted=cost_of(wasted)[0],
        num_lost_calls=totals.num_lost_calls + wasted.num_lost_calls,
        lost_cost_at_most=sole_amount((totals + wasted).lost_costs_at_most)[0],
    )


def _last_line(error: Exception) -> str:
    if isinstance(error, grpc.RpcError):
        return f"the job server is gone: {spell_rpc_error(error)}; the job may still run on its cluster"
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
