"""One provider as the `openai` engine asks it: its limit, tries, outages, and what was lost on the way.

Stands between `failover.py`, which chooses among endpoints and waits where none answers, and `client.py`, which makes
one call. A request leaves an endpoint that is out; while the endpoint answers others, it is tried again here.
"""

import asyncio
import logging
import random
from collections import Counter
from collections.abc import AsyncGenerator, Hashable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import lru_cache
from time import monotonic

from moebeam.model_runner.openai_engine.admission_queue import Calls
from moebeam.model_runner.openai_engine.client import ChatClient, EndpointSpec
from moebeam.model_runner.openai_engine.concurrency import AdaptiveLimit, MachineShare
from moebeam.model_runner.openai_engine.event_loop import Bell
from moebeam.model_runner.openai_engine.failures import CallFailure, classify_failure
from moebeam.model_runner.openai_engine.outages.circuit import Circuit, OutagePolicy
from moebeam.model_runner.openai_engine.outages.evidence import Evidence, OwnFailures
from moebeam.model_runner.openai_engine.outages.refusals import Refusals
from moebeam.model_runner.openai_engine.request_body import ChatBody, chat_body
from moebeam.model_runner.openai_engine.responses import Answer
from moebeam.schemas.canonical import fingerprint
from moebeam.schemas.errors import (
    AnswerInterrupted,
    ContentRefused,
    EngineOverloaded,
    MalformedResponse,
    RequestGivenUp,
    RequestRefused,
    RowError,
    abbreviate,
)
from moebeam.schemas.prices import find_tier_mode
from moebeam.schemas.records import LostCall, Request

_LOGGER = logging.getLogger(__name__)
_CANARY = "canary"
_TEST_S = 5.0
"""How long requests wait at most for the end of a canary's call, which wakes them."""


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How long to wait between tries: doubled each time up to the longest, of which half is random.

    After an overload the wait is shorter: the limit adapts, and the request keeps its slot meanwhile. So it is after an
    answer that came and cannot be read: whoever sent it is not overloaded.
    """

    first_wait_s: float = 0.5
    max_wait_s: float = 30.0
    max_overload_wait_s: float = 8.0
    max_malformed_wait_s: float = 1.0


@dataclass(frozen=True, slots=True)
class Arrived:
    """An answer and the call that brought it; `started_at` (UTC) is that call's start."""

    answer: Answer
    started_at: datetime
    latency_ms: float


class EndpointOut(Exception):
    """The endpoint answers nobody at present, or not any more; nothing is decided about the request."""


class Endpoint:
    """Asks one provider; all but the constructor and `circuit.find_outage` belongs to the event loop's thread.

    Attributes:
        refusals: requests that it refused alike, held back.
        bell: rings whenever an outage begins or ends.
    """

    def __init__(
        self,
        spec: EndpointSpec,
        secret: str,
        retry_policy: RetryPolicy | None = None,
        outage_policy: OutagePolicy | None = None,
        *,
        max_same_refusals: int = 20,
    ) -> None:
        self.spec = spec
        self.limit = AdaptiveLimit(spec.max_concurrency)
        self.counts: Counter[str] = Counter()
        self.circuit = Circuit(spec.profile.name, outage_policy)
        self.refusals = Refusals(max_same_refusals)
        self.bell = Bell()
        self._retry_policy = retry_policy or RetryPolicy()
        self._outage_policy = outage_policy or OutagePolicy()
        self._evidence = Evidence(spec.max_retries, self._outage_policy)
        self._share = MachineShare(f"{spec.base_url} {spec.model}")
        self._client = ChatClient(spec, secret)
        self._num_calling = 0
        self._last_answered: tuple[Request, ChatBody] | None = None

    @property
    def down(self) -> str | None:
        """Why the endpoint is not asked any more; None while it is."""
        return self.circuit.down

    @asynccontextmanager
    async def slot(self) -> AsyncGenerator[None]:
        """A slot among the requests in flight, waited for and given back at the end."""
        self.limit.cap(self._share.divide(self.spec.max_concurrency))
        await self.limit.acquire()
        try:
            yield
        finally:
            self.limit.release()

    async def ask(self, calls: Calls, own: OwnFailures, *, is_probe: bool) -> Arrived:
        """Answer one admitted request that holds a slot here, by as many calls as it takes.

        Args:
            calls: of the request; its queue is asked again before each further try.
            own: what the request met here before; updated.
            is_probe: whether it may be sent though the endpoint is out.
        Raises:
            CallFailure: the provider refuses the request, or fails on it alone.
            EndpointOut: the provider answers nobody at present.
            NotAdmitted: the request may not be sent any more.
        """
        request, queue = calls.request, calls.queue
        body = self._body(request)
        while True:
            while self.refusals.is_tested:
                await queue.sleep(request, _TEST_S, [self.bell])
            if self.down is not None or (self.circuit.is_open and not is_probe):
                raise EndpointOut
            started = monotonic()
            try:
                arrived = await self._call(request, body, self._headers(request, body), calls)
            except CallFailure as failure:
                self._record_failure(failure, own, started, is_probe=is_probe)
                if failure.consequence == "row" or self._evidence.is_own(own):
                    raise
                if self._needs_canary(own) and await self.send_canary(calls) is None:
                    queue.check(request)
                    continue
                await self._pause(failure, calls, own)
            else:
                self._last_answered = request, body
                self._record_answer(own, started)
                return arrived

    async def send_canary(self, calls: Calls) -> CallFailure | None:
        """Send the request that was answered last here once more, for one token: does the provider serve others?

        Args:
            calls: take what the call may cost, since its answer is nobody's.
        Returns:
            Why it failed; None if it was answered.
        """
        assert self._last_answered is not None
        request, body = self._last_answered
        short = replace(request, sampling=replace(request.sampling, max_tokens=1))
        body = ChatBody({**body.fields, self.spec.profile.max_tokens_field: 1}, body.is_strict)
        self.counts["num_canaries"] += 1
        headers = self._headers(short, body, f"{_CANARY} {self.counts['num_canaries']}")
        own, started, started_at = OwnFailures(), monotonic(), datetime.now(UTC)
        own_calls = replace(calls, lost=[])
        try:
            await self._call(short, body, headers, own_calls)
        except CallFailure as failure:
            self._record_failure(failure, own, started, is_probe=False)
            return failure
        else:
            self._record_answer(own, started)
            self._lose_call(short, _CANARY, started_at, own_calls)
            return None
        finally:
            calls.lost.extend(replace(call, error_type=_CANARY) for call in own_calls.lost)

    async def judge_refusal(self, failure: CallFailure, row: Hashable, calls: Calls) -> bool | None:
        """Whether a refusal is the request's own, which still holds its slot; None if that is not known yet.

        Where too many rows are refused alike, a canary tells whether others are served still; if not, this endpoint is
        asked nothing more.

        Args:
            row: tells rows apart; takes of one row are one.
            calls: see `send_canary`.
        """
        refusals, name = self.refusals, self.spec.profile.name
        if self.down is not None:
            return False
        if not refusals.add(failure.refusal, row) or refusals.is_tested:
            return None
        told = f"{name} refused the first {refusals.num_rows} requests alike"
        if self._last_answered is not None:
            told = f"{name} refused {refusals.num_rows} requests in a row alike"
            refusals.is_tested = True
            try:
                refused = await self.send_canary(calls)
            finally:
                refusals.is_tested = False
                self.bell.ring()
            if refused is None or refused.consequence != "row":
                return True if refused is None else None
        self.shut(f"{told}: {failure.error}; raise [failures] max_same_refusals if they are the rows' own")
        return False

    def shut(self, reason: str) -> None:
        """Ask this endpoint nothing more."""
        if self.circuit.shut(reason):
            self.refusals.drop()
            self.bell.ring()

    async def close(self) -> None:
        """Close all connections."""
        self._share.close()
        await self._client.close()

    def _body(self, request: Request) -> ChatBody:
        try:
            return chat_body(request, self.spec.profile, self.spec.model, is_stream=self.spec.is_stream)
        except RowError as error:
            raise CallFailure("row", error) from error

    async def _call(self, request: Request, body: ChatBody, headers: Mapping[str, str], calls: Calls) -> Arrived:
        """One call.

        Raises:
            CallFailure: it brought no answer.
            NotAdmitted: it must not be made.
        """
        await calls.depart(self._bound_call(request, RequestGivenUp.error_type, datetime.now(UTC)))
        self.counts["num_calls"] += 1
        self._num_calling += 1
        started_at, started = datetime.now(UTC), monotonic()
        try:
            answer = await self._client.exchange(body, headers, self.spec.bound(request.sampling))
        except asyncio.CancelledError:
            self._lose_call(request, RequestGivenUp.error_type, started_at, calls)
            raise
        except Exception as error:
            failure = classify_failure(error, self.spec.profile)
            self.counts[f"num_{failure.error.error_type}"] += 1
            if failure.may_be_billed:
                self._lose_call(request, failure.error.error_type, started_at, calls)
            else:
                calls.dismiss()
            if failure.consequence == "overload":
                self.limit.record_outcome(is_refused=True)
            raise failure from error
        finally:
            self._num_calling -= 1
        usage = answer.usage
        if isinstance(answer.error, AnswerInterrupted) and not usage.prompt_tokens and not usage.completion_tokens:
            # Nothing was paid for, as far as the provider says: asking again costs nothing that it named.
            if usage.is_known:
                calls.dismiss()
            else:
                self._lose_call(request, answer.error.error_type, started_at, calls)
            is_overload = answer.finish_reason == "insufficient_system_resource"
            self.counts[f"num_{answer.error.error_type}"] += 1
            self.limit.record_outcome(is_refused=is_overload)
            raise CallFailure("overload" if is_overload else "failed", EngineOverloaded(str(answer.error)))
        self.limit.record_outcome(is_refused=False)
        if not answer.has_known_reason:
            self.counts["num_unknown_finish_reasons"] += 1
            _warn_unknown_reason(self.spec.profile.name, answer.provider_finish_reason)
        return Arrived(answer, started_at, (monotonic() - started) * 1000)

    def _record_answer(self, own: OwnFailures, started: float) -> None:
        self._evidence.record_answer(own, started)
        self.refusals.record_answer(started)
        if self.circuit.record_answer():
            self.bell.ring()

    def _record_failure(self, failure: CallFailure, own: OwnFailures, started: float, *, is_probe: bool) -> None:
        if failure.consequence != "row":
            self._evidence.record_failure(own, failure, started)
            has_changed = self.circuit.record_failure(failure, is_probe=is_probe)
            if self.down is not None:
                self.refusals.drop()
        else:
            is_from_provider = isinstance(failure.error, RequestRefused | ContentRefused)
            has_changed = is_from_provider and self.circuit.record_refusal()
        if has_changed:
            self.bell.ring()

    def _needs_canary(self, own: OwnFailures) -> bool:
        has_answered = self._last_answered is not None
        return has_answered and self._num_calling == 0 and self._evidence.needs_others(own)

    async def _pause(self, failure: CallFailure, calls: Calls, own: OwnFailures) -> None:
        """Wait for the next try, for as long as the endpoint is not out."""
        ends_at = monotonic() + self._wait_s(failure, own.num_tries)
        while (left_s := ends_at - monotonic()) > 0:
            if self.circuit.is_open or self.down is not None:
                raise EndpointOut
            await calls.queue.sleep(calls.request, left_s, [self.bell])

    def _wait_s(self, failure: CallFailure, num_tries: int) -> float:
        retries, most_s = self._retry_policy, self._retry_policy.max_wait_s
        if failure.consequence == "overload":
            most_s = retries.max_overload_wait_s
        elif isinstance(failure.error, MalformedResponse):
            most_s = min(most_s, retries.max_malformed_wait_s)
        wait_s = min(most_s, retries.first_wait_s * 2.0 ** min(max(0, num_tries - 1), 30))
        wait_s *= random.uniform(0.5, 1.0)
        if failure.retry_after_s is None:
            return wait_s
        # Requests that were given the same instant must not come back together.
        return min(failure.retry_after_s, max(self._outage_policy.max_outage_s, retries.max_wait_s)) + wait_s * 0.1

    def _lose_call(self, request: Request, error_type: str, started_at: datetime, calls: Calls) -> None:
        self.counts["num_lost_calls"] += 1
        calls.lost.append(self._bound_call(request, error_type, started_at))

    def _bound_call(self, request: Request, error_type: str, started_at: datetime) -> LostCall:
        """What a call costs at most."""
        spec, most = self.spec, request.sampling.max_tokens
        mode = find_tier_mode(request.options.service_tier)
        return LostCall(spec.profile.name, spec.model, error_type, started_at, request.num_prompt_tokens, most, mode)

    def _headers(self, request: Request, body: ChatBody, *extra: str) -> Mapping[str, str]:
        """The key that tells the provider which calls are tries of one and the same attempt.

        Not the content alone: two rows may ask the same and want an answer each, and an answer that was not accepted is
        asked for again.
        """
        header = self.spec.profile.idempotency_header
        if header is None:
            return {}
        own = [request.own_draws] if request.own_draws else []
        attempt = [self.spec.run_id, *own, request.scope, request.request_id, request.attempt, *extra]
        return {header: fingerprint([*attempt, body.fields])}


@lru_cache(maxsize=256)
def _warn_unknown_reason(provider: str, word: str | None) -> None:
    """Log a finish reason that nobody here knows; once for each word."""
    _LOGGER.warning("%s: finish_reason %s is not known and counts as stop", provider, abbreviate(word))
