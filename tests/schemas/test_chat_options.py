from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moebeam.schemas.chat_options import (
    ChatOptions,
    ResponseFormat,
    ToolChoice,
    options_json,
    parse_options_json,
    parse_response_format,
    parse_thinking,
    parse_tool_choice,
    parse_tools,
    with_own_values,
)
from moebeam.schemas.errors import InvalidResponseFormat, InvalidSampling, InvalidTools, RowError

WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
TOOLS = parse_tools([WEATHER, {"name": "search"}])

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def test_tools_come_in_openai_form_or_bare() -> None:
    assert [tool.name for tool in TOOLS] == ["weather", "search"]
    assert TOOLS[1].parameters == {"type": "object", "properties": {}, "additionalProperties": False}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("weather", "expected a list of tools"),
        ([1], r"tools\[0\]: expected an object, found 1"),
        ([{"type": "retrieval", "function": {}}], r"tools\[0\]\.type: expected 'function'"),
        ([WEATHER, {"function": {"name": "a b"}}], r"tools\[1\]\.function\.name: expected 1 to 128"),
        ([{"name": "f", "strict": "yes"}], r"tools\[0\]\.strict: expected bool"),
        ([{"name": "f", "parameters": []}], r"tools\[0\]\.parameters"),
        ([WEATHER, WEATHER], r"tools\[1\]\.name: expected every name once"),
        ([{"name": f"f{i}"} for i in range(129)], "expected at most 128 tools, found 129"),
    ],
)
def test_a_wrong_tool_is_named(value: object, message: str) -> None:
    with pytest.raises(InvalidTools, match=message):
        parse_tools(value)


def test_a_choice_is_a_mode_or_a_declared_tool() -> None:
    assert parse_tool_choice({"type": "function", "function": {"name": "search"}}, TOOLS) == ToolChoice(
        "named", "search"
    )
    assert parse_tool_choice("weather", TOOLS) == ToolChoice("named", "weather")
    assert parse_tool_choice("required", TOOLS) == ToolChoice("required")
    with pytest.raises(InvalidTools, match="weather, search"):
        parse_tool_choice("wether", TOOLS)
    with pytest.raises(InvalidTools, match="without any"):
        parse_tool_choice("required", [])


def test_callable_tools_follow_the_choice() -> None:
    options = ChatOptions(tools=TOOLS)
    for mode, names in (("auto", ["weather", "search"]), ("none", []), ("required", ["weather", "search"])):
        found = with_own_values(options, {"tool_choice": mode}).callable_tools
        assert [tool.name for tool in found] == names
    assert [tool.name for tool in with_own_values(options, {"tool_choice": "search"}).callable_tools] == ["search"]


def test_a_schema_comes_nested_or_flat() -> None:
    expected = ResponseFormat("json_schema", {"type": "object"})
    nested = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
    assert parse_response_format(nested) == expected
    assert parse_response_format({"type": "json_schema", "schema": {"type": "object"}}) == expected
    with pytest.raises(InvalidResponseFormat, match=r"response_format\.json_schema\.schema: expected a JSON Schema"):
        parse_response_format({"type": "json_schema", "json_schema": {"name": "x"}})
    with pytest.raises(InvalidResponseFormat, match="expected one of text, json_object, json_schema, found 'xml'"):
        parse_response_format({"type": "xml"})


@pytest.mark.parametrize(
    ("value", "expected"),
    [(None, None), ({"type": "enabled"}, True), ("disabled", False), (True, True), ({"type": "disabled"}, False)],
)
def test_thinking_is_spelled_in_several_ways(value: object, expected: bool | None) -> None:
    assert parse_thinking(value) is expected


def test_what_a_row_says_wins_and_the_rest_stays() -> None:
    job = ChatOptions(tools=TOOLS, tool_choice=ToolChoice("named", "search"), thinking=True)
    own = with_own_values(
        job, {"response_format": {"type": "json_object"}, "thinking": None, "reasoning_effort": "low"}
    )
    assert (own.tools, own.thinking, own.reasoning_effort) == (TOOLS, True, "low")
    assert own.response_format == ResponseFormat("json_object")
    with pytest.raises(InvalidTools, match="found 'search'"):
        with_own_values(job, {"tools": [WEATHER]})
    for wrong in ({"max_reasoning_tokens": 0}, {"max_reasoning_tokens": True}, {"reasoning_effort": ""}):
        with pytest.raises(InvalidSampling):
            with_own_values(job, wrong)


@given(json_values, json_values, json_values, json_values)
def test_any_values_are_taken_or_refused_by_type(tools: Any, choice: Any, response: Any, thinking: Any) -> None:
    own = {"tools": tools, "tool_choice": choice, "response_format": response, "thinking": thinking}
    try:
        options = with_own_values(ChatOptions(), own)
    except RowError:
        return
    assert parse_options_json(options_json(options)) == options


def test_options_survive_as_text_with_the_order_of_their_keys() -> None:
    schema = {"type": "object", "properties": {"b": {}, "a": {}}}
    options = ChatOptions(
        tools=TOOLS,
        tool_choice=ToolChoice("named", "search"),
        parallel_tool_calls=False,
        response_format=ResponseFormat("json_schema", schema),
        thinking=False,
        reasoning_effort="max",
        max_reasoning_tokens=7,
    )
    text = options_json(options)
    assert parse_options_json(text) == options
    assert text.index('"b"') < text.index('"a"')
    assert options_json(ChatOptions()) == "{}"
