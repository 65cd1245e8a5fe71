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
    retry_after_s,
    shorten,
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
from moebeam.schemas.redaction.known_secrets import learn_secret

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
    return classify_failure(openai.APIStatusError(message, response=response, body=body), find_profile(provider))


@pytest.mark.parametrize(
    ("status", "consequence", "kind"),
    [
        (400, "row", RequestRefused),
        (401, "closed", EngineFailed),
        (402, "closed", EngineFailed),
        (403, "closed", EngineFailed),
        (404, "closed", EngineFailed),
        (408, "failed", EngineFailed),
        (405, "closed", EngineFailed),
        (407, "closed", EngineFailed),
        (409, "failed", EngineFailed),
        (410, "closed", EngineFailed),
        (413, "row", RequestRefused),
        (422, "row", RequestRefused),
        (425, "failed", EngineFailed),
        (429, "overload", EngineOverloaded),
        (500, "failed", EngineFailed),
        (502, "failed", EngineFailed),
        (503, "overload", EngineOverloaded),
        (504, "failed", EngineFailed),
        (529, "overload", EngineOverloaded),
        (599, "failed", EngineFailed),
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
        ("alibaba", 400, "Arrearage", "closed", EngineFailed),
        ("volcano", 403, "AccountOverdueError", "closed", EngineFailed),
        ("volcano", 400, "SensitiveContentDetected", "row", ContentRefused),
        ("openai", 429, "insufficient_quota", "closed", EngineFailed),
        ("openai", 429, "rate_limit_exceeded", "overload", EngineOverloaded),
    ],
)
def test_code_of_the_provider_comes_before_the_status(
    provider: str, status: int, code: str, consequence: Consequence, kind: type[RowError]
) -> None:
    failure = refusal(status, code=code, provider=provider)
    assert (failure.consequence, type(failure.error)) == (consequence, kind)


def test_text_of_a_refusal_decides_nothing_but_for_the_one_that_a_profile_lists() -> None:
    assert refusal(400, "insufficient_quota, rate limit, invalid api key").consequence == "row"
    assert refusal(400, "Model Not Exist").consequence == "closed"
    assert refusal(400, "Model Not Exist", provider="vllm").consequence == "row"
    assert refusal(400, "the text says: Model Not Exist").consequence == "row"


def test_refusals_are_alike_where_only_numbers_and_ids_differ() -> None:
    found = [refusal(400, f"model x-{n} is unknown, request_id req_{n}f{n}").refusal for n in (1, 22)]
    assert found[0] == found[1] != ""
    others = [refusal(400, "another"), refusal(422, "model x-1 is unknown, request_id req_1f1"), refusal(400, code="c")]
    assert len({found[0], *(one.refusal for one in others)}) == 4
    assert refusal(500).refusal == refusal(401).refusal == ""


def test_silence_and_broken_connections_are_the_providers() -> None:
    deepseek = find_profile("deepseek")
    causes: list[tuple[Exception, Consequence, type[RowError]]] = [
        (httpx2.ReadTimeout("x"), "failed", EngineTimeout),
        (httpx2.ReadError("x"), "failed", EngineFailed),
        (httpx2.ConnectError("x"), "unreachable", EngineFailed),
        (httpx2.ConnectTimeout("x"), "unreachable", EngineFailed),
    ]
    for cause, consequence, kind in causes:
        error = openai.APIConnectionError(request=REQUEST)
        error.__cause__ = cause
        failure = classify_failure(error, deepseek)
        assert (failure.consequence, type(failure.error)) == (consequence, kind)
        assert failure.may_be_billed == (consequence == "failed")
    malformed = classify_failure(MalformedResponse("choices: no"), deepseek)
    assert (malformed.consequence, type(malformed.error)) == ("failed", MalformedResponse)
    assert classify_failure(httpx2.DecodingError("x"), deepseek).consequence == "failed"
    assert classify_failure(TypeError("no JSON"), deepseek).consequence == "row"
    assert isinstance(classify_failure(httpx2.ReadTimeout("x"), deepseek).error, EngineTimeout)
    assert isinstance(classify_failure(httpx2.RemoteProtocolError("x"), deepseek).error, EngineFailed)


def test_no_message_holds_the_key_or_a_long_prompt() -> None:
    learn_secret(KEY)
    assert KEY not in str(refusal(400, "no", code=f"code {KEY}").error)
    told = str(refusal(400, f"key {KEY} may not ask " + "secret prompt " * 100).error)
    assert KEY not in told
    assert "[key]" in told
    assert len(told) < MAX_MESSAGE_CHARACTERS + 50
    assert KEY not in str(classify_failure(MalformedResponse(f"found {KEY}"), find_profile("deepseek")).error)
    assert shorten("a\n b") == "a b"


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
