"""Requests as bodies, each provider's way."""

import json
import logging
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from moebeam.model_runner.openai_engine import request_body
from moebeam.model_runner.openai_engine.profiles import find_profile
from moebeam.model_runner.openai_engine.request_body import ChatBody, chat_body
from moebeam.model_runner.seeds import derive_sent_seed
from moebeam.schemas.chat_options import ChatOptions, ResponseFormat, Tool, ToolChoice
from moebeam.schemas.errors import InvalidSampling, RequestRefused
from moebeam.schemas.records import Message, Request, Sampling

SCHEMA: Any = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
STRICT: Any = {
    "name": "look",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"q": {"type": "string"}},
        "required": ["q"],
        "additionalProperties": False,
    },
}


@pytest.fixture(autouse=True)
def forget_what_was_told() -> None:
    request_body._warn_once.cache_clear()


def request(tenant: str = "", sampling: Sampling | None = None, **options: Any) -> Request:
    messages = (Message("system", "Be brief."), Message("user", "How many?"))
    return Request(
        "r",
        np.arange(3, dtype=np.int32),
        messages,
        sampling or Sampling(50),
        tenant=tenant,
        options=ChatOptions(**options),
    )


def body(provider: str, wanted: Request, model: str = "deepseek-v4-flash", *, is_stream: bool = False) -> ChatBody:
    return chat_body(wanted, find_profile(provider), model, is_stream=is_stream)


def test_plain_request_says_no_more_than_it_needs() -> None:
    assert body("deepseek", request()).fields == {
        "model": "deepseek-v4-flash",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How many?"}],
        "max_tokens": 50,
        "temperature": 0.0,
    }


def test_messages_keep_their_further_fields() -> None:
    wanted = Request(
        "r",
        np.arange(3, dtype=np.int32),
        (Message("assistant", "", {"tool_calls": [], "reasoning_content": "hm"}), Message("tool", "4", {"x": 1})),
        Sampling(5),
    )
    assert body("vllm", wanted).fields["messages"] == [
        {"role": "assistant", "content": "", "tool_calls": [], "reasoning_content": "hm"},
        {"role": "tool", "content": "4", "x": 1},
    ]


@pytest.mark.parametrize(
    ("provider", "expected"),
    [
        ("deepseek", {"thinking": {"type": "disabled"}}),
        ("volcano", {"thinking": {"type": "disabled"}}),
        ("alibaba", {"enable_thinking": False}),
        ("vllm", {"chat_template_kwargs": {"thinking": False}}),
        ("openai", {}),
    ],
)
def test_thinking_is_switched_the_providers_way(provider: str, expected: dict[str, Any]) -> None:
    plain = body(provider, request()).fields
    switched = body(provider, request(thinking=False)).fields
    assert {name: value for name, value in switched.items() if name not in plain} == expected


@pytest.mark.parametrize(
    ("provider", "expected"),
    [
        ("deepseek", {"thinking": {"type": "disabled"}}),
        ("volcano", {"thinking": {"type": "disabled"}}),
        ("alibaba", {"enable_thinking": False}),
        ("vllm", {"chat_template_kwargs": {"thinking": False}, "reasoning_effort": "none"}),
        ("openai", {"reasoning_effort": "none"}),
    ],
)
def test_effort_none_switches_thinking_off_where_there_is_a_switch(provider: str, expected: dict[str, Any]) -> None:
    plain = body(provider, request()).fields
    for wanted in (request(reasoning_effort="none"), request(reasoning_effort="none", thinking=True)):
        sent = body(provider, wanted).fields
        assert {name: sent[name] for name in sent if name not in plain} == expected
    assert find_profile("alibaba").find_refusal("reasoning_effort", "none") is None
    assert find_profile("alibaba").find_refusal("reasoning_effort", "low") is not None


def test_text_parts_are_sent_as_they_came_or_joined_as_the_provider_joins_them() -> None:
    wanted = replace(request(), messages=(Message.of_parts("user", ["a", "b"], {}), Message("user", "c")))
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert [message["content"] for message in body("vllm", wanted).fields["messages"]] == [parts, "c"]
    assert [message["content"] for message in body("deepseek", wanted).fields["messages"]] == ["a\n\nb", "c"]


def test_effort_is_mapped_as_the_model_knows_it() -> None:
    assert body("deepseek", request(thinking=True, reasoning_effort="xhigh")).fields["reasoning_effort"] == "high"
    assert body("openai", request(reasoning_effort="xhigh"), "gpt").fields["reasoning_effort"] == "xhigh"
    assert "reasoning_effort" not in body("deepseek", request(thinking=False, reasoning_effort="high")).fields
    with pytest.raises(InvalidSampling, match="reasoning_effort"):
        body("deepseek", request(reasoning_effort="gigantic"))


def test_schema_goes_into_the_prompt_where_the_provider_takes_none() -> None:
    wanted = request(response_format=ResponseFormat("json_schema", SCHEMA))
    fields = body("deepseek", wanted).fields
    assert fields["response_format"] == {"type": "json_object"}
    system = fields["messages"][0]["content"]
    assert system.startswith("Be brief.\n\n")
    assert json.dumps(SCHEMA) in system
    assert "JSON" in system


def test_schema_that_the_prompt_holds_already_is_not_put_there_twice() -> None:
    wanted = Request(
        "r",
        np.arange(3, dtype=np.int32),
        (Message("system", f"Keep {json.dumps(SCHEMA)}"), Message("user", "?")),
        Sampling(5),
        options=ChatOptions(response_format=ResponseFormat("json_schema", SCHEMA)),
    )
    assert body("deepseek", wanted).fields["messages"][0]["content"] == f"Keep {json.dumps(SCHEMA)}"


def test_schema_is_sent_where_the_provider_takes_one() -> None:
    fields = body("vllm", request(response_format=ResponseFormat("json_schema", SCHEMA))).fields
    assert fields["response_format"] == {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}
    assert fields["messages"][0]["content"] == "Be brief."


def test_strict_tools_go_to_the_address_for_them_only_where_the_provider_can_take_them() -> None:
    strict = body("deepseek", request(tools=(Tool("look", STRICT),)))
    assert strict.is_strict
    assert strict.fields["tools"][0]["function"]["strict"] is True
    loose_document: Any = {**STRICT, "parameters": {**STRICT["parameters"], "required": []}}
    loose = body("deepseek", request(tools=(Tool("look", loose_document),)))
    assert not loose.is_strict
    assert "strict" not in loose.fields["tools"][0]["function"]
    assert "strict" not in body("volcano", request(tools=(Tool("look", STRICT),))).fields["tools"][0]["function"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [({"q": "ü", "n": 1}, '{"q": "ü", "n": 1}'), ('{"q":1}', '{"q":1}'), (None, "{}"), ({}, "{}")],
)
def test_arguments_of_an_earlier_call_are_sent_as_json_text(arguments: Any, text: str) -> None:
    calls: Any = [{"id": "c", "type": "function", "function": {"name": "look", "arguments": arguments}}]
    asked = replace(request(), messages=(Message("assistant", "", {"tool_calls": calls}),))
    (message,) = chat_body(asked, find_profile("vllm"), "m", is_stream=False).fields["messages"]
    assert message["tool_calls"] == [{"id": "c", "type": "function", "function": {"name": "look", "arguments": text}}]


def test_choice_of_tools_is_sent_in_its_documented_form() -> None:
    tools = (Tool("look", STRICT),)
    named = body("vllm", request(tools=tools, tool_choice=ToolChoice("named", "look"), parallel_tool_calls=False))
    assert named.fields["tool_choice"] == {"type": "function", "function": {"name": "look"}}
    assert named.fields["parallel_tool_calls"] is False
    assert body("vllm", request(tools=tools, tool_choice=ToolChoice("required"))).fields["tool_choice"] == "required"
    assert "tool_choice" not in body("vllm", request(tools=tools)).fields


def test_what_the_provider_does_not_take_is_not_sent_and_told_once(caplog: pytest.LogCaptureFixture) -> None:
    wanted = request(sampling=Sampling(5, seed=7, min_p=0.1, top_p=0.9))
    with caplog.at_level(logging.WARNING):
        first, *_ = (body("deepseek", wanted).fields for _ in range(3))
    assert "seed" not in first
    assert "min_p" not in first
    assert first["top_p"] == 0.9
    assert [record.getMessage() for record in caplog.records] == [
        "deepseek takes no seed: it is not sent",
        "deepseek takes no min_p: it is not sent",
    ]
    assert body("vllm", wanted).fields["seed"] == 7
    sampled = request(sampling=Sampling(5, temperature=1.0, seed=7))
    assert body("vllm", sampled).fields["seed"] == derive_sent_seed(sampled), "the row's own"


def test_penalties_and_likely_tokens_are_sent_where_they_are_asked_for() -> None:
    sampling = Sampling(5, logprobs=True, top_logprobs=3, frequency_penalty=0.5, presence_penalty=-1.0)
    found = body("openai", request(sampling=sampling)).fields
    asked = {"logprobs": True, "top_logprobs": 3, "frequency_penalty": 0.5, "presence_penalty": -1.0}
    assert {name: found[name] for name in asked} == asked
    assert not asked.keys() & body("openai", request()).fields.keys()
    with pytest.raises(RequestRefused, match=r"presence_penalty: siliconflow takes none, found -1\.0"):
        body("siliconflow", request(sampling=Sampling(5, presence_penalty=-1.0)))


@pytest.mark.parametrize(
    ("provider", "tier", "expected"),
    [
        ("openai", "flex", {"service_tier": "flex"}),
        ("openai", "default", {"service_tier": "default"}),
        ("openai", None, {}),
        ("deepseek", "auto", {}),
        ("fireworks", "priority", {"service_tier": "priority"}),
        ("fireworks", "default", {}),
    ],
)
def test_a_service_tier_is_sent_to_providers_that_have_it(provider: str, tier: Any, expected: dict[str, str]) -> None:
    found = body(provider, request(service_tier=tier)).fields
    assert {name: value for name, value in found.items() if name == "service_tier"} == expected


@pytest.mark.parametrize(("provider", "tier"), [("deepseek", "flex"), ("vllm", "priority"), ("azure", "flex")])
def test_a_tier_that_the_provider_does_not_have_refuses_the_request(provider: str, tier: Any) -> None:
    with pytest.raises(RequestRefused, match=rf"service_tier: expected .*which {provider} has, found '{tier}'"):
        body(provider, request(service_tier=tier))


def test_more_stop_strings_than_the_provider_takes_refuse_the_request() -> None:
    fits = request(sampling=Sampling(5, stop=tuple("abcd")))
    assert body("volcano", fits).fields["stop"] == ["a", "b", "c", "d"]
    with pytest.raises(RequestRefused, match=r"stop: volcano takes at most 4 stop strings, found 5"):
        body("volcano", request(sampling=Sampling(5, stop=tuple("abcde"))))


def test_tenants_are_told_apart_without_being_named() -> None:
    one, same, other = (body("deepseek", request(tenant=name)).fields["user_id"] for name in ("acme", "acme", "zeta"))
    assert one == same != other
    assert "acme" not in one
    assert "user_id" not in body("deepseek", request()).fields
    assert body("vllm", request(tenant="acme")).fields["cache_salt"] == one


def test_stream_asks_for_its_usage() -> None:
    assert body("alibaba", request(), is_stream=True).fields["stream_options"] == {"include_usage": True}
