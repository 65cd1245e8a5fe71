"""Watch: looks, while a shard is answered, whether its run must stop and whether its provider answers at all.

Part of *answer*, a thread beside the one that waits for answers: it works while none arrives. A stop, wherever it comes
from, ends the budget (`transforms/answer/budget.py`), so that no request leaves any more. After a signal or a deadline
the answers on their way are awaited for `drain_s`; then the engine gives back what is in flight. Where a limit of
spending bites, what is on its way is paid for and counted, and is awaited.
"""

import logging
import threading
import time
from typing import Self

from moebeam.model_runner.protocol import ModelRunner, OutageReporter, StoppableRunner
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.transforms.answer.budget import ShardBudget
from moebeam.transforms.durable.progress import OutageNote, OutageWriter
from moebeam.transforms.durable.stop import LOOK_S, SIGNAL, StopKind, find_stop, hear_stop

_HASTY: frozenset[StopKind] = frozenset({SIGNAL, "deadline"})
"""Stops after which what is in flight is given back: an answer that never ends would outlast every deadline."""

_LOGGER = logging.getLogger(__name__)


class ShardWatch:
    """Watches one attempt at a shard while it is entered.

    Args:
        runner: the engine itself, which all shards of the process share.
    """

    def __init__(
        self, layout: RunLayout, shard: str, runner: ModelRunner, budget: ShardBudget, *, drain_s: float
    ) -> None:
        self._layout = layout
        self._runner = runner
        self._budget = budget
        self._drain_s = drain_s
        self._outage = OutageWriter(layout, shard)
        self._wake = threading.Event()
        self._is_over = False
        self._stopped_at: float | None = None
        self._has_given_back = False
        self._thread = threading.Thread(target=self._watch, name=f"watch-{shard}", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *unused: object) -> None:
        self._is_over = True
        self._wake.set()
        self._thread.join()

    def _watch(self) -> None:
        with hear_stop(self._layout, self._wake):
            while not self._is_over:
                try:
                    self._look_for_stop()
                    self._look_for_outage()
                except Exception:  # an engine's own bug must not end the watch, which would never stop the run then
                    _LOGGER.exception("the watch over a shard failed; it goes on")
                self._wake.wait(self._next_look_s())
                self._wake.clear()
        self._outage.show(None)

    def _look_for_stop(self) -> None:
        budget = self._budget
        budget.end_if_lost()
        if budget.stop is None:
            reason = find_stop(self._layout) or budget.limits.find_late(time.time())
            if reason is not None:
                budget.end(reason)
        if budget.stop is None or budget.stop.kind not in _HASTY or self._has_given_back:
            return
        self._stopped_at = self._stopped_at or time.monotonic()
        if time.monotonic() - self._stopped_at >= self._drain_s and isinstance(self._runner, StoppableRunner):
            self._has_given_back = True
            self._runner.give_back()

    def _look_for_outage(self) -> None:
        if not isinstance(self._runner, OutageReporter):
            return
        outage = self._runner.find_outage()
        self._outage.show(
            outage and OutageNote(outage.provider, outage.since, outage.next_try_at, outage.message, time.time())
        )

    def _next_look_s(self) -> float:
        """Seconds until there may be something to do."""
        waits = [LOOK_S]
        deadline_at = self._budget.limits.deadline_at
        if self._budget.stop is None and deadline_at is not None:
            waits.append(deadline_at - time.time())
        if self._stopped_at is not None and not self._has_given_back:
            waits.append(self._stopped_at + self._drain_s - time.monotonic())
        return max(0.0, min(waits))
