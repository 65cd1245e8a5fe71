"""Spending: what a run has asked and paid, added up from all that tells of it.

Part of *answer*, below the budget (`transforms/answer/budget.py`). Commits and waste say exactly what was paid; for
shards that other workers are at, their progress files say it. Where answers are journaled, the journals of shards that
an earlier attempt began say what that attempt paid. Such a shard counts by its journal or by its progress, whichever is
more, never by both.
"""

import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal

from moebeam.schemas.answers import Totals
from moebeam.schemas.records import Completion
from moebeam.schemas.store import storage
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.transforms.answer.waste import read_waste, waste_names
from moebeam.transforms.durable.commit import read_commit
from moebeam.transforms.durable.journal_file import read_journal
from moebeam.transforms.durable.progress import ShardProgress, read_progress
from moebeam.transforms.money.account import Accounting

REFRESH_S = 1.0
"""Least seconds between two looks at what others have spent."""

_REFRESH_SHARE = 10
"""A look may take one part in so many of the time: on a slow store it is taken less often."""


@dataclass(frozen=True, slots=True)
class Spent:
    """What was asked and paid; input tokens are those of prompts, cached ones included."""

    num_requests: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    cost: Decimal = Decimal(0)

    def __add__(self, other: "Spent") -> "Spent":
        return Spent(
            self.num_requests + other.num_requests,
            self.input_tokens + other.input_tokens,
            self.output_tokens + other.output_tokens,
            self.cost + other.cost,
        )

    def __sub__(self, other: "Spent") -> "Spent":
        return Spent(
            self.num_requests - other.num_requests,
            self.input_tokens - other.input_tokens,
            self.output_tokens - other.output_tokens,
            self.cost - other.cost,
        )

    @classmethod
    def from_totals(cls, totals: Totals) -> "Spent":
        """What committed or wasted work took."""
        cost = sum((Decimal(amount) for amount in (totals.costs or {}).values()), Decimal(0))
        return cls(totals.num_attempts, totals.prompt_tokens, totals.completion_tokens, cost)

    @classmethod
    def from_progress(cls, progress: ShardProgress) -> "Spent":
        """What a shard at work took until it last wrote its progress."""
        return cls(progress.num_requests, progress.prompt_tokens, progress.completion_tokens, Decimal(progress.cost))

    @classmethod
    def from_completions(cls, completions: Iterable[Completion], accounting: Accounting) -> "Spent":
        """What completions took."""
        spent = cls()
        for completion in completions:
            usage, charge = completion.usage, accounting.charge_completion(completion)
            cost = charge.cost if charge is not None else Decimal(0)
            spent += cls(1, usage.prompt_tokens, usage.completion_tokens, cost)
        return spent

    def or_more(self, other: "Spent") -> "Spent":
        """The larger of each amount, of two accounts of the same work."""
        return Spent(
            max(self.num_requests, other.num_requests),
            max(self.input_tokens, other.input_tokens),
            max(self.output_tokens, other.output_tokens),
            max(self.cost, other.cost),
        )


@dataclass(frozen=True, slots=True)
class JournaledSpending:
    """What the journals of a run's shards say that was paid."""

    layout: RunLayout
    accounting: Accounting

    def read(self, committed: Collection[str]) -> Mapping[str, Spent]:
        """By shard, but for those that are committed.

        Raises:
            OSError: the store failed.
        """
        paths = (path for path, _ in storage.list_files(self.layout.journal))
        shards = {path.rpartition("/")[0].rpartition("/")[2] for path in paths} - {*committed}
        return {shard: self.read_shard(shard) for shard in sorted(shards)}

    def read_shard(self, shard: str) -> Spent:
        """What was paid for one shard."""
        kept = (entry.completion for entry in read_journal(self.layout, shard).entries)
        return Spent.from_completions(kept, self.accounting)


class RunSpending:
    """What a run has spent, read from its store; each commit and record of waste is read once.

    Journals are read at the first look: shards that are begun later count by their progress.
    """

    def __init__(self, layout: RunLayout, journaled: JournaledSpending | None = None) -> None:
        self._layout = layout
        self._journaled = journaled
        self._paid_before: Mapping[str, Spent] | None = None
        self._committed: dict[str, Spent] = {}
        self._wasted: dict[str, Spent] = {}
        self._at_work: dict[str, Spent] = {}
        self._spent_by_others: dict[str, Spent] = {}
        self._next_refresh = 0.0

    def spent_by_others(self, shard: str) -> Spent:
        """What was spent, but for what the shard's present attempt spends; looked up at most every `REFRESH_S`."""
        if time.monotonic() >= self._next_refresh:
            started = time.monotonic()
            self._read_all()
            self._spent_by_others.clear()
            ended = time.monotonic()
            self._next_refresh = ended + max(REFRESH_S, _REFRESH_SHARE * (ended - started))
        if shard not in self._spent_by_others:
            self._spent_by_others[shard] = self._sum_others(shard)
        return self._spent_by_others[shard]

    def invalidate(self) -> None:
        """Look again at the next question."""
        self._next_refresh = 0.0

    def _sum_others(self, shard: str) -> Spent:
        paid_before = self._paid_before or {}
        at_work = [
            self._at_work.get(name, Spent()).or_more(paid_before.get(name, Spent()))
            for name in {*self._at_work, *paid_before}
            if name not in self._committed and name != shard
        ]
        return sum((*self._committed.values(), *self._wasted.values(), *at_work), Spent())

    def _read_all(self) -> None:
        layout = self._layout
        # Progress before commits: a shard that commits in between is then counted as committed, never not at all.
        self._at_work = {shard: Spent.from_progress(found) for shard, found in read_progress(layout, "answer").items()}
        for name in storage.list_names(layout.commits, ".json"):
            shard = name.removesuffix(".json")
            if shard not in self._committed and (commit := read_commit(layout, shard)) is not None:
                self._committed[shard] = Spent.from_totals(commit.totals)
        if self._paid_before is None and self._journaled is not None:
            self._paid_before = self._journaled.read(self._committed)
        for name in waste_names(layout):
            if name not in self._wasted:
                self._wasted[name] = Spent.from_totals(read_waste(layout, name).totals)
