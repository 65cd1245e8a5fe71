"""Finds out in which form a chat template reads past calls and text parts, by rendering small chats in each.

Templates print the arguments of a call, dump them as JSON, or walk through them, so a form that one reads another
refuses, prints as Python, or encodes twice. `chat_template.py` asks once for each template and keeps the answer.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from moebeam.model_runner.encoding.chat.past_calls import ArgumentsForm
from moebeam.schemas.errors import TemplateBudgetExceeded

Render: TypeAlias = Callable[[Sequence[dict[str, Any]]], str]
"""Renders a chat with one template; raises whatever the template raises."""

_KEY, _VALUE = "probedKey", "probedValue"
_OBJECT = {_KEY: _VALUE}
_TEXT = f'{{"{_KEY}": "{_VALUE}"}}'
_ENCODED_TWICE = re.compile(rf'\\+"{_KEY}')
_AS_PYTHON = re.compile(rf"'{_KEY}'")
_CALL_ID = "call00001"
"""Nine letters and digits, which some templates insist on."""

_FIRST, _SECOND = "probedFirst", "probedSecond"


@dataclass(frozen=True, slots=True)
class CallForm:
    """How a template reads an assistant's message with calls.

    Attributes:
        has_null: whether a message that says nothing beside its calls has null for its content, rather than no text:
            some templates show the calls then only.
    """

    arguments: ArgumentsForm = "given"
    has_null: bool = False


def find_call_form(render: Render) -> CallForm:
    """The form in which a template shows a past call whole; as given where any does, or where none does."""
    for chat_with in _list_call_chats():
        for empty in ("", None):
            with_text = _try_render(render, chat_with(_TEXT, empty))
            with_object = _try_render(render, chat_with(_OBJECT, empty))
            form = _choose_form(with_text, with_object)
            if form is not None:
                sample, shown = (_TEXT, with_text) if form == "text" else (_OBJECT, with_object)
                has_null = empty is None or _is_more(_try_render(render, chat_with(sample, None)), shown)
                return CallForm(form, has_null)
    return CallForm()


def reads_parts(render: Render, role: str) -> bool:
    """Whether a template shows a content that is a list of text parts, in a message of this role."""
    content = [{"type": "text", "text": text} for text in (_FIRST, _SECOND)]
    return any(
        _FIRST in shown and _SECOND in shown and "'text'" not in shown and '"text"' not in shown
        for chat in _list_part_chats(role, content)
        if (shown := _try_render(render, chat)) is not None
    )


def _choose_form(with_text: str | None, with_object: str | None) -> ArgumentsForm | None:
    takes_text = _shows(with_text) and not _ENCODED_TWICE.search(with_text or "")
    takes_object = _shows(with_object) and not _AS_PYTHON.search(with_object or "")
    if takes_text and takes_object:
        # One that lays out objects and prints text as it is was trained on what it lays out.
        return "given" if with_text == with_object else "object"
    return "text" if takes_text else "object" if takes_object else None


def _shows(prompt: str | None) -> bool:
    return prompt is not None and _VALUE in prompt


def _is_more(with_null: str | None, without: str | None) -> bool:
    """Whether null makes a difference to a call that is shown, other than being printed."""
    if with_null is None or not _shows(with_null) or with_null == without:
        return False
    return with_null.count("None") <= (without or "").count("None")


def _list_call_chats() -> Iterator[Callable[[Any, str | None], list[dict[str, Any]]]]:
    """Chats with one call, by its arguments and the content beside it; templates refuse some of them."""

    def ends_with_result(arguments: Any, content: str | None) -> list[dict[str, Any]]:
        call = {"id": _CALL_ID, "type": "function", "function": {"name": "probe", "arguments": arguments}}
        return [
            {"role": "user", "content": "x"},
            {"role": "assistant", "content": content, "tool_calls": [call]},
            {"role": "tool", "name": "probe", "tool_call_id": _CALL_ID, "content": "y"},
        ]

    def goes_on(arguments: Any, content: str | None) -> list[dict[str, Any]]:
        turns = [{"role": "assistant", "content": "z"}, {"role": "user", "content": "x"}]
        return [*ends_with_result(arguments, content), *turns]

    def has_no_result(arguments: Any, content: str | None) -> list[dict[str, Any]]:
        return ends_with_result(arguments, content)[:2]

    yield ends_with_result
    yield goes_on
    yield has_no_result


def _list_part_chats(role: str, content: Any) -> Iterator[list[dict[str, Any]]]:
    message = {"role": role, "content": content}
    user, assistant = {"role": "user", "content": "x"}, {"role": "assistant", "content": "z"}
    match role:
        case "user":
            yield [message]
        case "assistant":
            yield [user, message, user]
        case "tool":
            call = {"id": _CALL_ID, "type": "function", "function": {"name": "probe", "arguments": {}}}
            for calls in ([call], [{**call, "function": {"name": "probe", "arguments": "{}"}}]):
                caller = {"role": "assistant", "content": "", "tool_calls": calls}
                yield [user, caller, {**message, "name": "probe", "tool_call_id": _CALL_ID}]
        case _:
            yield [message, user]
            yield [message, user, assistant, user]


def _try_render(render: Render, chat: Sequence[dict[str, Any]]) -> str | None:
    try:
        return render(chat)
    except TemplateBudgetExceeded:
        # It would take as long in every other form.
        raise
    except Exception:  # a template is foreign code: what it does not expect may raise anything
        return None
