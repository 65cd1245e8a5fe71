"""Providers' responses, read into one form: text, reasoning, calls, why it ended, and what it cost.

Last step of a request in the `openai` engine. Whole answers and streams in pieces end in the same `Answer`; what is cut
off or of another shape is a `MalformedResponse`, and what a provider leaves out stays unknown.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from moebeam.model_runner.openai_engine.profiles import Profile
from moebeam.schemas.errors import AnswerInterrupted, EngineFailed, MalformedResponse, RowError, abbreviate
from moebeam.schemas.records import FinishReason, ToolCall, Usage

_FINISH_REASONS: Mapping[str, FinishReason] = {
    **{reason: reason for reason in get_args(FinishReason) if reason != "error"},
    "function_call": "tool_calls",
    "abort": "aborted",
    "sensitive": "content_filter",
}
_INTERRUPTED = ("insufficient_system_resource", "aborted")
_MAX_ERROR_CHARACTERS = 200


class _Function(BaseModel):
    name: str | None = None
    arguments: str | dict[str, Any] | None = None


class _Call(BaseModel):
    index: int | None = None
    id: str | None = None
    function: _Function = _Function()


class _Message(BaseModel):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[_Call] | None = None


class _TokenLogprob(BaseModel):
    logprob: float


class _Logprobs(BaseModel):
    content: list[_TokenLogprob] | None = None


class _Choice(BaseModel):
    finish_reason: str | None = None
    message: _Message | None = None
    delta: _Message | None = None
    logprobs: _Logprobs | None = None


class _Response(BaseModel):
    """A whole response or one piece of a stream; fields that nothing here needs are passed over."""

    model: str | None = None
    system_fingerprint: str | None = None
    choices: list[_Choice]
    usage: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """One response, read.

    Attributes:
        error: why it is no answer although it came, and was paid for; None if it is one.
        is_usage_known: whether it says what it cost.
        model: the model as the provider names it; empty where it does not.
        fingerprint: the provider's mark of the configuration that answered; empty where it gives none.
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
    is_usage_known: bool = True


def read_answer(content: bytes, profile: Profile) -> Answer:
    """A whole response; blank lines ahead of it keep the connection alive and mean nothing.

    Raises:
        MalformedResponse: it is cut off, not JSON, or not a chat completion.
    """
    response = _parse(content)
    if not response.choices or response.choices[0].message is None:
        raise MalformedResponse(f"choices: expected a message, found {_abbreviate_content(content)}")
    choice = response.choices[0]
    assert choice.message is not None
    pieces = _Pieces()
    pieces.add(choice.message, choice)
    pieces.add_metadata(response)
    return pieces.answer(profile)


class StreamedAnswer:
    """Collects the lines of a stream; `answer` when it has ended."""

    def __init__(self) -> None:
        self._pieces = _Pieces()
        self._has_ended = False

    def add_line(self, line: str) -> None:
        """Take one line; blank ones and comments, such as `: keep-alive`, only show that the provider lives.

        Raises:
            MalformedResponse: an event that is not a piece of a chat completion.
        """
        if not line.startswith("data:"):
            return
        data = line[5:].strip()
        if data == "[DONE]":
            self._has_ended = True
            return
        response = _parse(data.encode())
        self._pieces.add_metadata(response)
        for choice in response.choices[:1]:
            if choice.delta is not None:
                self._pieces.add(choice.delta, choice)

    def answer(self, profile: Profile) -> Answer:
        """The whole answer.

        Raises:
            MalformedResponse: the stream ended before its answer did.
        """
        if not self._has_ended and self._pieces.finish_reason is None:
            raise MalformedResponse("expected a stream that ends with a finish_reason, found one that breaks off")
        return self._pieces.answer(profile)


@dataclass(slots=True)
class _PartialCall:
    id: str = ""
    name: str = ""
    arguments: str = ""


@dataclass(slots=True)
class _Pieces:
    """The parts of an answer so far."""

    texts: list[str] = field(default_factory=list[str])
    reasonings: list[str] = field(default_factory=list[str])
    calls: dict[int, _PartialCall] = field(default_factory=dict[int, _PartialCall])
    logprobs: list[float] = field(default_factory=list[float])
    finish_reason: str | None = None
    usage: dict[str, Any] | None = None
    model: str = ""
    fingerprint: str = ""

    def add_metadata(self, response: _Response) -> None:
        self.model = response.model or self.model
        self.fingerprint = response.system_fingerprint or self.fingerprint
        self.usage = response.usage or self.usage

    def add(self, message: _Message, choice: _Choice) -> None:
        if message.content:
            self.texts.append(message.content)
        if reasoning := message.reasoning_content or message.reasoning:
            self.reasonings.append(reasoning)
        for position, call in enumerate(message.tool_calls or ()):
            partial = self.calls.setdefault(position if call.index is None else call.index, _PartialCall())
            partial.id = call.id or partial.id
            partial.name = call.function.name or partial.name
            arguments = call.function.arguments
            # Some servers give the object itself, where the interface has its JSON text.
            partial.arguments += (
                json.dumps(arguments, ensure_ascii=False) if isinstance(arguments, dict) else arguments or ""
            )
        if choice.logprobs is not None:
            self.logprobs += [token.logprob for token in choice.logprobs.content or ()]
        self.finish_reason = choice.finish_reason or self.finish_reason

    def answer(self, profile: Profile) -> Answer:
        usage, error = _usage(self.usage, profile)
        is_usage_known = error is None
        finish_reason = _FINISH_REASONS.get(self.finish_reason or "")
        if finish_reason is None:
            found = abbreviate(self.finish_reason)
            error = error or EngineFailed(f"finish_reason: expected {', '.join(_FINISH_REASONS)}, found {found}")
            finish_reason = "error"
        elif finish_reason in _INTERRUPTED:
            error = AnswerInterrupted(
                f"{profile.name} gave up after {usage.completion_tokens} tokens (finish_reason {self.finish_reason})"
            )
        return Answer(
            text="".join(self.texts),
            finish_reason=finish_reason,
            usage=usage,
            model=self.model,
            fingerprint=self.fingerprint,
            reasoning_content="".join(self.reasonings) or None,
            tool_calls=tuple(
                ToolCall(call.id or f"call_{index}", call.name, call.arguments)
                for index, call in sorted(self.calls.items())
            ),
            logprobs=tuple(self.logprobs) if self.logprobs else None,
            error=error,
            is_usage_known=is_usage_known,
        )


def _usage(found: Mapping[str, Any] | None, profile: Profile) -> tuple[Usage, RowError | None]:
    """Token counts in OpenAI's names; an error where nobody could say what the answer cost."""
    prompt, completion = _count(found, "prompt_tokens"), _count(found, "completion_tokens")
    if prompt is None or completion is None:
        error = EngineFailed(
            f"usage: expected prompt_tokens and completion_tokens, found {abbreviate(found)}; "
            f"{profile.name} does not say what this answer cost"
        )
        return Usage(prompt or 0, completion or 0, None), error
    cached = next((count for path in profile.cached_tokens if (count := _count(found, path)) is not None), None)
    reasoning = _count(found, "completion_tokens_details.reasoning_tokens") or 0
    return Usage(prompt, completion, cached, reasoning), None


def _count(found: Any, path: str) -> int | None:
    for name in path.split("."):
        found = found.get(name) if isinstance(found, Mapping) else None
    return found if isinstance(found, int) and not isinstance(found, bool) else None


def _parse(content: bytes) -> _Response:
    try:
        return _Response.model_validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"])) or "response"
        raise MalformedResponse(f"{where}: {first['msg']}, found {_abbreviate_content(content)}") from None


def _abbreviate_content(content: bytes) -> str:
    """The beginning of a response, for messages: neither answers nor prompts belong in logs at length."""
    text = content.strip()[: _MAX_ERROR_CHARACTERS // 2].decode(errors="replace")
    return abbreviate(text, _MAX_ERROR_CHARACTERS)
