"""The vectors of DeepSeek's own V4 encoder, read in place."""

# ruff: noqa: RUF001 - the bars of the wire format are U+FF5C

import json

import pytest

from moebeam.model_runner.encoding.deepseek.deepseek_v4 import DeepSeekV4
from moebeam.schemas.chat_options import ChatOptions, parse_tools
from moebeam.transforms.render.chat_messages import parse_messages
from tests.support.paths import SHARED

VECTORS = SHARED / "conformance" / "deepseek_v4_encoding"

pytestmark = [
    pytest.mark.conformance,
    pytest.mark.skipif(not VECTORS.is_dir(), reason="../shared/conformance is not there"),
]


def expected(number: int) -> str:
    return (VECTORS / f"test_output_{number}.txt").read_text(encoding="utf-8")


def given(number: int) -> object:
    return json.loads((VECTORS / f"test_input_{number}.json").read_text(encoding="utf-8"))


def test_tools_and_results_become_the_expected_prompt() -> None:
    case = given(1)
    assert isinstance(case, dict)
    options = ChatOptions(tools=parse_tools(case["tools"]), thinking=True)
    assert DeepSeekV4().render(parse_messages(case["messages"]), options) == expected(1)


def test_tools_on_the_first_message_give_the_same_prompt() -> None:
    case = given(1)
    assert isinstance(case, dict)
    case["messages"][0]["tools"] = case["tools"]
    assert DeepSeekV4().render(parse_messages(case["messages"]), ChatOptions(thinking=True)) == expected(1)


def test_reasoning_of_earlier_turns_is_dropped_as_expected() -> None:
    assert DeepSeekV4().render(parse_messages(given(2)), ChatOptions(thinking=True)) == expected(2)


def test_answers_of_the_vectors_are_read_back() -> None:
    prompt = expected(1)
    marker = "<｜Assistant｜><think>"
    first = prompt.index(marker) + len(marker)
    answer = DeepSeekV4().parse(
        prompt[first : prompt.index("<｜User｜>", first)], starts_in_reasoning=True, has_tools=True
    )
    assert answer.error is None
    assert answer.content == ""
    assert answer.reasoning_content is not None and answer.reasoning_content.endswith("the get_weather tool.")
    assert [(call.id, call.name, json.loads(call.arguments)) for call in answer.tool_calls] == [
        ("call_0", "get_weather", {"location": "Beijing", "unit": "celsius"})
    ]
    last = DeepSeekV4().parse(prompt[prompt.rindex(marker) + len(marker) :], starts_in_reasoning=True, has_tools=True)
    assert last.content.endswith("45% humidity.")
    assert last.tool_calls == ()
