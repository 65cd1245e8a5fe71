"""Admission control: engines that pull requests ahead of time ask whether one may be sent now.

Connects *answer*'s budget, which knows what was spent and what is in flight, with remote engines, which pull hundreds
of requests to keep every slot at the provider busy. Pulling a request is free; sending it costs money.
"""

from collections.abc import Iterable, Iterator
from typing import Literal, Protocol, TypeAlias, runtime_checkable

from moebeam.schemas.records import Completion, LostCall, Request

Verdict: TypeAlias = Literal["send", "wait", "stop"]
"""`send`: send it now. `wait`: ask again after the next completion. `stop`: send no further request."""


class Admission(Protocol):
    """Decides whether requests may be sent, and hears of each call that leaves. Thread-safe; never blocks a thread."""

    def admit(self, request: Request) -> Verdict:
        """Decide on a request. `send` counts it as in flight until `settle`; asking again returns `send` again.

        Returns `wait` only while something is in flight.
        """
        ...

    def settle(self, completion: Completion) -> None:
        """Record the completion of an admitted request, before its slot at the provider is reused."""
        ...

    async def depart(self, request: Request, call: LostCall) -> bool:
        """Record that a call is about to leave for an admitted request; False if it must not. Awaited by the engine.

        Every call that left ends in the request's completion, as its answer or among its lost calls, or in `dismiss`.

        Args:
            call: what becomes of it if nobody hears of it again.
        """
        ...

    def dismiss(self, request: Request) -> None:
        """Record that the call that left last for a request brought nothing, and is not billed."""
        ...


class Unlimited:
    """Admits every request; others derive from it and decide."""

    def admit(self, request: Request) -> Verdict:
        return "send"

    def settle(self, completion: Completion) -> None:
        return None

    async def depart(self, request: Request, call: LostCall) -> bool:
        return True

    def dismiss(self, request: Request) -> None:
        return None


@runtime_checkable
class AdmittingRunner(Protocol):
    """An engine that asks for admission before it sends each request."""

    def generate_admitted(self, requests: Iterable[Request], admission: Admission) -> Iterator[Completion]:
        """Like `ModelRunner.generate`, but requests that were pulled and never admitted have no completion."""
        ...
