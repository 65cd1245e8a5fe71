"""Whether a request's failures are its own: policy, without calls.

Part of the `openai` engine, one for each endpoint (`endpoint.py`). A failure that may be the provider's makes no reject
unless others were answered between the request's tries, and chance does not explain that this one never was.
"""

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from math import inf

from moebeam.model_runner.openai_engine.failures import CallFailure
from moebeam.model_runner.openai_engine.outages.circuit import OutagePolicy

MAX_CHANCE = 1e-6
"""A request is given up where it would have failed by chance less often than this."""

_MAX_OUTCOMES = 512
_OVERLOADS_A_RETRY = 10


@dataclass(slots=True, eq=False)
class OwnFailures:
    """What one request met at one endpoint; times are the evidence's.

    Attributes:
        num_failed: tries that failed, without refusals for overload and connections that were never made.
        num_confirmed: those of them since whose predecessor another request was sent and answered.
    """

    num_failed: int = 0
    num_confirmed: int = 0
    num_overloaded: int = 0
    first_failed_at: float = inf
    last_failed_at: float = inf
    first_overloaded_at: float = inf

    @property
    def num_tries(self) -> int:
        """All tries that failed."""
        return self.num_failed + self.num_overloaded


@dataclass(frozen=True, slots=True)
class _Outcome:
    own: OwnFailures
    started_at: float
    is_answered: bool


class Evidence:
    """Recent outcomes of an endpoint's calls; lives on one event loop."""

    def __init__(self, max_retries: int, policy: OutagePolicy, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_retries = max_retries
        self._policy = policy
        self._clock = clock
        self._outcomes: deque[_Outcome] = deque(maxlen=_MAX_OUTCOMES)
        self._answered_start = -inf

    def record_answer(self, own: OwnFailures, started_at: float) -> None:
        """A call that began at `started_at` was answered."""
        self._answered_start = max(self._answered_start, started_at)
        self._outcomes.append(_Outcome(own, started_at, is_answered=True))

    def record_failure(self, own: OwnFailures, failure: CallFailure, started_at: float) -> None:
        """A call failed; what is plainly the provider's alone counts for nobody."""
        if failure.consequence == "unreachable":
            return
        now = self._clock()
        self._outcomes.append(_Outcome(own, started_at, is_answered=False))
        if failure.consequence == "overload":
            own.num_overloaded += 1
            own.first_overloaded_at = min(own.first_overloaded_at, now)
            return
        own.num_failed += 1
        own.num_confirmed += self._answered_start >= own.last_failed_at
        own.first_failed_at = min(own.first_failed_at, now)
        own.last_failed_at = now

    def is_own(self, own: OwnFailures) -> bool:
        """Whether a request is to be given up: only it fails here, and has failed often enough."""
        if own.num_failed > self._max_retries and own.num_confirmed:
            return self._share_failed(own) ** own.num_confirmed < MAX_CHANCE
        return (
            own.num_overloaded > self._max_retries * _OVERLOADS_A_RETRY
            and self._clock() - own.first_overloaded_at >= self._policy.max_outage_s
            and self._answered_start > own.first_overloaded_at
        )

    def needs_others(self, own: OwnFailures) -> bool:
        """Whether the request has used up its tries, and nobody was sent and answered since the last one.

        Overload passes by itself, so there it is enough to know now and then whether others get through.
        """
        if own.num_failed > self._max_retries and self._answered_start < own.last_failed_at:
            return True
        quiet_s = self._clock() - self._answered_start
        return own.num_overloaded > self._max_retries and quiet_s >= self._policy.max_wait_s

    def _share_failed(self, own: OwnFailures) -> float:
        """How likely a call of the others fails, estimated high, from those sent since the request first failed."""
        others = [
            outcome.is_answered
            for outcome in self._outcomes
            if outcome.own is not own and outcome.started_at >= own.first_failed_at
        ]
        return (others.count(False) + 1) / (len(others) + 2)
