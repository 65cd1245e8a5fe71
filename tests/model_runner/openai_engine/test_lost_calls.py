"""Calls that end without a usage: those that a provider may bill are named, with what they could cost at most."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moebeam.model_runner.openai_engine import concurrency
from moebeam.model_runner.openai_engine.options import FallbackSection
from moebeam.model_runner.openai_engine.runner import load_openai_runner
from moebeam.schemas.errors import EngineFailed, EngineUnavailable, RequestGivenUp
from moebeam.schemas.records import Completion, Message, Request, Sampling, Usage
from tests.support.engines.engine_configs import engine_config
from tests.support.engines.remote_engines import FAST, brief
from tests.support.servers.fake_endpoint import Call, FakeEndpoint, Reply, deepseek, error, with_usage
from tests.support.servers.local_servers import free_port

GOOD = Reply(deepseek("fine"))


@pytest.fixture(autouse=True)
def _folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(concurrency, "host_folder", lambda: tmp_path)


def asked(base_url: str, **values: Any) -> tuple[Completion, dict[str, float]]:
    given: dict[str, Any] = {"provider": "vllm", "base_url": base_url, "max_retries": 5, "timeout_s": 0.3}
    outages = values.pop("outages", brief())
    runner = load_openai_runner(engine_config("openai", "", "m", "r", **(given | values)), FAST, outages)
    request = Request("r0", np.arange(7, dtype=np.int32), (Message("user", "q"),), Sampling(100))
    found: list[Completion] = []
    try:
        found.extend(runner.generate([request]))
    except EngineUnavailable:
        found = found or [Completion.from_error("r0", EngineFailed("no completion"))]
    return found[0], dict(runner.counters())


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        (Reply(fault="silence"), "engine_timeout"),
        (Reply(deepseek(), fault="disconnect"), "engine_failed"),
        (Reply(deepseek(), fault="half_body"), "engine_failed"),
        (Reply(b"no json"), "malformed_response"),
        (Reply({"choices": []}), "malformed_response"),
        (error(502), "engine_failed"),
        (error(504), "engine_failed"),
        (error(500), None),
        (error(429), None),
        (error(503), None),
    ],
)
@pytest.mark.parametrize("mode", ["plain", "stream"])
def test_a_call_is_lost_where_the_provider_may_have_answered_it(reply: Reply, kind: str | None, mode: str) -> None:
    events: list[Any] = [{"choices": [{"delta": {"content": "fine"}, "finish_reason": "stop"}]}, "data: [DONE]"]
    usage = {"choices": [], "usage": deepseek()["usage"]}

    def replied(call: Call) -> Reply:
        if call.number == 0:
            return reply
        return GOOD if mode == "plain" else Reply(events=[events[0], usage, events[1]])

    with FakeEndpoint(replied) as served:
        found, counters = asked(served.base_url, mode=mode)
    assert found.error is None and found.text == "fine"
    assert [call.error_type for call in found.lost_calls] == ([kind] if kind else [])
    for call in found.lost_calls:
        assert (call.provider, call.model, call.prompt_tokens, call.max_output_tokens) == ("vllm", "m", 7, 100)
        assert call.started_at < found.started_at
    assert counters.get("num_lost_calls", 0) == len(found.lost_calls)


def test_nothing_is_lost_where_nobody_was_reached() -> None:
    found, counters = asked(f"http://127.0.0.1:{free_port()}/v1", outages=brief(0.1))
    assert found.error is not None and found.lost_calls == ()
    assert "num_lost_calls" not in counters


def test_a_request_that_is_given_up_names_all_its_calls_to_whatever_provider() -> None:
    with FakeEndpoint(lambda call: Reply(b"no")) as one, FakeEndpoint(lambda call: Reply(fault="disconnect")) as other:
        fallbacks = (FallbackSection(provider="sglang", base_url=other.base_url),)
        found, counters = asked(one.base_url, outages=brief(0.1), fallbacks=fallbacks)
        num_calls = Counter({"vllm": len(one.calls), "sglang": len(other.calls)})
    assert isinstance(found.error, RequestGivenUp)
    assert Counter(call.provider for call in found.lost_calls) == num_calls
    assert counters["num_lost_calls"] == sum(num_calls.values())


@pytest.mark.parametrize("mode", ["plain", "stream"])
def test_an_answer_without_a_usage_is_an_answer_and_no_lost_call(mode: str) -> None:
    events = [{"choices": [{"delta": {"content": "five words of some text"}, "finish_reason": "stop"}]}, "data: [DONE]"]
    whole = Reply(with_usage(deepseek("five words of some text"), None))
    with FakeEndpoint(lambda call: whole if mode == "plain" else Reply(events=events)) as served:
        found, counters = asked(served.base_url, mode=mode)
        assert len(served.calls) == 1
    assert (found.error, found.text, found.lost_calls) == (None, "five words of some text", ())
    assert found.usage == Usage(None, None).with_estimates(7, 6)
    assert "num_lost_calls" not in counters


def test_an_unknown_word_for_the_end_is_counted_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    with FakeEndpoint(lambda call: Reply(deepseek("fine", finish_reason="fed_up"))) as served:
        found, counters = asked(served.base_url)
        asked(served.base_url)
    assert (found.error, found.finish_reason, found.provider_finish_reason) == (None, "stop", "fed_up")
    assert counters["num_unknown_finish_reasons"] == 1
    assert [record.message for record in caplog.records if "fed_up" in record.message] == [
        "vllm: finish_reason 'fed_up' is not known and counts as stop"
    ]


def test_an_answer_that_the_provider_gave_up_without_a_usage_is_a_lost_call_and_asked_again() -> None:
    given_up = Reply(with_usage(deepseek("half", finish_reason="aborted"), None))
    with FakeEndpoint(lambda call: given_up if call.number == 0 else GOOD) as served:
        found, _ = asked(served.base_url)
    assert (found.error, found.text) == (None, "fine")
    assert [call.error_type for call in found.lost_calls] == ["answer_interrupted"]
