"""When a provider counts as out, when it is asked again, and how long it is waited for: policy, without calls.

Part of the `openai` engine, one for each endpoint (`endpoint.py`). While the circuit is open, one request at a time
probes the provider and all others wait. The first answer closes it.
"""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from moebeam.model_runner.openai_engine.failures import CallFailure
from moebeam.model_runner.protocol import Outage


@dataclass(frozen=True, slots=True)
class OutagePolicy:
    """What an outage is, and how long it is waited for.

    Attributes:
        max_outage_s: from the first failure without an answer after it; then the provider is down for good.
        num_failures: in a row, with no answer between; one is enough where no connection is made.
        overload_s: so long nothing but refusals for overload makes an outage too.
        first_wait_s, max_wait_s: between probes; doubled each time, of which half is random.
    """

    max_outage_s: float = 600.0
    num_failures: int = 3
    overload_s: float = 5.0
    first_wait_s: float = 1.0
    max_wait_s: float = 30.0


@dataclass(frozen=True, slots=True)
class _Open:
    """An outage, in seconds of the circuit's clock; replaced as a whole, since other threads read it."""

    since: float
    opened_at: float
    next_try_at: float
    wait_s: float
    message: str


class Circuit:
    """One provider's outages. Lives on one event loop; only `find_outage` may be called from other threads.

    Attributes:
        has_answered: whether the provider ever answered a request of this process.
        down: why it is not waited for any more; None while it is.
        num_outages: outages so far.
    """

    def __init__(
        self,
        provider: str,
        policy: OutagePolicy | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self._provider = provider
        self._policy = policy or OutagePolicy()
        self._clock = clock
        self._draw = draw
        self.has_answered = False
        self.down: str | None = None
        self.num_outages = 0
        self._ended_s = 0.0
        self._failing_since: float | None = None
        self._num_failures = 0
        self._open: _Open | None = None
        self._is_probed = False

    @property
    def is_open(self) -> bool:
        """Whether only a probe may be sent."""
        return self._open is not None

    @property
    def outage_s(self) -> float:
        """Seconds spent in outages, the present one included."""
        found = self._open
        return self._ended_s + (0.0 if found is None else self._clock() - found.opened_at)

    def find_outage(self) -> Outage | None:
        """The present outage; safe from any thread."""
        found = self._open
        if found is None:
            return None
        start = datetime.now(UTC) - timedelta(seconds=self._clock())
        since, next_try_at = (start + timedelta(seconds=at) for at in (found.since, found.next_try_at))
        return Outage(self._provider, since, next_try_at, found.message)

    def wait_s(self) -> float:
        """Seconds until the next probe; 0 if it is due."""
        return 0.0 if self._open is None else max(0.0, self._open.next_try_at - self._clock())

    @property
    def is_probe_due(self) -> bool:
        """Whether one request is to be sent, to see whether the outage is over."""
        return self._open is not None and not self._is_probed and self.wait_s() <= 0

    def claim_probe(self) -> bool:
        """Take the one probe that is due, if there is one; followed by `end_probe`, whatever came of it."""
        if not self.is_probe_due:
            return False
        self._is_probed = True
        return True

    def end_probe(self) -> None:
        """Let another request be the next probe."""
        self._is_probed = False

    def record_answer(self) -> bool:
        """The provider answered a request; returns whether that ended an outage."""
        self.has_answered = True
        return self.record_refusal()

    def record_refusal(self) -> bool:
        """The provider refused a request for what it asks, so it is there; returns whether that ended an outage."""
        was_open = self._open is not None
        self._ended_s = self.outage_s
        self._open, self._failing_since, self._num_failures = None, None, 0
        # The next outage has probes of its own, whatever becomes of the request that was this one's.
        self._is_probed = False
        return was_open

    def record_failure(self, failure: CallFailure, *, is_probe: bool) -> bool:
        """The provider failed on a call; returns whether an outage began or the provider is down now."""
        now, message = self._clock(), str(failure.error)
        if failure.consequence == "closed" and not self.has_answered:
            return self.shut(message)
        if self._failing_since is None:
            self._failing_since = now
        self._num_failures += failure.consequence != "overload"
        if self._open is None:
            if not self._is_outage(failure, now):
                return False
            self.num_outages += 1
            return self._wait_for_next_try(failure, now, now, self._policy.first_wait_s)
        if is_probe:
            wait_s = min(self._policy.max_wait_s, self._open.wait_s * 2)
            return self._wait_for_next_try(failure, now, self._open.opened_at, wait_s)
        return False

    def shut(self, reason: str) -> bool:
        """Wait for this provider no more; the first reason wins."""
        self._ended_s = self.outage_s
        self._open = None
        if self.down is None:
            self.down = reason
            return True
        return False

    def _is_outage(self, failure: CallFailure, now: float) -> bool:
        assert self._failing_since is not None
        if failure.consequence == "unreachable" or self._num_failures >= self._policy.num_failures:
            return True
        return failure.consequence == "overload" and now - self._failing_since >= self._policy.overload_s

    def _wait_for_next_try(self, failure: CallFailure, now: float, opened_at: float, wait_s: float) -> bool:
        """Set the next try, the last one at the end of the longest wait; returns whether anything is to be told."""
        assert self._failing_since is not None
        since, is_new = self._failing_since, self._open is None
        ends_at = since + self._policy.max_outage_s
        self._open = _Open(since, opened_at, now, wait_s, str(failure.error))
        if now >= ends_at:
            at = (datetime.now(UTC) - timedelta(seconds=now - since)).strftime("%H:%M")
            return self.shut(f"{self._provider}: no answer since {at} UTC for {now - since:.0f} s ({failure.error})")
        next_s = max(wait_s * (0.5 + 0.5 * self._draw()), failure.retry_after_s or 0.0)
        self._open = _Open(since, opened_at, min(now + next_s, ends_at), wait_s, str(failure.error))
        return is_new
