"""Frozen records around the model runner: one request or answer each.

Between stages, rows travel as Arrow record batches (`moebeam.schemas.tables`).
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
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
    probability of each output token, `top_logprobs` for those of so many likeliest tokens beside it. Before a token is
    drawn, each token that the answer already holds loses `frequency_penalty` for each time, and `presence_penalty`
    once, from its logit.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    min_p: float = 0.0
    logprobs: bool = False
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    top_logprobs: int = 0

    @property
    def has_penalty(self) -> bool:
        """Whether tokens of the answer so far change what comes next beyond the model."""
        return self.frequency_penalty != 0.0 or self.presence_penalty != 0.0

    @property
    def is_greedy(self) -> bool:
        """Whether the same prompt always gives the same answer."""
        return self.temperature == 0.0


@dataclass(frozen=True, slots=True)
class Message:
    """One chat message. `extra` holds fields other than role and content, such as `tool_calls`.

    Attributes:
        parts: the texts of a content that came as a list of several; how they are joined is the encoding's to say.
            `content` is then what readers without an encoding make of them: one a line.
    """

    role: str
    content: str
    extra: Mapping[str, Json] = field(default_factory=dict[str, Json])
    parts: tuple[str, ...] = ()

    @classmethod
    def of_parts(cls, role: str, parts: Sequence[str], extra: Mapping[str, Json]) -> "Message":
        """A message whose content is a list of texts; a single one is a content like any other."""
        return cls(role, "\n".join(parts), extra, tuple(parts) if len(parts) > 1 else ())

    @property
    def content_json(self) -> Json:
        """The content as it came: the list of its text parts, or text."""
        return [{"type": "text", "text": text} for text in self.parts] if self.parts else self.content

    def join_parts(self, separator: str) -> str:
        """The content, its parts joined by a separator."""
        return separator.join(self.parts) if self.parts else self.content


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
        row_id: the row's id in the input, for random numbers of its own; empty where `request_id` is one.
        sample: which of the row's answers this is, from 0; each has random numbers of its own.
        run_key: of the run, in place of a seed where `sampling` has none; empty where nothing tells runs apart.
        earlier: the answer that an earlier attempt at the shard kept. An engine that plans prefixes is handed it in its
            place among the others, yields it as it is, and counts later prompts' hits as if it had computed this one.
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
    row_id: str = ""
    sample: int = 0
    run_key: str = ""
    earlier: "Completion | None" = None

    @property
    def own_draws(self) -> str:
        """The run's key where its random numbers are this run's alone; empty for what every run answers alike."""
        return "" if self.sampling.is_greedy or self.sampling.seed is not None else self.run_key

    @property
    def num_prompt_tokens(self) -> int:
        return int(self.prompt_token_ids.shape[0])


UsageStatus: TypeAlias = Literal["reported", "missing", "contradictory"]
MAX_COUNTED_TOKENS = 10**12
"""No attempt has more tokens: a larger figure counts nothing, and sums of a few million such would overflow int64."""


@dataclass(frozen=True, slots=True)
class TokenClasses:
    """Tokens of one attempt in disjoint classes, as they are billed; None means unknown.

    Hits and misses add up to the prompt, visible and reasoning tokens to the output. With unknown hits, `cache_miss`
    is the whole prompt.
    """

    cache_hit: int | None
    cache_miss: int | None
    visible_output: int | None
    reasoning: int | None

    @property
    def num_prompt_tokens(self) -> int:
        """Hits and misses together; 0 if unknown."""
        return (self.cache_hit or 0) + (self.cache_miss or 0)


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one attempt, in OpenAI's names, as its provider or engine counted them; None means unknown, never zero.

    `cached_tokens` is part of `prompt_tokens`, `reasoning_tokens` of `completion_tokens`. Estimates have fields of
    their own, set only where the count is unknown, so no sum of counts can hold one. A figure that no count can be
    (negative, or above `MAX_COUNTED_TOKENS`) becomes unknown; a part that exceeds its whole stays as it was reported.
    Both make `status` `contradictory`.

    Attributes:
        status: `missing` if the prompt's or the output's count did not come.
        estimated_prompt_tokens, estimated_completion_tokens: counted here, by the tokenizer or by the text's length.
    """

    prompt_tokens: int | None
    completion_tokens: int | None
    cached_tokens: int | None = None
    reasoning_tokens: int = 0
    status: UsageStatus = "reported"
    estimated_prompt_tokens: int | None = None
    estimated_completion_tokens: int | None = None

    def __post_init__(self) -> None:
        impossible = [name for name in _COUNTS if not 0 <= (getattr(self, name) or 0) <= MAX_COUNTED_TOKENS]
        for name in impossible:
            object.__setattr__(self, name, 0 if name == "reasoning_tokens" else None)
        if impossible or self._has_part_beyond_whole():
            object.__setattr__(self, "status", "contradictory")
        elif not self.is_known and self.status == "reported":
            object.__setattr__(self, "status", "missing")

    @property
    def is_known(self) -> bool:
        """Whether both prompt and output were counted; only then the attempt has a price."""
        return self.prompt_tokens is not None and self.completion_tokens is not None

    @property
    def is_nothing(self) -> bool:
        """Whether no token was used, as by a request that nobody accepted."""
        return self.prompt_tokens == 0 and self.completion_tokens == 0

    @property
    def computed_tokens(self) -> int | None:
        """Prompt tokens not served from a cache; None if unknown."""
        prompt, cached = self.prompt_tokens, self.cached_tokens
        return None if prompt is None or cached is None or cached > prompt else prompt - cached

    @property
    def classes(self) -> TokenClasses:
        """The disjoint classes. A part that exceeds its whole is taken as counted beside it, which bounds the bill.

        Providers contradict themselves in this way where they leave cached or reasoning tokens out of the whole. How
        many tokens were cached is then unknown.
        """
        prompt, completion, cached, reasoning = (
            self.prompt_tokens,
            self.completion_tokens,
            self.cached_tokens,
            self.reasoning_tokens,
        )
        if prompt is None:
            hits, misses = None, None
        elif cached is None:
            hits, misses = None, prompt
        elif cached > prompt:
            hits, misses = None, prompt + cached
        else:
            hits, misses = cached, prompt - cached
        if completion is None:
            return TokenClasses(hits, misses, None, None)
        visible = completion if reasoning > completion else completion - reasoning
        return TokenClasses(hits, misses, visible, reasoning)

    @property
    def likely_prompt_tokens(self) -> int:
        """The count, or else its estimate; for limits and expectations, never for sums of counts."""
        return _first_known(self.prompt_tokens, self.estimated_prompt_tokens)

    @property
    def likely_completion_tokens(self) -> int:
        """As `likely_prompt_tokens`, of the output."""
        return _first_known(self.completion_tokens, self.estimated_completion_tokens)

    def with_estimates(self, prompt_tokens: int | None, completion_tokens: int) -> "Usage":
        """The same counts, with estimates where a count is unknown."""
        return replace(
            self,
            estimated_prompt_tokens=prompt_tokens if self.prompt_tokens is None else None,
            estimated_completion_tokens=completion_tokens if self.completion_tokens is None else None,
        )

    def _has_part_beyond_whole(self) -> bool:
        is_cached_beyond = self.prompt_tokens is not None and (self.cached_tokens or 0) > self.prompt_tokens
        return is_cached_beyond or (
            self.completion_tokens is not None and self.reasoning_tokens > self.completion_tokens
        )


_COUNTS = ("prompt_tokens", "completion_tokens", "cached_tokens", "reasoning_tokens")


def _first_known(*counts: int | None) -> int:
    return next((count for count in counts if count is not None), 0)


NOTHING_USED = Usage(prompt_tokens=0, completion_tokens=0, cached_tokens=0)
"""Usage of a request that no engine accepted or answered."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A function call in an answer; `arguments` is JSON text."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token that might have been drawn, as text, and the natural logarithm of its probability."""

    token: str
    logprob: float


@dataclass(frozen=True, slots=True)
class LostCall:
    """A provider call that returned no usage but may still be billed.

    *account* bounds its cost, which is never added to billed amounts.

    Attributes:
        error_type: how it ended, for example `engine_timeout`.
        started_at: UTC; decides the price.
        prompt_tokens: of the request, counted or estimated locally.
        max_output_tokens: most that the provider could have generated.
        price_mode: as the call was sent.
    """

    provider: str
    model: str
    error_type: str
    started_at: datetime
    prompt_tokens: int
    max_output_tokens: int
    price_mode: PriceMode = "online"


@dataclass(frozen=True, slots=True)
class Completion:
    """The outcome of one request: an answer, or a typed failure in `error`.

    `started_at` (UTC) decides the price; `latency_ms` runs from there to the last token. `usage` is what was billed,
    for a failure too; `price_mode` says at which of the provider's prices. `logprobs` are natural logarithms, one per
    completion token, if asked for, and `top_logprobs` the likeliest tokens at each place. `lost_calls` are earlier
    calls (for a failure, all calls) that the provider may have worked on without reporting usage. `repaired` names what
    was mended in the markup of the answer's calls.
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
    provider_finish_reason: str | None = None
    top_logprobs: tuple[tuple[TokenLogprob, ...], ...] | None = None
    repaired: tuple[str, ...] = ()

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
    """Sampling as canonical JSON: equal sampling gives equal text.

    What came later stands there only where it is asked for, so that the text of older runs stays as it was.
    """
    later = {
        "frequency_penalty": float(sampling.frequency_penalty),
        "presence_penalty": float(sampling.presence_penalty),
        "top_logprobs": sampling.top_logprobs,
    }
    return canonical_json(
        {
            "max_tokens": sampling.max_tokens,
            "temperature": float(sampling.temperature),
            "top_p": float(sampling.top_p),
            "stop": list(sampling.stop),
            "seed": sampling.seed,
            "min_p": float(sampling.min_p),
            "logprobs": sampling.logprobs,
            **{name: value for name, value in later.items() if value},
        }
    )


@lru_cache(maxsize=1024)
def parse_sampling_json(text: str) -> Sampling:
    """The inverse of `sampling_json`."""
    values: dict[str, Any] = json.loads(text)
    values["stop"] = tuple(values["stop"])
    return Sampling(**values)
