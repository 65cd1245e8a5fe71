"""What follows from a provider's refusals: by status and code, never by text."""

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import httpx2
import openai
import pytest

from moebeam.model_runner.openai_engine.failures import (
    MAX_MESSAGE_CHARACTERS,
    CallFailure,
    Consequence,
    classify_failure,
    redact,
    retry_after_s,
)
from moebeam.model_runner.openai_engine.profiles import find_profile
from moebeam.schemas.errors import (
    ContentRefused,
    EngineFailed,
    EngineOverloaded,
    EngineTimeout,
    MalformedResponse,
    RequestRefused,
    RowError,
)

KEY = "sk-very-secret"
REQUEST = httpx2.Request("POST", "http://127.0.0.1/chat/completions")


def refusal(
    status: int,
    message: str = "no",
    code: str | None = None,
    provider: str = "deepseek",
    headers: dict[str, str] | None = None,
) -> CallFailure:
    response = httpx2.Response(status, headers=headers or {}, request=REQUEST)
    body = {"message": message, "code": code}
    return classify_failure(openai.APIStatusError(message, response=response, body=body), find_profile(provider), KEY)


@pytest.mark.parametrize(
    ("status", "consequence", "kind"),
    [
        (400, "row", RequestRefused),
        (401, "endpoint", EngineFailed),
        (402, "endpoint", EngineFailed),
        (403, "endpoint", EngineFailed),
        (404, "endpoint", EngineFailed),
        (408, "retry", EngineFailed),
        (413, "row", RequestRefused),
        (422, "row", RequestRefused),
        (429, "overload", EngineOverloaded),
        (500, "retry", EngineFailed),
        (502, "retry", EngineFailed),
        (503, "overload", EngineOverloaded),
        (504, "retry", EngineFailed),
        (529, "overload", EngineOverloaded),
        (599, "retry", EngineFailed),
    ],
)
def test_each_status_has_its_consequence(status: int, consequence: Consequence, kind: type[RowError]) -> None:
    failure = refusal(status)
    assert (failure.consequence, type(failure.error)) == (consequence, kind)
    assert f"deepseek: HTTP {status}" in str(failure.error)


@pytest.mark.parametrize(
    ("provider", "status", "code", "consequence", "kind"),
    [
        ("alibaba", 400, "data_inspection_failed", "row", ContentRefused),
        ("alibaba", 400, "Arrearage", "endpoint", EngineFailed),
        ("volcano", 403, "AccountOverdueError", "endpoint", EngineFailed),
        ("volcano", 400, "SensitiveContentDetected", "row", ContentRefused),
        ("openai", 429, "insufficient_quota", "endpoint", EngineFailed),
        ("openai", 429, "rate_limit_exceeded", "overload", EngineOverloaded),
    ],
)
def test_code_of_the_provider_comes_before_the_status(
    provider: str, status: int, code: str, consequence: Consequence, kind: type[RowError]
) -> None:
    failure = refusal(status, code=code, provider=provider)
    assert (failure.consequence, type(failure.error)) == (consequence, kind)


def test_text_of_a_refusal_decides_nothing() -> None:
    assert refusal(400, "insufficient_quota, rate limit, invalid api key").consequence == "row"


def test_silence_and_broken_connections_may_be_tried_again() -> None:
    deepseek = find_profile("deepseek")
    for cause, kind in ((httpx2.ReadTimeout("x"), EngineTimeout), (httpx2.ConnectError("x"), EngineFailed)):
        error = openai.APIConnectionError(request=REQUEST)
        error.__cause__ = cause
        failure = classify_failure(error, deepseek, KEY)
        assert (failure.consequence, type(failure.error)) == ("retry", kind)
    malformed = classify_failure(MalformedResponse("choices: no"), deepseek, KEY)
    assert (malformed.consequence, type(malformed.error)) == ("retry", MalformedResponse)
    assert isinstance(classify_failure(httpx2.ReadTimeout("x"), deepseek, KEY).error, EngineTimeout)
    assert isinstance(classify_failure(httpx2.RemoteProtocolError("x"), deepseek, KEY).error, EngineFailed)


def test_no_message_holds_the_key_or_a_long_prompt() -> None:
    told = str(refusal(400, f"key {KEY} may not ask " + "secret prompt " * 100).error)
    assert KEY not in told
    assert "[key]" in told
    assert len(told) < MAX_MESSAGE_CHARACTERS + 50
    assert KEY not in str(classify_failure(MalformedResponse(f"found {KEY}"), find_profile("deepseek"), KEY).error)
    assert redact("a\n b", "") == "a b"


def test_retry_after_is_read_in_all_its_forms() -> None:
    assert retry_after_s({"retry-after": "3"}) == 3.0
    assert retry_after_s({"retry-after-ms": "1500", "retry-after": "9"}) == 1.5
    later = datetime.now(UTC) + timedelta(seconds=60)
    found = retry_after_s({"retry-after": format_datetime(later, usegmt=True)})
    assert found is not None and 0 < found <= 60
    assert retry_after_s({"retry-after": "-4"}) == 0.0
    assert retry_after_s({}) is None
    assert retry_after_s({"retry-after": "soon"}) is None
    assert refusal(429, headers={"Retry-After": "7"}).retry_after_s == 7.0
