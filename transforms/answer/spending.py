"""Spending: what a run has asked and paid, added up from all that tells of it.

Part of *answer*, below the budget (`transforms/answer/budget.py`). Commits and waste say exactly what was paid; for
shards that other workers are at, their progress files say it. The journals of shards that an earlier attempt began say
what that attempt paid. Such a shard counts by its journal or by its progress, whichever is more, never by both. What
this process answers itself is counted in memory, request by request.
"""

import threading
import time
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from weakref import WeakValueDictionary

from moebeam.schemas.answers import Totals
from moebeam.schemas.records import Completion
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.transforms.answer.waste import read_waste, waste_names
from moebeam.transforms.durable.commit import list_committed_shards, read_commit
from moebeam.transforms.durable.journal_file import list_journaled_shards, read_journal
from moebeam.transforms.durable.progress import ShardProgress, read_progress
from moebeam.transforms.money.account import Accounting

REFRESH_S = 1.0
"""Least seconds between two looks at what others have spent."""

_REFRESH_SHARE = 10
"""A look may take one part in so many of the time: on a slow store it is taken less often."""


@dataclass(frozen=True, slots=True)
class Spent:
    """What was asked and paid; input tokens are those of prompts, cached ones included.

    Tokens that a provider did not count are estimated: a limit of tokens must hold for them, too.
    """

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
        num_input = totals.prompt_tokens + totals.estimated_prompt_tokens
        return cls(totals.num_attempts, num_input, totals.completion_tokens + totals.estimated_completion_tokens, cost)

    @classmethod
    def from_progress(cls, progress: ShardProgress) -> "Spent":
        """What a shard at work took until it last wrote its progress."""
        num_input = progress.prompt_tokens + progress.estimated_prompt_tokens
        num_output = progress.completion_tokens + progress.estimated_completion_tokens
        return cls(progress.num_requests, num_input, num_output, Decimal(progress.cost))

    @classmethod
    def from_completions(cls, completions: Iterable[Completion], accounting: Accounting) -> "Spent":
        """What completions took."""
        spent = cls()
        for completion in completions:
            usage, charge = completion.usage, accounting.charge_completion(completion)
            cost = charge.cost if charge is not None else Decimal(0)
            spent += cls(1, usage.likely_prompt_tokens, usage.likely_completion_tokens, cost)
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
        shards = list_journaled_shards(self.layout)
        return {shard: self.read_shard(shard) for shard in shards if shard not in committed}

    def read_shard(self, shard: str) -> Spent:
        """What was paid for one shard."""
        kept = (entry.completion for entry in read_journal(self.layout, shard).entries)
        return Spent.from_completions(kept, self.accounting)


class Spending:
    """What the shards spend that a process answers at a time, beside what others have spent; thread-safe.

    All but `refresh`, `enter` and `leave` belongs inside `lock`.

    Attributes:
        others: spent by all but the shards of this process, as far as is known.
        own: spent by the shards of this process, those that have ended included.
        expected: what requests on their way are expected to take beyond what `own` counts of them.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.others = Spent()
        self.own = Spent()
        self.expected = Spent()

    def refresh(self) -> None:
        """Look up what others have spent, unless that was done a moment ago."""

    def enter(self, shard: str) -> None:
        """Count a shard's spending here from now on."""

    def leave(self, shard: str, spent: Spent) -> None:
        """Say what the attempt at a shard that ends now has spent; it stays counted."""

    @property
    def total(self) -> Spent:
        """All that is spent."""
        return self.others + self.own


class RunSpending(Spending):
    """What a run has spent, read from its store; each commit and record of waste is read once.

    Journals are read at the first look: shards that are begun later count by their progress. What has ended in this
    process is known before the store says it; where the store says more, as another process went on, that counts.
    """

    def __init__(self, layout: RunLayout, accounting: Accounting) -> None:
        super().__init__()
        self._layout = layout
        self._journaled = JournaledSpending(layout, accounting)
        self._paid_before: Mapping[str, Spent] | None = None
        self._committed: dict[str, Spent] = {}
        self._wasted: dict[str, Spent] = {}
        self._at_work: dict[str, Spent] = {}
        self._answering: set[str] = set()
        self._ended: dict[str, Spent] = {}
        self._looking = threading.Lock()
        self._next_refresh = 0.0

    def refresh(self) -> None:
        """See `Spending.refresh`; at most every `REFRESH_S`.

        Raises:
            OSError: the store failed.
        """
        if time.monotonic() < self._next_refresh or not self._looking.acquire(blocking=False):
            return
        try:
            started = time.monotonic()
            self._read_all()
            ended = time.monotonic()
            self._next_refresh = ended + max(REFRESH_S, _REFRESH_SHARE * (ended - started))
        finally:
            self._looking.release()

    def invalidate(self) -> None:
        """Look again at the next question."""
        self._next_refresh = 0.0

    def enter(self, shard: str) -> None:
        with self.lock:
            self.others -= self._known(shard)
            self.own -= self._ended.pop(shard, Spent())
            self._answering.add(shard)

    def leave(self, shard: str, spent: Spent) -> None:
        with self.lock:
            self._answering.discard(shard)
            self._ended[shard] = spent
            self.others += self._known(shard)

    def _known(self, shard: str) -> Spent:
        """What the store says of a shard beyond what was counted here."""
        if shard in self._answering:
            return Spent()
        found = self._committed.get(shard)
        if found is None:
            paid_before = (self._paid_before or {}).get(shard, Spent())
            found = self._at_work.get(shard, Spent()).or_more(paid_before)
        counted = self._ended.get(shard, Spent())
        return found.or_more(counted) - counted

    def _read_all(self) -> None:
        layout = self._layout
        # Progress before commits: a shard that commits in between is then counted as committed, never not at all.
        at_work = {shard: Spent.from_progress(found) for shard, found in read_progress(layout, "answer").items()}
        committed: dict[str, Spent] = {}
        for shard in list_committed_shards(layout):
            if shard not in self._committed and (commit := read_commit(layout, shard)) is not None:
                committed[shard] = Spent.from_totals(commit.totals)
        if self._paid_before is None:
            self._paid_before = self._journaled.read({*self._committed, *committed})
        for name in waste_names(layout):
            if name not in self._wasted and (waste := read_waste(layout, name)) is not None:
                self._wasted[name] = Spent.from_totals(waste.totals)
        with self.lock:
            self._at_work = at_work
            self._committed |= committed
            known = (self._known(shard) for shard in {*self._committed, *at_work, *self._paid_before})
            self.others = sum((*self._wasted.values(), *known), Spent())


_shared: WeakValueDictionary[str, RunSpending] = WeakValueDictionary()
_shared_lock = threading.Lock()


def share_spending(attempt: str, layout: RunLayout, accounting: Accounting) -> RunSpending:
    """The one account that all threads of this process keep for an attempt of a run, as long as any of them holds it.

    Args:
        attempt: unique to the attempt.
    """
    with _shared_lock:
        found = _shared.get(attempt)
        if found is None:
            found = _shared[attempt] = RunSpending(layout, accounting)
        return found
