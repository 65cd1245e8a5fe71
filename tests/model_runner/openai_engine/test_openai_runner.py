"""The `openai` engine against an endpoint that answers in the providers' forms and misbehaves as told."""

import gc
import json
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moebeam.model_runner.openai_engine import concurrency
from moebeam.model_runner.openai_engine.options import FallbackSection
from moebeam.model_runner.openai_engine.runner import load_openai_runner
from moebeam.schemas.chat_options import Tool
from moebeam.schemas.errors import (
    AnswerInterrupted,
    ContentRefused,
    EngineFailed,
    EngineLoadError,
    EngineUnavailable,
    RequestRefused,
)
from moebeam.schemas.records import Completion, Message, Request, Sampling, ToolCall, Usage
from tests.support.engines.engine_calls import GOOD, completions, echo, only, requests, runner, script
from tests.support.engines.engine_configs import engine_config
from tests.support.engines.remote_engines import brief
from tests.support.servers.fake_endpoint import (
    ALIBABA_USAGE,
    VLLM_USAGE,
    VOLCANO_USAGE,
    Call,
    FakeEndpoint,
    Reply,
    as_events,
    deepseek,
    error,
    with_usage,
)

KEY = "sk-test-0123456789"


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Keys of every provider, other people's variables, and a folder of its own for what processes share."""
    for name in ("DEEPSEEK_API_KEY", "DASHSCOPE_API_KEY", "ARK_API_KEY", "OPENAI_API_KEY"):
        monkeypatch.setenv(name, KEY)
    for name in ("OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "OPENAI_ADMIN_KEY"):
        monkeypatch.setenv(name, "foreign")
    monkeypatch.setattr(concurrency, "host_folder", lambda: tmp_path)
    yield
    gc.collect()


def test_every_request_gets_its_own_answer() -> None:
    found = completions(echo, requests(50))
    assert {name: c.text for name, c in found.items()} == {f"r{i}": f"question {i}" for i in range(50)}
    assert all(c.error is None for c in found.values())


def test_completion_says_who_served_it() -> None:
    found = only(script(Reply(deepseek(model="deepseek-v4-flash-0731"))))
    assert (found.provider, found.model, found.model_revision) == (
        "deepseek",
        "deepseek-v4-flash",
        "deepseek-v4-flash-0731 fp_deep",
    )
    assert found.usage == Usage(100, 10, 64, 0)
    nameless = only(script(Reply(deepseek(system_fingerprint=None))))
    assert nameless.model_revision == "rev"


@pytest.mark.parametrize("mode", ["plain", "stream"])
@pytest.mark.parametrize(
    ("provider", "usage", "expected"),
    [
        ("deepseek", deepseek()["usage"], Usage(100, 10, 64, 0)),
        ("alibaba", ALIBABA_USAGE, Usage(100, 10, 48, 4)),
        ("volcano", VOLCANO_USAGE, Usage(100, 10, 32, 3)),
        ("vllm", VLLM_USAGE, Usage(100, 10, None, 0)),
        ("sglang", VLLM_USAGE, Usage(100, 10, None, 0)),
    ],
)
def test_each_provider_answers_in_its_own_form(mode: str, provider: str, usage: Any, expected: Usage) -> None:
    calls = [{"id": "c", "type": "function", "function": {"name": "look", "arguments": '{"q": 1}'}}]
    answer = with_usage(deepseek("text", reasoning_content="why", tool_calls=calls), usage)

    def reply(call: Call) -> Reply:
        if call.body.get("stream"):
            return Reply(events=as_events(answer, keep_alives=3))
        return Reply(answer, num_blank_lines=3)

    found = only(reply, provider=provider, mode=mode)
    assert (found.text, found.reasoning_content, found.usage) == ("text", "why", expected)
    assert found.tool_calls == (ToolCall("c", "look", '{"q": 1}'),)
    assert (found.error, found.provider) == (None, provider)


def test_mode_is_the_profiles_where_the_job_does_not_say() -> None:
    with FakeEndpoint(script(Reply(events=as_events(deepseek("x"))))) as served:
        assert next(runner(served, provider="alibaba").generate(requests(1))).text == "x"
        assert served.calls[0].body["stream"] is True
    with FakeEndpoint(echo) as served:
        list(runner(served).generate(requests(1)))
        assert "stream" not in served.calls[0].body


@pytest.mark.parametrize(
    "trouble",
    [
        error(429, retry_after="0"),
        error(503),
        error(500),
        error(502),
        Reply(fault="disconnect"),
        Reply(deepseek("x" * 1000), fault="half_body"),
        Reply(b'{"choices": [{"mess'),
        Reply(b"<html>bad gateway</html>"),
        Reply({"object": "chat.completion"}),
        Reply(deepseek("", hit=0, miss=0, completion=0, finish_reason="insufficient_system_resource")),
        Reply(with_usage(deepseek("", finish_reason="aborted"), None)),
    ],
    ids=lambda trouble: f"{trouble.status}-{trouble.fault}",
)
def test_trouble_that_passes_is_outlived(trouble: Reply) -> None:
    found = only(script(trouble, trouble, GOOD))
    assert (found.text, found.error) == ("fine", None)


@pytest.mark.parametrize(("status", "kind"), [(400, RequestRefused), (422, RequestRefused)])
def test_refused_request_is_asked_once_and_leaves_the_others_alone(status: int, kind: type[Exception]) -> None:
    def reply(call: Call) -> Reply:
        return error(status, "no such thing") if call.last_user_text == "question 3" else echo(call)

    with FakeEndpoint(reply) as served:
        found = {c.request_id: c for c in runner(served).generate(requests(6))}
        assert len(served.calls) == 6
    assert isinstance(found["r3"].error, kind)
    assert "no such thing" in str(found["r3"].error)
    assert [c.error for name, c in found.items() if name != "r3"] == [None] * 5


def test_refusal_of_the_content_filter_is_told_apart() -> None:
    assert isinstance(
        only(lambda call: error(400, code="SensitiveContentDetected"), provider="volcano").error, ContentRefused
    )


@pytest.mark.parametrize("status", [401, 402])
def test_key_or_balance_stops_the_engine_and_makes_no_rejects(status: int) -> None:
    with FakeEndpoint(lambda call: error(status, f"bad key {KEY}")) as served:
        found: list[Completion] = []
        with pytest.raises(EngineUnavailable, match=f"deepseek: HTTP {status}") as stopped:
            found.extend(runner(served).generate(requests(1000)))
        assert found == []
        assert len(served.calls) < 300
    assert KEY not in str(stopped.value)


def test_answers_in_flight_come_out_before_the_engine_stops() -> None:
    def reply(call: Call) -> Reply:
        return error(402) if call.number >= 10 else Reply(deepseek("paid"), delay_s=0.05)

    found: list[Completion] = []
    with FakeEndpoint(reply) as served, pytest.raises(EngineUnavailable):
        for completion in runner(served).generate(requests(200)):
            found.append(completion)
    assert [c.text for c in found] == ["paid"] * 10


def test_failures_with_answers_between_them_lose_no_row() -> None:
    found = completions(lambda call: error(500) if call.number % 2 else GOOD, requests(20), max_concurrency=1)
    assert {c.error for c in found.values()} == {None}


def test_silence_is_a_timeout_while_long_answers_with_signs_of_life_are_not() -> None:
    silent = ["question 0"]

    def reply(call: Call) -> Reply:
        if call.last_user_text in silent:
            silent.remove(call.last_user_text)
            return Reply(fault="silence")
        return Reply(deepseek("late"), delay_s=1.2, num_blank_lines=12)

    found = completions(reply, requests(2), timeout_s=0.6)
    assert [call.error_type for call in found["r0"].lost_calls] == ["engine_timeout"]
    assert (found["r1"].text, found["r1"].lost_calls) == ("late", ())


def test_paid_answer_that_broke_off_comes_out_with_its_usage_and_is_not_asked_again() -> None:
    with FakeEndpoint(script(Reply(deepseek("half", finish_reason="insufficient_system_resource")))) as served:
        (found,) = runner(served).generate(requests(1))
        assert len(served.calls) == 1
    assert isinstance(found.error, AnswerInterrupted)
    assert (found.text, found.usage.completion_tokens) == ("half", 10)


def test_next_provider_answers_what_the_first_cannot() -> None:
    with FakeEndpoint(lambda call: error(401)) as first, FakeEndpoint(echo) as second:
        fallback = FallbackSection(provider="vllm", name="local-flash", base_url=second.base_url)
        found = list(runner(first, fallbacks=(fallback,)).generate(requests(40)))
        assert {(c.provider, c.model, c.error) for c in found} == {("vllm", "local-flash", None)}
        assert {call.body["model"] for call in second.calls} == {"local-flash"}
        assert len(first.calls) < 30


def test_provider_that_is_only_overloaded_is_asked_first_again() -> None:
    def reply(call: Call) -> Reply:
        return error(503) if call.last_user_text == "question 1" else echo(call)

    with FakeEndpoint(reply) as first, FakeEndpoint(echo) as second:
        fallback = FallbackSection(provider="vllm", base_url=second.base_url)
        found = {c.request_id: c for c in runner(first, brief(2.0), fallbacks=(fallback,)).generate(requests(4))}
    assert {name: c.provider for name, c in found.items()} == {
        "r0": "deepseek",
        "r1": "vllm",
        "r2": "deepseek",
        "r3": "deepseek",
    }


def test_request_that_one_provider_refuses_is_not_taken_to_the_next() -> None:
    with FakeEndpoint(lambda call: error(400)) as first, FakeEndpoint(echo) as second:
        (found,) = runner(first, fallbacks=(FallbackSection(provider="vllm", base_url=second.base_url),)).generate(
            requests(1)
        )
        assert (found.provider, type(found.error), len(second.calls)) == ("deepseek", RequestRefused, 0)


def test_engine_stops_when_the_last_provider_is_closed_too() -> None:
    with FakeEndpoint(lambda call: error(401)) as first, FakeEndpoint(lambda call: error(402)) as second:
        fallback = FallbackSection(provider="deepseek", base_url=second.base_url)
        with pytest.raises(EngineUnavailable, match=r"HTTP 401.*HTTP 402"):
            list(runner(first, fallbacks=(fallback,)).generate(requests(5)))


def test_requests_are_pulled_as_places_come_free() -> None:
    num_pulled = 0

    def many() -> Iterator[Request]:
        nonlocal num_pulled
        for one in requests(1000):
            num_pulled += 1
            yield one

    with FakeEndpoint(echo) as served:
        completed = runner(served, max_concurrency=8).generate(many())
        assert num_pulled == 0
        next(completed)
        assert num_pulled <= 8 * 2 + 65
        completed.close()


def test_first_answers_come_out_while_others_are_still_asked() -> None:
    def reply(call: Call) -> Reply:
        return Reply(deepseek("slow"), delay_s=600) if call.number else Reply(deepseek("first"))

    with FakeEndpoint(reply) as served:
        completed = runner(served).generate(requests(5))
        assert next(completed).text == "first"
        completed.close()


def test_threads_share_one_limit() -> None:
    with FakeEndpoint(lambda call: Reply(deepseek("x"), delay_s=0.01)) as served:
        shared = runner(served, max_concurrency=5)
        found: list[Completion] = []
        threads = [threading.Thread(target=lambda: found.extend(shared.generate(requests(30)))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 120
        assert served.peak_in_flight == 5


def test_endpoint_that_takes_few_gets_few_and_all_are_answered() -> None:
    with FakeEndpoint(lambda call: Reply(deepseek("x"), delay_s=0.01), max_in_flight=20) as served:
        asking = runner(served, max_concurrency=500)
        found = list(asking.generate(requests(600)))
        assert all(c.error is None for c in found)
        assert asking.endpoints[0].limit.limit < 100
        assert asking.counters()["num_engine_overloaded"] == served.num_refused > 0


def test_as_many_are_in_flight_as_the_provider_is_known_to_take() -> None:
    with FakeEndpoint(lambda call: Reply(deepseek("x"), is_held=call.number > 400), gather_at=256) as served:
        asking = runner(served, provider="vllm", timeout_s=60)
        assert sum(c.error is None for c in asking.generate(requests(700))) == 700
        assert served.peak_in_flight == asking.counters()["peak_in_flight"] == 256


def test_leaders_of_a_shared_prefix_are_through_before_the_rest_is_sent() -> None:
    in_flight: list[int] = []

    def reply(call: Call) -> Reply:
        in_flight.append(served.num_in_flight)
        return Reply(deepseek("x"), delay_s=0.02)

    with FakeEndpoint(reply) as served:
        list(runner(served).generate(requests(20, shared=200)))
        asked = [call.last_user_text for call in served.calls]
    assert asked[:2] == ["question 0", "question 1"]
    assert in_flight[:3] == [1, 1, 1]
    assert max(in_flight) > 1


def test_key_goes_to_the_provider_and_nowhere_else(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with FakeEndpoint(echo) as served:
        asking = runner(served)
        found = list(asking.generate(requests(2)))
        headers = served.calls[0].headers
    assert headers["authorization"] == f"Bearer {KEY}"
    assert not any("foreign" in value for value in headers.values())
    assert KEY not in caplog.text + repr(found) + repr(asking.config) + repr(asking.endpoints[0].spec)
    assert "question" not in "".join(record.getMessage() for record in caplog.records if record.levelno > logging.DEBUG)


def test_address_without_a_named_provider_gets_no_key_of_openai() -> None:
    with FakeEndpoint(echo) as served:
        list(runner(served, provider=None).generate(requests(1)))
        assert KEY not in served.calls[0].headers["authorization"]


def test_strict_tools_go_to_their_own_address() -> None:
    document: Any = {
        "name": "look",
        "strict": True,
        "parameters": {"type": "object", "properties": {}, "required": [], "additionalProperties": False},
    }
    with FakeEndpoint(echo) as served:
        asking = runner(served)
        list(asking.generate([*requests(1, tools=(Tool("look", document),))]))
        list(asking.generate(requests(1)))
        assert [call.path for call in served.calls] == ["/v1/beta/chat/completions", "/v1/chat/completions"]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"provider": "vllm"}, r"model\.base_url: expected the address of the vllm server"),
        ({"base_url": "ftp://x"}, r"model\.base_url: expected http"),
        ({"base_url": "http://user:word@x/v1"}, "without credentials"),
        ({"provider": "nobody"}, "expected one of alibaba"),
        ({"provider": "deepseek", "api_key_variable": "NOT_THERE"}, "environment variable NOT_THERE"),
        ({"fallbacks": (FallbackSection(provider="vllm"),)}, r"fallbacks\[0\]\.base_url"),
    ],
)
def test_what_is_missing_is_named_before_the_first_call(values: dict[str, Any], expected: str) -> None:
    with pytest.raises(EngineLoadError, match=expected) as refused:
        load_openai_runner(engine_config("openai", "", "m", "r", **values))
    assert "word" not in str(refused.value)


def test_missing_key_names_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DEEPSEEK_API_KEY")
    with pytest.raises(
        EngineLoadError, match="expected the key of deepseek in the environment variable DEEPSEEK_API_KEY"
    ):
        load_openai_runner(engine_config("openai", "", "m", "r", provider="deepseek"))


def test_request_that_cannot_be_sent_is_a_failure_of_its_row() -> None:
    odd: Any = {"y": object()}
    broken = Request("r", np.zeros(1, dtype=np.int32), (Message("user", "x", odd),), Sampling(1))
    with FakeEndpoint(echo) as served:
        (found,) = runner(served).generate([broken])
    assert isinstance(found.error, EngineFailed)
    assert "TypeError" in str(found.error)


def test_body_that_arrives_is_json_without_escapes_of_its_text() -> None:
    with FakeEndpoint(echo) as served:
        wanted = Request("r", np.zeros(1, dtype=np.int32), (Message("user", "über 你好 \U0001f600"),), Sampling(1))
        (found,) = runner(served).generate([wanted])
        assert json.dumps(served.calls[0].body["messages"][0]["content"]) == json.dumps("über 你好 \U0001f600")
    assert found.text == "über 你好 \U0001f600"
