"""Calls that end without a usage: those that a provider may bill are named, with what they could cost at most."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moebeam.model_runner.openai_engine import concurrency
from moebeam.model_runner.openai_engine.endpoint import RetryPolicy
from moebeam.model_runner.openai_engine.options import FallbackSection
from moebeam.model_runner.openai_engine.runner import load_openai_runner
from moebeam.schemas.records import Completion, Message, Request, Sampling
from tests.support.engine_configs import engine_config
from tests.support.fake_endpoint import Call, FakeEndpoint, Reply, deepseek, error, with_usage
from tests.support.local_servers import free_port

FAST = RetryPolicy(first_wait_s=0.001, max_wait_s=0.002, max_overload_wait_s=0.002)
GOOD = Reply(deepseek("fine"))


@pytest.fixture(autouse=True)
def _folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(concurrency, "host_folder", lambda: tmp_path)


def asked(base_url: str, **values: Any) -> tuple[Completion, dict[str, float]]:
    given: dict[str, Any] = {"provider": "vllm", "base_url": base_url, "max_retries": 5, "timeout_s": 0.3}
    runner = load_openai_runner(engine_config("openai", "", "m", "r", **(given | values)), FAST)
    request = Request("r0", np.arange(7, dtype=np.int32), (Message("user", "q"),), Sampling(100))
    (completion,) = runner.generate([request])
    return completion, dict(runner.counters())


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
    found, counters = asked(f"http://127.0.0.1:{free_port()}/v1", max_retries=1)
    assert found.error is not None and found.lost_calls == ()
    assert "num_lost_calls" not in counters


def test_a_failure_names_all_its_calls_also_those_to_the_provider_before() -> None:
    with FakeEndpoint(lambda call: Reply(b"no")) as one, FakeEndpoint(lambda call: Reply(fault="disconnect")) as other:
        fallbacks = (FallbackSection(provider="sglang", base_url=other.base_url),)
        found, counters = asked(one.base_url, max_retries=1, fallbacks=fallbacks)
    assert found.error is not None
    assert [call.provider for call in found.lost_calls] == ["vllm", "vllm", "sglang", "sglang"]
    assert counters["num_lost_calls"] == 4


def test_an_answer_without_a_usage_is_a_call_that_may_be_billed() -> None:
    with FakeEndpoint(lambda call: Reply(with_usage(deepseek("fine"), None))) as served:
        found, _ = asked(served.base_url)
    assert found.error is not None and "does not say what this answer cost" in str(found.error)
    assert [call.error_type for call in found.lost_calls] == ["engine_failed"]
