"""Providers' responses, read into one form: text, reasoning, calls, why it ended, and what it cost.

Last step of a request in the `openai` engine. Whole answers and streams in pieces end in the same `Answer`; what is cut
off or of another shape is a `MalformedResponse`, and what a provider leaves out stays unknown.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moebeam.model_runner.openai_engine.profiles import Profile
from moebeam.model_runner.openai_engine.response.call_pieces import MAX_CALLS, CallPiece, CallPieces
from moebeam.model_runner.openai_engine.response.finish_reasons import is_known_reason, map_finish_reason
from moebeam.model_runner.openai_engine.response.joined_text import join_pieces
from moebeam.schemas.errors import AnswerInterrupted, MalformedResponse, RowError, abbreviate
from moebeam.schemas.records import MAX_COUNTED_TOKENS, FinishReason, TokenLogprob, ToolCall, Usage

_INTERRUPTED = ("insufficient_system_resource", "aborted")
_MAX_ERROR_CHARACTERS = 200

Word = Annotated[str, Field(max_length=1_024)]
"""A name, or another short mark that goes into tables as it is."""
Logprob = Annotated[float, Field(le=1.0)]
"""Above 0 by an error of rounding at most; minus infinity where there is no probability at all."""
Model = TypeVar("Model", bound=BaseModel)


class _Function(BaseModel):
    name: Word | None = None
    arguments: str | dict[str, Any] | None = None


class _Call(BaseModel):
    model_config = ConfigDict(coerce_numbers_to_str=True)

    index: int | None = None
    # Some gateways put a thought's signature into it.
    id: Annotated[str, Field(max_length=1 << 16)] | None = None
    function: _Function = _Function()

    def to_piece(self) -> CallPiece:
        arguments = self.function.arguments
        # Some servers give the object itself, where the interface has its JSON text.
        text = json.dumps(arguments, ensure_ascii=False) if isinstance(arguments, dict) else arguments or ""
        index = None if self.index is None or self.index < 0 else self.index
        return CallPiece(index, self.id or "", self.function.name or "", text)


class _Message(BaseModel):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: Annotated[list[_Call], Field(max_length=MAX_CALLS)] | None = None


class _LikelyToken(BaseModel):
    token: str
    logprob: Logprob


class _TokenLogprob(BaseModel):
    logprob: Logprob
    top_logprobs: list[_LikelyToken] | None = None


class _Logprobs(BaseModel):
    content: list[_TokenLogprob] | None = None


class _Choice(BaseModel):
    model_config = ConfigDict(coerce_numbers_to_str=True)

    finish_reason: Word | None = None
    message: _Message | None = None
    delta: _Message | None = None
    logprobs: _Logprobs | None = None


class _Response(BaseModel):
    """A whole response or one piece of a stream; fields that nothing here needs are passed over."""

    model: Word | None = None
    system_fingerprint: Word | None = None
    service_tier: Word | None = None
    choices: list[_Choice]
    usage: Any = None


@dataclass(frozen=True, slots=True)
class Answer:
    """One response, read.

    Attributes:
        provider_finish_reason: the provider's own word for `finish_reason`; None where it gives none.
        error: why it is no answer although it came, and was paid for; None if it is one.
        model: the model as the provider names it; empty where it does not.
        fingerprint: the provider's mark of the configuration that answered; empty where it gives none.
        service_tier: the tier in which it was answered; None where the provider does not say.
    """

    text: str
    finish_reason: FinishReason
    usage: Usage
    model: str
    fingerprint: str
    reasoning_content: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    logprobs: tuple[float, ...] | None = None
    error: RowError | None = None
    provider_finish_reason: str | None = None
    service_tier: str | None = None
    top_logprobs: tuple[tuple[TokenLogprob, ...], ...] | None = None

    @property
    def has_known_reason(self) -> bool:
        """Whether the provider's word for its end is one that is known; others count as `stop`."""
        return is_known_reason(self.provider_finish_reason)


def read_answer(content: bytes, profile: Profile) -> Answer:
    """A whole response; blank lines ahead of it keep the connection alive and mean nothing.

    Raises:
        MalformedResponse: it is cut off, not JSON, or not a chat completion.
    """
    response = parse_json(_Response, content)
    if not response.choices or response.choices[0].message is None:
        raise MalformedResponse(f"choices: expected a message, found {_abbreviate_content(content)}")
    choice = response.choices[0]
    assert choice.message is not None
    pieces = _Pieces()
    pieces.add(choice.message, choice)
    pieces.calls.add_whole(_list_calls(choice.message))
    pieces.finish_word = choice.finish_reason
    pieces.add_metadata(response)
    return pieces.answer(profile)


class StreamedAnswer:
    """Collects the lines of a stream; `answer` when it has ended."""

    def __init__(self) -> None:
        self._pieces = _Pieces()
        self._has_begun = False
        self._has_ended = False

    def add_line(self, line: bytes) -> None:
        """Take one line; blank ones and comments, such as `: keep-alive`, only show that the provider lives.

        Raises:
            MalformedResponse: an event that is not a piece of a chat completion.
        """
        if not line.startswith(b"data:"):
            return
        data = line[5:].strip()
        if data == b"[DONE]":
            self._has_ended = True
            return
        response = parse_json(_Response, data)
        self._pieces.add_metadata(response)
        for choice in response.choices[:1]:
            self._has_begun = True
            # Some servers send an empty word with each piece until the last.
            self._pieces.finish_word = choice.finish_reason or self._pieces.finish_word
            if choice.delta is not None:
                self._pieces.add(choice.delta, choice)
                self._pieces.calls.add_event(_list_calls(choice.delta))

    def answer(self, profile: Profile) -> Answer:
        """The whole answer.

        Raises:
            MalformedResponse: the stream ended before its answer did.
        """
        if not self._has_begun or (not self._has_ended and self._pieces.finish_word is None):
            raise MalformedResponse(
                "expected a stream that ends with a finish_reason or [DONE], found one that breaks off"
            )
        return self._pieces.answer(profile)


def _list_calls(message: _Message) -> Sequence[CallPiece]:
    return [call.to_piece() for call in message.tool_calls or ()]


@dataclass(slots=True)
class _Pieces:
    """The parts of an answer so far."""

    texts: list[str] = field(default_factory=list[str])
    reasonings: list[str] = field(default_factory=list[str])
    calls: CallPieces = field(default_factory=CallPieces)
    logprobs: list[float] = field(default_factory=list[float])
    finish_word: str | None = None
    usage: Any = None
    model: str = ""
    fingerprint: str = ""
    service_tier: str | None = None
    top_logprobs: list[tuple[TokenLogprob, ...]] = field(default_factory=list[tuple[TokenLogprob, ...]])

    def add_metadata(self, response: _Response) -> None:
        self.service_tier = response.service_tier or self.service_tier
        self.model = response.model or self.model
        self.fingerprint = response.system_fingerprint or self.fingerprint
        self.usage = response.usage or self.usage

    def add(self, message: _Message, choice: _Choice) -> None:
        if message.content:
            self.texts.append(message.content)
        if reasoning := message.reasoning_content or message.reasoning:
            self.reasonings.append(reasoning)
        if choice.logprobs is not None:
            self.logprobs += [token.logprob for token in choice.logprobs.content or ()]
            self.top_logprobs += [
                tuple(TokenLogprob(likely.token, likely.logprob) for likely in token.top_logprobs or ())
                for token in choice.logprobs.content or ()
            ]

    def answer(self, profile: Profile) -> Answer:
        usage, calls = _read_usage(self.usage, profile), self.calls.finish()
        finish_reason = map_finish_reason(self.finish_word, has_calls=bool(calls))
        error: RowError | None = None
        if finish_reason in _INTERRUPTED:
            found = "an unknown number of" if usage.completion_tokens is None else usage.completion_tokens
            error = AnswerInterrupted(f"{profile.name} gave up after {found} tokens (finish_reason {self.finish_word})")
        return Answer(
            text=join_pieces(self.texts),
            finish_reason=finish_reason,
            usage=usage,
            model=self.model,
            fingerprint=self.fingerprint,
            reasoning_content=join_pieces(self.reasonings) or None,
            tool_calls=calls,
            logprobs=tuple(self.logprobs) if self.logprobs else None,
            error=error,
            provider_finish_reason=self.finish_word,
            service_tier=self.service_tier,
            top_logprobs=tuple(self.top_logprobs) if any(self.top_logprobs) else None,
        )


def _read_usage(found: Any, profile: Profile) -> Usage:
    """Token counts in OpenAI's names; what is not a number is unknown."""
    cached = next((count for path in profile.cached_tokens if (count := _count(found, path)) is not None), None)
    return Usage(
        prompt_tokens=_count(found, "prompt_tokens"),
        completion_tokens=_count(found, "completion_tokens"),
        cached_tokens=cached,
        reasoning_tokens=_count(found, "completion_tokens_details.reasoning_tokens") or 0,
    )


def _count(found: Any, path: str) -> int | None:
    for name in path.split("."):
        found = found.get(name) if isinstance(found, Mapping) else None
    if isinstance(found, float):
        if math.isinf(found):
            return MAX_COUNTED_TOKENS + 1
        return int(found) if found.is_integer() else None
    return found if isinstance(found, int) and not isinstance(found, bool) else None


def parse_json(model: type[Model], content: bytes) -> Model:
    """JSON in the shape of a model.

    Raises:
        MalformedResponse: it has another shape, or is no JSON.
    """
    try:
        try:
            return model.model_validate_json(content)
        except ValidationError as error:
            if error.errors(include_url=False, include_input=False)[0]["type"] != "json_invalid":
                raise
            return model.model_validate(_load_json(content, error))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "response"
        raise MalformedResponse(f"{where}: {first['msg']}, found {_abbreviate_content(content)}") from None


def _load_json(content: bytes, refused: ValidationError) -> Any:
    """What only Python's own parser reads: half of a surrogate pair, and integers of thousands of digits.

    Raises:
        ValidationError: the given one, if this parser refuses the content, too.
    """
    try:
        return json.loads(content.decode(), parse_int=lambda digits: int(digits) if len(digits) < 40 else math.inf)
    except (ValueError, RecursionError):
        raise refused from None


def _abbreviate_content(content: bytes) -> str:
    """The beginning of a response, for messages: neither answers nor prompts belong in logs at length."""
    text = content.strip()[: _MAX_ERROR_CHARACTERS // 2].decode(errors="replace")
    return abbreviate(text, _MAX_ERROR_CHARACTERS)
