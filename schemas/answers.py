"""Records of a request's way through *answer*: validated, accounted, committed.

`transforms/answer/` and `transforms/money/` create them, `transforms/durable/commit.py` stores them and
`transforms/publish/` sums them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal

from moebeam.schemas.canonical import Json
from moebeam.schemas.determinism import Determinism
from moebeam.schemas.errors import RowError
from moebeam.schemas.prices import EXACT, Charge
from moebeam.schemas.records import Completion
from moebeam.schemas.tables import Table


@dataclass(frozen=True, slots=True)
class ValidatedAnswer:
    """A completion after validation.

    Attributes:
        output_json: the answer's JSON as the model wrote it, stripped, each key once (the last of equal ones counts);
            None without a schema or with an error.
        error: why the answer is not valid; None if it is.
        value: the parsed JSON where `output_json` is set.
        attempt: number of this attempt at the request, from 1.
        is_last: whether no further attempt follows.
    """

    completion: Completion
    output_json: str | None
    error: RowError | None
    value: Json = None
    attempt: int = 1
    is_last: bool = True


@dataclass(frozen=True, slots=True)
class ClassAmounts:
    """A charge by token class; the four amounts sum to its cost."""

    cache_hit: Decimal
    cache_miss: Decimal
    visible_output: Decimal
    reasoning: Decimal


@dataclass(frozen=True, slots=True)
class AccountedAnswer:
    """A validated answer and the cost of its attempt; an unknown cost is None, never zero.

    `lost_cost_at_most` bounds what the provider may bill for calls that returned no usage. It is in the currency of
    `charge` but not part of it; None without such calls, or if one has no price in that currency. `journal` is the
    file that recorded the answer on arrival.
    """

    answer: ValidatedAnswer
    charge: Charge | None
    journal: str | None = None
    lost_cost_at_most: Decimal | None = None


@dataclass(frozen=True, slots=True)
class StagedFile:
    """One table of one shard on the store; `path` is relative to the output folder."""

    table: Table
    path: str
    num_rows: int
    num_bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over a shard or a run, from its tables. Tokens are those of the ledger's classes, as far as they are known.

    Attributes:
        num_reused: results copied from an earlier run's answers.
        num_rejects: rejected rows; files and row groups that could not be read are counted in `num_unreadable`.
        num_unreadable_rows: rows in those, as far as footers tell.
        cached_tokens: None if unknown for any attempt.
        costs: currency -> sum, as decimal text; empty without prices.
        num_unpriced: attempts whose cost is unknown: without a price, or without a usage.
        num_unknown_usage: those without a usage; their tokens are in no sum of tokens.
        estimated_prompt_tokens, estimated_completion_tokens: what was counted here in place of the unknown tokens.
        num_further_samples: results and rejected rows beyond the first of their row of the input.
        num_lost_calls: provider calls that returned no usage but may still be billed.
        lost_costs_at_most: currency -> most that may be billed for them, not part of `costs`; excludes calls without a
            price.
    """

    num_results: int = 0
    num_reused: int = 0
    num_rejects: int = 0
    num_unreadable: int = 0
    num_unreadable_rows: int = 0
    num_attempts: int = 0
    num_unpriced: int = 0
    num_upper_bound: int = 0
    prompt_tokens: int = 0
    cached_tokens: int | None = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    costs: Mapping[str, str] | None = None
    rejects_by_type: Mapping[str, int] | None = None
    num_lost_calls: int = 0
    lost_costs_at_most: Mapping[str, str] | None = None
    num_unknown_usage: int = 0
    estimated_prompt_tokens: int = 0
    estimated_completion_tokens: int = 0
    num_further_samples: int = 0

    @property
    def num_rows(self) -> int:
        """Rows of the input that have all their results and rejects."""
        return self.num_results + self.num_rejects - self.num_further_samples

    def __add__(self, other: "Totals") -> "Totals":
        unknown = self.cached_tokens is None or other.cached_tokens is None
        return Totals(
            num_results=self.num_results + other.num_results,
            num_reused=self.num_reused + other.num_reused,
            num_rejects=self.num_rejects + other.num_rejects,
            num_unreadable=self.num_unreadable + other.num_unreadable,
            num_unreadable_rows=self.num_unreadable_rows + other.num_unreadable_rows,
            num_attempts=self.num_attempts + other.num_attempts,
            num_unpriced=self.num_unpriced + other.num_unpriced,
            num_upper_bound=self.num_upper_bound + other.num_upper_bound,
            prompt_tokens=self.prompt_tokens + other.prompt_tokens,
            cached_tokens=None if unknown else (self.cached_tokens or 0) + (other.cached_tokens or 0),
            completion_tokens=self.completion_tokens + other.completion_tokens,
            reasoning_tokens=self.reasoning_tokens + other.reasoning_tokens,
            costs=_add_costs(self.costs or {}, other.costs or {}),
            rejects_by_type=_add_counts(self.rejects_by_type or {}, other.rejects_by_type or {}),
            num_lost_calls=self.num_lost_calls + other.num_lost_calls,
            lost_costs_at_most=_add_costs(self.lost_costs_at_most or {}, other.lost_costs_at_most or {}),
            num_unknown_usage=self.num_unknown_usage + other.num_unknown_usage,
            estimated_prompt_tokens=self.estimated_prompt_tokens + other.estimated_prompt_tokens,
            estimated_completion_tokens=self.estimated_completion_tokens + other.estimated_completion_tokens,
            num_further_samples=self.num_further_samples + other.num_further_samples,
        )


@dataclass(frozen=True, slots=True)
class ShardCommit:
    """The record that makes a shard's tables final, and the receipt that *answer* emits to *publish*.

    `engine` holds the engine's counters for the shard, such as tokens computed and seconds by phase; `determinism` what
    the engine promises, if it was asked.
    """

    shard: str
    run_id: str
    attempt: str
    committed_at: str
    files: tuple[StagedFile, ...]
    totals: Totals
    engine: Mapping[str, float] | None = None
    determinism: Determinism | None = None


def _add_costs(one: Mapping[str, str], other: Mapping[str, str]) -> dict[str, str]:
    currencies = sorted({*one, *other})
    return {c: format(EXACT.add(Decimal(one.get(c, "0")), Decimal(other.get(c, "0"))), "f") for c in currencies}


def _add_counts(one: Mapping[str, int], other: Mapping[str, int]) -> dict[str, int]:
    return {name: one.get(name, 0) + other.get(name, 0) for name in sorted({*one, *other})}
