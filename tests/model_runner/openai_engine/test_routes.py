"""Requests for other models than the job's, and the tiers in which they are answered."""

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moebeam.model_runner.openai_engine import concurrency
from moebeam.model_runner.openai_engine.options import FallbackSection, RouteSection
from moebeam.model_runner.openai_engine.prefix_gate import PrefixGate, WarmPrefixes
from moebeam.model_runner.openai_engine.runner import OpenAIRunner, load_openai_runner
from moebeam.schemas.chat_options import ChatOptions
from moebeam.schemas.errors import RequestRefused
from moebeam.schemas.records import Completion, Message, Request, Sampling
from tests.support.engines.engine_configs import engine_config
from tests.support.servers.fake_endpoint import Call, FakeEndpoint, Reply, deepseek, error


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    for name in ("DEEPSEEK_API_KEY", "OPENAI_API_KEY", "ROUTE_KEY"):
        monkeypatch.setenv(name, f"key of {name}")
    monkeypatch.setattr(concurrency, "host_folder", lambda: tmp_path)
    yield
    gc.collect()


def request(name: str, num_shared: int = 0, **options: Any) -> Request:
    token_ids = np.append(np.zeros(num_shared, dtype=np.int32), np.int32(len(name))).astype(np.int32)
    return Request(name, token_ids, (Message("user", name),), Sampling(9), options=ChatOptions(**options))


def load(served: FakeEndpoint, **values: Any) -> OpenAIRunner:
    given = {"provider": "deepseek", "base_url": served.base_url, "max_retries": 0}
    loaded = load_openai_runner(engine_config("openai", "", "m", "rev", **(given | values)))
    assert isinstance(loaded, OpenAIRunner)
    return loaded


def answers(runner: OpenAIRunner, *requests: Request) -> dict[str, Completion]:
    return {completion.request_id: completion for completion in runner.generate(requests)}


def test_each_model_is_asked_where_its_route_says() -> None:
    with (
        FakeEndpoint(lambda call: Reply(deepseek("one", model=""))) as one,
        FakeEndpoint(lambda call: Reply(deepseek("two", model=""))) as two,
    ):
        elsewhere = RouteSection(name="c", provider="openai", base_url=two.base_url, api_key_variable="ROUTE_KEY")
        runner = load(one, routes=(RouteSection(name="b"), elsewhere))
        found = answers(runner, request("own"), request("same", model="b"), request("other", model="c"))
    assert {name: (c.text, c.provider, c.model) for name, c in found.items()} == {
        "own": ("one", "deepseek", "m"),
        "same": ("one", "deepseek", "b"),
        "other": ("two", "openai", "c"),
    }
    assert sorted(call.body["model"] for call in one.calls) == ["b", "m"]
    assert [(call.body["model"], call.headers["authorization"]) for call in two.calls] == [
        ("c", "Bearer key of ROUTE_KEY")
    ]


def test_fallbacks_are_of_the_jobs_model_alone() -> None:
    def refuse(call: Call) -> Reply:
        return error(400, "bad parameter") if call.body["model"] == "b" else Reply(deepseek("fine"))

    with FakeEndpoint(refuse) as one, FakeEndpoint(lambda call: Reply(deepseek("fallback"))) as two:
        fallback = FallbackSection(provider="openai", base_url=two.base_url)
        runner = load(one, routes=(RouteSection(name="b"),), fallbacks=(fallback,))
        found = answers(runner, request("routed", model="b"))
        assert isinstance(found["routed"].error, RequestRefused)
        assert two.calls == []


@pytest.mark.parametrize(
    ("asked", "served", "mode"),
    [
        (None, None, "online"),
        ("flex", None, "flex"),
        ("priority", "priority", "priority"),
        ("flex", "default", "online"),
        ("priority", "standard", "online"),
        ("auto", "priority", "priority"),
        (None, "default", "online"),
    ],
)
def test_the_tier_that_served_decides_the_price(asked: Any, served: str | None, mode: str) -> None:
    answer = {**deepseek("fine"), "service_tier": served}
    with FakeEndpoint(lambda call: Reply(answer)) as endpoint:
        found = answers(load(endpoint, provider="openai"), request("r", service_tier=asked))
    assert found["r"].price_mode == mode


def test_a_tier_that_the_provider_lacks_is_the_requests_own_failure() -> None:
    with FakeEndpoint(lambda call: Reply(deepseek("fine"))) as endpoint:
        found = answers(load(endpoint), request("bad", service_tier="flex"), request("good"))
        assert len(endpoint.calls) == 1
    assert isinstance(found["bad"].error, RequestRefused)
    assert "which deepseek has" in str(found["bad"].error)
    assert found["good"].error is None


def test_requests_of_two_models_do_not_wait_for_each_others_prefix() -> None:
    gate = PrefixGate(num_leaders=1, min_prefix_tokens=4, warm=WarmPrefixes())
    first, second = request("a", 8), request("bb", 8, model="b")
    assert gate.offer(first) == [first]
    assert gate.offer(second) == [second]
    third = request("ccc", 8, model="b")
    assert gate.offer(third) == []
    assert gate.finish("bb") == [third]
