"""Families that bring a chat template: small templates that follow the documented forms of V3, R1, V3.1 and Qwen."""

# ruff: noqa: RUF001 - the bars of the wire format are U+FF5C

import json
from typing import Any

import pytest

from moebeam.model_runner.encoding.chat.token_marks import MARK, TokenMarks
from moebeam.model_runner.encoding.chat_template import ChatTemplate
from moebeam.schemas.chat_options import ChatOptions, ToolChoice, parse_tools
from moebeam.schemas.errors import InvalidMessages
from moebeam.schemas.records import Message, ToolCall

TOKENS = {"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>"}
BOS, EOS = TOKENS.values()

V3 = """{{ bos_token }}{% for m in messages %}
{%- if m.role == 'system' %}{{ m.content }}
{%- elif m.role == 'user' %}{{ '<｜User｜>' + m.content + '<｜Assistant｜>' }}
{%- elif m.role == 'tool' %}{{ '<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>' + m.content }}
    {{- '<｜tool▁output▁end｜><｜tool▁outputs▁end｜>' }}
{%- elif m.tool_calls %}{{ '<｜tool▁calls▁begin｜>' }}
    {%- for c in m.tool_calls %}{{ '<｜tool▁call▁begin｜>' + c.type + '<｜tool▁sep｜>' + c.function.name }}
        {{- '\\n```json\\n' + c.function.arguments + '\\n```<｜tool▁call▁end｜>' }}{% endfor %}
    {{- '<｜tool▁calls▁end｜>' + eos_token }}
{%- else %}{{ m.content.split('</think>')[-1] + eos_token }}{% endif %}
{%- endfor %}"""

R1 = V3 + "{% if add_generation_prompt %}{{ '<think>\\n' }}{% endif %}"

V3_1 = """{% if not thinking is defined %}{% set thinking = false %}{% endif %}{{ bos_token }}
{%- if tools is defined and tools is not none %}{{ '## Tools ' + (tools | tojson) }}
    {{- '<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>tool_call_name<｜tool▁sep｜>' }}{% endif %}
{%- for m in messages %}
{%- if m.role == 'user' %}{{ '<｜User｜>' + m.content }}
{%- else %}{{ '<｜Assistant｜></think>' + m.content + eos_token }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<｜Assistant｜>' + ('<think>' if thinking else '</think>') }}{% endif %}"""

QWEN = """{%- if tools %}{{ '<|im_start|>system\\n<tools>' }}{% for t in tools %}{{ '\\n' + (t | tojson) }}{% endfor %}
{{- '\\n</tools> <tool_call>\\n{"name": <function-name>, "arguments": <args-json-object>}\\n</tool_call>' }}
{{- '<|im_end|>\\n' }}{% endif %}
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + m.content | trim + '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}"""

TOOLS = parse_tools([{"type": "function", "function": {"name": "look", "description": "Größe"}}])
CHAT = [Message("user", "q")]


def template(source: str, **more: Any) -> ChatTemplate:
    return ChatTemplate(source, special_tokens=TOKENS, **more)


def test_histories_with_calls_and_results_reach_the_template() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "look", "arguments": '{"a": 1}'}}
    chat = [*CHAT, Message("assistant", "", {"tool_calls": [call]}), Message("tool", "r", {"tool_call_id": "1"})]
    assert template(V3).render(chat) == (
        f"{BOS}<｜User｜>q<｜Assistant｜><｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>look\n"
        f'```json\n{{"a": 1}}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>{EOS}'
        "<｜tool▁outputs▁begin｜><｜tool▁output▁begin｜>r<｜tool▁output▁end｜><｜tool▁outputs▁end｜>"
    )


def test_r1_leaves_the_model_inside_its_reasoning() -> None:
    r1 = template(R1)
    prompt = r1.render(CHAT)
    assert prompt.endswith("<｜Assistant｜><think>\n")
    assert r1.starts_in_reasoning(prompt)
    assert r1.is_thinking(ChatOptions())
    assert r1.parse(f"why\n</think>\n\nso{EOS}", starts_in_reasoning=True, has_tools=False).content == "\n\nso"


@pytest.mark.parametrize(
    ("source", "thinking", "opens"),
    [(V3, None, False), (V3_1, None, False), (V3_1, False, False), (V3_1, True, True), (QWEN, False, False)],
)
def test_thinking_of_is_what_the_template_makes_of_the_switch(source: str, thinking: bool | None, opens: bool) -> None:
    options = ChatOptions(thinking=thinking)
    assert template(source).is_thinking(options) is opens
    assert template(source).starts_in_reasoning(template(source).render(CHAT, options)) is opens


def test_switches_are_undefined_where_a_request_says_nothing() -> None:
    names = ("thinking", "enable_thinking", "reasoning_effort")
    source = " ".join(f"{{{{ {name} is defined }}}}" for name in names) + " {{ tools is not none }}"
    assert template(source).render(CHAT) == "False False False False"
    options = ChatOptions(tools=TOOLS, thinking=False, reasoning_effort="low")
    assert template(source).render(CHAT, options) == "True True True True"
    shown = "{{ thinking }} {{ enable_thinking }} {{ reasoning_effort }} {{ tools[0].function.name }}"
    assert template(shown).render(CHAT, options) == "False False low look"


def test_what_transformers_gives_every_template_is_there() -> None:
    assert template("{{ tools }} {{ documents }}").render(CHAT) == "None None"


def test_effort_none_is_no_thinking_whatever_the_switch_says() -> None:
    options = ChatOptions(reasoning_effort="none", thinking=True)
    assert template("{{ reasoning_effort }} {{ thinking }} {{ enable_thinking }}").render(CHAT, options) == (
        "none False False"
    )
    assert not template(V3_1).is_thinking(options)


def test_tools_are_shown_in_openais_form_unless_they_must_not_be_called() -> None:
    qwen = template(QWEN)
    shown = '\n{"type": "function", "function": {"name": "look", "description": "Größe"}}\n'
    assert shown in qwen.render(CHAT, ChatOptions(tools=TOOLS))
    assert qwen.render(CHAT, ChatOptions(tools=TOOLS, tool_choice=ToolChoice("none"))) == qwen.render(CHAT)


def test_template_for_tools_is_used_with_tools_only() -> None:
    both = template("plain", tool_source="tools")
    assert (both.render(CHAT), both.render(CHAT, ChatOptions(tools=TOOLS))) == ("plain", "tools")


@pytest.mark.parametrize(
    ("source", "name", "has_reasoning"),
    [(V3, "deepseek_v3", True), (R1, "deepseek_v3", True), (V3_1, "deepseek_v3_1", True), (QWEN, "hermes", True)],
)
def test_answers_are_read_in_the_format_of_the_template(source: str, name: str, has_reasoning: bool) -> None:
    encoding = template(source)
    assert encoding.call_format is not None
    assert (encoding.call_format.name, encoding.has_reasoning) == (name, has_reasoning)
    assert encoding.markup == encoding.call_format.markup | {"<think>", "</think>"}
    calls = [ToolCall("call_0", "look", '{"a": "</think>"}'), ToolCall("call_1", "look", "{}")]
    answer = encoding.parse(f"so{encoding.render_calls(calls)}{EOS}", starts_in_reasoning=False, has_tools=True)
    assert answer.error is None
    assert (answer.content, answer.tool_calls) == ("so", tuple(calls))


def test_template_without_calls_keeps_everything_in_the_content() -> None:
    plain = template("{{ messages[0].content }}")
    assert (plain.call_format, plain.has_reasoning, plain.markup) == (None, False, frozenset())
    text = '<think>x</think><tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    assert plain.parse(text, starts_in_reasoning=False, has_tools=True).content == text
    assert plain.render_calls([]) == ""
    with pytest.raises(InvalidMessages, match="knows no calls"):
        plain.render_calls([ToolCall("", "f", "{}")])


def test_prefix_is_gone_on_with() -> None:
    chat = [*CHAT, Message("assistant", '{"a": ', {"prefix": True})]
    assert template(V3_1).render(chat) == f'{BOS}<｜User｜>q<｜Assistant｜></think>{{"a": '
    assert template(QWEN).render(chat).endswith('<|im_start|>assistant\n{"a": ')
    for text in ("e", "", "t\n"):
        chat = [*CHAT, Message("assistant", text, {"prefix": True})]
        assert template(V3_1).render(chat) == f"{BOS}<｜User｜>q<｜Assistant｜></think>{text}"


@pytest.mark.parametrize("content", ["", "gone"])
def test_prefix_that_the_template_does_not_show_is_refused(content: str) -> None:
    with pytest.raises(InvalidMessages, match="prefix"):
        template("x").render([*CHAT, Message("assistant", content, {"prefix": True})])


def test_tokens_in_data_are_marked_and_reasoning_in_past_answers_is_still_found() -> None:
    marks = TokenMarks(["<｜User｜>", "<think>", "</think>"])
    chat = [
        Message("system", "<｜User｜>"),
        Message("user", "</think>"),
        Message("assistant", "<think>why</think>so <｜User｜>"),
        Message("user", "x"),
    ]
    prompt = template(V3, marks=marks).render(chat)
    assert marks.plain(prompt) == (
        f"{BOS}<｜User｜><｜User｜></think><｜Assistant｜>so <｜User｜>{EOS}<｜User｜>x<｜Assistant｜>"
    )
    assert prompt.count("<｜User｜>") == 2
    assert prompt.count(MARK) == 3


def test_tokens_in_arguments_and_tools_are_marked() -> None:
    marks = TokenMarks(["<|im_end|>"])
    arguments = {"a": "<|im_end|>"}
    source = "{{ messages[0].tool_calls[0].function.arguments | tojson }}{{ tools | tojson }}"
    tools = parse_tools([{"name": "look", "description": "<|im_end|>"}])
    for given in (arguments, json.dumps(arguments)):
        chat = [Message("assistant", "", {"tool_calls": [{"function": {"name": "look", "arguments": given}}]})]
        prompt = template(source, marks=marks).render(chat, ChatOptions(tools=tools))
        assert "<|im_end|>" not in prompt
        assert marks.plain(prompt).count("<|im_end|>") == 2
