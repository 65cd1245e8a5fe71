"""V4's prompts beyond the published vectors: roles, tasks, reasoning, results, prefixes and efforts."""

# ruff: noqa: RUF001 - the bars of the wire format are U+FF5C

import json
from typing import Any

import pytest

from moebeam.model_runner.encoding.chat_encoding import ChatEncoding
from moebeam.model_runner.encoding.deepseek.deepseek_v3_2 import DeepSeekV32
from moebeam.model_runner.encoding.deepseek.deepseek_v4 import DeepSeekV4
from moebeam.model_runner.encoding.deepseek.deepseek_v4_1 import DeepSeekV41
from moebeam.model_runner.encoding.deepseek.effort import V4_RELEASE, EffortProfile
from moebeam.schemas.chat_options import ChatOptions, ResponseFormat, ToolChoice, parse_tools
from moebeam.schemas.errors import InvalidMessages, InvalidTools
from moebeam.schemas.records import Message

V4 = DeepSeekV4()
BOS, EOS, USER, ASSISTANT = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"
CHAT = ChatOptions(thinking=False)
THINK = ChatOptions(thinking=True)
TOOLS = parse_tools([{"type": "function", "function": {"name": "look", "description": "Größe", "parameters": {}}}])


def user(text: str, **extra: Any) -> Message:
    return Message("user", text, extra)


def said(text: str, **extra: Any) -> Message:
    return Message("assistant", text, extra)


def calls(*ids: str) -> list[dict[str, Any]]:
    return [{"id": call_id, "type": "function", "function": {"name": "look", "arguments": "{}"}} for call_id in ids]


def result(text: str, call_id: str = "") -> Message:
    return Message("tool", text, {"tool_call_id": call_id} if call_id else {})


@pytest.mark.parametrize(
    ("options", "opening"),
    [(ChatOptions(), "<think>"), (THINK, "<think>"), (CHAT, "</think>")],
)
def test_thinking_is_on_unless_it_is_switched_off(options: ChatOptions, opening: str) -> None:
    prompt = V4.render([user("hi")], options)
    assert prompt == f"{BOS}{USER}hi{ASSISTANT}{opening}"
    assert V4.is_thinking(options) is (opening == "<think>")
    assert V4.starts_in_reasoning(prompt) is V4.is_thinking(options)


def test_earlier_reasoning_is_kept_where_tools_are_in_sight() -> None:
    chat = [user("a"), said("b", reasoning_content="why"), user("c")]
    assert "why" not in V4.render(chat, THINK)
    assert f"{ASSISTANT}<think>why</think>b{EOS}" in V4.render(chat, ChatOptions(tools=TOOLS))
    assert "why" not in V4.render(chat, ChatOptions(tools=TOOLS, thinking=False))


def test_reasoning_after_the_last_user_is_kept() -> None:
    chat = [user("a"), said("b", reasoning="one"), user("c"), said("d", reasoning="two")]
    assert V4.render(chat, THINK) == (
        f"{BOS}{USER}a{ASSISTANT}</think>b{EOS}{USER}c{ASSISTANT}<think>two</think>d{EOS}"
    )


def test_developer_before_the_last_user_is_dropped_only_while_thinking() -> None:
    chat = [Message("developer", "rules"), said("ok"), user("go")]
    assert V4.render(chat, THINK) == f"{BOS}ok{EOS}{USER}go{ASSISTANT}<think>"
    assert V4.render(chat, CHAT) == f"{BOS}{USER}rules{ASSISTANT}</think>ok{EOS}{USER}go{ASSISTANT}</think>"


def test_developer_brings_tools_and_schema_of_its_own() -> None:
    schema = {"type": "object", "title": "Ä"}
    extra = {"tools": [{"type": "function", "function": TOOLS[0].document}], "response_format": schema}
    prompt = V4.render([Message("developer", "rules", extra)], CHAT)
    head, _, tail = prompt.partition("\n\n## Tools\n")
    assert head == f"{BOS}{USER}rules"
    assert '\n{"name": "look", "description": "Größe", "parameters": {}}\n\nYou MUST strictly follow' in tail
    assert tail.endswith(
        "## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"
        '{"type": "object", "title": "Ä"}' + f"{ASSISTANT}</think>"
    )


def test_tools_hang_on_the_first_system_message_wherever_it_stands() -> None:
    options = ChatOptions(tools=TOOLS, thinking=False)
    prompt = V4.render([user("a"), said("b"), Message("system", "S"), user("c")], options)
    assert f"b{EOS}S\n\n## Tools\n" in prompt
    assert V4.render([user("a")], options).startswith(f"{BOS}\n\n## Tools\n")


def test_tools_that_must_not_be_called_are_not_shown() -> None:
    options = ChatOptions(tools=TOOLS, tool_choice=ToolChoice("none"), thinking=False)
    assert V4.render([user("a")], options) == V4.render([user("a")], CHAT)


def test_schema_of_the_answer_is_shown_and_json_object_has_no_text() -> None:
    schema = ChatOptions(response_format=ResponseFormat("json_schema", {"type": "array"}), thinking=False)
    assert V4.render([Message("system", "S"), user("a")], schema) == (
        f"{BOS}S\n\n## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"
        f'{{"type": "array"}}{USER}a{ASSISTANT}</think>'
    )
    plain = ChatOptions(response_format=ResponseFormat("json_object"), thinking=False)
    assert V4.render([user("a")], plain) == V4.render([user("a")], CHAT)


def test_results_stand_in_the_order_of_calls_and_merge_with_the_users_text() -> None:
    chat = [user("q"), said("", tool_calls=calls("x", "y")), result("second", "y"), result("first", "x"), user("so?")]
    assert V4.render(chat, CHAT).endswith(
        f"{EOS}{USER}<tool_result>first</tool_result>\n\n<tool_result>second</tool_result>\n\nso?{ASSISTANT}</think>"
    )


def test_results_without_ids_keep_their_order() -> None:
    chat = [user("q"), said("", tool_calls=calls("", "")), result("one"), result("two")]
    assert "<tool_result>one</tool_result>\n\n<tool_result>two</tool_result>" in V4.render(chat, CHAT)


@pytest.mark.parametrize("task", ["query", "authority", "domain", "title", "read_url"])
def test_task_takes_the_place_of_the_assistants_turn(task: str) -> None:
    assert V4.render([user("q", task=task)], CHAT) == f"{BOS}{USER}q<｜{task}｜>"


def test_action_is_answered_without_reasoning() -> None:
    prompt = V4.render([user("q", task="action")], THINK)
    assert prompt == f"{BOS}{USER}q{ASSISTANT}<think><｜action｜>"
    assert not V4.starts_in_reasoning(prompt)
    answered = V4.render([user("q", task="action"), said("search", reasoning="no")], THINK)
    assert answered == f"{prompt}search{EOS}"


def test_title_is_asked_behind_the_answer() -> None:
    chat = [user("q"), said("a", task="title")]
    assert V4.render(chat, CHAT) == f"{BOS}{USER}q{ASSISTANT}</think>a{EOS}<｜title｜>"


def test_task_of_a_text_that_is_merged_into_results_is_not_lost() -> None:
    chat = [user("q"), said("", tool_calls=calls("x")), result("r", "x"), user("now", task="query")]
    assert V4.render(chat, CHAT).endswith("<tool_result>r</tool_result>\n\nnow<｜query｜>")


def test_text_after_a_task_is_a_turn_of_its_own() -> None:
    assert V4.render([user("a", task="query"), user("b")], CHAT) == f"{BOS}{USER}a{USER}b{ASSISTANT}</think>"


def test_latest_reminder_has_a_token_of_its_own() -> None:
    chat = [Message("system", "S"), Message("latest_reminder", "2026-02-21"), user("q")]
    assert V4.render(chat, CHAT) == f"{BOS}S<｜latest_reminder｜>2026-02-21{USER}q{ASSISTANT}</think>"


def test_system_text_alone_is_answered() -> None:
    assert V4.render([Message("system", "S")], THINK) == f"{BOS}S{ASSISTANT}<think>"


@pytest.mark.parametrize("key", ["prefix", "wo_eos"])
def test_prefix_is_left_open(key: str) -> None:
    assert V4.render([user("q"), said("{", **{key: True})], CHAT) == f"{BOS}{USER}q{ASSISTANT}</think>{{"


def test_prefix_of_reasoning_is_gone_on_with() -> None:
    prompt = V4.render([user("q"), said("", reasoning_content="Let me", prefix=True)], THINK)
    assert prompt == f"{BOS}{USER}q{ASSISTANT}<think>Let me"
    assert V4.starts_in_reasoning(prompt)
    closed = V4.render([user("q"), said("{", reasoning_content="Let me", prefix=True)], THINK)
    assert closed == f"{BOS}{USER}q{ASSISTANT}<think>Let me</think>{{"
    assert not V4.starts_in_reasoning(closed)


@pytest.mark.parametrize(
    ("effort", "is_max"), [(None, False), ("high", False), ("low", False), ("max", True), ("xhigh", True)]
)
def test_release_knows_a_text_for_max_only(effort: str | None, is_max: bool) -> None:
    prompt = V4.render([Message("system", "S"), user("q")], ChatOptions(reasoning_effort=effort))
    text = V4_RELEASE.texts["max"]
    assert text.startswith("Reasoning Effort: Absolute maximum") and text.endswith("left unchecked.\n\n")
    assert prompt.startswith(f"{BOS}{text}S" if is_max else f"{BOS}S{USER}")


def test_effort_is_left_out_where_the_model_does_not_think() -> None:
    assert "Reasoning" not in V4.render([user("q")], ChatOptions(thinking=False, reasoning_effort="max"))


def test_later_encoders_have_a_text_for_each_effort() -> None:
    encoding = DeepSeekV4(EffortProfile({"low": "", "high": "H. ", "max": "M. "}, "low", {"medium": "high"}))
    for effort, text in ((None, ""), ("low", ""), ("high", "H. "), ("medium", "H. "), ("max", "M. ")):
        prompt = encoding.render([user("q")], ChatOptions(reasoning_effort=effort))
        assert prompt == f"{BOS}{text}{USER}q{ASSISTANT}<think>"


def test_unknown_effort_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(InvalidMessages, match=r"reasoning_effort: expected .*high, max.*found 'huge'"):
        V4.render([user("q")], ChatOptions(reasoning_effort="huge"))


@pytest.mark.parametrize(
    ("messages", "found"),
    [
        ([], "found none"),
        ([Message("robot", "x")], r"messages\[0\]\.role: expected one of .*found 'robot'"),
        ([Message("user", 7)], "int"),  # pyright: ignore[reportArgumentType]
        ([Message("developer", "")], r"messages\[0\]\.content"),
        ([user("q", task="sing")], r"messages\[0\]\.task: expected one of action.*'sing'"),
        ([user("q"), said("", tool_calls={})], r"messages\[1\]\.tool_calls: expected a list"),
        ([user("q"), said("", tool_calls=[1])], r"tool_calls\[0\]: expected an object"),
        (
            [user("q"), said("", tool_calls=[{"function": {"name": "f", "arguments": [1]}}])],
            r"tool_calls\[0\]\.arguments",
        ),
        ([user("q"), said("", tool_calls=[{"name": 'f">', "arguments": "{}"}])], r"tool_calls\[0\]\.name"),
        ([user("q"), said("", tool_calls=[{"name": "f", "arguments": "[1]"}])], r"arguments: expected a JSON object"),
        ([user("q"), said("", tool_calls=[{"name": "f", "arguments": '{"a":1,"a":2}'}])], "twice"),
        ([user("q"), said("", tool_calls=[{"name": "f", "arguments": '{"a":NaN}'}])], "NaN"),
        ([user("q"), said("", tool_calls=[{"name": "f", "arguments": {"a": float("inf")}}])], "arguments"),
        ([said("a", prefix=True), user("q")], r"messages\[0\]\.prefix"),
        ([user("q", prefix=True)], r"messages\[0\]\.prefix"),
        ([user("q"), said("a", prefix="yes")], r"messages\[1\]\.prefix: expected true or false"),
        ([user("q"), said("a", reasoning_content=1)], r"messages\[1\]\.reasoning_content: expected text"),
    ],
)
def test_bad_messages_name_the_place(messages: list[Message], found: str) -> None:
    with pytest.raises(InvalidMessages, match=found):
        V4.render(messages, CHAT)


def test_tools_in_two_places_are_refused() -> None:
    system = Message("system", "S", {"tools": [{"name": "f"}]})
    with pytest.raises(InvalidMessages, match=r"messages\[0\]\.tools: expected them in one place"):
        V4.render([system, user("q")], ChatOptions(tools=TOOLS))
    with pytest.raises(InvalidTools, match=r"messages\[0\]\.tools\[0\]\.name"):
        V4.render([Message("system", "S", {"tools": [{"name": "a b"}]})], CHAT)


def test_v4_1_has_a_system_token_numbers_and_spaced_tags() -> None:
    v4_1 = DeepSeekV41()
    chat = [Message("system", "S"), user("q"), said("", tool_calls=calls("x")), result("r", "x")]
    prompt = v4_1.render(chat, ChatOptions(tools=TOOLS))
    effort = "Reasoning Effort: 75 (range 1-100, the higher the value, the more thorough the reasoning)\n\n"
    assert prompt.startswith(f"{BOS}<｜System｜>{effort}S\n\n## Tools\n")
    assert 'writing a "<｜DSML｜ calls>" block' in prompt
    assert prompt.endswith(
        '\n\n<｜DSML｜ calls>\n<｜DSML｜ invoke name="look">\n\n</｜DSML｜ invoke>\n</｜DSML｜ calls>'
        f"{EOS}{USER}<tool_result>r</tool_result>{ASSISTANT}<think>"
    )
    assert v4_1.render([user("q")], CHAT) == f"{BOS}{USER}q{ASSISTANT}</think>"
    assert v4_1.render([user("q")], ChatOptions(reasoning_effort="7")).startswith(
        f"{BOS}<｜System｜>{effort.replace('75', '7')}{USER}"
    )
    with pytest.raises(InvalidMessages, match="1 to 100"):
        v4_1.render([user("q")], ChatOptions(reasoning_effort="101"))


def test_v4_1_answers_system_text_in_the_midst() -> None:
    chat = [user("a"), said("b", reasoning="why"), Message("system", "S")]
    assert (
        DeepSeekV41()
        .render(chat, ChatOptions(reasoning_effort="max"))
        .endswith(f"{USER}a{ASSISTANT}</think>b{EOS}<｜System｜>S{ASSISTANT}<think>")
    )


def test_results_alone_do_not_end_the_turn_of_v4_1_that_asked_for_them() -> None:
    call = {"id": "c", "function": {"name": "look", "arguments": "{}"}}
    asked = [
        Message("user", "a"),
        Message("assistant", "b", {"reasoning_content": "old"}),
        Message("user", "c"),
        Message("assistant", "", {"reasoning_content": "why", "tool_calls": [call]}),
        Message("tool", "r", {"tool_call_id": "c"}),
    ]
    prompt = DeepSeekV41().render(asked, ChatOptions())
    assert "old" not in prompt
    assert f"{USER}c{ASSISTANT}<think>why</think>" in prompt
    assert prompt.endswith(f"{USER}<tool_result>r</tool_result>{ASSISTANT}<think>")
    said = DeepSeekV41().render([*asked, Message("user", "and")], ChatOptions())
    assert "why" not in said
    assert said.endswith(f"{USER}<tool_result>r</tool_result>\n\nand{ASSISTANT}<think>")


@pytest.mark.parametrize(
    ("encoding", "separator"), [(DeepSeekV32(), "\n"), (DeepSeekV4(), "\n\n"), (DeepSeekV41(), "\n\n")]
)
def test_text_parts_are_joined_as_the_authors_join_them(encoding: ChatEncoding, separator: str) -> None:
    chat = [Message.of_parts(role, ["first", "second"], {}) for role in ("system", "user")]
    assert encoding.render(chat, ChatOptions()).count(f"first{separator}second") == 2


@pytest.mark.parametrize("encoding", [DeepSeekV32(), DeepSeekV4(), DeepSeekV41()])
def test_effort_none_is_no_thinking(encoding: ChatEncoding) -> None:
    chat = [Message("user", "q")]
    off = encoding.render(chat, ChatOptions(thinking=False))
    assert encoding.render(chat, ChatOptions(reasoning_effort="none")) == off
    assert encoding.render(chat, ChatOptions(reasoning_effort="none", thinking=True)) == off
    assert not encoding.is_thinking(ChatOptions(reasoning_effort="none"))


def test_arguments_may_be_text_or_an_object() -> None:
    arguments = {"k": [1, "é"]}
    prompts = {
        V4.render([user("q"), said("", tool_calls=[{"name": "f", "arguments": given}])], CHAT)
        for given in (arguments, json.dumps(arguments))
    }
    (prompt,) = prompts
    assert '<｜DSML｜parameter name="k" string="false">[1, "é"]</｜DSML｜parameter>' in prompt
