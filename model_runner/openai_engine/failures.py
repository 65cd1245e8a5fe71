"""Why a call to a provider failed, and what follows from it: for the row, for the endpoint, for the next try.

Stands between the `openai` client, whose exceptions are mapped here, and `endpoint.py` and `failover.py`, which wait,
ask the next provider or give up. Types and status codes decide, and a text only where a profile lists it: some
providers tell a wrong model name by nothing else.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any, Literal, TypeAlias, cast

import aiohttp
import httpx2
import openai

from moebeam.model_runner.openai_engine.profiles import Profile
from moebeam.schemas.errors import (
    ContentRefused,
    EngineFailed,
    EngineOverloaded,
    EngineTimeout,
    MalformedResponse,
    RedirectRefused,
    RequestRefused,
    ResponseTooLarge,
    RowError,
)
from moebeam.schemas.redaction.hide import hide_in_message

Consequence: TypeAlias = Literal["row", "unreachable", "failed", "overload", "closed"]
"""`row`: the provider refuses this request. The others are the provider's failures. `unreachable`: no connection was
made. `failed`: it broke off, was silent, answered with an error or with no answer. `overload`: later, and with fewer in
flight. `closed`: as asked here, it answers nobody, for want of a key, of money, or of the address."""

MAX_MESSAGE_CHARACTERS = 200
_NUMBER_OR_ID = re.compile(r"(?<!HTTP )\b[\w.-]*\d[\w.-]*")
_OVERLOADED = frozenset({429, 503, 529})
_FAILED = frozenset({408, 409, 425})
"""Beside all from 500 on that are no overload, and those that end nothing, below 200."""
_REFUSED = frozenset({400, 413, 422})
"""What else is below 500 speaks of the key, the account or the address."""
_GIVEN_UP_BETWEEN = frozenset({408, 502, 504, 524})
"""Sent by a server between here and the model, which may go on working."""
_NEVER_SENT = (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError, httpx2.ConnectError, httpx2.PoolTimeout)


@dataclass(eq=False)
class CallFailure(Exception):
    """A call without an answer.

    Attributes:
        error: what the row is rejected with, if nothing better comes.
        retry_after_s: how long the provider asked to be left alone; None where it did not say.
        may_be_billed: whether the provider may have worked on the request all the same.
        refusal: equal for refusals that differ in nothing but numbers and ids; empty where nothing was refused.
    """

    consequence: Consequence
    error: RowError
    retry_after_s: float | None = None
    may_be_billed: bool = False
    refusal: str = ""


def classify_failure(error: Exception, profile: Profile) -> CallFailure:
    """Map an exception of the client, or of reading its response; no secret stands in the message."""
    if isinstance(error, RedirectRefused | ResponseTooLarge | EngineTimeout):
        # What one request brought upon itself, it would again, and it may be paid for each time.
        found = type(error)(f"{profile.name}: {shorten(str(error))}")
        return replace(_refused(found), may_be_billed=not isinstance(error, RedirectRefused))
    if isinstance(error, MalformedResponse):
        return CallFailure("failed", MalformedResponse(f"{profile.name}: {shorten(str(error))}"), may_be_billed=True)
    if isinstance(error, RowError):
        return CallFailure("row", error)
    if isinstance(error, openai.APIStatusError):
        return _status_failure(error, profile)
    if isinstance(error, openai.APIConnectionError | httpx2.TransportError):
        # A stream breaks off outside of the client's own reading, with the transport's error itself. Over aiohttp a
        # refused or lost connection is a ConnectTimeout too.
        transport = error.__cause__ if isinstance(error, openai.APIConnectionError) else error
        was_sent = _was_sent(error)
        if isinstance(transport, httpx2.TimeoutException) and not isinstance(transport, httpx2.ConnectTimeout):
            silent = EngineTimeout(f"{profile.name}: silent for longer than timeout_s")
            return CallFailure("failed", silent, may_be_billed=was_sent)
        cause = type(_causes(error)[-1]).__name__
        if not was_sent:
            return CallFailure("unreachable", EngineFailed(f"{profile.name}: no connection ({cause})"))
        broken = EngineFailed(f"{profile.name}: the connection broke off ({cause})")
        return CallFailure("failed", broken, may_be_billed=True)
    if isinstance(error, aiohttp.ClientResponseError):
        broken = MalformedResponse(f"{profile.name}: expected a response of HTTP, found {shorten(error.message)}")
        return CallFailure("failed", broken, may_be_billed=True)
    unknown = EngineFailed(f"{profile.name}: {type(error).__name__}: {shorten(str(error))}")
    if isinstance(error, openai.OpenAIError | httpx2.HTTPError | aiohttp.ClientError | OSError):
        return CallFailure("failed", unknown, may_be_billed=True)
    # Raised by what is asked, such as a value that is no JSON, and by nobody's failure.
    return replace(_refused(unknown), may_be_billed=True)


def _status_failure(error: openai.APIStatusError, profile: Profile) -> CallFailure:
    status = error.status_code
    code, message = _read_error(error.body)
    where = f"{profile.name}: HTTP {status}" + (f" {shorten(code)}" if code else "")
    text = f"{where}: {shorten(message)}" if message else where
    if code in profile.stop_codes or message.strip() in profile.stop_messages:
        return CallFailure("closed", EngineFailed(text))
    if code in profile.refusal_codes:
        return _refused(ContentRefused(text))
    if status in _OVERLOADED:
        return CallFailure("overload", EngineOverloaded(text), retry_after_s(error.response.headers))
    if status in _FAILED or status >= 500 or status < 200:
        wait_s, is_between = retry_after_s(error.response.headers), status in _GIVEN_UP_BETWEEN
        return CallFailure("failed", EngineFailed(text), wait_s, may_be_billed=is_between)
    if status in _REFUSED:
        return _refused(RequestRefused(text))
    return CallFailure("closed", EngineFailed(text), retry_after_s(error.response.headers))


def _refused(error: RowError) -> CallFailure:
    """A refusal; what tells one request from another, numbers and words with digits in them, is no part of its kind."""
    kind = f"{error.error_type}: {_NUMBER_OR_ID.sub('#', str(error))}"
    return CallFailure("row", error, refusal=kind)


def _was_sent(error: BaseException) -> bool:
    """Whether a request may have reached the provider: all but what failed while a connection was made.

    A connect time-out has a cause of its own only where it is something else, such as a lost connection.
    """
    causes = _causes(error)
    return not isinstance(causes[-1], httpx2.ConnectTimeout) and not any(
        isinstance(cause, _NEVER_SENT) for cause in causes
    )


def _causes(error: BaseException) -> list[BaseException]:
    """An error and what caused it, down to aiohttp's or the system's own word for it."""
    causes = [error]
    while (cause := causes[-1].__cause__) is not None:
        causes.append(cause)
    return causes


def _read_error(body: object) -> tuple[str, str]:
    """The code and the message of an error response, in OpenAI's form or flat; empty where it has none."""
    if not isinstance(body, Mapping):
        return "", body if isinstance(body, str) else ""
    fields = cast("Mapping[str, Any]", body)
    nested = fields.get("error")
    if isinstance(nested, Mapping):
        fields = cast("Mapping[str, Any]", nested)
    code, message = fields.get("code"), fields.get("message")
    return "" if code is None else str(code), "" if message is None else str(message)


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Seconds, from `retry-after-ms`, or `Retry-After` as a number or a date; None where it is absent or unreadable."""
    try:
        if (milliseconds := headers.get("retry-after-ms")) is not None:
            return max(0.0, float(milliseconds) / 1000)
        value = headers.get("retry-after")
        if value is None:
            return None
        try:
            return max(0.0, float(value))
        except ValueError:
            return max(0.0, (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError, OverflowError):
        return None


def shorten(text: str) -> str:
    """A provider's words as they may be logged: without secrets, on one line, short, since they may quote a prompt.

    Secrets go first: cut in two they would be none that anybody knows.
    """
    text = " ".join(hide_in_message(text).split())
    return text if len(text) <= MAX_MESSAGE_CHARACTERS else text[: MAX_MESSAGE_CHARACTERS - 3] + "..."
