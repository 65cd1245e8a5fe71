"""*answer*: a planned shard becomes committed tables, in one step without a shuffle between payment and durability.

Before it: *plan*. After it: *publish*. The step composes pure iterator functions, run -> validate (which may ask
again) -> account, and ends in one commit; its output is the commit record. A shard that is committed already is not run
again.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Any, Literal

import apache_beam as beam
import pyarrow as pa
from apache_beam.utils.shared import Shared

from model_runner.prefix_tree import token_ids_of
from model_runner.prompt_encoder import PromptEncoder
from model_runner.protocol import CONSTRAINED_ENGINES, CountingRunner, EngineConfig, ModelRunner, load_runner
from schemas import storage
from schemas.job import RepairSection
from schemas.layout import RunLayout
from schemas.output_type import OutputType
from schemas.records import Request
from transforms.account import AccountedAnswer, account
from transforms.answer_terms import TermsBook
from transforms.budget import BudgetedRunner, Limits, RunSpending, ShardBudget, Spent
from transforms.chat_messages import parse_messages
from transforms.commit import ShardCommit, commit_shard, read_commit
from transforms.failure import recorded_failure
from transforms.grammar_book import GrammarBook
from transforms.heartbeat import Beat, Heartbeat
from transforms.lease import POLL_S, ShardLease
from transforms.plan import PlannedShard
from transforms.price_book import PriceBook
from transforms.render import SchemaInPrompt, sampling_of
from transforms.repair import Repair
from transforms.shard_tables import PlannedRows, ShardNames, shard_tables
from transforms.sorted_runs import read_rows
from transforms.stop import ON_ERROR, StopReason, request_stop
from transforms.validate import validate
from transforms.waste import record_waste


@dataclass(frozen=True, slots=True)
class AnswerSpec:
    """How a job's shards are answered; picklable, without a loaded model.

    Attributes:
        terms: what answers must keep.
        is_constrained: whether engines in process are held to the terms while they decode.
        output_type: of the typed column of answers, where the job has a schema.
        provider, model: whose prices apply; None means what each completion names.
        on_error: whether a row that the engine cannot answer is rejected, or stops the run.
    """

    run_id: str
    layout: RunLayout
    engine: EngineConfig
    terms: TermsBook
    prices: PriceBook | None
    repair: RepairSection = field(default_factory=RepairSection)
    schema_in_prompt: SchemaInPrompt = "auto"
    is_constrained: bool = True
    output_type: OutputType | None = None
    provider: str | None = None
    model: str | None = None
    limits: Limits = field(default_factory=Limits)
    on_error: Literal["reject", "fail"] = "reject"


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


@dataclass(frozen=True, slots=True, weakref_slot=True)
class LoadedEngine:
    """What the threads of a worker process share: the engine, and the encoding of its prompts."""

    runner: ModelRunner
    encoder: PromptEncoder

    @classmethod
    def load(cls, config: EngineConfig) -> "LoadedEngine":
        """Load both.

        Raises:
            EngineLoadError: the engine or its tokenizer cannot be loaded.
        """
        return cls(load_runner(config), PromptEncoder.load(config.path, config.encoding))


class _AnswerShard(beam.DoFn):
    """Shares one loaded engine among the threads of a worker process."""

    def __init__(self, spec: AnswerSpec, shared: Shared) -> None:
        self._spec = spec
        self._shared = shared
        self._spending = RunSpending(spec.layout)
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
        """The shard's commit, made now, before or by a copy at work; None if the run was asked to stop."""
        layout, shard = self._spec.layout, planned.shard
        commit = read_commit(layout, shard)
        lease = ShardLease(layout, shard)
        while commit is None and not storage.exists(layout.stop):
            with lease.claimed() as is_ours:
                # Looked at again under the lease: its last holder may have committed just before it let go.
                commit = read_commit(layout, shard)
                if commit is None and is_ours:
                    return self._answered(planned)
            if commit is None:
                time.sleep(POLL_S)
        return commit

    def _answered(self, planned: PlannedShard) -> ShardCommit | None:
        """The shard's commit; None if the run has to stop before or within it."""
        spec = self._spec
        budget = ShardBudget(spec.limits, lambda: self._spending.outside(planned.shard))
        if spec.limits.has_any and planned.num_requests:
            self._spending.forget_look()
            budget.stop = spec.limits.refused(budget.outside(), planned)
            if budget.stop is not None:
                request_stop(spec.layout, budget.stop)
                return None
        table = read_rows(spec.layout.shard_plan(planned.shard))
        # Loaded only once there is a shard to answer: a finished or empty run needs no model.
        engine = self._shared.acquire(self._load) if planned.num_requests else None
        self._num_rows.inc(planned.num_rows)
        return answer_shard(planned.shard, table, engine, spec, budget)

    def _load(self) -> LoadedEngine:
        return LoadedEngine.load(self._spec.engine)


def answer_shard(
    shard: str, table: pa.Table, engine: LoadedEngine | None, spec: AnswerSpec, budget: ShardBudget | None = None
) -> ShardCommit | None:
    """Run, validate and account one shard, and commit its tables.

    Args:
        table: the shard's plan, rows of `schemas.tables.plan_schema`.
        engine: may be None for a shard without requests.
        budget: ends the shard in the middle when it is spent; None is without limits.
    Returns:
        None where the run is to stop before the shard is whole; what it paid is then kept as waste.
    """
    rows = PlannedRows.of(table)
    names = ShardNames(spec.run_id, shard, spec.prices.version if spec.prices else None)
    budget = budget or ShardBudget(Limits(), Spent)
    runner = engine and engine.runner
    before = counters_of(runner)
    answers: dict[int, list[AccountedAnswer]] = {}
    if rows.asked:
        assert engine is not None, f"shard {shard} has requests but no engine"
        try:
            for answer in _accounted(shard, rows, engine, spec, budget):
                answers.setdefault(int(answer.answer.completion.request_id), []).append(answer)
        except Exception:
            with contextlib.suppress(OSError):
                record_waste(spec.layout, rows, answers, names)
            raise
    is_whole = all(row in answers and answers[row][-1].answer.is_last for row in rows.asked)
    if budget.stop is not None and (budget.stop.kind == ON_ERROR or not is_whole):
        record_waste(spec.layout, rows, answers, names)
        request_stop(spec.layout, budget.stop)
        return None
    counted = {
        name: value if name.startswith("peak_") else value - before[name] for name, value in counters_of(runner).items()
    }
    tables = shard_tables(rows, answers, names, spec.output_type)
    return commit_shard(spec.layout, spec.run_id, shard, tables, counted)


def _accounted(
    shard: str, rows: PlannedRows, engine: LoadedEngine, spec: AnswerSpec, budget: ShardBudget
) -> Iterator[AccountedAnswer]:
    """The way of a shard's requests to answers that say what they cost, until the budget ends."""
    options = rows.text("options")
    has_stops = spec.limits.has_any or spec.on_error == "fail"
    validated = validate(
        requests_of(rows, spec, engine.encoder),
        BudgetedRunner(engine.runner, budget) if has_stops else engine.runner,
        lambda request_id: spec.terms.of(options[int(request_id)]),
        Repair(spec.repair, engine.encoder, spec.schema_in_prompt),
    )
    accounted = account(validated, spec.prices, spec.provider, spec.model)
    for answer in _with_heartbeat(shard, rows, accounted, spec.layout):
        budget.note_answer(answer)
        if spec.on_error == "fail" and budget.stop is None:
            budget.stop = _failed_row(rows, answer)
        yield answer


def _failed_row(rows: PlannedRows, answer: AccountedAnswer) -> StopReason | None:
    """Why a run whose rows must not fail stops here; None if the engine answered."""
    error = answer.answer.error
    if error is None or error.error_stage != "run" or not answer.answer.is_last:
        return None
    row = int(answer.answer.completion.request_id)
    custom_id, file, number = (rows.text(name)[row] for name in ("custom_id", "source_file", "source_row"))
    return StopReason(ON_ERROR, f"row {custom_id!r} ({file}, row {number}): {error.error_type}: {error}")


def counters_of(runner: ModelRunner | None) -> Mapping[str, float]:
    """What an engine has counted so far; nothing where it does not count."""
    return dict(runner.counters()) if isinstance(runner, CountingRunner) else {}


def requests_of(rows: PlannedRows, spec: AnswerSpec, encoder: PromptEncoder) -> Iterator[Request]:
    """The requests of a shard in token order, each made when it is pulled; `request_id` is the row's index."""
    columns = [rows.table.column(name) for name in ("prefix_key", "messages", "sampling", "options", "tenant")]
    grammars = GrammarBook(encoder) if spec.is_constrained and spec.engine.engine in CONSTRAINED_ENGINES else None
    for row in rows.asked:
        key, messages, sampling, options, tenant = (column[row].as_py() for column in columns)
        token_ids = token_ids_of(key)
        terms = spec.terms.of(options)
        yield Request(
            request_id=str(row),
            prompt_token_ids=token_ids,
            messages=parse_messages(json.loads(messages)),
            sampling=sampling_of(sampling),
            tenant=tenant,
            grammar=grammars.grammar_of(options, terms, token_ids) if grammars is not None else None,
            options=terms.options,
        )


def _with_heartbeat(
    shard: str, rows: PlannedRows, accounted: Iterable[AccountedAnswer], layout: RunLayout
) -> Iterator[AccountedAnswer]:
    heartbeat = Heartbeat(layout, "answer")
    beat, cost = Beat(), Decimal(0)
    for answer in accounted:
        completion = answer.answer.completion
        # A row is done at its last attempt.
        group = 1 + len(rows.followers.get(int(completion.request_id), ())) if answer.answer.is_last else 0
        usage = completion.usage
        cost += answer.charge.cost if answer.charge else 0
        beat = replace(
            beat,
            rows_done=beat.rows_done + group,
            num_requests=beat.num_requests + 1,
            num_rejects=beat.num_rejects + (group if answer.answer.error else 0),
            prompt_tokens=beat.prompt_tokens + usage.prompt_tokens,
            cached_tokens=beat.cached_tokens + (usage.cached_tokens or 0),
            completion_tokens=beat.completion_tokens + usage.completion_tokens,
        )
        if heartbeat.is_due(shard):
            heartbeat.beat(shard, replace(beat, cost=format(cost, "f")))
        yield answer
