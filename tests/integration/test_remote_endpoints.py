"""The `openai` engine against aimock, which is not ours, and under loads that take a while."""

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moebeam.model_runner.openai_engine.endpoint import RetryPolicy
from moebeam.model_runner.openai_engine.outages.circuit import OutagePolicy
from moebeam.model_runner.openai_engine.runner import OpenAIRunner, load_openai_runner
from moebeam.schemas.errors import EngineOverloaded
from moebeam.schemas.records import Message, Request, Sampling, ToolCall, Usage
from tests.support.engines.engine_configs import engine_config
from tests.support.engines.remote_engines import brief
from tests.support.servers.aimock_server import Aimock
from tests.support.servers.fake_endpoint import Call, FakeEndpoint, Reply, deepseek

pytestmark = pytest.mark.integration

NUM_REQUESTS = 10_000
CHAOS = {"drop": 0.05, "malformed": 0.05, "ratelimit": 0.05, "disconnect": 0.02}
USAGE = {"prompt_tokens": 11, "completion_tokens": 3, "total_tokens": 14}


def fixture(words: str, **response: Any) -> Mapping[str, Any]:
    return {"match": {"userMessage": words}, "response": {"usage": USAGE, "model": "mock", **response}}


def requests(num: int, words: str = "question") -> Iterator[Request]:
    for i in range(num):
        yield Request(f"r{i}", np.array([i], dtype=np.int32), (Message("user", f"{words} {i}"),), Sampling(50))


def runner(base_url: str, outages: OutagePolicy | None = None, **values: Any) -> OpenAIRunner:
    config = engine_config("openai", "", "mock", "r", provider="sglang", base_url=base_url, **values)
    loaded = load_openai_runner(config, RetryPolicy(first_wait_s=0.05), outages)
    assert isinstance(loaded, OpenAIRunner)
    return loaded


@pytest.mark.parametrize("mode", ["plain", "stream"])
def test_aimock_answers_are_read_whole_and_in_pieces(tmp_path: Path, mode: str) -> None:
    call = {"name": "look", "arguments": {"q": "x"}}
    fixtures = [
        fixture("question", content="an answer that comes in several pieces", finishReason="stop"),
        fixture("tool", toolCalls=[call], finishReason="tool_calls"),
        fixture("why", content="so", reasoning="because", finishReason="length"),
    ]
    with Aimock(tmp_path, fixtures) as served:
        # A prompt that no fixture fits gets a 503, though others are answered.
        asking = runner(served.base_url, brief(1.0), mode=mode, max_retries=0)
        (plain,) = asking.generate(requests(1))
        (tool,) = asking.generate(requests(1, "tool"))
        (why,) = asking.generate(requests(1, "why"))
        (unknown,) = asking.generate(requests(1, "nothing fits"))
    assert (plain.text, plain.usage) == ("an answer that comes in several pieces", Usage(11, 3, None, 0))
    ((name, arguments),) = [(found.name, found.arguments) for found in tool.tool_calls]
    assert (name, arguments.replace(" ", ""), tool.finish_reason) == ("look", '{"q":"x"}', "tool_calls")
    assert (why.text, why.reasoning_content, why.finish_reason) == ("so", "because", "length")
    assert isinstance(tool.tool_calls[0], ToolCall)
    assert isinstance(unknown.error, EngineOverloaded)


def test_ten_thousand_requests_through_chaos_are_all_answered_or_typed_failures(tmp_path: Path) -> None:
    with Aimock(tmp_path, [fixture("question", content="answer")], CHAOS) as served:
        asking = runner(served.base_url)
        found = list(asking.generate(requests(NUM_REQUESTS)))
    assert Counter(c.request_id for c in found) == Counter(f"r{i}" for i in range(NUM_REQUESTS))
    answered = [c for c in found if c.error is None]
    assert {c.text for c in answered} == {"answer"}
    assert {c.usage for c in answered} == {Usage(11, 3, None, 0)}
    assert all(c.usage == Usage(0, 0, 0) for c in found if c.error is not None)
    assert len(answered) == NUM_REQUESTS, "none of the failures is a row's own"
    counters = asking.counters()
    for kind in ("engine_failed", "malformed_response", "engine_overloaded"):
        assert counters[f"num_{kind}"] > NUM_REQUESTS * 0.03
    failed = sum(counters[f"num_{kind}"] for kind in ("engine_failed", "malformed_response", "engine_overloaded"))
    assert counters["num_calls"] == len(answered) + failed


def test_one_process_holds_2500_requests_in_flight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEEPSEEK_API_KEY", "sk-test")

    def reply(call: Call) -> Reply:
        return Reply(deepseek("x"), is_held=call.number > 5500)

    with FakeEndpoint(reply, gather_at=2500) as served:
        config = engine_config("openai", "", "deepseek-v4-flash", "r", provider="deepseek", base_url=served.base_url)
        asking = load_openai_runner(config)
        assert sum(c.error is None for c in asking.generate(requests(10_000))) == 10_000
        assert served.peak_in_flight == asking.counters()["peak_in_flight"] == 2500
