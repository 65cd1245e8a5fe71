"""One shard from its plan to its commit: run -> validate (which may ask again) -> account -> tables -> commit.

The core of *answer*, composed of pure iterator functions; `step.py` wraps it for Beam.
"""

import contextlib
import json
import time
from collections.abc import Iterable, Iterator, Mapping
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
)
from moebeam.schemas.answers import AccountedAnswer, ShardCommit
from moebeam.schemas.contract.output_type import OutputType
from moebeam.schemas.job.sections import FailuresSection, RepairSection
from moebeam.schemas.records import Request, parse_sampling_json
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.transforms.answer.ask_again import AttemptPolicy
from moebeam.transforms.answer.budget import BudgetedRunner, BudgetEnded, ShardBudget, SpendingLimits
from moebeam.transforms.answer.grammar_cache import GrammarCache
from moebeam.transforms.answer.journal import JournaledRunner, ShardJournal, keeping_runner
from moebeam.transforms.answer.repair import Repair
from moebeam.transforms.answer.reuse import EarlierAnswers, ReuseSource
from moebeam.transforms.answer.shard_events import log_commit
from moebeam.transforms.answer.shard_tables import PlannedRows, shard_tables
from moebeam.transforms.answer.spending import Spent
from moebeam.transforms.answer.validate import answer_and_validate
from moebeam.transforms.answer.waste import record_waste
from moebeam.transforms.durable.commit import commit_shard
from moebeam.transforms.durable.progress import ProgressWriter, ShardProgress
from moebeam.transforms.durable.stop import ON_ERROR, StopReason, request_stop
from moebeam.transforms.money.account import Accounting, account
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
        return cls(runner, load_encoder(config.path, config.options.encoding, config.name))


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
        None if the run must stop before the shard is complete; what it paid is then kept as waste, or in the journal
        for the next attempt.
    """
    started = time.monotonic()
    budget = budget or ShardBudget(SpendingLimits(), Spent)
    runner = engine and engine.runner
    before = read_counters(runner)
    answers: dict[int, list[AccountedAnswer]] = {}
    replayed: Mapping[str, float] = {}
    if rows.asked:
        assert engine is not None, f"shard {shard} has requests but no engine"
        try:
            with _open_journal(shard, spec) as journal:
                with contextlib.suppress(BudgetEnded):
                    for answer in _account_answers(shard, rows, engine, spec, budget, journal):
                        answers.setdefault(int(answer.answer.completion.request_id), []).append(answer)
                replayed = journal.counters if journal is not None else {}
        except Exception:
            if not spec.is_journaled:
                with contextlib.suppress(OSError):
                    record_waste(spec.layout, shard, rows, answers, spec.accounting)
            raise
    is_whole = all(row in answers and answers[row][-1].answer.is_last for row in rows.asked)
    if budget.stop is not None and (budget.stop.kind == ON_ERROR or not is_whole):
        if not spec.is_journaled:
            record_waste(spec.layout, shard, rows, answers, spec.accounting)
        request_stop(spec.layout, budget.stop)
        return None
    counted = counters_since(before, read_counters(runner))
    tables = shard_tables(shard, rows, answers, spec.accounting, spec.output_type)
    commit = commit_shard(spec.layout, spec.accounting.run_id, shard, tables, {**counted, **replayed})
    ids, kinds = (tables["rejects"].column(name).to_pylist() for name in ("custom_id", "error_type"))
    log_commit(commit, time.monotonic() - started, list(zip(ids, kinds, strict=True)))
    return commit


def _open_journal(shard: str, spec: AnswerSpec) -> contextlib.AbstractContextManager[ShardJournal | None]:
    if not spec.is_journaled:
        return contextlib.nullcontext()
    return ShardJournal.open(spec.layout, shard, takes_failures=spec.failures.on_error != "fail")


def _account_answers(
    shard: str,
    rows: PlannedRows,
    engine: LoadedEngine,
    spec: AnswerSpec,
    budget: ShardBudget,
    journal: ShardJournal | None,
) -> Iterator[AccountedAnswer]:
    """Stream a shard's requests to priced answers, until the budget ends."""
    options = rows.values("options")
    has_stops = spec.limits.has_any or spec.failures.on_error == "fail"
    runner = engine.runner if journal is None else keeping_runner(engine.runner, journal)
    if has_stops:
        runner = BudgetedRunner(runner, budget)
    if journal is not None:
        # Counted now as already spent, so replayed answers are not counted again.
        kept = (entry.completion for entry in journal.kept.entries)
        budget.own += Spent.from_completions(kept, spec.accounting)
        runner = JournaledRunner(runner, journal)
    validated = answer_and_validate(
        make_requests(shard, rows, spec, engine.encoder),
        runner,
        lambda request_id: spec.terms.find(options[int(request_id)]),
        again := AttemptPolicy(spec.failures, Repair(spec.repair, engine.encoder, spec.schema_in_prompt)),
        again.pause,
    )
    accounted = account(validated, spec.accounting)
    for answer in _report_progress(shard, rows, accounted, spec.layout, writes_last=journal is not None):
        if journal is not None:
            place = (answer.answer.completion.request_id, answer.answer.attempt)
            answer = replace(answer, journal=journal.references.get(place))
        budget.note_answer(answer)
        if spec.failures.on_error == "fail" and budget.stop is None:
            budget.stop = _find_failed_row(rows, answer)
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


def make_requests(shard: str, rows: PlannedRows, spec: AnswerSpec, encoder: Encoder) -> Iterator[Request]:
    """Requests of a shard in token order, built lazily; `request_id` is the row's index."""
    columns = [rows.table.column(name) for name in ("prefix_key", "messages", "sampling", "options", "tenant")]
    is_constrained = spec.is_constrained and spec.engine.options.is_constrained
    grammars = GrammarCache(encoder) if is_constrained and isinstance(encoder, PromptEncoder) else None
    # With a tokenizer, the rendered prompt already holds the schema.
    is_told = spec.schema_in_prompt == "always" and spec.engine.options.is_remote
    for row in rows.asked:
        key, messages, sampling, options, tenant = (column[row].as_py() for column in columns)
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
                prompt_tokens=progress.prompt_tokens + usage.prompt_tokens,
                cached_tokens=progress.cached_tokens + (usage.cached_tokens or 0),
                completion_tokens=progress.completion_tokens + usage.completion_tokens,
            )
            if writer.is_due(shard):
                writer.write(shard, replace(progress, cost=format(cost, "f")))
            yield answer
    finally:
        if writes_last:
            writer.write(shard, replace(progress, cost=format(cost, "f")))
