"""*answer*: a planned shard becomes committed tables, in one step without a shuffle between payment and durability.

Before it: *plan*. After it: *publish*. The step composes pure iterator functions, run -> validate (which may ask
again) -> account, and ends in one commit; its output is the commit record. A shard that is committed already is not run
again.
"""

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import apache_beam as beam
from apache_beam.utils.shared import Shared

from moebeam.schemas.answers import ShardCommit
from moebeam.schemas.store import storage
from moebeam.transforms.answer.answer_shard import AnswerSpec, EngineProcess, LoadedEngine, answer_rows, prepare_rows
from moebeam.transforms.answer.budget import ShardBudget
from moebeam.transforms.answer.expectation import Ceiling
from moebeam.transforms.answer.shard_events import shard_counters
from moebeam.transforms.answer.spending import RunSpending, share_spending
from moebeam.transforms.beam.coders import register_record
from moebeam.transforms.beam.counters import add_to_counters
from moebeam.transforms.beam.late_spec import LateSpec, do_with
from moebeam.transforms.durable.commit import read_commit
from moebeam.transforms.durable.failure import record_failure
from moebeam.transforms.durable.journal_file import read_journal
from moebeam.transforms.durable.lease import POLL_S, HeldLease, ShardLease, has_lost_a_holder
from moebeam.transforms.durable.stop import find_stop, request_stop, wait_unless_stopped
from moebeam.transforms.log_events import log_event
from moebeam.transforms.plan.plan_record import PlannedShard
from moebeam.transforms.plan.sorted_runs import read_rows

register_record(ShardCommit)


class AnswerShards(beam.PTransform[Any, Any]):
    """Planned shards -> commit records.

    Args:
        resources: Beam's resource hints for workers that answer, by name. They are on the one step that holds the
            engine: on the whole transform they would reach into the steps that a runner fuses with its shuffle.
    """

    def __init__(self, spec: AnswerSpec | LateSpec[AnswerSpec], resources: Mapping[str, str] | None = None) -> None:
        super().__init__()
        self._spec = spec
        self._resources = resources or {}

    def expand(self, pcoll: "beam.PCollection[PlannedShard]") -> "beam.PCollection[ShardCommit]":
        answer = beam.ParDo(*do_with(partial(_AnswerShard, shared=Shared()), self._spec))
        answer = answer.with_output_types(ShardCommit).with_resource_hints(**self._resources)
        committed: Any = pcoll | "SpreadShards" >> beam.Reshuffle() | "AnswerShard" >> answer
        return committed


class _AnswerShard(beam.DoFn):
    """Shares one loaded engine among the threads of a worker process."""

    def __init__(self, spec: AnswerSpec, shared: Shared) -> None:
        self._spec = spec
        self._shared = shared
        self._spending: RunSpending | None = None

    def setup(self) -> None:
        """Leave the terminal's process group in a worker process, so that Ctrl-C drains instead of killing it."""
        spec = self._spec
        # Held here, since only as long as somebody does the threads of the process have one account.
        self._spending = share_spending(spec.attempt, spec.layout, spec.accounting)
        main = getattr(sys.modules.get("__main__"), "__spec__", None)
        if main is not None and main.name == "apache_beam.runners.worker.sdk_worker_main":
            with contextlib.suppress(OSError):
                os.setpgid(0, 0)

    def process(self, element: PlannedShard) -> Iterator[ShardCommit]:
        with record_failure(self._spec.layout, "answer"):
            commit = self._find_commit(element)
        if commit is not None:
            yield commit

    def _find_commit(self, planned: PlannedShard) -> ShardCommit | None:
        """The shard's commit, made now, before or by a copy at work; None if the run was asked to stop.

        An attempt that loses its lease on the way waits for its successor's commit.
        """
        layout, shard = self._spec.layout, planned.shard
        commit = read_commit(layout, shard)
        lease = ShardLease(layout, shard)
        while commit is None and find_stop(layout) is None and not storage.exists(layout.stop):
            with lease.hold() as held:
                # Looked at again under the lease: its last holder may have committed just before it let go.
                commit = read_commit(layout, shard)
                if commit is None and held is not None:
                    commit = self._answer(planned, held)
                    if commit is not None or not held.is_lost:
                        return commit
            if commit is None:
                wait_unless_stopped(layout, POLL_S)
        return commit

    def _answer(self, planned: PlannedShard, held: HeldLease) -> ShardCommit | None:
        """The shard's commit; None if the run has to stop before or within it, or the lease is lost."""
        spec = self._spec
        assert self._spending is not None, "a DoFn is set up before it processes"
        ceiling = Ceiling.from_engine(spec.accounting, spec.engine)
        budget = ShardBudget(spec.limits, self._spending, ceiling, planned.shard, held)
        if self._is_spent(planned, self._spending):
            return None
        rows = prepare_rows(read_rows(spec.layout.shard_plan(planned.shard)), spec)
        # Loaded only once there is something to answer: a finished or empty run needs no model.
        engine = self._shared.acquire(self._load) if rows.asked else None
        add_to_counters("answer", {"num_rows": planned.num_rows})
        where = {"run": spec.accounting.run_id, "shard": planned.shard}
        log_event("shard_begun", **where, num_rows=planned.num_rows, num_asked=len(rows.asked))
        started = time.monotonic()
        commit = answer_rows(planned.shard, rows, engine, spec, budget)
        if commit is not None:
            add_to_counters("answer", shard_counters(commit, time.monotonic() - started))
        elif budget.stop is not None:
            log_event("shard_stopped", **where, reason=str(budget.stop.kind))
        return commit

    def _is_spent(self, planned: PlannedShard, spending: RunSpending) -> bool:
        """Whether nothing is left to spend on a shard, whose journal cannot finish it either; then ask all to stop."""
        spec = self._spec
        if not spec.limits.has_any or not planned.num_requests or spec.reuse is not None:
            return False
        spending.invalidate()
        budget = ShardBudget(spec.limits, spending)
        kept = read_journal(spec.layout, planned.shard).entries
        if budget.may_ask() or sum(entry.is_answer for entry in kept) >= planned.num_requests:
            return False
        if budget.stop is not None:
            request_stop(spec.layout, budget.stop)
        return True

    def _load(self) -> LoadedEngine:
        failures = self._spec.failures
        engine = replace(self._spec.engine, run_id=self._spec.accounting.run_id, failures=failures)
        return LoadedEngine.load(engine, self._engine_process(), failures.max_silence_s)

    def _engine_process(self) -> EngineProcess:
        options, failures = self._spec.engine.options, self._spec.failures
        if options.is_remote:
            return "shared"
        if options.is_self_healing:
            return "host" if failures.engine_process == "host" else "shared"
        if failures.engine_process != "auto":
            return failures.engine_process
        is_in_danger = failures.max_silence_s is not None or has_lost_a_holder(self._spec.layout)
        return "own" if is_in_danger else "shared"
