"""V3.2's prompts, by its own encoder's rules."""

# ruff: noqa: RUF001 - the bars of the wire format are U+FF5C

import pytest

from moebeam.model_runner.encoding.deepseek.deepseek_v3_2 import DeepSeekV32
from moebeam.schemas.chat_options import ChatOptions, parse_tools
from moebeam.schemas.errors import InvalidMessages
from moebeam.schemas.records import Message

V3_2 = DeepSeekV32()
BOS, EOS, USER, ASSISTANT = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"
CALLS = [{"id": str(number), "function": {"name": "look", "arguments": '{"n": 1}'}} for number in range(2)]


def test_results_stand_in_a_block_behind_the_calls_and_thinking_begins_anew() -> None:
    chat = [
        Message("user", "q"),
        Message("assistant", "", {"reasoning": "hm", "tool_calls": CALLS}),
        Message("tool", "one"),
        Message("tool", "two"),
    ]
    prompt = V3_2.render(chat, ChatOptions())
    parameter = '<｜DSML｜parameter name="n" string="false">1</｜DSML｜parameter>'
    call = f'<｜DSML｜invoke name="look">\n{parameter}\n</｜DSML｜invoke>\n'
    assert prompt == (
        f"{BOS}{USER}q{ASSISTANT}<think>hm</think>\n\n<｜DSML｜function_calls>\n{call}{call}</｜DSML｜function_calls>{EOS}"
        "\n\n<function_results>\n<result>one</result>\n<result>two</result>\n</function_results>\n\n<think>"
    )
    assert V3_2.starts_in_reasoning(prompt)


@pytest.mark.parametrize("num_results", [1, 3])
def test_results_must_match_the_calls(num_results: int) -> None:
    chat = [Message("user", "q"), Message("assistant", "", {"tool_calls": CALLS})]
    with pytest.raises(InvalidMessages, match=r"messages\[\d\]: expected .*result"):
        V3_2.render([*chat, *[Message("tool", "r")] * num_results], ChatOptions())


def test_answer_to_the_last_user_needs_reasoning() -> None:
    chat = [Message("user", "q"), Message("assistant", "a")]
    with pytest.raises(InvalidMessages, match=r"messages\[1\]\.reasoning_content"):
        V3_2.render(chat, ChatOptions())
    assert V3_2.render(chat, ChatOptions(thinking=False)) == f"{BOS}{USER}q{ASSISTANT}</think>a{EOS}"


def test_prefix_is_left_open() -> None:
    chat = [Message("user", "q"), Message("assistant", "{", {"prefix": True})]
    assert V3_2.render(chat, ChatOptions(thinking=False)) == f"{BOS}{USER}q{ASSISTANT}</think>{{"
    assert V3_2.render(chat, ChatOptions()) == f"{BOS}{USER}q{ASSISTANT}<think></think>{{"


def test_tools_and_developers_words_stand_where_the_encoder_puts_them() -> None:
    tools = parse_tools([{"name": "look"}])
    prompt = V3_2.render([Message("system", "S"), Message("user", "q")], ChatOptions(tools=tools, thinking=False))
    assert prompt.startswith(f"{BOS}S\n\n## Tools\n\nYou have access to a set of tools you can use to answer")
    assert prompt.endswith(f'<functions>\n{{"name": "look"}}\n</functions>\n{USER}q{ASSISTANT}</think>')
    developer = Message("developer", "d", {"response_format": {"type": "object"}})
    assert V3_2.render([developer], ChatOptions()).endswith(
        f'reply:\n{{"type": "object"}}\n\n# The user\'s message is: d{ASSISTANT}<think>'
    )


def test_earlier_reasoning_is_dropped() -> None:
    chat = [Message("user", "a"), Message("assistant", "b", {"reasoning_content": "why"}), Message("user", "c")]
    assert V3_2.render(chat, ChatOptions()) == f"{BOS}{USER}a{ASSISTANT}</think>b{EOS}{USER}c{ASSISTANT}<think>"


def test_answers_are_read_in_its_own_tags() -> None:
    text = 'x\n\n<｜DSML｜function_calls>\n<｜DSML｜invoke name="f">\n</｜DSML｜invoke>\n</｜DSML｜function_calls>'
    answer = V3_2.parse(text + EOS, starts_in_reasoning=False, has_tools=True)
    assert (answer.content, [call.name for call in answer.tool_calls]) == ("x", ["f"])
    other = V3_2.parse(text.replace("function_calls", "tool_calls"), starts_in_reasoning=False, has_tools=True)
    assert (other.content, other.tool_calls, other.repaired) == ("x", answer.tool_calls, ("misspelt_tag",))
