"""Requests that a provider refused, held back while it refuses all alike: policy and a list, without calls.

Part of the `openai` engine, one for each endpoint (`endpoint.py`). A wrong model name is answered like a wrong row, for
every row. So a refusal becomes a reject only once another request, sent after it, was answered, or the input is over.
"""

import asyncio
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, eq=False)
class _Held:
    """A refused request that waits for its verdict: True makes it a reject."""

    owner: object
    refused_at: float
    verdict: asyncio.Future[bool]


class Refusals:
    """The unbroken series of equal refusals at its end; lives on one event loop.

    Attributes:
        most: distinct rows of a series from which on nobody is taken to be served.
        is_tested: whether somebody is finding out just now if others are served.
    """

    def __init__(self, most: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.most = most
        self.is_tested = False
        self._clock = clock
        self._kind = ""
        self._rows: dict[Hashable, float] = {}
        self._held: list[_Held] = []

    @property
    def num_rows(self) -> int:
        """Distinct rows of the series."""
        return len(self._rows)

    def num_held(self, owner: object) -> int:
        """Requests of one `generate` that wait for their verdict."""
        return sum(held.owner is owner for held in self._held)

    def add(self, kind: str, row: Hashable) -> bool:
        """Take a refusal into the series, or begin another one; returns whether the series is too long now."""
        if kind != self._kind:
            self._decide(self._held, is_reject=True)
            self._kind, self._held = kind, []
            self._rows.clear()
        self._rows[row] = self._clock()
        return len(self._rows) >= self.most

    async def hold(self, owner: object) -> bool:
        """Wait for the verdict on a refusal: True makes it a reject, False says that the provider refuses everybody.

        Args:
            owner: whose end, by `release`, makes it a reject too.
        """
        held = _Held(owner, self._clock(), asyncio.get_running_loop().create_future())
        self._held.append(held)
        try:
            return await held.verdict
        finally:
            if held in self._held:
                self._held.remove(held)

    def record_answer(self, started_at: float) -> None:
        """A request sent at `started_at` was answered: what was refused before was refused for its own sake."""
        if not self._rows:
            return
        self._rows = {row: at for row, at in self._rows.items() if at > started_at}
        self._decide([held for held in self._held if held.refused_at <= started_at], is_reject=True)

    def release(self, owner: object) -> None:
        """Make rejects of what one `generate` holds; the series goes on."""
        self._decide([held for held in self._held if held.owner is owner], is_reject=True)

    def drop(self) -> None:
        """The provider refuses everybody."""
        self._decide(self._held, is_reject=False)

    def _decide(self, decided: list[_Held], *, is_reject: bool) -> None:
        for held in decided:
            if not held.verdict.done():
                held.verdict.set_result(is_reject)
