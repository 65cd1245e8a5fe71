"""What the command line shows of a run: its progress, its end, and what a check found.

Plain records between `jobs/run/launch.py`, `jobs/check/preflight.py` and `jobs/commands/cli.py`; no Beam, no torch, no
console.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from decimal import Decimal
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from moebeam.transforms.durable.progress import OutageNote

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_WRONG_JOB = 2
EXIT_TOO_MANY_REJECTS = 3
EXIT_STOPPED = 4

LIMITS = frozenset({"max_cost", "max_input_tokens", "max_output_tokens", "max_requests", "deadline"})
"""Reasons of a stop that are keys of `[limits]`."""

PIPELINE_THREAD = "pipeline"
"""Name of the launcher's thread in which a pipeline runs."""

RunStatus = Literal["succeeded", "incomplete", "already_done", "staged"]

CountedUnit = Literal["rows", "answers"]
"""What progress counts: answers where some row has several of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgressSnapshot:
    """How far a run is; counters include earlier attempts of the same run.

    Attributes:
        stage: the current one: `plan` (with read and render), `answer` or `publish`.
        rows_done: rows that this stage has finished, answered or rejected.
        rows_total: rows that this stage will see; None while unknown.
        prompt_tokens: tokens of the prompts answered so far, cached ones included.
        cost: what is billed so far; None without a price.
        elapsed_s: seconds since the start of this attempt.
        stop: why the run is about to end, in words; None while it goes on.
        outage: the provider that workers wait for; None while it answers.
        unit: what `rows_done`, `rows_total` and `num_rejects` count.
    """

    stage: str
    rows_done: int
    rows_total: int | None
    shards_done: int
    shards_total: int | None
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    num_rejects: int
    cost: Decimal | None
    currency: str | None
    elapsed_s: float
    stop: str | None = None
    outage: "OutageNote | None" = None
    unit: CountedUnit = "rows"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """How a run ended.

    Attributes:
        rows_in: rows of the input that could be read; None where the run stopped before that was known.
        answers_in: answers that these rows were planned to have; a row rejected before it was asked counts as one.
        num_rejects: rejected answers and rows; unreadable files and row groups are not among them.
        num_further_samples: how many of results and rejects are not the first of their row.
        num_unreadable: files and row groups that could not be read.
        prompt_tokens, completion_tokens, reasoning_tokens: as far as they were counted; None where no answer's were.
        cached_tokens: None where the engine does not say, never 0 for unknown.
        num_unknown_usage: answers whose provider did not count their tokens; they are in no sum, and `cost` neither.
        estimated_prompt_tokens, estimated_completion_tokens: of those, as counted here.
        max_hit_rate: h* of the plan, the largest share of prompt tokens that sharing can save; 0 to 1.
        rejects_by_message: the commonest messages, the commonest first, and how many rows have them.
        num_answered: results, rejects and journaled answers.
        num_journaled: those whose answer is in a journal; it is in the tables once the run has gone on.
        cost: what is billed for answers in the tables and in journals, as tokens are theirs; None without a price.
        cost_journaled: the part of `cost` for answers in journals; None if none.
        cost_paid: all that is billed, `cost` and `cost_wasted`.
        account: what was paid by state (`committed`, `journaled`, `wasted` and `paid`, their sum), in all currencies.
        reason: why the run is incomplete: a key of `[limits]`, or `signal`.
        message: for people, for example why the run is incomplete.
        num_reused: how many of `num_results` are answers of an earlier run.
        cost_wasted: billed on top of `cost` for answers that were not used; None if none.
        num_lost_calls: calls that returned no usage, but that the provider may bill.
        lost_cost_at_most: most that it may bill for them, on top of `cost`; None if unknown.
        table: the table of a lakehouse that holds the run's results; None if none does.
        table_commits: snapshot or version of each of the run's tables there.
    """

    status: RunStatus
    exit_code: int
    run_id: str
    output: str
    rows_in: int | None
    answers_in: int | None = None
    num_further_samples: int = 0
    num_results: int = 0
    num_rejects: int = 0
    num_unreadable: int = 0
    rejects_by_type: Mapping[str, int] = field(default_factory=dict[str, int])
    rejects_by_message: Mapping[str, int] = field(default_factory=dict[str, int])
    num_answered: int = 0
    num_journaled: int = 0
    prompt_tokens: int | None = 0
    cached_tokens: int | None = 0
    computed_tokens: int | None = 0
    completion_tokens: int | None = 0
    reasoning_tokens: int | None = 0
    max_hit_rate: float | None = None
    cost: Decimal | None = None
    cost_allocated: Decimal | None = None
    cost_basis: str | None = None
    currency: str | None = None
    price_book: str | None
    elapsed_s: float
    message: str | None = None
    reason: str | None = None
    cost_wasted: Decimal | None = None
    num_reused: int = 0
    num_unknown_usage: int = 0
    estimated_prompt_tokens: int = 0
    estimated_completion_tokens: int = 0
    num_lost_calls: int = 0
    lost_cost_at_most: Decimal | None = None
    cost_journaled: Decimal | None = None
    cost_paid: Decimal | None = None
    account: Mapping[str, object] | None = None
    table: str | None = None
    table_commits: Mapping[str, str] = field(default_factory=dict[str, str])

    def to_json(self) -> dict[str, object]:
        """The record as JSON values: decimals as plain strings, rejects by type in order of name."""
        return {each.name: json_value(getattr(self, each.name)) for each in fields(self)}


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckReport:
    """What `validate` found before any row was answered.

    Attributes:
        num_rows: rows by the files' footers, or lines of JSONL.
        limit: the trial's `--limit`, if any.
        columns: the input's columns, in order.
        price: the price line that will be used, in words; None without a price book.
        output_type: of the typed column of answers; None without a schema.
        warnings: what is allowed but probably not meant.
    """

    output: str
    num_files: int
    num_rows: int
    limit: int | None
    columns: tuple[str, ...]
    engine: str
    model: str
    schema: str | None
    price: str | None
    output_type: str | None = None
    warnings: tuple[str, ...] = ()

    def to_json(self) -> dict[str, object]:
        """The record as JSON values."""
        return {each.name: json_value(getattr(self, each.name)) for each in fields(self)}


def choose_exit_code(
    *, is_complete: bool, answers_in: int, num_rejects: int, num_unreadable: int, max_reject_share: float
) -> int:
    """The exit code of a run that neither failed nor was refused.

    Args:
        answers_in: of the readable rows of the input, `results + rejects`.
        num_rejects: rejected ones, without unreadable files.
        max_reject_share: share of `answers_in` that may be rejected; taken as the decimal number its author wrote, so
            that 29 of 100 rows are within 0.29.
    Returns:
        4 where work is left, 3 for more rejects than allowed or anything unreadable, else 0.
    """
    if not is_complete:
        return EXIT_STOPPED
    if num_unreadable > 0 or num_rejects > Decimal(str(max_reject_share)) * answers_in:
        return EXIT_TOO_MANY_REJECTS
    return EXIT_DONE


def json_value(value: object) -> object:
    """A record's value for `--json`: decimals as plain strings, mappings in order of their keys."""
    if isinstance(value, Decimal):
        return format(value, "f")
    if isinstance(value, Mapping):
        return {str(key): json_value(value[key]) for key in sorted(value)}
    if isinstance(value, tuple):
        return [json_value(item) for item in value]
    return value
