"""The lines of a journal: answers, and the calls that left for them.

Part of *answer*, below `journal_file.py`. A line is a checksum and, under it, the line's number in its file and a JSON
object. There are three kinds:

- An *answer*: a completion with its usage, and of its request only a digest. A failure that used nothing has a line,
  too, where calls of it may be billed; it is never replayed.
- A *departure*: a call is about to leave. It says what the call may cost at most.
- A *dismissal*: the call that left last for a request brought nothing, and is not billed.

An answer ends all departures of its request's attempt that its writer wrote before: it names those calls itself, as the
one that was answered or among its lost ones. Departures that nothing ends are calls in flight when their process died.

What is read back is validated as strictly as the tables demand, so that a line that cannot be used is found where it is
read and not where it would fail a commit.
"""

import json
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from typing import Annotated, Any, TypeAlias

from pydantic import AwareDatetime, ConfigDict, Field, FiniteFloat, TypeAdapter

from moebeam.schemas.errors import EngineFailed, RequestGivenUp, RowError
from moebeam.schemas.prices import PriceMode
from moebeam.schemas.records import (
    MAX_COUNTED_TOKENS,
    Completion,
    FinishReason,
    LostCall,
    TokenLogprob,
    ToolCall,
    Usage,
    UsageStatus,
)

_Tokens: TypeAlias = Annotated[int, Field(ge=0, le=MAX_COUNTED_TOKENS)]
_Attempt: TypeAlias = Annotated[int, Field(ge=1, lt=2**31)]
_STRICT = ConfigDict(extra="forbid")


@dataclass(frozen=True, slots=True)
class Entry:
    """A journaled completion.

    Attributes:
        reference: its file and line, below the folder of the shard's journal.
        key: digest of the request, see `journal.request_key`.
        attempt: the request's attempt number at the time.
    """

    reference: str
    key: str
    attempt: int
    completion: Completion

    @property
    def is_answer(self) -> bool:
        """Whether it can be replayed: an answer, or a failure that used tokens. Else it only names lost calls."""
        return is_paid(self.completion)


def is_paid(completion: Completion) -> bool:
    """Whether a completion is an answer, or a failure that used tokens. A free failure is better retried."""
    return completion.error is None or not completion.usage.is_nothing


@dataclass(frozen=True, slots=True)
class Departure:
    """A call that was about to leave.

    Attributes:
        call: what it may cost at most.
    """

    key: str
    attempt: int
    request_id: str
    call: LostCall


@dataclass(frozen=True, slots=True)
class Dismissal:
    """The call that left last for an attempt at a request is not billed."""

    request_id: str
    attempt: int


Line: TypeAlias = Entry | Departure | Dismissal


def in_flight_entry(reference: str, departure: Departure) -> Entry:
    """What a departure comes to that nothing ended: a request that was given up, whose call may be billed."""
    told = "its process ended before an answer was journaled; the call may be billed"
    completion = Completion.from_error(
        departure.request_id,
        RequestGivenUp(told),
        started_at=departure.call.started_at,
        lost_calls=(departure.call,),
    )
    return Entry(reference, departure.key, departure.attempt, completion)


def number_line(number: int, content: bytes) -> bytes:
    """A line of a file.

    Args:
        number: of the line in its file, from 1.
    """
    numbered = b"%d %s" % (number, content)
    return b"%08x %s\n" % (zlib.crc32(numbered), numbered)


def format_departure(departure: Departure) -> bytes:
    """The content of a line that says that a call leaves."""
    call = departure.call
    values = {
        "departs": {"key": departure.key, "attempt": departure.attempt, "request_id": departure.request_id},
        "call": _describe_call(call),
    }
    return _encode(values)


def format_dismissal(dismissal: Dismissal) -> bytes:
    """The content of a line that says that a call is not billed."""
    return _encode({"dismissed": {"request_id": dismissal.request_id, "attempt": dismissal.attempt}})


def format_answer(key: str, attempt: int, completion: Completion) -> bytes:
    """The content of a line that holds an answer."""
    error = completion.error
    values: dict[str, Any] = {
        "key": key,
        "attempt": attempt,
        "request_id": completion.request_id,
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "provider_finish_reason": completion.provider_finish_reason,
        "usage": asdict(completion.usage),
        "started_at": completion.started_at.isoformat(),
        "latency_ms": completion.latency_ms,
        "provider": completion.provider,
        "model": completion.model,
        "model_revision": completion.model_revision,
        "reasoning_content": completion.reasoning_content,
        "tool_calls": [asdict(call) for call in completion.tool_calls],
        "logprobs": completion.logprobs,
        "top_logprobs": completion.top_logprobs
        and [[[likely.token, likely.logprob] for likely in place] for place in completion.top_logprobs],
        "repaired": completion.repaired,
        "price_mode": completion.price_mode,
        "error": error and {"type": error.error_type, "message": str(error)},
        "lost_calls": [_describe_call(call) for call in completion.lost_calls],
    }
    return _encode(values)


def _describe_call(call: LostCall) -> dict[str, Any]:
    return {
        "provider": call.provider,
        "model": call.model,
        "error_type": call.error_type,
        "started_at": call.started_at.isoformat(),
        "prompt_tokens": call.prompt_tokens,
        "max_output_tokens": call.max_output_tokens,
        "price_mode": call.price_mode,
    }


def _encode(values: dict[str, Any]) -> bytes:
    # A provider's JSON may hold lone surrogates. Each is kept as it is: as escapes, two adjacent ones would be read
    # back as one character.
    return json.dumps(values, separators=(",", ":"), ensure_ascii=False).encode("utf-8", "surrogatepass")


@dataclass(frozen=True, slots=True)
class _KeptUsage:
    __pydantic_config__ = _STRICT

    prompt_tokens: _Tokens | None
    completion_tokens: _Tokens | None
    cached_tokens: _Tokens | None = None
    reasoning_tokens: _Tokens = 0
    status: UsageStatus = "reported"
    estimated_prompt_tokens: _Tokens | None = None
    estimated_completion_tokens: _Tokens | None = None


@dataclass(frozen=True, slots=True)
class _KeptToolCall:
    __pydantic_config__ = _STRICT

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class _KeptError:
    __pydantic_config__ = _STRICT

    type: str
    message: str


@dataclass(frozen=True, slots=True)
class _KeptCall:
    __pydantic_config__ = _STRICT

    provider: str
    model: str
    error_type: str
    started_at: AwareDatetime
    prompt_tokens: _Tokens
    max_output_tokens: _Tokens
    price_mode: PriceMode = "online"

    def restore(self) -> LostCall:
        return LostCall(
            self.provider,
            self.model,
            self.error_type,
            self.started_at,
            self.prompt_tokens,
            self.max_output_tokens,
            self.price_mode,
        )


@dataclass(frozen=True, slots=True)
class _KeptAnswer:
    """An answer's line; fields with a default are missing in lines of older versions."""

    __pydantic_config__ = _STRICT

    key: str
    attempt: _Attempt
    request_id: str
    text: str
    finish_reason: FinishReason
    usage: _KeptUsage
    started_at: AwareDatetime
    latency_ms: FiniteFloat
    provider: str
    model: str
    model_revision: str
    reasoning_content: str | None
    tool_calls: tuple[_KeptToolCall, ...]
    logprobs: tuple[float, ...] | None
    error: _KeptError | None
    price_mode: PriceMode = "online"
    provider_finish_reason: str | None = None
    top_logprobs: tuple[tuple[tuple[str, float], ...], ...] | None = None
    repaired: tuple[str, ...] = ()
    lost_calls: tuple[_KeptCall, ...] = ()

    def restore(self, reference: str) -> Entry:
        usage, error, likeliest = self.usage, self.error, self.top_logprobs
        completion = Completion(
            request_id=self.request_id,
            text=self.text,
            finish_reason=self.finish_reason,
            usage=Usage(
                usage.prompt_tokens,
                usage.completion_tokens,
                usage.cached_tokens,
                usage.reasoning_tokens,
                usage.status,
                usage.estimated_prompt_tokens,
                usage.estimated_completion_tokens,
            ),
            started_at=self.started_at,
            latency_ms=self.latency_ms,
            provider=self.provider,
            model=self.model,
            model_revision=self.model_revision,
            reasoning_content=self.reasoning_content,
            tool_calls=tuple(ToolCall(call.id, call.name, call.arguments) for call in self.tool_calls),
            logprobs=self.logprobs,
            error=None if error is None else _error_types().get(error.type, EngineFailed)(error.message),
            price_mode=self.price_mode,
            lost_calls=tuple(call.restore() for call in self.lost_calls),
            provider_finish_reason=self.provider_finish_reason,
            top_logprobs=None
            if likeliest is None
            else tuple(tuple(TokenLogprob(*likely) for likely in place) for place in likeliest),
            repaired=self.repaired,
        )
        return Entry(reference, self.key, self.attempt, completion)


@dataclass(frozen=True, slots=True)
class _KeptRequest:
    __pydantic_config__ = _STRICT

    key: str
    attempt: _Attempt
    request_id: str


@dataclass(frozen=True, slots=True)
class _KeptDeparture:
    __pydantic_config__ = _STRICT

    departs: _KeptRequest
    call: _KeptCall

    def restore(self) -> Departure:
        return Departure(self.departs.key, self.departs.attempt, self.departs.request_id, self.call.restore())


@dataclass(frozen=True, slots=True)
class _KeptDismissal:
    __pydantic_config__ = _STRICT

    dismissed: Dismissal


_ANSWER: TypeAdapter[_KeptAnswer] = TypeAdapter(_KeptAnswer)
_DEPARTURE: TypeAdapter[_KeptDeparture] = TypeAdapter(_KeptDeparture)
_DISMISSAL: TypeAdapter[_KeptDismissal] = TypeAdapter(_KeptDismissal)


def parse_line(line: bytes, name: str, place: int) -> tuple[int, Line]:
    """Parse one line of a file: its number, and what it says.

    Args:
        place: counted in the file, for lines of older versions, which have no number.
    Raises:
        ValueError: the line is damaged, or says something that no table could hold.
    """
    checksum, _, content = line.partition(b" ")
    if int(checksum, 16) != zlib.crc32(content):
        raise ValueError("checksum")
    number = place
    if not content.startswith(b"{"):
        counted, _, content = content.partition(b" ")
        number = int(counted)
    values: object = json.loads(content.decode("utf-8", "surrogatepass"))
    kind: object = next(iter(values), None) if isinstance(values, dict) else None
    if kind == "departs":
        return number, _DEPARTURE.validate_python(values).restore()
    if kind == "dismissed":
        return number, _DISMISSAL.validate_python(values).dismissed
    return number, _ANSWER.validate_python(values).restore(f"{name}:{number}")


@cache
def _error_types() -> dict[str, type[RowError]]:
    return {kind.error_type: kind for kind in _subclasses(RowError)}


def _subclasses(kind: type[RowError]) -> Iterator[type[RowError]]:
    for subclass in kind.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)
