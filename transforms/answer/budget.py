"""Budgets: how much a run may spend, held against what it has spent and what is on its way.

Part of *answer*. Checked before each shard, and inside a shard before each request is sent: once what is spent and
what requests in flight are expected to take (`transforms/answer/expectation.py`) reaches a limit, nothing more
is sent until answers arrive. Requests are counted exactly. Tokens and money pass a limit by what the requests on
their way take beyond what was expected of them, so at most by all of these at their maximal price, and with several
workers by what the others spend between two writes of their progress and two looks at it
(`progress.INTERVAL_S`, `spending.REFRESH_S`).
"""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from threading import Lock

from moebeam.model_runner.admission import AdmittingRunner, Verdict
from moebeam.model_runner.protocol import ModelRunner
from moebeam.schemas.answers import AccountedAnswer
from moebeam.schemas.job.sections import LimitsSection
from moebeam.schemas.records import Completion, Request
from moebeam.transforms.answer.expectation import Ceiling, Expectation
from moebeam.transforms.answer.spending import Spent
from moebeam.transforms.durable.stop import StopKind, StopReason
from moebeam.transforms.plan.plan_record import PlannedShard


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
        if self.deadline_at is not None and now >= self.deadline_at:
            at = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.deadline_at))
            return StopReason("deadline", f"[limits] deadline: {at} is past")
        for kind, limit, found in self._amounts(spent):
            if found >= limit:
                return StopReason(
                    kind, f"[limits] {kind}: {_format_amount(limit)} allowed, {_format_amount(found)} spent"
                )
        return None

    def find_refusal(self, spent: Spent, planned: PlannedShard) -> StopReason | None:
        """The limit that a shard would certainly pass, if any: it asks each of its requests at least once."""
        if (reason := self.find_reached(spent, time.time())) is not None:
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

    An `Admission` for engines, which ask from other threads; only `refresh` reads the store, which may be slow.

    Attributes:
        spent_by_others: reads from the store what was spent beside this attempt.
        own: what this attempt has spent; requests and their prompts count from when they are sent.
        stop: why no more requests may be sent; None while they may.
    """

    limits: SpendingLimits
    spent_by_others: Callable[[], Spent]
    ceiling: Ceiling = field(default_factory=Ceiling)
    own: Spent = field(default_factory=Spent)
    stop: StopReason | None = None
    _expectation: Expectation = field(default_factory=Expectation)
    _in_flight: dict[str, InFlight] = field(default_factory=dict[str, InFlight])
    _expected: Spent = field(default_factory=Spent)
    _spent_by_others: Spent = field(default_factory=Spent)
    _lock: Lock = field(default_factory=Lock)

    def refresh(self) -> None:
        """Look up what others have spent, unless that was done a moment ago."""
        if self.stop is None and self.limits.has_any:
            self._spent_by_others = self.spent_by_others()

    def may_ask(self) -> bool:
        """Look up what others have spent, and say whether anything is left."""
        self.refresh()
        with self._lock:
            return self._is_open()

    def admit(self, request: Request) -> Verdict:
        """Whether a request may be sent now; see `Admission.admit`."""
        with self._lock:
            if request.request_id in self._in_flight:
                return "send"
            if not self._is_open():
                return "stop"
            if self.limits.has_any:
                if (
                    self._in_flight
                    and self.limits.find_reached(self._spent_by_others + self.own + self._expected, 0.0) is not None
                ):
                    return "wait"
                most = self.ceiling.most(request)
                expected = self._expectation.expect(most)
                counted = Spent(num_requests=1, input_tokens=expected.input_tokens)
                self.own += counted
                self._expected += expected - counted
                self._in_flight[request.request_id] = InFlight(most, expected)
            return "send"

    def settle(self, completion: Completion) -> None:
        """Count what a request took instead of what was expected of it; replayed answers, which none sent, not at all.

        Of one that failed without a usage the prompt stays counted.
        """
        with self._lock:
            away = self._in_flight.pop(completion.request_id, None)
            if away is None:
                return
            counted = Spent(num_requests=1, input_tokens=away.expected.input_tokens)
            self._expected -= away.expected - counted
            taken = Spent.from_completions([completion], self.ceiling.accounting)
            if taken.input_tokens:
                self._expectation.learn(away.most, taken)
                self.own += taken - counted

    def end_round(self) -> None:
        """Nothing is on its way any more; what an engine lost stays counted as far as it was."""
        with self._lock:
            self._in_flight.clear()
            self._expected = Spent()

    def note_answer(self, answer: AccountedAnswer) -> None:
        """Stop where money is limited and an answer has no price."""
        if self.limits.max_cost is not None and answer.charge is None and self.stop is None:
            self.stop = StopReason("max_cost", "[limits] max_cost: an answer has no price, so nobody knows the cost")

    def _is_open(self) -> bool:
        if self.stop is None and self.limits.has_any:
            self.stop = self.limits.find_reached(self._spent_by_others + self.own, time.time())
        return self.stop is None


@dataclass(frozen=True, slots=True)
class BudgetedRunner:
    """A runner that sends requests as long as the budget lasts; what is on its way it finishes.

    Engines that ask before they send (`AdmittingRunner`) are let pull ahead. Others take what they are handed for sent:
    they are handed what the budget is expected to bear, then, when all of it has arrived, as much as is left.
    """

    runner: ModelRunner
    budget: ShardBudget

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """As `ModelRunner.generate`, until the budget ends.

        Raises:
            BudgetEnded: it ended before all requests were sent that had been pulled; what was sent came out before.
        """
        waiting = _Waiting(iter(requests), self.budget)
        if isinstance(self.runner, AdmittingRunner):
            for completion in self.runner.generate_admitted(waiting.pull(), self.budget):
                waiting.unanswered.pop(completion.request_id, None)
                yield completion
                self.budget.refresh()
        else:
            while not waiting.is_over:
                for completion in self.runner.generate(waiting.pull_admitted()):
                    waiting.unanswered.pop(completion.request_id, None)
                    self.budget.settle(completion)
                    yield completion
                self.budget.end_round()
        if waiting.unanswered and self.budget.stop is not None:
            raise BudgetEnded(self.budget.stop.message)


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
            verdict = self.budget.admit(request)
            self._held = request if verdict == "wait" else None
            if verdict != "send":
                self.is_over = verdict == "stop"
                return
            yield request

    def _next(self) -> Request | None:
        # Asked before the next one is pulled, so that where the budget ends none is pulled in vain.
        request = next(self.requests, None) if self.budget.may_ask() else None
        if request is None:
            self.is_over = True
            return None
        self.unanswered[request.request_id] = None
        return request
