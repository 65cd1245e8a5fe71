"""*answer*: a planned shard becomes committed tables, in one step without a shuffle between payment and durability.

Before it: *plan*. After it: *publish*. The step composes pure iterator functions, run -> validate -> account, and ends
in one commit; its output is the commit record. A shard that is committed already is not run again.
"""

import contextlib
import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any

import apache_beam as beam
import pyarrow as pa
from apache_beam.utils.shared import Shared

from model_runner.prefix_tree import token_ids_of
from model_runner.protocol import CountingRunner, EngineConfig, ModelRunner, load_runner
from schemas import storage
from schemas.answer_schema import AnswerSchema
from schemas.layout import RunLayout
from schemas.records import Request
from transforms.account import AccountedAnswer, account
from transforms.chat_messages import parse_messages
from transforms.commit import ShardCommit, commit_shard, read_commit
from transforms.failure import recorded_failure
from transforms.heartbeat import Beat, Heartbeat
from transforms.plan import PlannedShard
from transforms.price_book import PriceBook
from transforms.render import sampling_of
from transforms.run import run
from transforms.shard_tables import PlannedRows, ShardNames, shard_tables
from transforms.sorted_runs import read_rows
from transforms.validate import validate


@dataclass(frozen=True, slots=True)
class AnswerSpec:
    """How a job's shards are answered; picklable, without a loaded model.

    Attributes:
        provider, model: whose prices apply; None means what each completion names.
    """

    run_id: str
    layout: RunLayout
    engine: EngineConfig
    schema: AnswerSchema | None
    prices: PriceBook | None
    provider: str | None = None
    model: str | None = None


class AnswerShards(beam.PTransform[Any, Any]):
    """Planned shards -> commit records."""

    def __init__(self, spec: AnswerSpec) -> None:
        super().__init__()
        self._spec = spec

    def expand(self, pcoll: "beam.PCollection[PlannedShard]") -> "beam.PCollection[ShardCommit]":
        committed: Any = (
            pcoll | "SpreadShards" >> beam.Reshuffle() | "AnswerShard" >> beam.ParDo(_AnswerShard(self._spec, Shared()))
        )
        return committed


class _AnswerShard(beam.DoFn):
    """Shares one loaded engine among the threads of a worker process."""

    def __init__(self, spec: AnswerSpec, shared: Shared) -> None:
        self._spec = spec
        self._shared = shared
        self._num_rows = beam.metrics.Metrics.counter("answer", "num_rows")

    def setup(self) -> None:
        """Leave the terminal's process group in a worker process, so that Ctrl-C drains instead of killing it."""
        main = getattr(sys.modules.get("__main__"), "__spec__", None)
        if main is not None and main.name == "apache_beam.runners.worker.sdk_worker_main":
            with contextlib.suppress(OSError):
                os.setpgid(0, 0)

    def process(self, element: PlannedShard) -> Iterator[ShardCommit]:
        with recorded_failure(self._spec.layout, "answer"):
            commit = self._commit_of(element)
        if commit is not None:
            yield commit

    def _commit_of(self, planned: PlannedShard) -> ShardCommit | None:
        """The shard's commit, made now or before; None if the run was asked to stop."""
        spec = self._spec
        commit = read_commit(spec.layout, planned.shard)
        if commit is not None or storage.exists(spec.layout.stop):
            return commit
        table = read_rows(spec.layout.shard_plan(planned.shard))
        # Loaded only once there is a shard to answer: a finished or empty run needs no model.
        runner = self._shared.acquire(self._load) if planned.num_requests else None
        self._num_rows.inc(planned.num_rows)
        return answer_shard(planned.shard, table, runner, spec)

    def _load(self) -> ModelRunner:
        return load_runner(self._spec.engine)


def answer_shard(shard: str, table: pa.Table, runner: ModelRunner | None, spec: AnswerSpec) -> ShardCommit:
    """Run, validate and account one shard, and commit its tables.

    Args:
        table: the shard's plan, rows of `schemas.tables.plan_schema`.
        runner: may be None for a shard without requests.
    """
    rows = PlannedRows.of(table)
    before = counters_of(runner)
    answers: dict[int, AccountedAnswer] = {}
    if rows.asked:
        assert runner is not None, f"shard {shard} has requests but no engine"
        completions = run(requests_of(rows), runner)
        validated = validate(completions, spec.schema)
        accounted = account(validated, spec.prices, spec.provider, spec.model)
        answers = {int(a.answer.completion.request_id): a for a in _with_heartbeat(shard, rows, accounted, spec.layout)}
    names = ShardNames(spec.run_id, shard, spec.prices.version if spec.prices else None)
    counted = {
        name: value if name.startswith("peak_") else value - before[name] for name, value in counters_of(runner).items()
    }
    return commit_shard(spec.layout, spec.run_id, shard, shard_tables(rows, answers, names), counted)


def counters_of(runner: ModelRunner | None) -> Mapping[str, float]:
    """What an engine has counted so far; nothing where it does not count."""
    return dict(runner.counters()) if isinstance(runner, CountingRunner) else {}


def requests_of(rows: PlannedRows) -> Iterator[Request]:
    """The requests of a shard in token order, each made when it is pulled; `request_id` is the row's index."""
    columns = [rows.table.column(name) for name in ("prefix_key", "messages", "sampling", "tenant")]
    for row in rows.asked:
        key, messages, sampling, tenant = (column[row].as_py() for column in columns)
        yield Request(
            request_id=str(row),
            prompt_token_ids=token_ids_of(key),
            messages=parse_messages(json.loads(messages)),
            sampling=sampling_of(sampling),
            tenant=tenant,
        )


def _with_heartbeat(
    shard: str, rows: PlannedRows, accounted: Iterable[AccountedAnswer], layout: RunLayout
) -> Iterator[AccountedAnswer]:
    heartbeat = Heartbeat(layout, "answer")
    beat, cost = Beat(), Decimal(0)
    for answer in accounted:
        completion = answer.answer.completion
        group = 1 + len(rows.followers.get(int(completion.request_id), ()))
        usage = completion.usage
        cost += answer.charge.cost if answer.charge else 0
        beat = replace(
            beat,
            rows_done=beat.rows_done + group,
            num_rejects=beat.num_rejects + (group if answer.answer.error else 0),
            prompt_tokens=beat.prompt_tokens + usage.prompt_tokens,
            cached_tokens=beat.cached_tokens + (usage.cached_tokens or 0),
            completion_tokens=beat.completion_tokens + usage.completion_tokens,
        )
        if heartbeat.is_due(shard):
            heartbeat.beat(shard, replace(beat, cost=format(cost, "f")))
        yield answer
