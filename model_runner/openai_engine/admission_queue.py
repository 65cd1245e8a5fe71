"""The queue in which requests that hold a slot at the provider are admitted one by one, as long as the budget lasts.

Part of the `openai` engine, between the endpoint's limit (`concurrency.py`) and the call itself, so that exactly the
requests that passed it are in flight. Lives on the event loop, one for each `generate`.
"""

import asyncio
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from moebeam.model_runner.admission import Admission, Unlimited
from moebeam.model_runner.openai_engine.event_loop import Bell
from moebeam.schemas.records import Completion, LostCall, Request


class NotAdmitted(Exception):
    """The request is not sent, or not sent again, and will not be."""


class AdmissionQueue:
    """Lets requests through in the order in which they came; without an admission all at once.

    Attributes:
        owner: tells the requests of one `generate` from those of another.
    """

    def __init__(self, admission: Admission | None = None) -> None:
        self.owner = object()
        self._admission = admission or Unlimited()
        self._is_closed = False
        self._admitted: set[str] = set()
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._sleeping: dict[str, Request] = {}
        self._bell = Bell()

    @property
    def num_admitted(self) -> int:
        """Requests that were admitted and are not settled."""
        return len(self._admitted)

    @property
    def has_waiting(self) -> bool:
        """Whether requests wait to be admitted."""
        return bool(self._waiting)

    def admit(self, request: Request) -> bool:
        """Ask whether a request may be sent, for the first time or again; False says to wait outside of the slot.

        Raises:
            NotAdmitted: it may not.
        """
        is_known = request.request_id in self._admitted
        if self._is_closed and not is_known:
            raise NotAdmitted
        match self._admission.admit(request):
            case "send":
                self._admitted.add(request.request_id)
                if not is_known:
                    # What one completion frees may be enough for more than one.
                    self._wake_first()
                return True
            case "wait":
                return is_known
            case "stop":
                self.close()
                raise NotAdmitted

    async def wait(self, request: Request, *, is_first: bool = False) -> None:
        """Wait until something is settled, behind those who wait already.

        Args:
            is_first: it was the first of them, and asked in vain.
        Raises:
            NotAdmitted: nothing more is admitted.
        """
        if request.request_id in self._admitted or not (self._waiting or is_first):
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        (self._waiting.appendleft if is_first else self._waiting.append)(turn)
        await turn
        if self._is_closed:
            raise NotAdmitted

    async def sleep(self, request: Request, seconds: float, bells: Sequence[Bell]) -> None:
        """Let a request wait for its next try, until one of the bells rings.

        Raises:
            NotAdmitted: it may not be sent, or not sent again.
        """
        self._sleeping[request.request_id] = request
        try:
            await Bell.sleep(seconds, (self._bell, *bells))
        finally:
            del self._sleeping[request.request_id]
        self.check(request)

    def check(self, request: Request) -> None:
        """Ask whether a request that waits for a try may still have it.

        Raises:
            NotAdmitted: it may not.
        """
        if self._is_closed or request.request_id in self._admitted:
            self.admit(request)

    def poll(self) -> None:
        """Ask for those who sleep whether they still may be sent: nobody tells the queue of a stop."""
        first = next((one for name, one in self._sleeping.items() if name in self._admitted), None)
        first = first or next(iter(self._sleeping.values()), None)
        if first is not None and not self._is_closed:
            try:
                self.admit(first)
            except NotAdmitted:
                return
        elif first is not None:
            self._bell.ring()

    def settle(self, completion: Completion) -> Completion:
        """Report a completion and return it; the first request that waits is tried again."""
        self._admitted.discard(completion.request_id)
        self._admission.settle(completion)
        self._wake_first()
        return completion

    async def depart(self, request: Request, call: LostCall) -> None:
        """Say that a call leaves now.

        Raises:
            NotAdmitted: it must not, and no other one either.
        """
        if not await self._admission.depart(request, call):
            self.close()
            raise NotAdmitted

    def dismiss(self, request: Request) -> None:
        """Say that the last call brought nothing, and is not billed."""
        self._admission.dismiss(request)

    def close(self) -> None:
        """Admit no more requests; those who sleep ask whether they may go on."""
        self._is_closed = True
        waiting, self._waiting = self._waiting, deque()
        for turn in waiting:
            if not turn.done():
                turn.set_result(None)
        self._bell.ring()

    def _wake_first(self) -> None:
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return


@dataclass(frozen=True, slots=True)
class Calls:
    """The calls made for one request, canaries sent on its behalf included.

    Attributes:
        lost: those that the provider may bill although they brought no usage.
    """

    request: Request
    queue: AdmissionQueue
    lost: list[LostCall] = field(default_factory=list[LostCall])

    async def depart(self, call: LostCall) -> None:
        """Say that a call leaves now.

        Raises:
            NotAdmitted: it must not.
        """
        await self.queue.depart(self.request, call)

    def dismiss(self) -> None:
        """The last call brought nothing, and is not billed."""
        self.queue.dismiss(self.request)
