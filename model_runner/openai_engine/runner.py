"""The `openai` engine: requests answered by OpenAI-compatible endpoints, the first that can before the next.

Stands where a model would in the *answer* stage. A call of `generate` pulls requests as slots come free, lets the first
of each shared prefix go ahead (`prefix_gate.py`), sends each on its way (`failover.py`), and yields completions as they
arrive. An answer whose cost is known is never thrown away: where it cannot be used, it comes out with its error and its
usage, and *answer* may ask again. Calls that failed without a usage are repeated here.
"""

import asyncio
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from time import monotonic
from typing import TypeAlias

from moebeam.model_runner.admission import Admission
from moebeam.model_runner.openai_engine.admission_queue import AdmissionQueue, NotAdmitted
from moebeam.model_runner.openai_engine.batch.runner import BatchRunner
from moebeam.model_runner.openai_engine.batch.service import BatchService
from moebeam.model_runner.openai_engine.endpoint import Endpoint, RetryPolicy
from moebeam.model_runner.openai_engine.endpoint_specs import find_secret, make_spec, name_first_endpoint
from moebeam.model_runner.openai_engine.event_loop import BackgroundLoop
from moebeam.model_runner.openai_engine.failover import Failover, Unanswered
from moebeam.model_runner.openai_engine.options import FallbackSection, OpenAIOptions
from moebeam.model_runner.openai_engine.outages.circuit import OutagePolicy
from moebeam.model_runner.openai_engine.prefix_gate import PrefixGate, WarmPrefixes
from moebeam.model_runner.protocol import EngineConfig, Outage
from moebeam.schemas.determinism import REMOTE, Determinism
from moebeam.schemas.errors import EngineUnavailable
from moebeam.schemas.records import Completion, Request

_LOOK_AHEAD = 64
"""Requests pulled beyond those that may be in flight, so that no slot stays empty while input is read."""
_MAX_HELD = 4096
"""Most requests that wait for others of their prefix; beyond it no more are pulled."""


_POLL_S = 0.2
"""How often those who wait are asked whether they still may be sent."""


@dataclass(frozen=True, slots=True)
class _Held:
    """A request that its provider has refused; its completion follows."""

    request_id: str


@dataclass(frozen=True, slots=True)
class _Unsent:
    """A request that was not admitted, or was given back."""

    request_id: str


@dataclass(frozen=True, slots=True)
class _Broken:
    """An error of our own; it ends the run."""

    error: BaseException


_Arrival: TypeAlias = Completion | Unanswered | _Held | _Unsent | _Broken


class OpenAIRunner:
    """Asks endpoints in order; one is loaded a process, and its threads share connections and limits.

    Attributes:
        endpoints: for requests that name no model of their own.
        routes: for requests that do, by that name.
    """

    def __init__(
        self,
        config: EngineConfig,
        endpoints: Sequence[Endpoint],
        routes: Mapping[str, Sequence[Endpoint]] | None = None,
    ) -> None:
        self.config = config
        self.endpoints = tuple(endpoints)
        self.routes = {name: tuple(group) for name, group in (routes or {}).items()}
        self._background = BackgroundLoop.current()
        self._warm = WarmPrefixes()
        self._is_given_back = False
        self._tasks: set[asyncio.Task[None]] = set()
        key = id(self)
        closing = self._all_endpoints()

        async def close() -> None:
            for endpoint in closing:
                await endpoint.close()

        self._background.register_close(key, close)
        self._finalizer = weakref.finalize(self, self._background.close_now, key)
        self._finalizer.atexit = False

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Answer requests, each as soon as its answer arrives.

        Raises:
            EngineUnavailable: no endpoint is left that could answer; what was in flight came out before.
        """
        return self._generate(requests, AdmissionQueue())

    def generate_admitted(self, requests: Iterable[Request], admission: Admission) -> Iterator[Completion]:
        """As `generate`, but each request is admitted once it holds a slot; see `AdmittingRunner`."""
        return self._generate(requests, AdmissionQueue(admission))

    def give_back(self) -> None:
        """See `StoppableRunner`."""
        self._is_given_back = True
        self._background.call(_cancel, self._tasks)

    def find_outage(self) -> Outage | None:
        """See `OutageReporter`: requests wait where all endpoints that could answer them are out."""
        for group in (self.endpoints, *self.routes.values()):
            found = [endpoint.circuit.find_outage() for endpoint in group if endpoint.down is None]
            outages = [outage for outage in found if outage is not None]
            if outages and len(outages) == len(found):
                return min(outages, key=lambda outage: outage.next_try_at)
        return None

    def determinism(self) -> Determinism:
        """See `PromisingRunner`."""
        return REMOTE

    def counters(self) -> dict[str, float]:
        """See `CountingRunner`: calls, what became of those that failed, outages; sums over all endpoints."""
        sums: dict[str, float] = {"num_calls": 0}
        for endpoint in self._all_endpoints():
            outages = {"num_outages": endpoint.circuit.num_outages, "outage_s": endpoint.circuit.outage_s}
            counts = {**endpoint.counts.copy(), **{name: value for name, value in outages.items() if value}}
            for name, value in counts.items():
                sums[name] = sums.get(name, 0) + value
        return {**sums, "peak_in_flight": max(endpoint.limit.peak_in_flight for endpoint in self._all_endpoints())}

    def _generate(self, requests: Iterable[Request], queue: AdmissionQueue) -> Iterator[Completion]:
        profile = self.endpoints[0].spec.profile
        gate = PrefixGate(num_leaders=profile.num_leaders, min_prefix_tokens=profile.min_prefix_tokens, warm=self._warm)
        way = _Way(queue)
        source, num_away, reason, is_over = iter(requests), 0, "", False
        try:
            while True:
                is_over = is_over or self._is_given_back
                while not is_over and not reason and way.arrivals.empty() and self._has_room(num_away, way, gate):
                    request = next(source, None)
                    if request is None:
                        is_over = True
                    else:
                        num_away += self._send(gate.offer(request), way)
                if num_away == 0:
                    break
                if num_away == len(way.held):
                    # Nobody is left whose answer could tell what their refusals mean.
                    self._background.call(self._release_held, queue)
                arrival = self._next_arrival(way)
                if arrival is None:
                    continue
                if isinstance(arrival, _Broken):
                    raise arrival.error
                num_away -= not isinstance(arrival, _Held)
                if isinstance(arrival, Unanswered):
                    reason = reason or arrival.reason
                elif isinstance(arrival, _Unsent):
                    # What the gate still holds would not be admitted either.
                    is_over = True
                elif not reason:
                    num_away += self._send(gate.finish(arrival.request_id), way)
                if (completion := way.take(arrival)) is not None:
                    yield completion
        finally:
            if num_away:
                self._background.call(_cancel, way.tasks)
        if reason:
            raise EngineUnavailable(reason)

    def _next_arrival(self, way: "_Way") -> "_Arrival | None":
        """What comes next; None once in a while, and those who wait are asked whether they still may be sent."""
        if monotonic() >= way.poll_at:
            way.poll_at = monotonic() + _POLL_S
            self._background.call(way.queue.poll)
        try:
            return way.arrivals.get(timeout=_POLL_S)
        except Empty:
            return None

    def _has_room(self, num_away: int, way: "_Way", gate: PrefixGate) -> bool:
        most = max((endpoint.limit.limit for endpoint in self._all_endpoints() if endpoint.down is None), default=1)
        return num_away - len(way.held) < 2 * most + _LOOK_AHEAD and gate.num_held < _MAX_HELD

    def _all_endpoints(self) -> tuple[Endpoint, ...]:
        return tuple(endpoint for group in (self.endpoints, *self.routes.values()) for endpoint in group)

    def _send(self, requests: Sequence[Request], way: "_Way") -> int:
        if requests:
            self._background.call(self._start, requests, way)
        return len(requests)

    def _start(self, requests: Sequence[Request], way: "_Way") -> None:
        for request in requests:
            if self._is_given_back:
                way.arrivals.put(_Unsent(request.request_id))
                continue
            task = self._background.spawn(self._arrive(request, way))
            for tasks in (way.tasks, self._tasks):
                tasks.add(task)
                task.add_done_callback(tasks.discard)
            task.add_done_callback(lambda ended, name=request.request_id: way.note_cancelled(ended, name))

    async def _arrive(self, request: Request, way: "_Way") -> None:
        failover = Failover(
            request,
            self.endpoints if request.options.model is None else self.routes[request.options.model],
            way.queue,
            self.config.revision,
            lambda: way.arrivals.put(_Held(request.request_id)),
        )
        try:
            arrival = await failover.find_answer()
            if isinstance(arrival, Unanswered):
                way.queue.close()
            way.arrivals.put(arrival)
        except NotAdmitted:
            way.arrivals.put(failover.give_up() or _Unsent(request.request_id))
        except asyncio.CancelledError:
            if not self._is_given_back:
                raise
            way.arrivals.put(failover.give_up() or _Unsent(request.request_id))
        except Exception as error:
            way.arrivals.put(_Broken(error))

    def _release_held(self, queue: AdmissionQueue) -> None:
        for endpoint in self._all_endpoints():
            endpoint.refusals.release(queue.owner)


@dataclass(slots=True)
class _Way:
    """The requests of one `generate` that are on their way.

    Attributes:
        tasks: belong to the event loop.
        held: ids of those whose refusal waits for its verdict.
    """

    queue: AdmissionQueue
    arrivals: "SimpleQueue[_Arrival]" = field(default_factory=SimpleQueue)
    tasks: set[asyncio.Task[None]] = field(default_factory=set[asyncio.Task[None]])
    held: set[str] = field(default_factory=set[str])
    poll_at: float = 0.0

    def take(self, arrival: "Completion | Unanswered | _Held | _Unsent") -> Completion | None:
        """Note an arrival; returns its completion, if it has one."""
        if isinstance(arrival, _Held):
            self.held.add(arrival.request_id)
            return None
        self.held.discard(arrival.request_id)
        if isinstance(arrival, Unanswered):
            return arrival.completion
        return arrival if isinstance(arrival, Completion) else None

    def note_cancelled(self, ended: "asyncio.Task[None]", request_id: str) -> None:
        """A task that is cancelled before it has begun says nothing itself."""
        if ended.cancelled():
            self.arrivals.put(_Unsent(request_id))


def _cancel(tasks: set[asyncio.Task[None]]) -> None:
    for task in list(tasks):
        task.cancel()


def load_openai_runner(
    config: EngineConfig, retry_policy: RetryPolicy | None = None, outage_policy: OutagePolicy | None = None
) -> OpenAIRunner | BatchRunner:
    """Look up providers and keys; no call is made.

    Args:
        outage_policy: None takes `[failures] max_outage_s`.
    Raises:
        EngineLoadError: a provider is unknown, or its address or its key is missing; names the field or the variable.
    """
    options = config.options_as(OpenAIOptions)
    first = name_first_endpoint(config, options)
    if options.is_batch:
        spec, secret = make_spec(config, options, first, "model"), find_secret(first, "model")
        service = BatchService(spec, secret, max_outage_s=config.failures.max_outage_s)
        return BatchRunner(config, service, config.run_id)
    failures = config.failures

    def make_endpoint(wanted: FallbackSection, where: str) -> Endpoint:
        return Endpoint(
            make_spec(config, options, wanted, where),
            find_secret(wanted, where),
            retry_policy,
            outage_policy or OutagePolicy(failures.max_outage_s),
            max_same_refusals=failures.max_same_refusals,
        )

    endpoints = [make_endpoint(first, "model")]
    for place, wanted in enumerate(options.fallbacks):
        endpoints.append(make_endpoint(wanted, f"model.fallbacks[{place}]"))
    routes = {
        route.name: [make_endpoint(options.complete_route(route), f"model.routes[{place}]")]
        for place, route in enumerate(options.routes)
    }
    return OpenAIRunner(config, endpoints, routes)
