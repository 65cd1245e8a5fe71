"""Parses one line of a JSONL input in the OpenAI batch shape.

Part of *read*. Specification: OpenAI's Batch API input object (`custom_id`, `method`, `url`, `body`), with the body of
a chat completion. What moebeam does not support is a typed reject, never ignored; what its engine cannot follow is
found by *render*, which knows the engine.
"""

import json
from typing import Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moebeam.schemas.canonical import Json, canonical_json
from moebeam.schemas.chat_options import OPTION_NAMES
from moebeam.schemas.errors import InvalidId, InvalidLine, InvalidSampling, UnsupportedRequest, abbreviate

CHAT_URLS = ("/v1/chat/completions", "/chat/completions")

_NEUTRAL: dict[str, tuple[Json, ...]] = {
    "stream": (False,),
    "logit_bias": ({},),
}
"""Fields accepted only with a value that changes nothing; null changes nothing in any field."""

_IGNORED = ("user", "metadata", "store")
"""Fields that change no answer: notes for the account at OpenAI, which are read and not sent."""

_BOUNDS = {
    "greater_than": ("gt", "more than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}


class _Sampling(BaseModel):
    model_config = ConfigDict(strict=True)

    max_tokens: int | None = Field(default=None, gt=0)
    max_completion_tokens: int | None = Field(default=None, gt=0)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    stop: str | list[str] | None = None
    seed: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    n: int | None = Field(default=None, ge=1, le=128)


class _Line(BaseModel):
    model_config = ConfigDict(extra="forbid")

    custom_id: Any = None
    method: Literal["POST"] = "POST"
    url: str
    body: dict[str, Any]


class BatchRequest(BaseModel):
    """A line's request: the chat and the row's own sampling values, both as canonical JSON.

    The sampling values have OpenAI's names, `n` among them.
    `options` is a JSON object of its further options (`moebeam.schemas.chat_options.OPTION_NAMES`), keys as written.
    """

    custom_id: str
    messages: str
    sampling: str
    options: str


SamplingValues: TypeAlias = dict[str, Json]


def read_custom_id(line: bytes) -> str | None:
    """The id of a line, if it can be read even when the rest is wrong."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return None
    custom_id = value.get("custom_id") if isinstance(value, dict) else None
    return custom_id if isinstance(custom_id, str) and custom_id and _is_unicode(custom_id) else None


def _is_unicode(text: str) -> bool:
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


def parse_batch_line(line: bytes) -> BatchRequest:
    """Parse one line.

    Raises:
        InvalidLine: not UTF-8, not a JSON object, or a field of the wrong shape.
        InvalidId: `custom_id` is missing, empty or not a string.
        UnsupportedRequest: another URL, or a body field that moebeam does not support.
        InvalidSampling: a number outside of OpenAI's range.
    """
    try:
        parsed = _Line.model_validate(json.loads(line))
    except UnicodeDecodeError as error:
        raise InvalidLine(f"expected UTF-8, found byte 0x{line[error.start]:02x} at position {error.start}") from error
    except json.JSONDecodeError as error:
        raise InvalidLine(f"expected a JSON object, found an error at column {error.colno}: {error.msg}") from error
    except (ValidationError, RecursionError) as error:
        raise InvalidLine(_explain(error)) from error
    except ValueError as error:
        raise InvalidLine(f"expected a JSON object that can be read, found: {error}") from error
    if not isinstance(parsed.custom_id, str) or not parsed.custom_id:
        raise InvalidId(f"custom_id: expected a string that is not empty, found {parsed.custom_id!r}")
    if parsed.url not in CHAT_URLS:
        raise UnsupportedRequest(f"url: expected one of {', '.join(CHAT_URLS)}, found {parsed.url!r}")
    try:
        messages = canonical_json(_read_messages(parsed.body))
    except ValueError as error:
        raise InvalidLine(f"body.messages: expected JSON numbers, found: {error}") from error
    for name, text in (("custom_id", parsed.custom_id), ("body.messages", messages)):
        if not _is_unicode(text):
            raise InvalidLine(f"{name}: expected Unicode text, found a lone surrogate escape")
    return BatchRequest(
        custom_id=parsed.custom_id,
        messages=messages,
        sampling=canonical_json(_read_sampling(parsed.body)),
        options=_read_options(parsed.body),
    )


def _read_options(body: dict[str, Any]) -> str:
    own = {name: body[name] for name in OPTION_NAMES if body.get(name) is not None}
    try:
        text = json.dumps(own, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except ValueError as error:
        raise InvalidLine(f"body: expected JSON numbers in tools and schemas, found: {error}") from error
    if not _is_unicode(text):
        raise InvalidLine("body: expected Unicode text in tools and schemas, found a lone surrogate escape")
    return text


def _read_messages(body: dict[str, Any]) -> Json:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise InvalidLine(f"body.messages: expected a list of messages, found {abbreviate(messages)}")
    return messages


def _read_sampling(body: dict[str, Any]) -> SamplingValues:
    known = set(_Sampling.model_fields)
    for name, value in body.items():
        if name in known or name in _IGNORED or name in OPTION_NAMES or name == "messages" or value is None:
            continue
        if name not in _NEUTRAL or value not in _NEUTRAL[name]:
            raise UnsupportedRequest(f"body.{name}: {abbreviate(value)} is not supported")
    try:
        own = _Sampling.model_validate({name: body[name] for name in known if name in body})
    except ValidationError as error:
        raise _explain_sampling(error) from error
    values: SamplingValues = own.model_dump(exclude_none=True)
    if "max_completion_tokens" in values:
        values["max_tokens"] = values.pop("max_completion_tokens")
    if isinstance(values.get("stop"), str):
        values["stop"] = [values["stop"]]
    return values


def _explain_sampling(error: ValidationError) -> InvalidLine | InvalidSampling:
    """A number out of range is a sampling value that is wrong, any other value a line that is wrong."""
    first = error.errors(include_url=False)[0]
    if first["type"] not in _BOUNDS:
        return InvalidLine(f"body.{_explain(error)}")
    name, words = _BOUNDS[first["type"]]
    where, bound = ".".join(map(str, first["loc"])), first.get("ctx", {})[name]
    return InvalidSampling(f"body.{where}: expected {words} {bound:g}, found {first['input']!r}")


def _explain(error: ValidationError | RecursionError) -> str:
    if isinstance(error, RecursionError):
        return "expected a JSON object, found one nested too deeply"
    first = error.errors(include_url=False, include_context=False)[0]
    where = ".".join(str(part) for part in first["loc"]) or "line"
    return f"{where}: {first['msg']}, found {abbreviate(first['input'])}"
