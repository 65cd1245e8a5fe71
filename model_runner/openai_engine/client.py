"""One exchange with a provider: a body goes out, an answer is read.

Below `endpoint.py`, which decides when and how often. The official `openai` client serves for the exchange alone: its
own retries are off, since they would hide refusals, and its response models are not used, since they cost more than
the exchange. Over aiohttp a call costs a third of the CPU that it costs over the client's default transport, and stays
there with 1,000 in flight. What may come back is bounded below it, in `transport/`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import parse_qsl

import httpx2
import openai
from openai.types.chat import ChatCompletionChunk

from moebeam.model_runner.openai_engine.profiles import Profile
from moebeam.model_runner.openai_engine.request_body import ChatBody
from moebeam.model_runner.openai_engine.responses import Answer, StreamedAnswer, read_answer
from moebeam.model_runner.openai_engine.transport.bounded_client import ACCEPTED, BoundedClient, bound_call
from moebeam.model_runner.openai_engine.transport.bounds import ResponseBounds, bound_answer
from moebeam.model_runner.openai_engine.transport.event_lines import EventLines
from moebeam.schemas.records import Sampling

_PATH = "/chat/completions"
_CONNECT_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class EndpointSpec:
    """Where and how to ask; the key itself stands nowhere but in the client.

    Attributes:
        model: the model as the provider names it.
        max_concurrency: most requests in flight from this machine.
        timeout_s: most seconds without a byte.
        run_id: of the run; part of idempotency keys.
        max_answer_s, max_response_bytes: see `bound_answer`.
    """

    profile: Profile
    model: str
    base_url: str
    max_concurrency: int
    timeout_s: float
    is_stream: bool
    max_retries: int
    run_id: str = ""
    max_answer_s: float = 0.0
    max_response_bytes: int = 0

    def bound(self, sampling: Sampling) -> ResponseBounds:
        """What the answer to a request may take."""
        return bound_answer(
            sampling,
            is_stream=self.is_stream,
            timeout_s=self.timeout_s,
            max_bytes=self.max_response_bytes,
            max_s=self.max_answer_s,
        )


def make_client(spec: EndpointSpec, secret: str) -> openai.AsyncOpenAI:
    """The official client of an endpoint; its calls are made inside of `bound_call`."""
    most = spec.max_concurrency
    limits = httpx2.Limits(max_connections=most, max_keepalive_connections=most)
    timeout = httpx2.Timeout(spec.timeout_s, connect=_CONNECT_TIMEOUT_S, pool=None)
    address, _, query = spec.base_url.partition("?")
    return openai.AsyncOpenAI(
        api_key=secret or "none",
        base_url=address,
        default_query=dict(parse_qsl(query)),
        max_retries=0,
        timeout=timeout,
        http_client=BoundedClient(limits=limits, timeout=timeout, follow_redirects=False),
        default_headers={**ACCEPTED, **_account_headers(spec.profile)},
    )


class ChatClient:
    """The connections to one provider; belongs to the event loop's thread."""

    def __init__(self, spec: EndpointSpec, secret: str) -> None:
        self._spec = spec
        self._secret = secret
        self._client: openai.AsyncOpenAI | None = None
        self._strict_client: openai.AsyncOpenAI | None = None

    async def exchange(self, body: ChatBody, headers: Mapping[str, str], bounds: ResponseBounds) -> Answer:
        """Post a body and read the answer, whole or in pieces.

        Raises:
            Exception: of many kinds; see `classify_failure`.
        """
        sent = {**headers, **key_headers(self._spec.profile, self._secret)}
        options: Any = {"headers": sent} if sent else {}
        ask = self._ask_stream if self._spec.is_stream else self._ask
        return await bound_call(ask(self._choose_client(body), body, options), bounds, "max_answer_s")

    async def _ask(self, client: openai.AsyncOpenAI, body: ChatBody, options: Any) -> Answer:
        response = await client.post(_PATH, body=body.fields, cast_to=httpx2.Response, options=options)
        return read_answer(response.content, self._spec.profile)

    async def _ask_stream(self, client: openai.AsyncOpenAI, body: ChatBody, options: Any) -> Answer:
        stream = await client.post(
            _PATH,
            body=body.fields,
            cast_to=ChatCompletionChunk,
            stream=True,
            stream_cls=openai.AsyncStream[ChatCompletionChunk],
            options=options,
        )
        answer, lines = StreamedAnswer(), EventLines()
        try:
            # The client's own events are not used: parsing one costs more than all that follows here.
            async for piece in stream.response.aiter_bytes():
                for line in lines.feed(piece):
                    answer.add_line(line)
            answer.add_line(lines.end())
        finally:
            await stream.close()
        return answer.answer(self._spec.profile)

    async def close(self) -> None:
        """Close all connections."""
        if self._client is not None:
            client, self._client, self._strict_client = self._client, None, None
            await client.close()

    def _choose_client(self, body: ChatBody) -> openai.AsyncOpenAI:
        spec = self._spec
        if self._client is None:
            self._client = make_client(spec, self._secret)
            if spec.profile.strict_tools_url is not None:
                self._strict_client = self._client.with_options(base_url=_strict_url(spec))
        return self._strict_client if body.is_strict and self._strict_client is not None else self._client


def _account_headers(profile: Profile) -> Mapping[str, Any]:
    """OpenAI's own account variables must not reach another provider."""
    if profile.name == "openai":
        return {}
    return {"OpenAI-Organization": openai.Omit(), "OpenAI-Project": openai.Omit()}


def key_headers(profile: Profile, secret: str) -> Mapping[str, Any]:
    """The key where its header is not the client's; of each call, since only there the client's may be left out."""
    if profile.key_header == "Authorization":
        return {}
    return {"Authorization": openai.Omit(), profile.key_header: secret}


def _strict_url(spec: EndpointSpec) -> str:
    """The address for strict tools: the profile's own, or below an address that the job names."""
    profile = spec.profile
    assert profile.strict_tools_url is not None
    if profile.base_url is None or spec.base_url == profile.base_url:
        return profile.strict_tools_url
    return spec.base_url.rstrip("/") + profile.strict_tools_url.removeprefix(profile.base_url)
