"""The queue: requests that have a place at the provider pass it one by one, as long as the budget lasts.

Part of the `openai` engine, between the endpoint's limit (`concurrency.py`) and the call itself, so that what is behind
the queue is in flight and nothing else. Lives on the event loop, one for each `generate`.
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
                    # What one arrival sets free may be enough for more than one.
                    self._wake_first()
                    return
                case "wait":
                    # It was the first in the line, or there was none.
                    await self._turn(self._waiting.appendleft)
                case "stop":
                    self.close()
        raise NotAdmitted

    async def _turn(self, enqueue: Callable[[asyncio.Future[None]], None]) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        enqueue(turn)
        await turn

    def settle(self, completion: Completion) -> Completion:
        """Tell what became of a request, and give it back; the first that waits is asked about again."""
        self._admission.settle(completion)
        self._wake_first()
        return completion

    def close(self) -> None:
        """Let nobody through any more."""
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
