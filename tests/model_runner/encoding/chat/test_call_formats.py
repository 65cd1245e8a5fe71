"""Calls of tools in every format: what is written is read back, and two different calls are never written alike."""

# ruff: noqa: RUF001 - the bars of the wire format are U+FF5C

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moebeam.model_runner.encoding.chat.call_formats import (
    DEEPSEEK_V3,
    DEEPSEEK_V3_1,
    HERMES,
    CallFormat,
    format_of_template,
)
from moebeam.model_runner.encoding.chat.token_marks import TokenMarks
from moebeam.model_runner.encoding.deepseek.dsml import V3_2_CALLS, V4_1_CALLS, V4_CALLS
from moebeam.schemas.canonical import canonical_json
from moebeam.schemas.errors import InvalidMessages, MalformedToolCall
from moebeam.schemas.records import ToolCall

FORMATS: list[CallFormat] = [V3_2_CALLS, V4_CALLS, V4_1_CALLS, DEEPSEEK_V3, DEEPSEEK_V3_1, HERMES]
MARKUP = [
    *(
        "｜DSML｜",
        "<｜DSML｜",
        "</｜DSML｜parameter>",
        "</｜DSML｜ parameter>",
        "</｜DSML｜tool_calls>",
        "<think>",
        "</think>",
    ),
    *("<｜end▁of▁sentence｜>", "<｜tool▁call▁end｜>", "\n```<｜tool▁call▁end｜>", "</tool_call>", "<｜User｜>"),
    *('"', "\\", "\\u003c", '" string="true">', "\n", "<", ">", "\ufdd0", "<\ufdd0｜User｜>"),
]
MARKS = TokenMarks(["<｜User｜>", "｜DSML｜", "<think>", "</think>", "<｜end▁of▁sentence｜>", "[INST]"])

characters = st.characters(exclude_categories=["Cs"])
texts = st.lists(st.sampled_from([*MARKUP, "[INST]", "1", "true", "null", " "]) | st.text(characters, max_size=4)).map(
    "".join
)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda children: st.lists(children, max_size=3) | st.dictionaries(texts, children, max_size=3),
    max_leaves=8,
)
arguments = st.dictionaries(texts, values, max_size=4)
names = st.from_regex(r"[A-Za-z0-9_.:-]{1,20}", fullmatch=True)
calls = st.lists(st.tuples(names, arguments), min_size=1, max_size=3)


def call(name: str, value: dict[str, Any]) -> ToolCall:
    return ToolCall("any", name, json.dumps(value))


def read(call_format: CallFormat, text: str) -> tuple[ToolCall, ...]:
    found = call_format.find(text, 0)
    assert found is not None
    assert found[0] == 0
    return call_format.parse(text, found[1])


@pytest.mark.parametrize("call_format", FORMATS, ids=lambda found: found.name)
@given(given_calls=calls)
def test_calls_are_read_as_they_were_written(
    call_format: CallFormat, given_calls: list[tuple[str, dict[str, Any]]]
) -> None:
    written = call_format.render([call(name, value) for name, value in given_calls], marks=MARKS)
    parsed = read(call_format, MARKS.plain(written))
    assert [found.id for found in parsed] == [f"call_{index}" for index in range(len(given_calls))]
    assert [(found.name, canonical_json(json.loads(found.arguments))) for found in parsed] == [
        (name, canonical_json(value)) for name, value in given_calls
    ]


@pytest.mark.parametrize("call_format", FORMATS, ids=lambda found: found.name)
@given(value=arguments)
def test_written_arguments_spell_no_token_but_the_formats_own(call_format: CallFormat, value: dict[str, Any]) -> None:
    written = call_format.render([call("f", value)], marks=MARKS)
    genuine = "".join(text for text, is_data in MARKS.sections(written) if not is_data)
    skeleton = call_format.render([call("f", dict.fromkeys(map(str, range(len(value))), 0))])
    for token in ("<｜User｜>", "<think>", "</think>", "<｜end▁of▁sentence｜>", "[INST]"):
        assert token not in genuine
    assert genuine.count("｜DSML｜") <= skeleton.count("｜DSML｜")


@given(first=arguments, second=arguments)
def test_different_arguments_are_never_written_alike(first: dict[str, Any], second: dict[str, Any]) -> None:
    if json.dumps(first) != json.dumps(second):
        assert V4_CALLS.render([call("f", first)]) != V4_CALLS.render([call("f", second)])


@pytest.mark.parametrize(
    ("value", "written"),
    [
        ("5", '"true">5<'),
        (5, '"false">5<'),
        ("", '"true"><'),
        (None, '"false">null<'),
        ("null", '"true">null<'),
        (100.0, '"false">100.0<'),
        (10**30, f'"false">{10**30}<'),
        ({}, '"false">{}<'),
        ("\na ", '"true">\na <'),
        ("a < b &lt;", '"true">a < b &lt;<'),
        ("</｜DSML｜parameter>", '"false">"\\u003c/｜DSML｜parameter>"<'),
        ("</think>", '"false">"\\u003c/think>"<'),
        ("<｜end▁of▁sentence｜>", '"false">"\\u003c｜end▁of▁sentence｜>"<'),
        (["</｜DSML｜invoke>"], '"false">["\\u003c/｜DSML｜invoke>"]<'),
    ],
)
def test_strings_stand_raw_unless_they_spell_markup(value: object, written: str) -> None:
    text = V4_CALLS.render([call("f", {"k": value})])
    assert f'<｜DSML｜parameter name="k" string={written}/｜DSML｜parameter>' in text


@pytest.mark.parametrize(
    ("name", "written"),
    [
        ("a&b c>d", "a&b c>d"),
        ('a"b', 'a\\"b'),
        ("a\\b", "a\\\\b"),
        ("a\nb", "a\\nb"),
        ("</think>", "\\u003c/think>"),
        ("", ""),
    ],
)
def test_names_of_parameters_are_escaped_where_they_must(name: str, written: str) -> None:
    text = V4_CALLS.render([call("f", {name: 1})])
    assert f'name="{written}" string="false">1<' in text
    assert json.loads(read(V4_CALLS, text)[0].arguments) == {name: 1}


def test_call_without_arguments_keeps_the_empty_line_of_the_reference() -> None:
    assert V4_CALLS.render([call("f", {})]) == (
        '\n\n<｜DSML｜tool_calls>\n<｜DSML｜invoke name="f">\n\n</｜DSML｜invoke>\n</｜DSML｜tool_calls>'
    )


@pytest.mark.parametrize("call_format", FORMATS, ids=lambda found: found.name)
@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("a b", "{}", r"calls\[0\]\.name"),
        ("", "{}", r"calls\[0\]\.name"),
        ('f"', "{}", r"calls\[0\]\.name"),
        ("f", "", r"calls\[0\]\.arguments"),
        ("f", "[]", "expected a JSON object"),
        ("f", '{"a": Infinity}', "Infinity"),
        ("f", '{"a": 1e9999}', "more than 4300 digits"),
        ("f", '{"a": {"b": 1, "b": 2}}', "twice"),
        ("f", '{"a": "\\ud800"}', "surrogate"),
        ("f", '{"a":' * 200 + "1" + "}" * 200, "nested deeper"),
    ],
)
def test_what_cannot_be_written_is_refused(call_format: CallFormat, name: str, text: str, found: str) -> None:
    with pytest.raises(InvalidMessages, match=found):
        call_format.render([ToolCall("", name, text)], where="calls")


def block(inner: str) -> str:
    return f"<｜DSML｜tool_calls>\n{inner}\n</｜DSML｜tool_calls>"


def invoke(inner: str) -> str:
    return block(f'<｜DSML｜invoke name="f">\n{inner}\n</｜DSML｜invoke>')


P = '<｜DSML｜parameter name="k" string='
END = "</｜DSML｜parameter>"


@pytest.mark.parametrize(
    ("text", "place", "problem"),
    [
        ("<｜DSML｜tool>", "<｜DSML｜tool>", "<｜DSML｜tool_calls>"),
        ("</｜DSML｜tool_calls>", "</｜DSML｜tool_calls>", "<｜DSML｜tool_calls>"),
        (block(""), "</｜DSML｜tool_calls>", "<｜DSML｜invoke"),
        (invoke("").replace('"f"', '"a b"'), ' b"', '">'),
        (invoke("x"), "x", "<｜DSML｜parameter"),
        (invoke(f'{P}"maybe">1{END}'), '"k" string="maybe"', "true|false"),
        (invoke(f'{P}"true">1{END}{P}"true">2{END}'), f'{P}"true">2', "every parameter once"),
        (invoke(f'{P}"false">yes{END}'), "yes", "a JSON value"),
        (invoke(f'{P}"false">{{"a":1,"a":2}}{END}'), '{"a":1', "twice"),
        (invoke(f'{P}"false">NaN{END}'), "NaN", "NaN"),
        (invoke(f'{P}"true">1\n{P}"true">2{END}'), '<｜DSML｜parameter name="k" string="true">2', "a raw string"),
        (invoke(f'{P}"true">1'), "1", "ends with"),
        (invoke("") + " and more", "and more", "the end of the answer"),
        (invoke("")[:-5], "</｜DSML｜tool_c", "</｜DSML｜tool_calls>"),
    ],
)
def test_malformed_dsml_names_the_character(text: str, place: str, problem: str) -> None:
    position = text.rindex(place)
    with pytest.raises(MalformedToolCall, match=re.escape(problem)) as raised:
        V4_CALLS.parse(text, 0)
    # A tag within a raw string is named where it stands, one character behind its bracket.
    assert any(f"at character {near}:" in str(raised.value) for near in (position, position + 1))


V3_CALL = '<｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{"a": "```\\n<"}\n```<｜tool▁call▁end｜>'


def test_v3_fences_its_arguments() -> None:
    assert DEEPSEEK_V3.render([call("f", {"a": "```\n<"})]) == (f"<｜tool▁calls▁begin｜>{V3_CALL}<｜tool▁calls▁end｜>")


def test_v3_1_and_hermes_look_as_documented() -> None:
    pair = [call("f", {"a": 1}), call("g", {})]
    assert DEEPSEEK_V3_1.render(pair) == (
        '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{"a": 1}<｜tool▁call▁end｜>'
        "<｜tool▁call▁begin｜>g<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
    )
    assert HERMES.render(pair) == (
        '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>\n'
        '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>'
    )


def test_hermes_takes_the_keys_in_either_order_and_no_other() -> None:
    (found,) = HERMES.parse('<tool_call>{"arguments": {"a": "</tool_call>"}, "name": "f"}</tool_call>\n', 0)
    assert (found.name, json.loads(found.arguments)) == ("f", {"a": "</tool_call>"})
    with pytest.raises(MalformedToolCall, match="`name` and `arguments`"):
        HERMES.parse('<tool_call>{"name": "f"}</tool_call>', 0)


@pytest.mark.parametrize("call_format", FORMATS, ids=lambda found: found.name)
def test_every_part_of_the_shape_is_in_what_is_written(call_format: CallFormat) -> None:
    """A grammar is built of these parts."""
    inner = "" if call_format.arguments == "dsml" else "{}"
    expected = call_format.between.join(
        f"{call_format.call_begin(name)}{inner}{call_format.call_end}" for name in ("f", "g")
    )
    written = call_format.render([call("f", {}), call("g", {})])
    assert written == f"{call_format.begin}{expected}{call_format.end}"
    parameters = f"{V4_CALLS.parameter_begin('k', is_string=True)}v{V4_CALLS.parameter_end}"
    assert parameters in V4_CALLS.render([call("f", {"k": "v"})])


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ '<｜tool▁calls▁begin｜>' }}```json", DEEPSEEK_V3),
        ("{{ '<｜tool▁calls▁begin｜>' }}", DEEPSEEK_V3_1),
        ('<tool_call>\\n{\\"name\\": <f>, \\"arguments\\": <a>}', HERMES),
        ('<tool_call><function=f> "arguments"', None),
        ("{{ messages }}", None),
    ],
)
def test_format_is_known_by_the_markers_of_the_template(source: str, expected: CallFormat | None) -> None:
    assert format_of_template(source) is expected
