"""Past calls and text parts reach each template in the form that it reads, whichever form a row has."""

import json
from typing import Any

import pytest

from moebeam.model_runner.encoding.chat_template import ChatTemplate
from moebeam.schemas.chat_options import ChatOptions, parse_tools
from moebeam.schemas.errors import InvalidMessages
from moebeam.schemas.records import Message

CALLS = "{% for m in messages %}{% for c in m.tool_calls or [] %}[%s]{% endfor %}{% endfor %}"
ITEMS = "{% for k, v in c.function.arguments | items %}{{ k }}={{ v }};{% endfor %}"
ARGUMENTS = "{{ m.tool_calls[0].function.arguments }}"
EACH = "{% for p in m.content %}<{{ p.text }}>{% endfor %}"
OBJECT = {"city": "Köln", "n": [1]}
TOOLS = parse_tools([{"name": "look"}])


def chat(arguments: Any, **more: Any) -> list[Message]:
    call = {"id": "call00009", "type": "function", "function": {"name": "look", "arguments": arguments}}
    return [
        Message("user", "q"),
        Message("assistant", "", {"tool_calls": [call], **more}),
        Message("tool", "r", {"tool_call_id": "call00009"}),
        Message("user", "and?"),
    ]


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        (ITEMS, "city=Köln;n=[1];"),
        ("{% for k in c.function.arguments %}{{ k }}={{ c.function.arguments[k] }};{% endfor %}", "city=Köln;n=[1];"),
        ("{{ c.function | tojson }}", '{"name": "look", "arguments": {"city": "Köln", "n": [1]}}'),
        ("{{ c.function.arguments | tojson }}", '{"city": "Köln", "n": [1]}'),
        ("{{ c.function.arguments }}", '{"city": "Köln", "n": [1]}'),
        ("{{ c.function.name + c.function.arguments }}", 'look{"city": "Köln", "n": [1]}'),
        (
            "{% if c.function.arguments is string %}{{ c.function.arguments }}{% else %}"
            "{{ c.function.arguments | tojson }}{% endif %}",
            '{"city": "Köln", "n": [1]}',
        ),
        (
            "{% if c.function.arguments is mapping %}" + ITEMS + "{% else %}{{ c.function.arguments }}{% endif %}",
            "city=Köln;n=[1];",
        ),
        ("{% if c.id | length != 9 %}{{ raise_exception('nine!') }}{% endif %}" + ITEMS, "city=Köln;n=[1];"),
        ("{% if messages[-1].role != 'user' %}{{ raise_exception('user!') }}{% endif %}" + ITEMS, "city=Köln;n=[1];"),
        ("{{ c.function.name }}", "look"),
    ],
)
@pytest.mark.parametrize("arguments", [OBJECT, json.dumps(OBJECT, ensure_ascii=False)], ids=["object", "text"])
@pytest.mark.parametrize("tools", [(), TOOLS], ids=["alone", "with-tools"])
def test_arguments_are_shown_once_and_alike_in_either_form(
    layout: str, expected: str, arguments: Any, tools: Any
) -> None:
    template = ChatTemplate(CALLS.replace("%s", layout))
    for _ in range(2):
        assert template.render(chat(arguments), ChatOptions(tools=tools)) == f"[{expected}]"


@pytest.mark.parametrize("arguments", [None, "", " ", {}, "{}"])
def test_calls_without_arguments_have_an_empty_object(arguments: Any) -> None:
    dumped = ChatTemplate(CALLS.replace("%s", "{{ c.function.arguments | tojson }}"))
    assert dumped.render(chat(arguments)) == "[{}]"
    joined = ChatTemplate(CALLS.replace("%s", "{{ '' + c.function.arguments }}"))
    assert joined.render(chat(arguments)) == "[{}]"


def test_bare_calls_are_shown_like_openais() -> None:
    template = ChatTemplate(CALLS.replace("%s", "{{ c.function.name }}" + ITEMS))
    messages = [Message("user", "q"), Message("assistant", "", {"tool_calls": [{"name": "look", "arguments": "{}"}]})]
    assert template.render(messages) == "[look]"


@pytest.mark.parametrize("text", ["{oh", "[1]", '"a"', '{"a": 1, "a": 2}'])
def test_text_that_is_no_object_is_refused_where_an_object_is_read(text: str) -> None:
    template = ChatTemplate(CALLS.replace("%s", ITEMS))
    with pytest.raises(InvalidMessages, match=r"messages\[1\]\.tool_calls\[0\]\.arguments: expected a JSON object"):
        template.render(chat(text))
    assert ChatTemplate(CALLS.replace("%s", "{{ c.function.arguments }}")).render(chat(text)) == f"[{text}]"


@pytest.mark.parametrize(
    "content",
    [
        "{% if m.content is none %}" + ARGUMENTS + "{% else %}{{ m.content }}{% endif %}",
        "{{ m.content }}" + ARGUMENTS,
        "{{ '' + m.content }}" + ARGUMENTS,
    ],
)
def test_calls_are_shown_where_a_template_wants_null_beside_them_and_null_is_never_printed(
    content: str,
) -> None:
    source = "{% for m in messages %}{% if m.tool_calls %}" + content + "{% endif %}{% endfor %}"
    assert ChatTemplate(source).render(chat("{}")) == "{}"


def parts(role: str) -> list[Message]:
    called = chat("{}")
    listed = Message.of_parts(role, ["one", "two"], {"tool_call_id": "call00009"} if role == "tool" else {})
    match role:
        case "system":
            return [listed, Message("user", "q")]
        case "tool":
            return [*called[:2], listed]
        case "assistant":
            return [Message("user", "q"), listed, Message("user", "q")]
        case _:
            return [listed]


@pytest.mark.parametrize("role", ["system", "user", "assistant", "tool"])
@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ m.content }}", "one\ntwo"),
        ("{{ m.content + '' }}", "one\ntwo"),
        ("{{ m.content | tojson }}", '"one\\ntwo"'),
        ("{% if m.content is string %}{{ m.content }}{% else %}" + EACH + "{% endif %}", "<one><two>"),
        ("{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}", "onetwo"),
    ],
)
def test_text_parts_reach_templates_that_read_them_and_are_lines_for_others(
    role: str, source: str, expected: str
) -> None:
    template = ChatTemplate(
        "{% for m in messages %}{% if m.role == '" + role + "' %}" + source + "{% endif %}{% endfor %}"
    )
    assert template.render(parts(role)) == expected


def test_a_prefix_of_parts_is_gone_on_with() -> None:
    source = "{% for m in messages %}{{ m.content }}{% endfor %}"
    said = Message.of_parts("assistant", ["one", "two"], {"prefix": True})
    assert ChatTemplate(source).render([Message("user", "q"), said]) == "qone\ntwo"
