"""Budgets: how much a run may spend, held against what it has spent and what is on its way; and when it must stop.

Part of *answer*. Checked before each request is sent: once what is spent and what requests in flight are expected to
take (`transforms/answer/expectation.py`) reaches a limit, nothing more is sent until answers arrive. Limits bite
inside a shard; what was answered of it is kept in its journal, and the next attempt asks the rest.

Shards that one process answers at a time count together (`transforms/answer/spending.py`), so that a process keeps a
number of requests exactly. Tokens and money pass a limit by what the requests on their way take beyond what was
expected of them, so at most by all of these at their maximal price. Between several processes a limit of any kind is
also passed by what the others spend between two writes of their progress and two looks at it (`progress.INTERVAL_S`,
`spending.REFRESH_S`).
"""

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from threading import Event
from typing import Self

from moebeam.model_runner.admission import AdmittingRunner, Verdict
from moebeam.model_runner.protocol import ModelRunner
from moebeam.schemas.answers import AccountedAnswer
from moebeam.schemas.errors import EngineUnavailable, RequestGivenUp
from moebeam.schemas.job.sections import LimitsSection
from moebeam.schemas.records import Completion, LostCall, Request
from moebeam.transforms.answer.expectation import Ceiling, Expectation
from moebeam.transforms.answer.spending import Spending, Spent
from moebeam.transforms.durable.lease import HeldLease
from moebeam.transforms.durable.stop import LOST_LEASE, ON_ERROR, SIGNAL, StopKind, StopReason

_STOPS_RETRIES: frozenset[StopKind] = frozenset({SIGNAL, ON_ERROR, LOST_LEASE, "deadline"})
"""Stops after which a request that was sent is not tried again; a limit of spending has counted it already."""


class BudgetEnded(Exception):
    """Requests that were handed out were not sent any more; `ShardBudget.stop` says why."""


@dataclass(frozen=True, slots=True)
class SpendingLimits:
    """The limits of one attempt of a run; `deadline_at` is in seconds since the epoch. None is no limit."""

    max_cost: Decimal | None = None
    max_input_tokens: int | None = None
    max_output_tokens: int | None = None
    max_requests: int | None = None
    deadline_at: float | None = None

    @classmethod
    def from_section(cls, section: LimitsSection, now: float) -> "SpendingLimits":
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
        return self != SpendingLimits()

    def find_reached(self, spent: Spent, now: float) -> StopReason | None:
        """The first limit that leaves nothing more to spend, if any."""
        if (late := self.find_late(now)) is not None:
            return late
        for kind, limit, found in self._amounts(spent):
            if found >= limit:
                return StopReason(
                    kind, f"[limits] {kind}: {_format_amount(limit)} allowed, {_format_amount(found)} spent"
                )
        return None

    def find_late(self, now: float) -> StopReason | None:
        """The deadline, once it is past."""
        if self.deadline_at is None or now < self.deadline_at:
            return None
        at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.deadline_at))
        return StopReason("deadline", f"[limits] deadline: {at} is past")

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


def _format_amount(amount: Decimal | int) -> str:
    return f"{amount.normalize():,f}" if isinstance(amount, Decimal) else f"{amount:,}"


@dataclass(frozen=True, slots=True)
class InFlight:
    """What a request may take, and what it is expected to take beyond what was counted when it left."""

    most: Spent
    expected: Spent


@dataclass(slots=True)
class ShardBudget:
    """The budget as one attempt of a shard sees it; says once, and then for good, that it must stop.

    An `Admission` for engines, which ask from other threads; only `refresh` reads the store, which may be slow. Entered
    while the shard is answered.

    Attributes:
        spending: of all shards that this process answers at the same time, and of all others.
        lease: under which the shard is answered; nothing leaves once it is lost.
        own: what this attempt has spent; requests and their prompts count from when they are sent.
        stop: why no more requests may be sent; None while they may. Set by `end`.
    """

    limits: SpendingLimits = field(default_factory=SpendingLimits)
    spending: Spending = field(default_factory=Spending)
    ceiling: Ceiling = field(default_factory=Ceiling)
    shard: str = ""
    lease: HeldLease | None = None
    own: Spent = field(default_factory=Spent)
    stop: StopReason | None = None
    _expectation: Expectation = field(default_factory=Expectation)
    _in_flight: dict[str, InFlight] = field(default_factory=dict[str, InFlight])
    _ended: Event = field(default_factory=Event)

    def __enter__(self) -> Self:
        self.spending.enter(self.shard)
        return self

    def __exit__(self, *unused: object) -> None:
        self.end_round()
        self.spending.leave(self.shard, self.own)

    def end(self, reason: StopReason) -> None:
        """Send nothing more; the first reason wins. Safe from any thread."""
        with self.spending.lock:
            self._end(reason)

    def sleep(self, seconds: float) -> None:
        """Wait, but not past the end of the budget."""
        self._ended.wait(seconds)

    def refresh(self) -> None:
        """Look up what others have spent, unless that was done a moment ago."""
        if self.stop is None and self.limits.has_any:
            self.spending.refresh()

    def may_ask(self) -> bool:
        """Look up what others have spent, and say whether anything is left."""
        self.refresh()
        with self.spending.lock:
            return self._is_open()

    def admit(self, request: Request) -> Verdict:
        """Whether a request may be sent now, or tried again; see `Admission.admit`."""
        with self.spending.lock:
            if request.request_id in self._in_flight:
                return "stop" if self.stop is not None and self.stop.kind in _STOPS_RETRIES else "send"
            if not self._is_open():
                return "stop"
            if self.limits.has_any:
                if self._in_flight and self.limits.find_reached(self._sum(with_expected=True), 0.0) is not None:
                    return "wait"
                most = self.ceiling.most(request)
                expected = self._expectation.expect(most)
                counted = Spent(num_requests=1, input_tokens=expected.input_tokens)
                self._count(counted, expected - counted)
                self._in_flight[request.request_id] = InFlight(most, expected)
            return "send"

    def settle(self, completion: Completion) -> None:
        """Count what a request took instead of what was expected of it; replayed answers, which none sent, not at all.

        Of one that failed without a usage the prompt stays counted.
        """
        with self.spending.lock:
            away = self._in_flight.pop(completion.request_id, None)
            if away is None:
                return
            counted = Spent(num_requests=1, input_tokens=away.expected.input_tokens)
            self._count(Spent(), counted - away.expected)
            taken = Spent.from_completions([completion], self.ceiling.accounting)
            if taken.input_tokens:
                self._expectation.learn(away.most, taken)
                self._count(taken - counted)

    async def depart(self, request: Request, call: LostCall) -> bool:
        """Whether the shard is still ours, and a call for it may leave; see `Admission.depart`.

        Raises:
            OSError: the store does not say.
        """
        if self.lease is not None and not await self.lease.confirm():
            self.end_if_lost()
        return self.stop is None or self.stop.kind not in _STOPS_RETRIES

    def dismiss(self, request: Request) -> None:
        return None

    def end_if_lost(self) -> None:
        """Send nothing more once the lease is known to be lost."""
        if self.lease is not None and self.lease.is_lost:
            self.end(StopReason(LOST_LEASE, f"another worker answers shard {self.shard}: its lease ended here"))

    def end_round(self) -> None:
        """Nothing is on its way any more; what an engine lost stays counted as far as it was."""
        with self.spending.lock:
            for away in self._in_flight.values():
                self._count(Spent(), Spent(1, away.expected.input_tokens) - away.expected)
            self._in_flight.clear()

    def count_earlier(self, spent: Spent) -> None:
        """Count what earlier attempts spent on this shard and this one finds in its journal."""
        with self.spending.lock:
            self._count(spent)

    def note_answer(self, answer: AccountedAnswer) -> None:
        """Stop where money is limited and an answer has no price."""
        if self.limits.max_cost is not None and answer.charge is None:
            why = "has no price" if answer.answer.completion.usage.is_known else "came without a usage"
            advice = "limit requests or tokens in place of it"
            self.end(StopReason("max_cost", f"[limits] max_cost: an answer {why}, so nobody knows the cost; {advice}"))

    def _end(self, reason: StopReason) -> None:
        if self.stop is None:
            self.stop = reason
            self._ended.set()

    def _is_open(self) -> bool:
        if self.stop is None and self.limits.has_any:
            reason = self.limits.find_reached(self._sum(), time.time())
            if reason is not None:
                self._end(reason)
        return self.stop is None

    def _sum(self, *, with_expected: bool = False) -> Spent:
        total = self.spending.total
        return total + self.spending.expected if with_expected else total

    def _count(self, spent: Spent, expected: Spent | None = None) -> None:
        self.own += spent
        self.spending.own += spent
        if expected is not None:
            self.spending.expected += expected


@dataclass(frozen=True, slots=True)
class BudgetedRunner:
    """A runner that sends requests as long as the budget lasts; what is on its way it finishes.

    Engines that ask before they send (`AdmittingRunner`) are let pull ahead. Others take what they are handed for sent:
    they are handed what the budget is expected to bear, then, when all of it has arrived, as much as is left.
    """

    runner: ModelRunner
    budget: ShardBudget

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """As `ModelRunner.generate`, until the budget ends. A request that was given up is no answer, and stays back.

        Raises:
            BudgetEnded: it ended before all requests were answered that had been pulled; others came out before.
        """
        waiting = _Waiting(iter(requests), self.budget)
        has_given_up = False
        for completion in self._answers(waiting):
            if isinstance(completion.error, RequestGivenUp):
                has_given_up = True
                continue
            waiting.unanswered.pop(completion.request_id, None)
            yield completion
        if waiting.unanswered and self.budget.stop is not None:
            raise BudgetEnded(self.budget.stop.message)
        if has_given_up:
            raise EngineUnavailable("the engine gave requests up though nobody asked it to stop")

    def _answers(self, waiting: "_Waiting") -> Iterator[Completion]:
        if isinstance(self.runner, AdmittingRunner):
            for completion in self.runner.generate_admitted(waiting.pull(), self.budget):
                yield completion
                self.budget.refresh()
            return
        while not waiting.is_over:
            for completion in self.runner.generate(waiting.pull_admitted()):
                self.budget.settle(completion)
                yield completion
            self.budget.end_round()
            if self.budget.stop is not None:
                return


@dataclass(slots=True)
class _Waiting:
    """Requests on their way into an engine.

    Attributes:
        unanswered: ids of those that were pulled and have not come out again.
        is_over: whether there are no more, or no more may be sent.
    """

    requests: Iterator[Request]
    budget: ShardBudget
    unanswered: dict[str, None] = field(default_factory=dict[str, None])
    is_over: bool = False
    _held: Request | None = None

    def pull(self) -> Iterator[Request]:
        """All of them, while anything is left of the budget."""
        while (request := self._next()) is not None:
            yield request

    def pull_admitted(self) -> Iterator[Request]:
        """Those that may be sent now; the one after them is held for the next round."""
        while (request := self._held or self._next()) is not None:
            verdict = "send" if request.earlier is not None else self.budget.admit(request)
            self._held = request if verdict == "wait" else None
            if verdict != "send":
                self.is_over = verdict == "stop"
                return
            yield request

    def _next(self) -> Request | None:
        # Pulled before the budget is asked: where all that is left is replayed from a journal, nothing need be asked.
        request = next(self.requests, None)
        if request is not None:
            self.unanswered[request.request_id] = None
            if request.earlier is not None or self.budget.may_ask():
                return request
        self.is_over = True
        return None
