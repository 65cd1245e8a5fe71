"""The queue in which requests that hold a slot at the provider are admitted one by one, as long as the budget lasts.

Part of the `openai` engine, between the endpoint's limit (`concurrency.py`) and the call itself, so that exactly the
requests that passed it are in flight. Lives on the event loop, one for each `generate`.
"""

import asyncio
from collections import deque
from collections.abc import Callable

from moebeam.model_runner.admission import Admission, Unlimited
from moebeam.schemas.records import Completion, Request


class NotAdmitted(Exception):
    """The request was not sent, and will not be."""


class AdmissionQueue:
    """Lets requests through in the order in which they came; without an admission all at once."""

    def __init__(self, admission: Admission | None = None) -> None:
        self._admission = admission or Unlimited()
        self._is_closed = False
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def acquire(self, request: Request) -> None:
        """Wait until a request may be sent.

        Raises:
            NotAdmitted: it may not.
        """
        if self._waiting:
            await self._turn(self._waiting.append)
        while not self._is_closed:
            match self._admission.admit(request):
                case "send":
                    # What one completion frees may be enough for more than one.
                    self._wake_first()
                    return
                case "wait":
                    # It was the first in the queue, or the queue was empty.
                    await self._turn(self._waiting.appendleft)
                case "stop":
                    self.close()
        raise NotAdmitted

    async def _turn(self, enqueue: Callable[[asyncio.Future[None]], None]) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        enqueue(turn)
        await turn

    def settle(self, completion: Completion) -> Completion:
        """Report a completion and return it; the first request that waits is tried again."""
        self._admission.settle(completion)
        self._wake_first()
        return completion

    def close(self) -> None:
        """Admit no more requests."""
        self._is_closed = True
        waiting, self._waiting = self._waiting, deque()
        for turn in waiting:
            if not turn.done():
                turn.set_result(None)

    def _wake_first(self) -> None:
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return
