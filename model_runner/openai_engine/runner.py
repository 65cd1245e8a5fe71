"""The `openai` engine: requests answered by OpenAI-compatible endpoints, the first that can before the next.

Stands where a model would in the *answer* stage. A call of `generate` pulls requests as slots come free, lets the first
of each shared prefix go ahead (`prefix_gate.py`), and yields completions as they arrive. An answer whose cost is known
is never thrown away: where it cannot be used, it comes out with its error and its usage, and *answer* may ask again.
Calls that failed without a usage are repeated here.
"""

import asyncio
import os
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from queue import SimpleQueue
from typing import TypeAlias
from urllib.parse import urlsplit

from moebeam.model_runner.admission import Admission
from moebeam.model_runner.openai_engine.admission_queue import AdmissionQueue, NotAdmitted
from moebeam.model_runner.openai_engine.batch_runner import BatchRunner
from moebeam.model_runner.openai_engine.batch_service import BatchService
from moebeam.model_runner.openai_engine.completions import to_completion, to_failed_completion
from moebeam.model_runner.openai_engine.endpoint import Endpoint, EndpointSpec, RetryPolicy
from moebeam.model_runner.openai_engine.event_loop import BackgroundLoop
from moebeam.model_runner.openai_engine.failures import CallFailure
from moebeam.model_runner.openai_engine.options import FallbackSection, OpenAIOptions, RemoteMode
from moebeam.model_runner.openai_engine.prefix_gate import PrefixGate, WarmPrefixes
from moebeam.model_runner.openai_engine.profiles import find_profile
from moebeam.model_runner.protocol import EngineConfig
from moebeam.schemas.errors import EngineLoadError, EngineUnavailable, RowError
from moebeam.schemas.records import Completion, LostCall, Request

_LOOK_AHEAD = 64
"""Requests pulled beyond those that may be in flight, so that no slot stays empty while input is read."""
_MAX_HELD = 4096
"""Most requests that wait for others of their prefix; beyond it no more are pulled."""


@dataclass(frozen=True, slots=True)
class _Unanswered:
    """A request for which no endpoint is left."""

    request_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class _Unsent:
    """A request that was not admitted."""


@dataclass(frozen=True, slots=True)
class _Broken:
    """An error of our own; it ends the run."""

    error: BaseException


_Arrival: TypeAlias = Completion | _Unanswered | _Unsent | _Broken


class OpenAIRunner:
    """Asks endpoints in order; one is loaded a process, and its threads share connections and limits."""

    def __init__(self, config: EngineConfig, endpoints: Sequence[Endpoint]) -> None:
        self.config = config
        self.endpoints = tuple(endpoints)
        self._background = BackgroundLoop.current()
        self._warm = WarmPrefixes()
        key = id(self)
        closing = self.endpoints

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

    def _generate(self, requests: Iterable[Request], queue: AdmissionQueue) -> Iterator[Completion]:
        profile = self.endpoints[0].spec.profile
        gate = PrefixGate(num_leaders=profile.num_leaders, min_prefix_tokens=profile.min_prefix_tokens, warm=self._warm)
        arrivals: SimpleQueue[_Arrival] = SimpleQueue()
        tasks: set[asyncio.Task[None]] = set()
        source, num_in_flight, reason, is_over = iter(requests), 0, "", False
        try:
            while True:
                while not is_over and not reason and arrivals.empty() and self._has_room(num_in_flight, gate.num_held):
                    request = next(source, None)
                    if request is None:
                        is_over = True
                    else:
                        num_in_flight += self._send(gate.offer(request), queue, arrivals, tasks)
                if num_in_flight == 0:
                    break
                arrival = arrivals.get()
                if isinstance(arrival, _Broken):
                    raise arrival.error
                num_in_flight -= 1
                if isinstance(arrival, _Unsent):
                    # What the gate still holds would not be admitted either.
                    is_over = True
                    continue
                if isinstance(arrival, _Unanswered):
                    reason = reason or arrival.reason
                    continue
                if not reason:
                    num_in_flight += self._send(gate.finish(arrival.request_id), queue, arrivals, tasks)
                yield arrival
        finally:
            if num_in_flight:
                self._background.call(_cancel, tasks)
        if reason:
            raise EngineUnavailable(reason)

    def counters(self) -> dict[str, float]:
        """See `CountingRunner`: calls, and what became of those that failed; sums over all endpoints."""
        sums: dict[str, float] = {"num_calls": 0}
        for endpoint in self.endpoints:
            for name, value in endpoint.counts.copy().items():
                sums[name] = sums.get(name, 0) + value
        return {**sums, "peak_in_flight": max(endpoint.limit.peak_in_flight for endpoint in self.endpoints)}

    def _has_room(self, num_in_flight: int, num_held: int) -> bool:
        most = max((endpoint.limit.limit for endpoint in self.endpoints if endpoint.down is None), default=1)
        return num_in_flight < 2 * most + _LOOK_AHEAD and num_held < _MAX_HELD

    def _send(
        self,
        requests: Sequence[Request],
        queue: AdmissionQueue,
        arrivals: SimpleQueue[_Arrival],
        tasks: set[asyncio.Task[None]],
    ) -> int:
        if requests:
            self._background.call(self._start, requests, queue, arrivals, tasks)
        return len(requests)

    def _start(
        self,
        requests: Sequence[Request],
        queue: AdmissionQueue,
        arrivals: SimpleQueue[_Arrival],
        tasks: set[asyncio.Task[None]],
    ) -> None:
        for request in requests:
            task = self._background.spawn(self._arrive(request, queue, arrivals))
            tasks.add(task)
            task.add_done_callback(tasks.discard)

    async def _arrive(self, request: Request, queue: AdmissionQueue, arrivals: SimpleQueue[_Arrival]) -> None:
        try:
            arrival = await self._complete(request, queue)
            if isinstance(arrival, _Unanswered):
                queue.close()
            arrivals.put(arrival)
        except NotAdmitted:
            arrivals.put(_Unsent())
        except Exception as error:
            arrivals.put(_Broken(error))

    async def _complete(self, request: Request, queue: AdmissionQueue) -> Completion | _Unanswered:
        failed: tuple[Endpoint, RowError] | None = None
        lost: list[LostCall] = []
        for endpoint in self.endpoints:
            if endpoint.down is not None:
                continue
            started_at = datetime.now(UTC)
            try:
                async with endpoint.slot():
                    arrived = await endpoint.ask(request, queue, lost)
                    completion = to_completion(
                        request.request_id,
                        arrived.answer,
                        endpoint.spec,
                        self.config.revision,
                        started_at=arrived.started_at,
                        latency_ms=arrived.latency_ms,
                        lost_calls=lost,
                    )
                    # While it holds its slot: no other request is sent before this answer is accounted for.
                    return queue.settle(completion)
            except CallFailure as failure:
                if failure.consequence == "row":
                    return queue.settle(_fail(request, endpoint, failure.error, started_at, lost))
                if failure.consequence != "endpoint":
                    failed = endpoint, failure.error
        if failed is not None and any(endpoint.down is None for endpoint in self.endpoints):
            return queue.settle(_fail(request, *failed, datetime.now(UTC), lost))
        told = "; ".join(str(endpoint.down) for endpoint in self.endpoints if endpoint.down is not None)
        return _Unanswered(request.request_id, f"no provider can answer: {told}")


def _fail(
    request: Request, endpoint: Endpoint, error: RowError, started_at: datetime, lost: Sequence[LostCall]
) -> Completion:
    latency_ms = (datetime.now(UTC) - started_at).total_seconds() * 1000
    return to_failed_completion(
        request.request_id, error, endpoint.spec, started_at=started_at, latency_ms=latency_ms, lost_calls=lost
    )


def _cancel(tasks: set[asyncio.Task[None]]) -> None:
    for task in list(tasks):
        task.cancel()


def load_openai_runner(config: EngineConfig, retry_policy: RetryPolicy | None = None) -> OpenAIRunner | BatchRunner:
    """Look up providers and keys; no call is made.

    Raises:
        EngineLoadError: a provider is unknown, or its address or its key is missing; names the field or the variable.
    """
    options = config.options_as(OpenAIOptions)
    first = FallbackSection.model_construct(
        provider=options.provider or "",
        name=config.name,
        base_url=options.base_url,
        api_key_variable=options.api_key_variable,
        max_concurrency=options.max_concurrency,
    )
    if options.is_batch:
        service = BatchService(_spec(config, options, first, "model"), _secret(first, "model"))
        return BatchRunner(config, service, config.run_id)
    endpoints = [
        Endpoint(_spec(config, options, wanted, where), _secret(wanted, where), retry_policy)
        for where, wanted in _name_endpoints((first, *options.fallbacks))
    ]
    return OpenAIRunner(config, endpoints)


def _name_endpoints(wanted: Sequence[FallbackSection]) -> Iterator[tuple[str, FallbackSection]]:
    for position, one in enumerate(wanted):
        yield (f"fallbacks[{position - 1}]" if position else "model", one)


def _spec(config: EngineConfig, options: OpenAIOptions, wanted: FallbackSection, where: str) -> EndpointSpec:
    """Where and how one provider is asked; raises as `load_openai_runner` does."""
    profile = find_profile(wanted.provider or None)
    base_url = wanted.base_url or profile.base_url
    if base_url is None:
        raise EngineLoadError(f"{where}.base_url: expected the address of the {profile.name} server, found none")
    parts = urlsplit(base_url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise EngineLoadError(f"{where}.base_url: expected http(s)://HOST/..., found {base_url!r}")
    if parts.username or parts.password or parts.query:
        raise EngineLoadError(f"{where}.base_url: expected an address without credentials; name api_key_variable")
    model = wanted.name or config.name
    return EndpointSpec(
        profile=profile,
        model=model,
        base_url=base_url,
        max_concurrency=wanted.max_concurrency or profile.concurrency_for(model),
        timeout_s=options.timeout_s or profile.timeout_s,
        is_stream=_is_stream(options.mode, profile.mode),
        max_retries=options.max_retries,
        run_id=config.run_id,
    )


def _secret(wanted: FallbackSection, where: str) -> str:
    """The key, from the environment; empty where the endpoint may be asked without one."""
    profile = find_profile(wanted.provider or None)
    if wanted.api_key_variable is None and not wanted.provider and wanted.base_url is not None:
        # An address without a named provider is not OpenAI's: its key does not go there.
        return ""
    variable = wanted.api_key_variable or profile.api_key_variable
    secret = os.environ.get(variable, "").strip()
    if not secret and (wanted.api_key_variable is not None or not profile.is_key_optional):
        raise EngineLoadError(
            f"{where}.api_key_variable: expected the key of {profile.name} in the environment variable {variable}, "
            "which is not set"
        )
    return secret


def _is_stream(mode: RemoteMode, profile_mode: str) -> bool:
    return (profile_mode if mode == "auto" else mode) == "stream"
