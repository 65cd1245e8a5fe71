"""Frozen records around the model runner: one request or answer each.

Between stages, rows travel as Arrow record batches (`moebeam.schemas.tables`).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from moebeam.schemas.canonical import Json, canonical_json
from moebeam.schemas.chat_options import DEFAULT_OPTIONS, ChatOptions
from moebeam.schemas.errors import RowError
from moebeam.schemas.prices import PriceMode

TokenIds: TypeAlias = npt.NDArray[np.int32]
FinishReason: TypeAlias = Literal[
    "stop", "length", "tool_calls", "content_filter", "insufficient_system_resource", "aborted", "error"
]


@dataclass(frozen=True, slots=True)
class Sampling:
    """Sampling parameters in OpenAI's names, plus vLLM's `min_p`. `temperature=0` is greedy.

    `min_p` keeps tokens with at least that share of the top token's probability. `logprobs` asks for the log
    probability of each output token.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    min_p: float = 0.0
    logprobs: bool = False

    @property
    def is_greedy(self) -> bool:
        """Whether the same prompt always gives the same answer."""
        return self.temperature == 0.0


@dataclass(frozen=True, slots=True)
class Message:
    """One chat message. `extra` holds fields other than role and content, such as `tool_calls`."""

    role: str
    content: str
    extra: Mapping[str, Json] = field(default_factory=dict[str, Json])


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """One prompt to answer.

    Attributes:
        request_id: unique within one `generate` call.
        prompt_token_ids: the encoded prompt; int32, shape (num_prompt_tokens,).
        messages: the chat behind the prompt; remote engines send it.
        tenant: different tenants never share cached prefixes.
        scope: makes `request_id` unique within a run, for example the shard.
        options: tools, response format and thinking, as rendered; remote engines send them.
        grammar: llguidance grammar (JSON text) that constrains decoding; only in-process engines apply it.
    """

    request_id: str
    prompt_token_ids: TokenIds
    messages: tuple[Message, ...]
    sampling: Sampling
    tenant: str = ""
    attempt: int = 1
    grammar: str | None = None
    options: ChatOptions = DEFAULT_OPTIONS
    scope: str = ""

    @property
    def num_prompt_tokens(self) -> int:
        return int(self.prompt_token_ids.shape[0])


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one attempt, in OpenAI's names.

    `cached_tokens` is part of `prompt_tokens`; None means unknown, never zero. `reasoning_tokens` is part of
    `completion_tokens`.
    """

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int | None = None
    reasoning_tokens: int = 0

    @property
    def computed_tokens(self) -> int | None:
        """Prompt tokens not served from a cache; None if unknown."""
        return None if self.cached_tokens is None else self.prompt_tokens - self.cached_tokens


NOTHING_USED = Usage(prompt_tokens=0, completion_tokens=0, cached_tokens=0)
"""Usage of a request that no engine accepted or answered."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A function call in an answer; `arguments` is JSON text."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class LostCall:
    """A provider call that returned no usage but may still be billed.

    *account* bounds its cost, which is never added to billed amounts.

    Attributes:
        error_type: how it ended, for example `engine_timeout`.
        started_at: UTC; decides the price.
        prompt_tokens: of the request, counted or estimated locally.
        max_output_tokens: most that the provider could have generated.
    """

    provider: str
    model: str
    error_type: str
    started_at: datetime
    prompt_tokens: int
    max_output_tokens: int


@dataclass(frozen=True, slots=True)
class Completion:
    """The outcome of one request: an answer, or a typed failure in `error`.

    `started_at` (UTC) decides the price; `latency_ms` runs from there to the last token. `usage` is what was billed,
    for a failure too; `price_mode` says at which of the provider's prices. `logprobs` are natural logarithms, one per
    completion token, if asked for. `lost_calls` are earlier calls (for a failure, all calls) that the provider may
    have worked on without reporting usage.
    """

    request_id: str
    text: str
    finish_reason: FinishReason
    usage: Usage
    started_at: datetime
    latency_ms: float
    provider: str
    model: str
    model_revision: str
    reasoning_content: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    logprobs: tuple[float, ...] | None = None
    error: RowError | None = None
    price_mode: PriceMode = "online"
    lost_calls: tuple[LostCall, ...] = ()

    @classmethod
    def from_error(
        cls,
        request_id: str,
        error: RowError,
        *,
        usage: Usage = NOTHING_USED,
        started_at: datetime | None = None,
        latency_ms: float = 0.0,
        provider: str = "",
        model: str = "",
        model_revision: str = "",
        lost_calls: tuple[LostCall, ...] = (),
    ) -> "Completion":
        """Create a failure without text.

        Args:
            started_at: None means now.
            provider, model, model_revision: empty if none accepted the request.
        """
        return cls(
            request_id=request_id,
            text="",
            finish_reason="error",
            usage=usage,
            started_at=started_at or datetime.now(UTC),
            latency_ms=latency_ms,
            provider=provider,
            model=model,
            model_revision=model_revision,
            error=error,
            lost_calls=lost_calls,
        )


def sampling_json(sampling: Sampling) -> str:
    """Sampling as canonical JSON: equal sampling gives equal text."""
    return canonical_json(
        {
            "max_tokens": sampling.max_tokens,
            "temperature": float(sampling.temperature),
            "top_p": float(sampling.top_p),
            "stop": list(sampling.stop),
            "seed": sampling.seed,
            "min_p": float(sampling.min_p),
            "logprobs": sampling.logprobs,
        }
    )


@lru_cache(maxsize=1024)
def parse_sampling_json(text: str) -> Sampling:
    """The inverse of `sampling_json`."""
    values: dict[str, Any] = json.loads(text)
    values["stop"] = tuple(values["stop"])
    return Sampling(**values)
