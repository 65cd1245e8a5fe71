"""Budgets: how much a run may spend, held against what all its workers have spent.

Part of *answer*. Looked at before each shard, and inside a shard before each request is handed out; requests that are
under way are finished. What this worker's shard spends is known exactly; what other workers spend comes from commits,
records of waste, and the heartbeats of shards at work. So the overshoot is at most what is under way in all engines at
that moment, and what other workers spend in the seconds between two of their heartbeats and two looks at them
(`heartbeat.INTERVAL_S` and `REFRESH_S`). Where answers are journaled, the journals of shards that an earlier attempt
began say what it paid: a shard counts by its journal or its heartbeat, whichever says more, never by both.
"""

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from decimal import Decimal

from model_runner.protocol import ModelRunner
from schemas import storage
from schemas.job import LimitsSection
from schemas.layout import RunLayout
from schemas.records import Completion, Request
from transforms.account import AccountedAnswer, account
from transforms.commit import Totals, read_commit
from transforms.heartbeat import Beat, read_beats
from transforms.journal_file import read_journal
from transforms.plan import PlannedShard
from transforms.price_book import PriceBook
from transforms.stop import StopKind, StopReason
from transforms.validate import ValidatedAnswer
from transforms.waste import read_waste, waste_names

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

    @classmethod
    def of_totals(cls, totals: Totals) -> "Spent":
        """What committed or wasted work took."""
        cost = sum((Decimal(amount) for amount in (totals.costs or {}).values()), Decimal(0))
        return cls(totals.num_attempts, totals.prompt_tokens, totals.completion_tokens, cost)

    @classmethod
    def of_beat(cls, beat: Beat) -> "Spent":
        """What a shard at work took until its last heartbeat."""
        return cls(beat.num_requests, beat.prompt_tokens, beat.completion_tokens, Decimal(beat.cost))

    @classmethod
    def of_completions(
        cls, completions: Iterable[Completion], prices: PriceBook | None, provider: str | None, model: str | None
    ) -> "Spent":
        """What answers took that were journaled; prices as of `account`."""
        spent = cls()
        for answer in account((ValidatedAnswer(each, None, None) for each in completions), prices, provider, model):
            usage = answer.answer.completion.usage
            cost = answer.charge.cost if answer.charge is not None else Decimal(0)
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
class Limits:
    """The limits of one attempt of a run; `deadline_at` is in seconds since the epoch. None is no limit."""

    max_cost: Decimal | None = None
    max_input_tokens: int | None = None
    max_output_tokens: int | None = None
    max_requests: int | None = None
    deadline_at: float | None = None

    @classmethod
    def of(cls, section: LimitsSection, now: float) -> "Limits":
        """The limits of an attempt that starts `now`, in seconds since the epoch."""
        return cls(
            section.max_cost,
            section.max_input_tokens,
            section.max_output_tokens,
            section.max_requests,
            section.deadline_at(now),
        )

    @property
    def has_any(self) -> bool:
        return self != Limits()

    def reached(self, spent: Spent, now: float) -> StopReason | None:
        """The first limit that leaves nothing more to spend, if any."""
        if self.deadline_at is not None and now >= self.deadline_at:
            at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.deadline_at))
            return StopReason("deadline", f"[limits] deadline: {at} is past")
        for kind, limit, found in self._amounts(spent):
            if found >= limit:
                return StopReason(kind, f"[limits] {kind}: {_spelled(limit)} allowed, {_spelled(found)} spent")
        return None

    def refused(self, spent: Spent, planned: PlannedShard) -> StopReason | None:
        """The limit that a shard would certainly pass, if any: it asks each of its requests at least once."""
        if (reason := self.reached(spent, time.time())) is not None:
            return reason
        least = spent + Spent(planned.num_requests, planned.num_prompt_tokens)
        for kind, limit, needed in self._amounts(least):
            if needed > limit and kind in ("max_requests", "max_input_tokens"):
                used = spent.num_requests if kind == "max_requests" else spent.input_tokens
                return StopReason(
                    kind,
                    f"[limits] {kind}: {limit:,} allowed, {used:,} spent, and shard {planned.shard} "
                    f"needs at least {needed - used:,}",
                )
        return None

    def _amounts(self, spent: Spent) -> Iterator[tuple[StopKind, Decimal | int, Decimal | int]]:
        """Kind, limit and amount of each limit on spending."""
        if self.max_cost is not None:
            yield "max_cost", self.max_cost, spent.cost
        if self.max_input_tokens is not None:
            yield "max_input_tokens", self.max_input_tokens, spent.input_tokens
        if self.max_output_tokens is not None:
            yield "max_output_tokens", self.max_output_tokens, spent.output_tokens
        if self.max_requests is not None:
            yield "max_requests", self.max_requests, spent.num_requests


def _spelled(amount: Decimal | int) -> str:
    return f"{amount.normalize():,f}" if isinstance(amount, Decimal) else f"{amount:,}"


@dataclass(frozen=True, slots=True)
class JournaledSpending:
    """What the journals of a run's shards say that was paid; prices as of `account`."""

    layout: RunLayout
    prices: PriceBook | None
    provider: str | None
    model: str | None

    def of(self, is_done: Collection[str]) -> Mapping[str, Spent]:
        """By shard, but for those that are committed.

        Raises:
            OSError: the store failed.
        """
        paths = (path for path, _ in storage.list_files(self.layout.journal))
        shards = {path.rpartition("/")[0].rpartition("/")[2] for path in paths} - {*is_done}
        return {shard: self.of_shard(shard) for shard in sorted(shards)}

    def of_shard(self, shard: str) -> Spent:
        """What was paid for one shard."""
        completions = (entry.completion for entry in read_journal(self.layout, shard).entries)
        return Spent.of_completions(completions, self.prices, self.provider, self.model)


class RunSpending:
    """What a run has spent, read from its store; each commit and record of waste is read once.

    Journals are read at the first look: of shards that are begun later, heartbeats tell.
    """

    def __init__(self, layout: RunLayout, journaled: JournaledSpending | None = None) -> None:
        self._layout = layout
        self._journaled = journaled
        self._paid_before: Mapping[str, Spent] | None = None
        self._committed: dict[str, Spent] = {}
        self._wasted: dict[str, Spent] = {}
        self._beats: dict[str, Spent] = {}
        self._next_look = 0.0

    def outside(self, shard: str) -> Spent:
        """What was spent, but for what the shard's present attempt spends; looked up at most every `REFRESH_S`."""
        if time.monotonic() >= self._next_look:
            started = time.monotonic()
            self._look()
            ended = time.monotonic()
            self._next_look = ended + max(REFRESH_S, _REFRESH_SHARE * (ended - started))
        paid_before = self._paid_before or {}
        at_work = [
            self._beats.get(name, Spent()).or_more(paid_before.get(name, Spent()))
            for name in {*self._beats, *paid_before}
            if name not in self._committed and name != shard
        ]
        return sum((*self._committed.values(), *self._wasted.values(), *at_work), Spent())

    def forget_look(self) -> None:
        """Look again at the next question."""
        self._next_look = 0.0

    def _look(self) -> None:
        layout = self._layout
        # Beats before commits: a shard that commits in between is then counted as committed, never not at all.
        self._beats = {shard: Spent.of_beat(beat) for shard, beat in read_beats(layout, "answer").items()}
        for name in storage.list_names(layout.commits, ".json"):
            shard = name.removesuffix(".json")
            if shard not in self._committed and (commit := read_commit(layout, shard)) is not None:
                self._committed[shard] = Spent.of_totals(commit.totals)
        if self._paid_before is None and self._journaled is not None:
            self._paid_before = self._journaled.of(self._committed)
        for name in waste_names(layout):
            if name not in self._wasted:
                self._wasted[name] = Spent.of_totals(read_waste(layout, name).totals)


@dataclass(slots=True)
class ShardBudget:
    """The budget as one attempt of a shard sees it; says once, and then for good, that it must stop.

    Attributes:
        outside: what is spent beside this attempt.
        stop: why no more requests may be handed out; None while they may.
    """

    limits: Limits
    outside: Callable[[], Spent]
    own: Spent = field(default_factory=Spent)
    stop: StopReason | None = None

    def may_ask(self) -> bool:
        """Whether one more request may be handed out."""
        if self.stop is None and self.limits.has_any:
            self.stop = self.limits.reached(self.outside() + self.own, time.time())
        return self.stop is None

    def note_request(self, request: Request) -> None:
        self.own += Spent(num_requests=1, input_tokens=request.num_prompt_tokens)

    def note_answer(self, answer: AccountedAnswer, *, is_counted: bool = False) -> None:
        """Count an answer's output and cost; its input was counted when it was asked.

        Args:
            is_counted: whether it is counted already, as one that an earlier attempt journaled.
        """
        cost = answer.charge.cost if answer.charge is not None else Decimal(0)
        if not is_counted:
            self.own += Spent(output_tokens=answer.answer.completion.usage.completion_tokens, cost=cost)
        if self.limits.max_cost is not None and answer.charge is None and self.stop is None:
            self.stop = StopReason("max_cost", "[limits] max_cost: an answer has no price, so nobody knows the cost")


@dataclass(frozen=True, slots=True)
class BudgetedRunner:
    """A runner that is handed requests as long as the budget lasts; what it was handed it finishes."""

    runner: ModelRunner
    budget: ShardBudget

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """As `ModelRunner.generate`, for the requests that were pulled."""
        num_counted: dict[str, int] = {}
        for completion in self.runner.generate(self._handed_out(requests, num_counted)):
            # Prompts of remote engines were counted by an estimate.
            difference = completion.usage.prompt_tokens - num_counted.pop(completion.request_id, 0)
            if completion.usage.prompt_tokens:
                self.budget.own += Spent(input_tokens=difference)
            yield completion

    def _handed_out(self, requests: Iterable[Request], num_counted: dict[str, int]) -> Iterator[Request]:
        waiting = iter(requests)
        # Asked before the next one is pulled: a request that was pulled counts as under way.
        while self.budget.may_ask():
            request = next(waiting, None)
            if request is None:
                return
            self.budget.note_request(request)
            num_counted[request.request_id] = request.num_prompt_tokens
            yield request
