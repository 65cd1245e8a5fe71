"""What becomes of a request on its way through *answer*: validated, accounted, committed.

Records only: `transforms/answer/` and `transforms/money/` make them, `transforms/durable/commit.py` keeps them and
`transforms/publish/` adds them up.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal

from moebeam.schemas.canonical import Json
from moebeam.schemas.errors import RowError
from moebeam.schemas.prices import EXACT, Charge
from moebeam.schemas.records import Completion
from moebeam.schemas.tables import Table


@dataclass(frozen=True, slots=True)
class ValidatedAnswer:
    """A completion and what became of it.

    Attributes:
        output_json: the answer's JSON as the model wrote it, without the white space around it; None without a
            schema or with an error.
        error: why there is no valid answer; None if there is one.
        value: the parsed JSON where `output_json` is set.
        attempt: which attempt of its request this is, from 1.
        is_last: whether the request is not asked again.
    """

    completion: Completion
    output_json: str | None
    error: RowError | None
    value: Json = None
    attempt: int = 1
    is_last: bool = True


@dataclass(frozen=True, slots=True)
class ClassAmounts:
    """A charge by token class; the four amounts add up to its cost."""

    cache_hit: Decimal
    cache_miss: Decimal
    visible_output: Decimal
    reasoning: Decimal


@dataclass(frozen=True, slots=True)
class AccountedAnswer:
    """A validated answer and what its attempt cost; None where no price is known, which is not zero.

    `lost_cost_at_most` is what calls without a usage may be billed at most, beside `charge` and in its currency; None
    where there are none, or one of them has no price in it. `journal` is where the answer was kept as it arrived.
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
    """Sums over a shard or a run, from its tables.

    Attributes:
        num_reused: results that an earlier run's answers became.
        num_rejects: rejected rows; files and row groups that could not be read are counted in `num_unreadable`.
        num_unreadable_rows: rows that those stand for, as far as footers tell.
        cached_tokens: None as soon as one attempt does not know.
        costs: currency -> sum, as decimal text; empty without prices.
        num_unpriced: attempts without a price.
        num_lost_calls: calls to a provider that ended without a usage, and that it may bill all the same.
        lost_costs_at_most: currency -> what it may bill for them, beside `costs`; those without a price are not in it.
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
        )


@dataclass(frozen=True, slots=True)
class ShardCommit:
    """The record that makes a shard's tables count; also the receipt that *answer* gives to *publish*.

    `engine` holds what the engine counted meanwhile, such as tokens computed and seconds by phase.
    """

    shard: str
    run_id: str
    attempt: str
    committed_at: str
    files: tuple[StagedFile, ...]
    totals: Totals
    engine: Mapping[str, float] | None = None


def _add_costs(one: Mapping[str, str], other: Mapping[str, str]) -> dict[str, str]:
    currencies = sorted({*one, *other})
    return {c: format(EXACT.add(Decimal(one.get(c, "0")), Decimal(other.get(c, "0"))), "f") for c in currencies}


def _add_counts(one: Mapping[str, int], other: Mapping[str, int]) -> dict[str, int]:
    return {name: one.get(name, 0) + other.get(name, 0) for name in sorted({*one, *other})}
