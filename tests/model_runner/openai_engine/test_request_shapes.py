"""Requests in the shape that the documents of further providers describe: address, key, and fields of their own."""

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moebeam.model_runner.openai_engine import concurrency
from moebeam.model_runner.openai_engine.profiles import find_profile
from moebeam.model_runner.openai_engine.runner import OpenAIRunner, load_openai_runner
from moebeam.schemas.chat_options import ChatOptions, ResponseFormat
from moebeam.schemas.errors import EngineLoadError
from moebeam.schemas.records import Completion, Message, Request, Sampling
from tests.support.engines.engine_configs import engine_config
from tests.support.servers.fake_endpoint import Call, FakeEndpoint, Reply, deepseek

KEY = "key-test-0123456789"


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    for name in ("openrouter", "siliconflow", "fireworks", "together", "azure", "deepseek"):
        monkeypatch.setenv(find_profile(name).api_key_variable, KEY)
    monkeypatch.setattr(concurrency, "host_folder", lambda: tmp_path)
    yield
    gc.collect()


def asked(
    provider: str, path: str = "/v1", answer: Any = None, sampling: Sampling | None = None, **options: Any
) -> tuple[Call, Completion]:
    """The call that one request becomes, and what is made of its answer."""
    request = Request(
        "r",
        np.arange(3, dtype=np.int32),
        (Message("user", "hi"),),
        sampling or Sampling(9),
        tenant="acme",
        options=ChatOptions(**options),
    )
    with FakeEndpoint(lambda call: Reply(answer or deepseek("fine"))) as served:
        address = served.base_url.removesuffix("/v1") + path
        config = engine_config("openai", "", "m", "rev", provider=provider, base_url=address, max_retries=0)
        loaded = load_openai_runner(config)
        assert isinstance(loaded, OpenAIRunner)
        (completion,) = loaded.generate([request])
    assert completion.error is None
    (call,) = served.calls
    return call, completion


@pytest.mark.parametrize("provider", ["openrouter", "siliconflow", "fireworks", "together"])
def test_the_key_is_a_bearers_token_and_the_path_openais(provider: str) -> None:
    call, completion = asked(provider)
    assert call.path == "/v1/chat/completions"
    assert call.headers["authorization"] == f"Bearer {KEY}"
    assert "api-key" not in call.headers
    assert call.body["model"] == "m"
    assert call.body["max_tokens"] == 9
    assert completion.provider == provider


def test_azures_key_has_a_header_of_its_own_and_its_address_names_the_resource() -> None:
    call, completion = asked("azure", "/openai/v1")
    assert call.path == "/openai/v1/chat/completions"
    assert call.headers["api-key"] == KEY
    assert "authorization" not in call.headers
    assert (call.body["model"], call.body["max_completion_tokens"]) == ("m", 9)
    assert completion.provider == "azure"
    assert find_profile("azure").base_url is None


def test_azures_older_addresses_keep_their_api_version() -> None:
    call, _ = asked("azure", "/openai/deployments/m?api-version=2024-10-21")
    assert call.path == "/openai/deployments/m/chat/completions?api-version=2024-10-21"
    with pytest.raises(EngineLoadError, match="expected an address without credentials"):
        load_openai_runner(engine_config("openai", "", "m", provider="deepseek", base_url="http://h/v1?api-version=1"))


def test_openrouter_asks_only_providers_that_take_every_option() -> None:
    call, completion = asked(
        "openrouter",
        answer={**deepseek("fine"), "service_tier": "default"},
        thinking=True,
        service_tier="flex",
        sampling=Sampling(9, 0.5, seed=7, min_p=0.1),
    )
    assert call.body["provider"] == {"require_parameters": True}
    assert call.body["reasoning"] == {"enabled": True}
    assert (call.body["service_tier"], call.body["min_p"]) == ("flex", 0.1)
    assert call.body["seed"] not in (7, None), "the row's own"
    assert completion.price_mode == "online"


def test_siliconflow_switches_thinking_as_alibaba_does() -> None:
    usage = {"prompt_tokens": 15, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 4}}
    call, completion = asked("siliconflow", answer={**deepseek("fine"), "usage": usage}, thinking=False)
    assert call.body["enable_thinking"] is False
    assert completion.usage.cached_tokens == 4


def test_fireworks_has_a_priority_tier_and_keeps_tenants_apart() -> None:
    call, completion = asked("fireworks", service_tier="priority")
    assert call.body["service_tier"] == "priority"
    assert call.body["prompt_cache_isolation_key"] not in ("", "acme")
    assert completion.price_mode == "priority"


def test_a_schema_is_sent_to_those_that_take_one() -> None:
    wanted = ResponseFormat("json_schema", {"type": "object"})
    for provider in ("openrouter", "fireworks", "together", "azure"):
        call, _ = asked(provider, response_format=wanted)
        assert call.body["response_format"]["type"] == "json_schema"
    call, _ = asked("siliconflow", response_format=wanted)
    assert call.body["response_format"] == {"type": "json_object"}
