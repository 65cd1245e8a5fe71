"""One request's way to its answer: which endpoint it goes to next, what it waits for, and what becomes of it.

Part of the `openai` engine, between `runner.py`, which keeps many requests on their way, and `endpoint.py`, which asks
one provider. A request waits where every endpoint that could answer it is out. It fails only for what is its own.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from moebeam.model_runner.openai_engine.admission_queue import AdmissionQueue, Calls
from moebeam.model_runner.openai_engine.completions import to_completion, to_failed_completion
from moebeam.model_runner.openai_engine.endpoint import Endpoint, EndpointOut
from moebeam.model_runner.openai_engine.failures import CallFailure
from moebeam.model_runner.openai_engine.outages.evidence import OwnFailures
from moebeam.schemas.errors import RequestGivenUp, RowError
from moebeam.schemas.prices import find_tier_mode
from moebeam.schemas.records import Completion, LostCall, Request

_PROBED_S = 5.0
"""How long a request waits at most for the end of another one's probe, which wakes it."""


@dataclass(frozen=True, slots=True)
class Unanswered:
    """A request for which no endpoint is left.

    Attributes:
        completion: names the calls that may be billed all the same; None where there was none.
    """

    request_id: str
    reason: str
    completion: Completion | None


@dataclass(slots=True, eq=False)
class Failover:
    """One request among its endpoints, the first that can answer before the next.

    Attributes:
        revision: of the model, for answers that name none.
        on_hold: called where the provider has refused the request and the verdict is still out.
        lost: calls that may be billed although they brought no usage.
    """

    request: Request
    endpoints: Sequence[Endpoint]
    queue: AdmissionQueue
    revision: str
    on_hold: Callable[[], None]
    lost: list[LostCall] = field(default_factory=list[LostCall])
    started_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    _own: dict[Endpoint, OwnFailures] = field(default_factory=dict[Endpoint, OwnFailures])
    _failed: dict[Endpoint, CallFailure] = field(default_factory=dict[Endpoint, CallFailure])

    async def find_answer(self) -> Completion | Unanswered:
        """Ask until there is an answer, a failure of the request's own, or no endpoint left.

        Raises:
            NotAdmitted: the request may not be sent any more.
        """
        await self.queue.wait(self.request)
        while True:
            left = [endpoint for endpoint in self.endpoints if endpoint.down is None and endpoint not in self._failed]
            if not left:
                return self._conclude()
            endpoint, is_probe = self._choose(left)
            if endpoint is None:
                wait_s = min(endpoint.circuit.wait_s() or _PROBED_S for endpoint in left)
                await self.queue.sleep(self.request, wait_s, [endpoint.bell for endpoint in left])
                continue
            try:
                found = await self._ask(endpoint, is_probe=is_probe)
            finally:
                if is_probe:
                    endpoint.circuit.end_probe()
                    endpoint.bell.ring()
            if found is not None:
                return found
            if is_probe:
                # Those whom the bell has woken come first, so that the next probe is another request.
                await asyncio.sleep(0)

    def give_up(self) -> Completion | None:
        """What is known of the request when it is abandoned; None if no call of it may be billed."""
        if not self.lost:
            return None
        error = RequestGivenUp(f"given up before its answer came; {len(self.lost)} of its calls may be billed")
        return self.queue.settle(self._fail(self.endpoints[0], error))

    def _choose(self, left: Sequence[Endpoint]) -> tuple[Endpoint | None, bool]:
        """The first endpoint that is not out, or whose next probe is due, and whether this request is the probe."""
        for endpoint in left:
            if not endpoint.circuit.is_open:
                return endpoint, False
            # Only an admitted one may be the probe: what waits for admission waits for those who wait here.
            if endpoint.circuit.is_probe_due and self._is_admitted() and endpoint.circuit.claim_probe():
                return endpoint, True
        return None, False

    def _is_admitted(self) -> bool:
        """Whether the request may be sent now."""
        if self.queue.admit(self.request):
            return True
        self._release_held()
        return False

    def _release_held(self) -> None:
        """End the wait for a verdict where nothing else is on its way: others may wait to be admitted until then."""
        owner = self.queue.owner
        if self.queue.num_admitted == sum(endpoint.refusals.num_held(owner) for endpoint in self.endpoints):
            for endpoint in self.endpoints:
                endpoint.refusals.release(owner)

    async def _ask(self, endpoint: Endpoint, *, is_probe: bool) -> Completion | None:
        """Ask one endpoint; None where another, or the same one later, is to be asked."""
        is_own: bool | None = None
        try:
            async with endpoint.slot():
                if self._is_admitted():
                    try:
                        arrived = await self._call(endpoint, is_probe=is_probe)
                    except CallFailure as failure:
                        if failure.refusal:
                            is_own = await endpoint.judge_refusal(failure, self._row, self._calls)
                        raise
                    # While it holds its slot: no other request is sent before this answer is accounted for.
                    return self.queue.settle(arrived)
        except EndpointOut:
            return None
        except CallFailure as failure:
            if failure.consequence != "row":
                self._failed[endpoint] = failure
                return None
            if failure.refusal and is_own is None:
                is_own = await self._wait_for_verdict(endpoint)
            return None if is_own is False else self.queue.settle(self._fail(endpoint, failure.error))
        await self.queue.wait(self.request, is_first=True)
        return None

    @property
    def _calls(self) -> Calls:
        return Calls(self.request, self.queue, self.lost)

    @property
    def _row(self) -> tuple[str, str]:
        return self.request.scope, self.request.request_id

    async def _call(self, endpoint: Endpoint, *, is_probe: bool) -> Completion:
        own = self._own.setdefault(endpoint, OwnFailures())
        arrived = await endpoint.ask(self._calls, own, is_probe=is_probe)
        return to_completion(
            self.request.request_id,
            arrived.answer,
            endpoint.spec,
            self.revision,
            started_at=arrived.started_at,
            latency_ms=arrived.latency_ms,
            lost_calls=self.lost,
            num_prompt_tokens=self.request.num_prompt_tokens,
            price_mode=find_tier_mode(self.request.options.service_tier),
        )

    async def _wait_for_verdict(self, endpoint: Endpoint) -> bool:
        """Whether a refusal turns out to be the request's own; False if the provider refuses everybody, and is down."""
        self.on_hold()
        if self.queue.has_waiting:
            asyncio.get_running_loop().call_soon(self._release_held)
        return await endpoint.refusals.hold(self.queue.owner)

    def _conclude(self) -> Completion | Unanswered:
        if self._failed:
            endpoint, failure = next(reversed(self._failed.items()))
            return self.queue.settle(self._fail(endpoint, failure.error))
        told = "; ".join(endpoint.down for endpoint in self.endpoints if endpoint.down is not None)
        return Unanswered(self.request.request_id, f"no provider can answer: {told}", self.give_up())

    def _fail(self, endpoint: Endpoint, error: RowError) -> Completion:
        latency_ms = (datetime.now(UTC) - self.started_at).total_seconds() * 1000
        return to_failed_completion(
            self.request.request_id,
            error,
            endpoint.spec,
            started_at=self.started_at,
            latency_ms=latency_ms,
            lost_calls=self.lost,
        )
