"""Splits an answer's text into reasoning, content and calls.

Total: every text gives a `ParsedAnswer`, and every character of it is in there, in `reasoning_content`, `content` or
the calls, except the markup that was understood: `<think>`, `</think>`, the blank line before calls, and the
end-of-sentence markers at the end. What looks like calls but cannot be read stays in the content, with the error beside
it.
"""

from dataclasses import dataclass, replace

from moebeam.model_runner.encoding.chat.call_formats import CallFormat
from moebeam.schemas.errors import MalformedToolCall
from moebeam.schemas.records import ToolCall

THINK, END_OF_THINKING = "<think>", "</think>"


@dataclass(frozen=True, slots=True)
class ParsedAnswer:
    """What a model said.

    Attributes:
        content: the answer beside reasoning and calls; the whole text after the reasoning where there is an error.
        reasoning_content: None where the model did not reason at all.
        tool_calls: ids are `call_0`, `call_1` and so on; arguments are JSON objects.
        error: calls were begun and cannot be read; counts characters of the whole text.
    """

    content: str
    reasoning_content: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    error: MalformedToolCall | None = None


def parse_answer(
    text: str,
    *,
    starts_in_reasoning: bool,
    has_reasoning: bool,
    call_format: CallFormat | None,
    end_marker: str | None,
) -> ParsedAnswer:
    """Splits an answer; see the module docstring.

    Args:
        starts_in_reasoning: the prompt ended inside `<think>`.
        has_reasoning: the model knows `<think>`, and may open it itself.
        call_format: how calls are written; None keeps them in the content.
        end_marker: the token that ends an answer, as text.
    """
    text = strip_end_marker(text, end_marker)
    thought = _find_reasoning(text, starts_in_reasoning, has_reasoning)
    start = thought.rest if thought else 0
    # Models do call tools inside their reasoning without closing it.
    is_open = thought is not None and not thought.is_closed
    found = call_format.find(text, thought.begin if thought and is_open else start) if call_format else None
    if thought and is_open and found:
        thought, start = replace(thought, end=found[0]), found[0]
    reasoning = thought.lead + text[thought.begin : thought.end] if thought else None
    if not found or not call_format:
        return ParsedAnswer(text[start:], reasoning)
    end_of_content, begin = found
    try:
        calls = call_format.parse(text, begin)
    except MalformedToolCall as error:
        return ParsedAnswer(text[start:], reasoning, error=error)
    return ParsedAnswer(text[start:end_of_content], reasoning, calls)


def strip_end_marker(text: str, end_marker: str | None) -> str:
    """Removes trailing end-of-sentence markers."""
    end = len(text)
    while end_marker and text.endswith(end_marker, 0, end):
        end -= len(end_marker)
    return text[:end]


@dataclass(frozen=True, slots=True)
class _Reasoning:
    """Where the reasoning stands: characters `begin` to `end`, behind white space that was before its `<think>`."""

    lead: str
    begin: int
    end: int
    rest: int
    is_closed: bool


def _find_reasoning(text: str, starts_in_reasoning: bool, has_reasoning: bool) -> _Reasoning | None:
    num_spaces = len(text) - len(text.lstrip())
    opens_itself = has_reasoning and text.startswith(THINK, num_spaces)
    if not starts_in_reasoning and not opens_itself:
        return None
    lead, begin = (text[:num_spaces], num_spaces + len(THINK)) if opens_itself else ("", 0)
    end = text.find(END_OF_THINKING, begin)
    if end < 0:
        return _Reasoning(lead, begin, len(text), len(text), is_closed=False)
    return _Reasoning(lead, begin, end, end + len(END_OF_THINKING), is_closed=True)
