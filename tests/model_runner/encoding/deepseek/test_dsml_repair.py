"""Calls that break the format: read where they mean something certain, and told from text that mentions the markup."""

# ruff: noqa: RUF001 - the bars of the wire format are U+FF5C

import json
from typing import Any

import pytest

from moebeam.model_runner.encoding.chat.answers import ParsedAnswer
from moebeam.model_runner.encoding.chat_encoding import ChatEncoding
from moebeam.model_runner.encoding.deepseek.deepseek_v3_2 import DeepSeekV32
from moebeam.model_runner.encoding.deepseek.deepseek_v4 import DeepSeekV4
from moebeam.model_runner.encoding.deepseek.deepseek_v4_1 import DeepSeekV41
from moebeam.schemas.chat_options import parse_tools
from moebeam.schemas.records import ToolCall

V4 = DeepSeekV4()
OPEN, CLOSE = "<｜DSML｜tool_calls>\n", "\n</｜DSML｜tool_calls>"
CALL, CALL_END = '<｜DSML｜invoke name="find">\n', "\n</｜DSML｜invoke>"
END = "</｜DSML｜parameter>"


def parameter(value: str, attributes: str = 'name="q" string="true"') -> str:
    return f"<｜DSML｜parameter {attributes}>{value}{END}"


Q = parameter("x")
R = parameter("y", 'name="r" string="true"')
WHOLE = OPEN + CALL + Q + CALL_END + CLOSE


def parse(text: str, **more: Any) -> ParsedAnswer:
    return V4.parse(text, starts_in_reasoning=False, has_tools=True, **more)


def read_calls(answer: ParsedAnswer) -> list[tuple[str, Any]]:
    assert answer.error is None, answer.error
    return [(call.name, json.loads(call.arguments)) for call in answer.tool_calls]


def inside(written: str) -> str:
    return OPEN + CALL + written + CALL_END + CLOSE


@pytest.mark.parametrize(
    ("text", "arguments", "repaired"),
    [
        (inside(parameter("x", 'name="q"')), {"q": "x"}, "string_attribute"),
        (inside(parameter("[1, 2]", 'name="q"')), {"q": [1, 2]}, "string_attribute"),
        (inside(parameter("x", 'name="q" string="maybe"')), {"q": "x"}, "string_attribute"),
        (inside(parameter("{oh", 'name="q" string="false"')), {"q": "{oh"}, "text_for_json"),
        (inside(parameter("True", 'name="q" string="false"')), {"q": True}, ""),
        (
            inside(Q.removesuffix(END) + "\n" + parameter("y", 'name="r" string="true"')),
            {"q": "x", "r": "y"},
            "parameter",
        ),
        (inside(Q.removesuffix(END)), {"q": "x"}, "parameter_not_closed"),
        (inside(Q.removesuffix(END) + "</parameter>"), {"q": "x"}, "parameter_not_closed"),
        (inside(Q.removesuffix(END) + "</|DSML|parameter>"), {"q": "x"}, "parameter_not_closed"),
        (inside(Q + "\n" + Q), {"q": "x"}, "repeated_parameter"),
        (inside(Q + END), {"q": "x"}, "misspelt_tag"),
        (inside('{"q": {"a": 1}}'), {"q": {"a": 1}}, "json_for_parameters"),
        (inside(parameter('{"q": 1}', 'name="arguments" string="false"')), {"q": 1}, "wrapped_arguments"),
        (inside(parameter('{"q": 1}', 'name="arguments" string="true"')), {"q": 1}, "wrapped_arguments"),
        (OPEN + '<｜DSML｜invoke name="find"/>' + CLOSE, {}, "misspelt_tag"),
        (OPEN + CALL + Q + CLOSE, {"q": "x"}, "call_not_closed"),
        (OPEN + CALL + Q, {"q": "x"}, "call_not_closed"),
        (OPEN + CALL + Q + "\n</｜DSML｜inv", {"q": "x"}, "call_not_closed"),
        (OPEN + CALL + Q + CALL_END + "\n", {"q": "x"}, "block_not_closed"),
        (OPEN + CALL + Q + CALL_END + "\n</｜DSML｜tool_", {"q": "x"}, "block_not_closed"),
        (CALL + Q + CALL_END + CLOSE, {"q": "x"}, "block_not_opened"),
        (CALL + Q + CALL_END, {"q": "x"}, "block_not_opened"),
        (WHOLE.replace("<｜DSML｜tool_calls", "<｜DSML｜toolCalls"), {"q": "x"}, "misspelt_tag"),
        (WHOLE.replace("tool_calls", "function_calls"), {"q": "x"}, "misspelt_tag"),
        (WHOLE.replace("｜", "|"), {"q": "x"}, "misspelt_tag"),
        (WHOLE.replace("DSML", "dsml").replace("invoke", "Invoke"), {"q": "x"}, "misspelt_tag"),
        (WHOLE.replace("<｜DSML｜", "< ｜DSML｜ "), {"q": "x"}, "misspelt_tag"),
        (WHOLE.replace('">', '" >').replace("name=", " name = "), {"q": "x"}, "misspelt_tag"),
        (WHOLE.replace('"find"', "'find'").replace('"true"', "true"), {"q": "x"}, "misspelt_tag"),
        (WHOLE.replace('"', '\\"'), {"q": "x"}, "misspelt_tag"),
        (WHOLE.replace('"find"', '" find "').replace("｜tool", "｜ tool"), {"q": "x"}, "misspelt_tag"),
        (inside(parameter("x", 'string="true" name="q"')), {"q": "x"}, "misspelt_tag"),
        (WHOLE.replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;"), {"q": "x"}, "escaped_markup"),
        (inside(parameter("<|DSML|invoke>")[: -len(END)]), {"q": "<|DSML|invoke>"}, "parameter_not_closed"),
    ],
)
def test_calls_of_certain_meaning_are_read_and_marked(text: str, arguments: Any, repaired: str) -> None:
    answer = parse(f"Let me look.\n\n{text}")
    assert read_calls(answer) == [("find", arguments)]
    assert answer.content == "Let me look."
    assert any(name.startswith(repaired) for name in answer.repaired) or (not repaired and not answer.repaired)


@pytest.mark.parametrize(
    ("text", "num_calls", "content", "repaired"),
    [
        (f"{WHOLE}\n\nDone.", 1, "Done.", ("text_after_calls",)),
        (f"So:\n\n{WHOLE}Done.", 1, "So:\n\nDone.", ("text_after_calls",)),
        (f"{WHOLE}\n\n{WHOLE}", 2, "", ("several_blocks",)),
        (f"{WHOLE}\nAnd\n{WHOLE}", 2, "And", ("several_blocks", "text_after_calls")),
        (f"I use <｜DSML｜tool_calls> now.\n\n{WHOLE}", 1, "I use <｜DSML｜tool_calls> now.", ()),
        (f"I use <｜DSML｜tool_calls> now.\n{WHOLE}", 1, "I use <｜DSML｜tool_calls> now.\n", ()),
        (f"So.{CALL}{Q}{CALL_END}", 1, "So.", ("block_not_closed", "block_not_opened")),
        (f"{OPEN}{CALL}{Q}{CALL}{Q}{CALL_END}{CLOSE}", 2, "", ("call_not_closed",)),
        (f"</think>{WHOLE}\nDone.", 1, "Done.", ("end_of_thinking", "text_after_calls")),
    ],
)
def test_text_beside_the_calls_is_kept(text: str, num_calls: int, content: str, repaired: tuple[str, ...]) -> None:
    answer = parse(text)
    assert (read_calls(answer), answer.content) == ([("find", {"q": "x"})] * num_calls, content)
    assert answer.repaired == repaired
    assert [call.id for call in answer.tool_calls] == [f"call_{index}" for index in range(num_calls)]


@pytest.mark.parametrize(
    "text",
    [
        "see <｜DSML｜foo> and <｜DSML｜tool_call> here",
        "see <｜DSML｜",
        "The tag <｜DSML｜tool_calls> opens calls.\nThe tag </｜DSML｜tool_calls> ends them.",
        "<｜DSML｜tool_calls> opens calls.",
        '<｜DSML｜invoke name="find"> opens one call.',
        f"It looks like this:\n```\n{WHOLE}\n```\nNow you know.",
        f"Write `{CALL}{Q}{CALL_END}` to call.",
        OPEN + '<｜DSML｜invoke name="$TOOL_NAME">\n...' + CALL_END + CLOSE + "\nThat is the form.",
        "a < b, |DSML| and DSML",
    ],
)
def test_text_that_mentions_the_markup_is_text(text: str) -> None:
    assert parse(text) == ParsedAnswer(text)


@pytest.mark.parametrize(
    "text",
    [
        OPEN,
        OPEN + CLOSE,
        OPEN + "<｜DSML｜inv",
        OPEN + CALL + '<｜DSML｜parameter name="q" string="true">half a va',
        OPEN + CALL + "between the tags" + CALL_END + CLOSE,
        inside(Q + "between" + Q),
        inside('{}{"q": 1}'),
        inside(Q + "\n" + parameter("y")),
        inside(parameter('{"a":1,"a":2}', 'name="q" string="false"')),
        inside(parameter("a <｜DSML｜tool_calls> b")),
        inside(parameter("x", 'string="true"')),
        OPEN + '<｜DSML｜invoke name="a b">\n' + Q + CALL_END + CLOSE,
        f"{WHOLE}\n\n<tool_result>made up</tool_result>",
        f"{WHOLE}<｜User｜>and",
        f"{WHOLE}\n<｜DSML｜foo>",
        "so\n\n<｜DSML｜tool_c",
    ],
)
def test_calls_of_uncertain_meaning_are_errors(text: str) -> None:
    answer = parse(text)
    assert answer.error is not None
    assert (answer.content, answer.tool_calls) == (text, ())


@pytest.mark.parametrize("end", ["", CALL_END, CALL_END + "\n</｜DSM", "\n</"])
def test_what_an_answer_without_its_end_may_have_gone_on_with_is_not_guessed(end: str) -> None:
    text = OPEN + CALL + Q + end
    assert parse(text).error is None
    assert parse(text, is_cut=True).error is not None
    assert parse(WHOLE, is_cut=True).error is None


TOOLS = parse_tools(
    [
        {
            "name": "find",
            "parameters": {
                "type": "object",
                "properties": {
                    "q": {"type": "string"},
                    "n": {"type": ["integer", "null"]},
                    "any": {},
                    "arguments": {"type": "object"},
                },
            },
        }
    ]
)


@pytest.mark.parametrize(
    ("attributes", "written", "expected"),
    [
        ('name="q"', "7", "7"),
        ('name="q" string="false"', "7", "7"),
        ('name="q" string="false"', '"7"', "7"),
        ('name="n"', "7", 7),
        ('name="n" string="true"', "7", 7),
        ('name="n" string="true"', "None", None),
        ('name="n" string="true"', "seven", "seven"),
        ('name="any" string="true"', "7", "7"),
        ('name="any"', "7", 7),
        ('name="arguments" string="false"', '{"q": 1}', {"q": 1}),
    ],
)
def test_the_functions_schema_says_how_a_value_is_meant(attributes: str, written: str, expected: object) -> None:
    answer = parse(inside(parameter(written, attributes)), tools=TOOLS)
    (name,) = [name for name in ("q", "n", "any", "arguments") if f'"{name}"' in attributes]
    assert read_calls(answer) == [("find", {name: expected})]


@pytest.mark.parametrize("encoding", [DeepSeekV32(), V4, DeepSeekV41()], ids=lambda found: found.name)
def test_every_encodings_own_tags_are_exact(encoding: ChatEncoding) -> None:
    written = encoding.render_calls([ToolCall("", "find", '{"q": "x"}')])
    answer = encoding.parse(f"{written}\nso", starts_in_reasoning=False, has_tools=True)
    assert read_calls(answer) == [("find", {"q": "x"})]
    assert answer.repaired == ("text_after_calls",)


def test_calls_in_open_reasoning_are_mended_too() -> None:
    answer = V4.parse(f"why\n\n{CALL}{Q}{CALL_END}", starts_in_reasoning=True, has_tools=True)
    assert (answer.reasoning_content, answer.content, read_calls(answer)) == ("why", "", [("find", {"q": "x"})])
    closed = V4.parse(f"why</think>{WHOLE}Done.", starts_in_reasoning=True, has_tools=True)
    assert (closed.reasoning_content, closed.content, read_calls(closed)) == ("why", "Done.", [("find", {"q": "x"})])
    mention = "why <｜DSML｜ and more"
    assert V4.parse(mention, starts_in_reasoning=True, has_tools=True) == ParsedAnswer("", mention)


def test_an_example_that_is_fenced_directly_behind_the_reasoning_is_text() -> None:
    example = f"```\n{WHOLE}\n```\nNow you know."
    answer = V4.parse(f"why</think>{example}", starts_in_reasoning=True, has_tools=True)
    assert answer == ParsedAnswer(example, "why")


def test_a_runaway_answer_takes_no_time() -> None:
    """These take minutes if each tag looks at the whole text again."""
    for piece in (f"{CALL}x\n", OPEN, "<" + " " * 50, '<｜DSML｜parameter a="'):
        parse(OPEN + piece * 10_000)
