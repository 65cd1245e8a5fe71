"""Splits an answer's text into reasoning, content and calls.

Total: every text gives a `ParsedAnswer`, and every character of it is in there, in `reasoning_content`, `content` or
the calls, except the markup that was understood: `<think>`, `</think>`, the blank line before calls, and the
end-of-sentence markers at the end. What looks like calls but cannot be read stays in the content, with the error beside
it. Calls that break their format but mean something certain are read, and what was mended is named; text behind or
between them follows the content after a blank line, without the white space around it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from moebeam.model_runner.encoding.chat.call_formats import CallFormat, FoundCalls
from moebeam.schemas.chat_options import Tool
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
        repaired: what was mended in the markup: the names of `dsml_repair.py`, and `end_of_thinking` for a `</think>`
            without any thinking before it.
    """

    content: str
    reasoning_content: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    error: MalformedToolCall | None = None
    repaired: tuple[str, ...] = ()


def parse_answer(
    text: str,
    *,
    starts_in_reasoning: bool,
    has_reasoning: bool,
    call_format: CallFormat | None,
    end_marker: str | None,
    tools: Sequence[Tool] = (),
    is_cut: bool = False,
) -> ParsedAnswer:
    """Splits an answer; see the module docstring.

    Args:
        starts_in_reasoning: the prompt ended inside `<think>`.
        has_reasoning: the model knows `<think>`, and may open it itself.
        call_format: how calls are written; None keeps them in the content.
        end_marker: the token that ends an answer, as text.
        tools: those that could be called, where they are known.
        is_cut: the answer ended for want of tokens.
    """
    text = strip_end_marker(text, end_marker)
    thought = _find_reasoning(text, starts_in_reasoning, has_reasoning)
    start = thought.rest if thought else 0
    repaired: tuple[str, ...] = ()
    if thought is None and has_reasoning and (closed := _find_stray_end(text)):
        start, repaired = closed, ("end_of_thinking",)
    # Models do call tools inside their reasoning without closing it.
    is_open = thought is not None and not thought.is_closed
    found: FoundCalls | None = None
    error: MalformedToolCall | None = None
    if call_format is not None:
        search_from = thought.begin if thought and is_open else start
        try:
            found = call_format.read(text, search_from, tools=tools, is_cut=is_cut)
        except MalformedToolCall as malformed:
            error = malformed
            if thought and is_open and (opening := call_format.find(text, search_from)):
                thought, start = replace(thought, end=opening[0]), opening[0]
    if thought and is_open and found:
        thought, start = replace(thought, end=found.end_of_content), found.end_of_content
    reasoning = thought.lead + text[thought.begin : thought.end] if thought else None
    if found is None:
        return ParsedAnswer(text[start:], reasoning, error=error, repaired=repaired)
    content = "\n\n".join(filter(None, (text[start : found.end_of_content], found.rest)))
    return ParsedAnswer(content, reasoning, found.calls, repaired=(*repaired, *found.repaired))


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


def _find_stray_end(text: str) -> int:
    """Where the text goes on behind a `</think>` that begins it; 0 where none does."""
    num_spaces = len(text) - len(text.lstrip())
    return num_spaces + len(END_OF_THINKING) if text.startswith(END_OF_THINKING, num_spaces) else 0


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
