"""Retry: resends a request that the engine could not answer, unchanged, after a backoff.

Part of *answer*, beside `transforms/answer/repair.py`, which asks again when the answer was wrong. Error types say
which failures may be transient (`MoebeamError.retryable`). Remote engines retry by themselves first; only what they
gave up comes here.
"""

import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from moebeam.schemas.answers import ValidatedAnswer
from moebeam.schemas.job.sections import FailuresSection
from moebeam.schemas.records import Request
from moebeam.transforms.answer.repair import Repair

MAX_WAIT_S = 60.0


@dataclass(slots=True)
class AttemptPolicy:
    """Retries and repairs of one shard, each with its own limit; see `validate.NextAttempt`."""

    section: FailuresSection
    repair: Repair
    sleep: Callable[[float], None] = time.sleep
    _num_retries: Counter[str] = field(default_factory=Counter[str])
    _num_pauses: int = 0
    _is_pause_due: bool = False

    def __call__(self, request: Request, answer: ValidatedAnswer) -> Request | None:
        """The next attempt of a request; None if there is none."""
        error = answer.error
        if error is None or error.error_stage != "run":
            return self.repair(request, answer, num_asked=request.attempt - self._num_retries[request.request_id])
        if not error.retryable or self._num_retries[request.request_id] >= self.section.max_retries:
            return None
        self._num_retries[request.request_id] += 1
        self._is_pause_due = True
        return replace(request, attempt=request.attempt + 1)

    def pause(self) -> None:
        """Wait before the next round if it holds a retry: exponential backoff with jitter, at most `MAX_WAIT_S`."""
        if self._is_pause_due:
            most = min(MAX_WAIT_S, self.section.retry_wait_s * 2**self._num_pauses)
            self.sleep(random.uniform(most / 2, most))
            self._num_pauses += 1
        self._is_pause_due = False
