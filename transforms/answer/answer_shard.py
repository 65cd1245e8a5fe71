"""One shard from its plan to its commit: run -> validate (which may ask again) -> account -> tables -> commit.

The core of *answer*, composed of pure iterator functions; `step.py` wraps it for Beam.
"""

import contextlib
import json
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Literal, TypeAlias

import pyarrow as pa

from moebeam.model_runner.checkpoint.model_store import local_checkpoint
from moebeam.model_runner.encoding.prompt_encoder import PromptEncoder
from moebeam.model_runner.encoding.remote_prompts import Encoder, load_encoder
from moebeam.model_runner.encoding.schema_in_prompt import with_schema_in_prompt
from moebeam.model_runner.engine_process.host_runner import HostRunner
from moebeam.model_runner.engine_process.isolated_runner import IsolatedRunner
from moebeam.model_runner.prefix_tree import token_ids_of
from moebeam.model_runner.protocol import (
    CountingRunner,
    EngineConfig,
    ModelRunner,
    counters_since,
    load_runner,
    read_determinism,
)
from moebeam.schemas.answers import AccountedAnswer, ShardCommit
from moebeam.schemas.contract.output_type import OutputType
from moebeam.schemas.determinism import Determinism
from moebeam.schemas.job.sections import FailuresSection, RepairSection
from moebeam.schemas.records import Request, parse_sampling_json
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.schemas.tables import Table
from moebeam.transforms.answer.ask_again import AttemptPolicy
from moebeam.transforms.answer.budget import BudgetedRunner, BudgetEnded, ShardBudget, SpendingLimits
from moebeam.transforms.answer.grammar_cache import GrammarCache
from moebeam.transforms.answer.journal import JournaledRunner, ShardJournal, keeping_runner
from moebeam.transforms.answer.repair import Repair
from moebeam.transforms.answer.reuse import EarlierAnswers, ReuseSource
from moebeam.transforms.answer.shard_events import log_commit
from moebeam.transforms.answer.shard_tables import PlannedRows, shard_tables
from moebeam.transforms.answer.spending import Spent
from moebeam.transforms.answer.unusable.answers import TABLE_ERRORS, reject_unusable
from moebeam.transforms.answer.validate import answer_and_validate
from moebeam.transforms.answer.watch import ShardWatch
from moebeam.transforms.durable.commit import commit_shard
from moebeam.transforms.durable.progress import ProgressWriter, ShardProgress
from moebeam.transforms.durable.stop import LOST_LEASE, ON_ERROR, StopReason, request_stop
from moebeam.transforms.money.account import Accounting, account
from moebeam.transforms.money.attempt_costs import Attempts
from moebeam.transforms.render.answer_terms import TermsCache
from moebeam.transforms.render.chat_messages import parse_messages
from moebeam.transforms.render.render_rows import SchemaInPrompt


@dataclass(frozen=True, slots=True)
class AnswerSpec:
    """How a job's shards are answered; picklable, holds no loaded model.

    Attributes:
        terms: what answers must satisfy.
        is_constrained: whether in-process engines decode under the terms' grammar.
        output_type: of the typed answer column, if the job has a schema.
        failures: what happens to rows that the engine cannot answer, and to an engine that dies.
        reuse: the earlier run to take answers from, if any.
        attempt: unique to this attempt of the run.
        run_key: of the run, the same for all its attempts: what random numbers follow where a request has no seed.
    """

    layout: RunLayout
    engine: EngineConfig
    terms: TermsCache
    accounting: Accounting
    repair: RepairSection = field(default_factory=RepairSection)
    schema_in_prompt: SchemaInPrompt = "auto"
    is_constrained: bool = True
    output_type: OutputType | None = None
    limits: SpendingLimits = field(default_factory=SpendingLimits)
    failures: FailuresSection = field(default_factory=FailuresSection)
    reuse: ReuseSource | None = None
    attempt: str = field(default_factory=lambda: uuid.uuid4().hex)
    run_key: str = ""

    @property
    def is_journaled(self) -> bool:
        """Whether answers are journaled as they arrive."""
        choice = self.failures.journal
        return choice == "always" or (choice == "auto" and self.engine.options.is_remote)


EngineProcess: TypeAlias = Literal["shared", "own", "host"]


@dataclass(frozen=True, slots=True, weakref_slot=True)
class LoadedEngine:
    """The engine and its prompt encoder, shared by the threads of a worker process."""

    runner: ModelRunner
    encoder: Encoder

    @classmethod
    def load(
        cls, config: EngineConfig, process: EngineProcess = "shared", max_silence_s: float | None = None
    ) -> "LoadedEngine":
        """Load the engine and the encoder.

        Args:
            process: where the engine lives: in this process, in one of its own, or in one that the host shares.
            max_silence_s: see `IsolatedRunner`.
        Raises:
            EngineLoadError: the engine or its tokenizer cannot be loaded, or the checkpoint is not the job's.
        """
        if config.options.has_weights:
            config = replace(config, path=local_checkpoint(config.path, config.revision))
        runner: ModelRunner
        match process:
            case "own":
                runner = IsolatedRunner(config, max_silence_s=max_silence_s)
            case "host":
                runner = HostRunner(config, max_silence_s=max_silence_s)
            case "shared":
                runner = load_runner(config)
        return cls(
            runner, load_encoder(config.path, config.options.encoding, config.name, config.options.max_model_len)
        )


def prepare_rows(table: pa.Table, spec: AnswerSpec) -> PlannedRows:
    """Classify a shard's plan, with the answers that an earlier run already gave.

    Raises:
        OSError: the earlier run cannot be read.
    """
    rows = PlannedRows.from_table(table)
    if spec.reuse is None or not rows.asked:
        return rows
    return rows.with_reused(EarlierAnswers.load(spec.reuse, spec.layout).find_answers(table, rows.asked))


def answer_shard(
    shard: str, table: pa.Table, engine: LoadedEngine | None, spec: AnswerSpec, budget: ShardBudget | None = None
) -> ShardCommit | None:
    """As `answer_rows`, from a shard's plan in `moebeam.schemas.tables.plan_schema`."""
    return answer_rows(shard, prepare_rows(table, spec), engine, spec, budget)


def answer_rows(
    shard: str, rows: PlannedRows, engine: LoadedEngine | None, spec: AnswerSpec, budget: ShardBudget | None = None
) -> ShardCommit | None:
    """Run, validate and account one shard, and commit its tables.

    Args:
        engine: may be None if nothing in the shard is asked.
        budget: ends the shard early when it is spent; None means no limits.
    Returns:
        None if the run must stop before the shard is complete, or another worker has its lease; what was answered is
        then in its journal, for the next attempt.
    """
    started = time.monotonic()
    budget = budget or ShardBudget(shard=shard)
    runner = engine and engine.runner
    before = read_counters(runner)
    answers: dict[int, list[AccountedAnswer]] = {}
    replayed: Mapping[str, float] = {}
    if rows.asked:
        assert engine is not None, f"shard {shard} has requests but no engine"
        watch = ShardWatch(spec.layout, shard, engine.runner, budget, drain_s=spec.failures.drain_s)
        with budget, open_journal(shard, spec, budget) as journal:
            is_over = False
            try:
                with watch, contextlib.suppress(BudgetEnded):
                    for answer in _account_answers(shard, rows, engine, spec, budget, journal):
                        answers.setdefault(int(answer.answer.completion.request_id), []).append(answer)
                is_over = True
            finally:
                is_whole = is_over and all(row in answers and answers[row][-1].answer.is_last for row in rows.asked)
                must_stop = budget.stop is not None and (budget.stop.kind == ON_ERROR or not is_whole)
                if not is_over or must_stop:
                    # An error in flight says more than one from the store, which shares its cause or follows it.
                    with contextlib.nullcontext() if is_over else contextlib.suppress(OSError):
                        _keep_late(shard, rows, answers, engine, spec, journal)
            replayed = journal.counters
        if budget.stop is not None and must_stop:
            if budget.stop.kind != LOST_LEASE:
                request_stop(spec.layout, budget.stop)
            return None
    counted = {**counters_since(before, read_counters(runner)), **replayed}
    promise = read_determinism(runner) if rows.asked else None
    try:
        tables, commit = _commit_answers(shard, rows, answers, spec, counted, promise)
    except TABLE_ERRORS:
        sound = reject_unusable(spec.layout, shard, rows, answers, spec.accounting, spec.output_type)
        if sound == answers:
            raise
        tables, commit = _commit_answers(shard, rows, sound, spec, counted, promise)
    ids, kinds = (tables["rejects"].column(name).to_pylist() for name in ("custom_id", "error_type"))
    log_commit(commit, time.monotonic() - started, list(zip(ids, kinds, strict=True)))
    return commit


def _commit_answers(
    shard: str,
    rows: PlannedRows,
    answers: Mapping[int, Attempts],
    spec: AnswerSpec,
    counted: Mapping[str, float],
    promise: Determinism | None,
) -> tuple[dict[Table, pa.Table], ShardCommit]:
    tables = shard_tables(shard, rows, answers, spec.accounting, spec.output_type)
    return tables, commit_shard(spec.layout, spec.accounting.run_id, shard, tables, counted, promise)


def open_journal(shard: str, spec: AnswerSpec, budget: ShardBudget) -> ShardJournal:
    """The journal of one attempt at a shard; what earlier ones left is read whether or not this one writes it."""
    return ShardJournal.open(
        spec.layout,
        shard,
        takes_failures=spec.failures.on_error != "fail",
        is_prompt=spec.is_journaled,
        generation=budget.lease.generation if budget.lease is not None else 0,
    )


def _keep_late(
    shard: str,
    rows: PlannedRows,
    answers: Mapping[int, Sequence[AccountedAnswer]],
    engine: LoadedEngine,
    spec: AnswerSpec,
    journal: ShardJournal,
) -> None:
    """Journal what an attempt that ends before its shard has answered, where that was not done on the way."""
    if spec.is_journaled:
        return
    kept = [(each.answer.attempt, each.answer.completion) for found in answers.values() for each in found]
    asked = rows.with_asked({*answers, *map(int, journal.given_up)})
    journal.keep_late(kept, make_requests(shard, asked, spec, engine.encoder, has_grammars=False))


def _account_answers(
    shard: str,
    rows: PlannedRows,
    engine: LoadedEngine,
    spec: AnswerSpec,
    budget: ShardBudget,
    journal: ShardJournal,
) -> Iterator[AccountedAnswer]:
    """Stream a shard's requests to priced answers, until the budget ends."""
    options = rows.values("options")
    # Counted now as already spent, so replayed answers are not counted again.
    budget.count_earlier(Spent.from_completions((entry.completion for entry in journal.kept.entries), spec.accounting))
    runner = JournaledRunner(
        BudgetedRunner(keeping_runner(engine.runner, journal), budget), journal, spec.engine.options.plans_prefixes
    )
    validated = answer_and_validate(
        make_requests(shard, rows, spec, engine.encoder),
        runner,
        lambda request_id: spec.terms.find(options[int(request_id)]),
        again := AttemptPolicy(spec.failures, Repair(spec.repair, engine.encoder, spec.schema_in_prompt), budget.sleep),
        again.pause,
    )
    accounted = account(validated, spec.accounting)
    for answer in _report_progress(shard, rows, accounted, spec.layout, writes_last=spec.is_journaled):
        place = (answer.answer.completion.request_id, answer.answer.attempt)
        answer = replace(answer, journal=journal.references.get(place))
        budget.note_answer(answer)
        if spec.failures.on_error == "fail" and (reason := _find_failed_row(rows, answer)) is not None:
            budget.end(reason)
        yield answer


def _find_failed_row(rows: PlannedRows, answer: AccountedAnswer) -> StopReason | None:
    """Why a run whose rows must not fail stops here; None if the engine answered."""
    error = answer.answer.error
    if error is None or error.error_stage != "run" or not answer.answer.is_last:
        return None
    row = int(answer.answer.completion.request_id)
    custom_id, file, number = (rows.values(name)[row] for name in ("custom_id", "source_file", "source_row"))
    return StopReason(ON_ERROR, f"row {custom_id!r} ({file}, row {number}): {error.error_type}: {error}")


def read_counters(runner: ModelRunner | None) -> Mapping[str, float]:
    """An engine's counters so far; empty if it does not count."""
    return dict(runner.counters()) if isinstance(runner, CountingRunner) else {}


def make_requests(
    shard: str, rows: PlannedRows, spec: AnswerSpec, encoder: Encoder, *, has_grammars: bool = True
) -> Iterator[Request]:
    """Requests of a shard in token order, built lazily; `request_id` is the row's index.

    Args:
        has_grammars: whether engines in process decode them under grammars, where the job has any.
    """
    names = ("prefix_key", "messages", "sampling", "options", "tenant", "custom_id", "sample")
    columns = [rows.table.column(name) for name in names]
    is_constrained = has_grammars and spec.is_constrained and spec.engine.options.is_constrained
    grammars = GrammarCache(encoder) if is_constrained and isinstance(encoder, PromptEncoder) else None
    # With a tokenizer, the rendered prompt already holds the schema.
    is_told = spec.schema_in_prompt == "always" and spec.engine.options.is_remote
    for row in rows.asked:
        key, messages, sampling, options, tenant, row_id, sample = (column[row].as_py() for column in columns)
        token_ids = token_ids_of(key)
        terms = spec.terms.find(options)
        chat = parse_messages(json.loads(messages))
        response_format = terms.options.response_format
        if is_told and response_format.type == "json_schema":
            chat = with_schema_in_prompt(chat, response_format.schema)
        yield Request(
            request_id=str(row),
            prompt_token_ids=token_ids,
            messages=chat,
            sampling=parse_sampling_json(sampling),
            tenant=tenant,
            grammar=grammars.get(options, terms, token_ids) if grammars is not None else None,
            options=terms.options,
            scope=shard,
            row_id=row_id,
            sample=sample,
            run_key=spec.run_key,
        )


def _report_progress(
    shard: str, rows: PlannedRows, accounted: Iterable[AccountedAnswer], layout: RunLayout, *, writes_last: bool
) -> Iterator[AccountedAnswer]:
    """Pass answers on and write progress; `writes_last` also writes it at the end, even after an error."""
    writer = ProgressWriter(layout, "answer")
    progress, cost = ShardProgress(), Decimal(0)
    try:
        for answer in accounted:
            completion = answer.answer.completion
            # A row is done at its last attempt.
            num_rows = 1 + len(rows.followers.get(int(completion.request_id), ())) if answer.answer.is_last else 0
            usage = completion.usage
            cost += answer.charge.cost if answer.charge else 0
            progress = replace(
                progress,
                rows_done=progress.rows_done + num_rows,
                num_requests=progress.num_requests + 1,
                num_rejects=progress.num_rejects + (num_rows if answer.answer.error else 0),
                prompt_tokens=progress.prompt_tokens + (usage.prompt_tokens or 0),
                cached_tokens=progress.cached_tokens + (usage.cached_tokens or 0),
                completion_tokens=progress.completion_tokens + (usage.completion_tokens or 0),
                num_unknown_usage=progress.num_unknown_usage + (not usage.is_known),
                estimated_prompt_tokens=progress.estimated_prompt_tokens + (usage.estimated_prompt_tokens or 0),
                estimated_completion_tokens=progress.estimated_completion_tokens
                + (usage.estimated_completion_tokens or 0),
            )
            if writer.is_due(shard):
                writer.write(shard, replace(progress, cost=format(cost, "f")))
            yield answer
    finally:
        if writes_last:
            writer.write(shard, replace(progress, cost=format(cost, "f")))
