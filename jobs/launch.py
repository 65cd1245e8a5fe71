"""Run a checked job: start the pipeline, watch it through the store, and say how it ended."""

import contextlib
import json
import logging
import threading
import time
from collections.abc import Callable, Sequence
from decimal import Decimal
from typing import Any

import apache_beam as beam

from jobs.beam_options import beam_options
from jobs.preflight import CheckedJob, check_job
from jobs.summary import ProgressSnapshot, RunStatus, RunSummary, exit_code_of
from pipelines.main_job import build
from schemas import storage
from schemas.errors import JobInterrupted, PipelineFailed
from schemas.job import Job
from schemas.layout import RunLayout
from transforms.coders import RecordCoder
from transforms.commit import ShardCommit, Totals, read_commit
from transforms.failure import read_failure
from transforms.heartbeat import read_beats
from transforms.plan import PlanRecord, read_plan
from transforms.publish import cost_of

POLL_S = 0.25
_LOGGER = logging.getLogger(__name__)

OnProgress = Callable[[ProgressSnapshot], None]


def launch(
    job: Job,
    *,
    limit: int | None = None,
    beam_args: Sequence[str] = (),
    stop: threading.Event | None = None,
    progress: OnProgress | None = None,
) -> RunSummary:
    """Run a job to its end, or to where it is stopped.

    Args:
        limit: answer only the first so many rows.
        beam_args: Beam options in Beam's snake_case.
        stop: when set, shards under way are finished and no further one is started.
        progress: called a few times a second.
    Raises:
        JobError: the job cannot run, or a step of it failed.
    """
    started = time.monotonic()
    options = beam_options(beam_args)
    checked = check_job(job, limit=limit)
    layout = checked.layout
    for warning in checked.warnings:
        _LOGGER.warning("%s", warning)
    manifest = _read_manifest(layout)
    if manifest is not None and manifest["status"] == "complete":
        return _summary(manifest, checked, "already_done", started)
    checked.identity.claim_output(layout)
    storage.remove_files([layout.stop, layout.failure])
    pipeline = beam.Pipeline(options=options)
    build(pipeline, checked.main_job(read_plan(layout)))
    watch = _Watch(checked, started)
    run = _PipelineThread(pipeline)
    run.start()
    is_draining = False
    while run.is_alive():
        run.join(POLL_S)
        if stop is not None and stop.is_set() and not is_draining:
            storage.write_note(layout.stop, b"")
            if read_plan(layout) is None:
                raise JobInterrupted("stopped while planning; nothing was asked of the model yet")
            is_draining = True
        if progress is not None:
            # A look that fails while files come and go is only a look; the next one is soon.
            with contextlib.suppress(OSError):
                progress(watch.snapshot())
    run.raise_failure(layout)
    storage.remove_files([layout.stop])
    manifest = _read_manifest(layout)
    assert manifest is not None, "a pipeline that succeeded has written its manifest"
    return _summary(manifest, checked, "succeeded" if manifest["status"] == "complete" else "incomplete", started)


class _PipelineThread(threading.Thread):
    """The pipeline beside the launcher, which shows progress and listens to signals meanwhile."""

    def __init__(self, pipeline: beam.Pipeline) -> None:
        super().__init__(name="pipeline", daemon=True)
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


class _Watch:
    """How far a run is, read from the store."""

    def __init__(self, checked: CheckedJob, started: float) -> None:
        self._checked = checked
        self._layout = checked.layout
        self._started = started
        self._plan: PlanRecord | None = None
        self._commits: dict[str, ShardCommit] = {}

    def snapshot(self) -> ProgressSnapshot:
        """One look at the plan, the commits and the heartbeats."""
        layout = self._layout
        self._plan = self._plan or read_plan(layout)
        line = self._checked.price_line
        if self._plan is None:
            rows_done = sum(beat.rows_done for beat in read_beats(layout, "plan").values())
            total = self._checked.scan.num_rows
            return self._snapshot("plan", rows_done, total, Totals(cached_tokens=0), 0, Decimal(0) if line else None)
        for name in storage.list_names(layout.commits, ".json"):
            shard = name.removesuffix(".json")
            if shard not in self._commits and (commit := read_commit(layout, shard)) is not None:
                self._commits[shard] = commit
        totals = sum((commit.totals for commit in self._commits.values()), Totals(costs={}, rejects_by_type={}))
        beats = [beat for shard, beat in read_beats(layout, "answer").items() if shard not in self._commits]
        rows_done = totals.num_results + totals.num_rejects + totals.num_unreadable
        answering = Totals(
            num_rejects=sum(beat.num_rejects for beat in beats),
            prompt_tokens=sum(beat.prompt_tokens for beat in beats),
            cached_tokens=sum(beat.cached_tokens for beat in beats),
            completion_tokens=sum(beat.completion_tokens for beat in beats),
        )
        cost = None
        if line is not None:
            cost = (cost_of(totals)[0] or Decimal(0)) + sum((Decimal(beat.cost) for beat in beats), Decimal(0))
        is_answered = len(self._commits) == len(self._plan.shards)
        stage = "publish" if is_answered else "answer"
        done = rows_done + sum(beat.rows_done for beat in beats)
        return self._snapshot(stage, done, self._plan.num_rows, totals + answering, len(self._commits), cost)

    def _snapshot(
        self, stage: str, rows_done: int, rows_total: int, totals: Totals, shards_done: int, cost: Decimal | None
    ) -> ProgressSnapshot:
        line = self._checked.price_line
        return ProgressSnapshot(
            stage=stage,
            rows_done=rows_done,
            rows_total=rows_total,
            shards_done=shards_done,
            shards_total=len(self._plan.shards) if self._plan is not None else None,
            prompt_tokens=totals.prompt_tokens,
            cached_tokens=totals.cached_tokens or 0,
            completion_tokens=totals.completion_tokens,
            num_rejects=totals.num_rejects,
            cost=cost,
            currency=line.currency if line is not None else None,
            elapsed_s=time.monotonic() - self._started,
        )


def _read_manifest(layout: RunLayout) -> dict[str, Any] | None:
    with contextlib.suppress(FileNotFoundError):
        return json.loads(storage.read_bytes(layout.manifest))
    return None


def _summary(manifest: dict[str, Any], checked: CheckedJob, status: RunStatus, started: float) -> RunSummary:
    totals = RecordCoder(Totals).decode(json.dumps(manifest["totals"]).encode())
    cost, currency = cost_of(totals)
    cached = totals.cached_tokens
    is_complete = manifest["status"] == "complete"
    message = None
    if not is_complete:
        left = manifest["num_shards"] - manifest["num_committed_shards"]
        message = f"stopped with {left} of {manifest['num_shards']} shards left; run the same command to continue"
    return RunSummary(
        status=status,
        exit_code=exit_code_of(
            is_complete=is_complete,
            rows_in=manifest["rows_in"],
            num_rejects=totals.num_rejects,
            num_unreadable=totals.num_unreadable,
            max_reject_share=checked.job.output.max_reject_share,
        ),
        run_id=manifest["run_id"],
        output=checked.layout.output,
        rows_in=manifest["rows_in"],
        num_results=totals.num_results,
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
        currency=currency,
        price_book=manifest["price_book"],
        elapsed_s=time.monotonic() - started,
        message=message,
    )


def _last_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
