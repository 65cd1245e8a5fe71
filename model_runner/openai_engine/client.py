"""One exchange with a provider: a body goes out, an answer is read.

Below `endpoint.py`, which decides when and how often. The official `openai` client serves for the exchange alone: its
own retries are off, since they would hide refusals, and its response models are not used, since they cost more than
the exchange. Over aiohttp a call costs a third of the CPU that it costs over the client's default transport, and stays
there with 1,000 in flight.
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
    """

    profile: Profile
    model: str
    base_url: str
    max_concurrency: int
    timeout_s: float
    is_stream: bool
    max_retries: int
    run_id: str = ""


class ChatClient:
    """The connections to one provider; belongs to the event loop's thread."""

    def __init__(self, spec: EndpointSpec, secret: str) -> None:
        self._spec = spec
        self._secret = secret
        self._client: openai.AsyncOpenAI | None = None
        self._strict_client: openai.AsyncOpenAI | None = None

    async def exchange(self, body: ChatBody, headers: Mapping[str, str]) -> Answer:
        """Post a body and read the answer, whole or in pieces.

        Raises:
            Exception: of many kinds; see `classify_failure`.
        """
        client, profile = self._choose_client(body), self._spec.profile
        sent = {**headers, **_key_headers(profile, self._secret)}
        options: Any = {"headers": sent} if sent else {}
        if not self._spec.is_stream:
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

    async def close(self) -> None:
        """Close all connections."""
        if self._client is not None:
            client, self._client, self._strict_client = self._client, None, None
            await client.close()

    def _choose_client(self, body: ChatBody) -> openai.AsyncOpenAI:
        spec = self._spec
        if self._client is None:
            most = spec.max_concurrency
            limits = httpx2.Limits(max_connections=most, max_keepalive_connections=most)
            timeout = httpx2.Timeout(spec.timeout_s, connect=_CONNECT_TIMEOUT_S, pool=None)
            address, _, query = spec.base_url.partition("?")
            self._client = openai.AsyncOpenAI(
                api_key=self._secret or "none",
                base_url=address,
                default_query=dict(parse_qsl(query)),
                max_retries=0,
                timeout=timeout,
                http_client=openai.DefaultAioHttpClient(limits=limits, timeout=timeout),
                default_headers=_account_headers(spec.profile),
            )
            if spec.profile.strict_tools_url is not None:
                self._strict_client = self._client.with_options(base_url=_strict_url(spec))
        return self._strict_client if body.is_strict and self._strict_client is not None else self._client


def _account_headers(profile: Profile) -> Mapping[str, Any]:
    """OpenAI's own account variables must not reach another provider."""
    if profile.name == "openai":
        return {}
    return {"OpenAI-Organization": openai.Omit(), "OpenAI-Project": openai.Omit()}


def _key_headers(profile: Profile, secret: str) -> Mapping[str, Any]:
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
