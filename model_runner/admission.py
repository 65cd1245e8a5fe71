"""Admission: whether a request may be sent now, asked by engines that take requests well ahead of sending them.

Stands between *answer*'s budget, which knows what was spent and what is expected of requests on their way, and remote
engines, which pull hundreds of requests so that no place at the provider stays empty. Being pulled costs nothing there;
being sent does.
"""

from collections.abc import Iterable, Iterator
from typing import Literal, Protocol, TypeAlias, runtime_checkable

from moebeam.schemas.records import Completion, Request

Verdict: TypeAlias = Literal["send", "wait", "stop"]
"""`send`: now. `wait`: ask again after the next arrival. `stop`: neither this request nor any other."""


class Admission(Protocol):
    """Decides; called from any thread, and never blocks."""

    def admit(self, request: Request) -> Verdict:
        """Whether a request may leave. `send` counts it as on its way until it arrives; asked again, it stays `send`.

        `wait` is only said while something is on its way.
        """
        ...

    def settle(self, completion: Completion) -> None:
        """What became of a request that was admitted, told before another one gets its place at the provider."""
        ...


class Unlimited:
    """The admission of requests that nothing holds back."""

    def admit(self, request: Request) -> Verdict:
        return "send"

    def settle(self, completion: Completion) -> None:
        return None


@runtime_checkable
class AdmittingRunner(Protocol):
    """An engine that asks before it sends each request."""

    def generate_admitted(self, requests: Iterable[Request], admission: Admission) -> Iterator[Completion]:
        """As `ModelRunner.generate`, but a request that was pulled and never admitted has no completion."""
        ...
