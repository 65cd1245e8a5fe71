"""One provider as the `openai` engine asks it: client, limit, retries.

Stands between `runner.py`, which goes from one endpoint to the next, and the official `openai` client, which serves
for the exchange alone: its own retries are off, since they would hide refusals, and `responses.py` reads the bytes in
place of its response models, which cost more than the exchange. Over aiohttp a call costs a third of the CPU
that it costs over the client's default transport, and stays there with 1,000 in flight.
"""

import asyncio
import random
from collections import Counter
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from time import perf_counter
from typing import Any

import httpx2
import openai
from openai.types.chat import ChatCompletionChunk
from tenacity import AsyncRetrying, RetryCallState

from moebeam.model_runner.openai_engine.admission_queue import AdmissionQueue
from moebeam.model_runner.openai_engine.concurrency import AdaptiveLimit, MachineShare
from moebeam.model_runner.openai_engine.failures import CallFailure, classify_failure
from moebeam.model_runner.openai_engine.profiles import Profile
from moebeam.model_runner.openai_engine.request_body import ChatBody, chat_body
from moebeam.model_runner.openai_engine.responses import Answer, StreamedAnswer, read_answer
from moebeam.schemas.canonical import fingerprint
from moebeam.schemas.errors import AnswerInterrupted, EngineOverloaded, RowError
from moebeam.schemas.records import LostCall, Request

_PATH = "/chat/completions"
_CONNECT_TIMEOUT_S = 30.0
_MAX_RETRY_AFTER_S = 600.0
_OVERLOADS_A_RETRY = 10
MAX_FAILED_IN_A_ROW = 32
"""Requests given up one after the other, with no answer between them, after which an endpoint counts as down."""


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How long to wait between tries: doubled each time up to the longest, of which half is random.

    After an overload the wait is shorter: the limit adapts, and the request keeps its slot meanwhile.
    """

    first_wait_s: float = 0.5
    max_wait_s: float = 30.0
    max_overload_wait_s: float = 8.0


@dataclass(frozen=True, slots=True)
class EndpointSpec:
    """Where and how to ask; the key itself stands nowhere but in the client.

    Attributes:
        model: the model as the provider names it.
        max_concurrency: most requests in flight from this machine.
        timeout_s: most seconds without a byte.
        run_id: of the run; part of idempotency keys.
    """

    profile: Profile
    model: str
    base_url: str
    max_concurrency: int
    timeout_s: float
    is_stream: bool
    max_retries: int
    run_id: str = ""


@dataclass(frozen=True, slots=True)
class Arrived:
    """An answer and the call that brought it; `started_at` (UTC) is that call's start."""

    answer: Answer
    started_at: datetime
    latency_ms: float


class Endpoint:
    """Asks one provider; all but the constructor belongs to the event loop's thread.

    Attributes:
        down: why the endpoint can answer nothing any more; None while it can.
    """

    def __init__(self, spec: EndpointSpec, secret: str, retry_policy: RetryPolicy | None = None) -> None:
        self.spec = spec
        self.down: RowError | None = None
        self.limit = AdaptiveLimit(spec.max_concurrency)
        self.counts: Counter[str] = Counter()
        self._secret = secret
        self._retry_policy = retry_policy or RetryPolicy()
        self._share = MachineShare(f"{spec.base_url} {spec.model}")
        self._num_failed_in_a_row = 0
        self._client: openai.AsyncOpenAI | None = None
        self._strict_client: openai.AsyncOpenAI | None = None

    @asynccontextmanager
    async def slot(self) -> AsyncGenerator[None]:
        """A slot among the requests in flight, waited for and given back at the end."""
        self.limit.cap(self._share.divide(self.spec.max_concurrency))
        await self.limit.acquire()
        try:
            yield
        finally:
            self.limit.release()

    async def ask(self, request: Request, queue: AdmissionQueue, lost: list[LostCall]) -> Arrived:
        """Answer one request that holds a slot here, by as many calls as `max_retries` allows.

        Args:
            queue: admits the request before the first call.
            lost: calls that the provider may bill although they brought no usage are added.
        Raises:
            CallFailure: there is no answer from here.
            NotAdmitted: it may not be sent any more.
        """
        body = self._body(request)
        try:
            if self.down is None:
                await queue.acquire(request)
            # Another request may have found the endpoint closed meanwhile.
            if self.down is not None:
                raise CallFailure("endpoint", self.down)
            arrived = await AsyncRetrying(
                sleep=asyncio.sleep, retry=self._should_retry, stop=self._should_stop, wait=self._wait_s, reraise=True
            )(self._once, request, body, lost)
        except CallFailure as failure:
            self._record_given_up(failure)
            raise
        self._num_failed_in_a_row = 0
        return arrived

    async def close(self) -> None:
        """Close all connections."""
        self._share.close()
        if self._client is not None:
            client, self._client, self._strict_client = self._client, None, None
            await client.close()

    def _body(self, request: Request) -> ChatBody:
        try:
            return chat_body(request, self.spec.profile, self.spec.model, is_stream=self.spec.is_stream)
        except RowError as error:
            raise CallFailure("row", error) from error

    async def _once(self, request: Request, body: ChatBody, lost: list[LostCall]) -> Arrived:
        self.counts["num_calls"] += 1
        started_at, started = datetime.now(UTC), perf_counter()
        try:
            answer = await self._exchange(body, self._options(request, body))
        except Exception as error:
            failure = classify_failure(error, self.spec.profile, self._secret)
            self.counts[f"num_{failure.error.error_type}"] += 1
            if failure.may_be_billed:
                self._record_lost_call(request, failure.error, started_at, lost)
            self.limit.record_outcome(is_refused=failure.consequence == "overload")
            raise failure from error
        usage = answer.usage
        if isinstance(answer.error, AnswerInterrupted) and not usage.prompt_tokens and not usage.completion_tokens:
            # Nothing was paid for: asking again costs nothing.
            is_overload = answer.finish_reason == "insufficient_system_resource"
            self.counts[f"num_{answer.error.error_type}"] += 1
            self.limit.record_outcome(is_refused=is_overload)
            raise CallFailure("overload" if is_overload else "retry", EngineOverloaded(str(answer.error)))
        self.limit.record_outcome(is_refused=False)
        if not answer.is_usage_known:
            assert answer.error is not None, "an answer without a usage has an error"
            self._record_lost_call(request, answer.error, started_at, lost)
        return Arrived(answer, started_at, (perf_counter() - started) * 1000)

    def _record_lost_call(self, request: Request, error: RowError, started_at: datetime, lost: list[LostCall]) -> None:
        self.counts["num_lost_calls"] += 1
        spec, most = self.spec, request.sampling.max_tokens
        lost.append(
            LostCall(spec.profile.name, spec.model, error.error_type, started_at, request.num_prompt_tokens, most)
        )

    async def _exchange(self, body: ChatBody, options: Any) -> Answer:
        client = self._choose_client(body)
        profile = self.spec.profile
        if not self.spec.is_stream:
            response = await client.post(_PATH, body=body.fields, cast_to=httpx2.Response, options=options)
            return read_answer(response.content, profile)
        stream = await client.post(
            _PATH,
            body=body.fields,
            cast_to=ChatCompletionChunk,
            stream=True,
            stream_cls=openai.AsyncStream[ChatCompletionChunk],
            options=options,
        )
        answer = StreamedAnswer()
        try:
            # The client's own events are not used: parsing one costs more than all that follows here.
            async for line in stream.response.aiter_lines():
                answer.add_line(line)
        finally:
            await stream.close()
        return answer.answer(profile)

    def _options(self, request: Request, body: ChatBody) -> Any:
        """The key that tells the provider which calls are tries of one and the same attempt.

        Not the content alone: two rows may ask the same and want an answer each, and an answer that was not accepted is
        asked for again.
        """
        header = self.spec.profile.idempotency_header
        if header is None:
            return {}
        attempt = [self.spec.run_id, request.scope, request.request_id, request.attempt]
        return {"headers": {header: fingerprint([*attempt, body.fields])}}

    def _choose_client(self, body: ChatBody) -> openai.AsyncOpenAI:
        if self._client is None:
            most = self.spec.max_concurrency
            limits = httpx2.Limits(max_connections=most, max_keepalive_connections=most)
            timeout = httpx2.Timeout(self.spec.timeout_s, connect=_CONNECT_TIMEOUT_S, pool=None)
            # OpenAI's own account variables must not reach another provider.
            foreign: Mapping[str, Any] = {"OpenAI-Organization": openai.Omit(), "OpenAI-Project": openai.Omit()}
            self._client = openai.AsyncOpenAI(
                api_key=self._secret or "none",
                base_url=self.spec.base_url,
                max_retries=0,
                timeout=timeout,
                http_client=openai.DefaultAioHttpClient(limits=limits, timeout=timeout),
                default_headers=None if self.spec.profile.name == "openai" else foreign,
            )
            if self.spec.profile.strict_tools_url is not None:
                self._strict_client = self._client.with_options(base_url=_strict_url(self.spec))
        return self._strict_client if body.is_strict and self._strict_client is not None else self._client

    def _record_given_up(self, failure: CallFailure) -> None:
        if failure.consequence == "endpoint":
            self.down = self.down or failure.error
        elif failure.consequence != "row":
            self._num_failed_in_a_row += 1
            if self._num_failed_in_a_row >= MAX_FAILED_IN_A_ROW:
                self.down = self.down or failure.error

    def _should_retry(self, state: RetryCallState) -> bool:
        failure = _failure(state)
        return failure is not None and failure.consequence in ("retry", "overload") and self.down is None

    def _should_stop(self, state: RetryCallState) -> bool:
        failure = _failure(state)
        if failure is None:
            return True
        if (failure.retry_after_s or 0.0) > _MAX_RETRY_AFTER_S:
            return True
        most = self.spec.max_retries * (_OVERLOADS_A_RETRY if failure.consequence == "overload" else 1)
        return state.attempt_number > most

    def _wait_s(self, state: RetryCallState) -> float:
        failure = _failure(state)
        is_overload = failure is not None and failure.consequence == "overload"
        most_s = self._retry_policy.max_overload_wait_s if is_overload else self._retry_policy.max_wait_s
        wait_s = min(most_s, self._retry_policy.first_wait_s * 2.0 ** min(state.attempt_number - 1, 30))
        wait_s *= random.uniform(0.5, 1.0)
        asked_s = failure.retry_after_s if failure is not None else None
        # Requests that were given the same instant must not come back together.
        return wait_s if asked_s is None else asked_s + wait_s * 0.1


def _failure(state: RetryCallState) -> CallFailure | None:
    error = state.outcome.exception() if state.outcome is not None else None
    return error if isinstance(error, CallFailure) else None


def _strict_url(spec: EndpointSpec) -> str:
    """The address for strict tools: the profile's own, or below an address that the job names."""
    profile = spec.profile
    assert profile.strict_tools_url is not None
    if profile.base_url is None or spec.base_url == profile.base_url:
        return profile.strict_tools_url
    return spec.base_url.rstrip("/") + profile.strict_tools_url.removeprefix(profile.base_url)
