"""What DeepSeek's encodings with DSML calls share: tokens around turns, the form of answers, attachments.

V3.2 (`deepseek_v3_2.py`) and V4 (`deepseek_v4.py`) differ in how turns follow each other, in results and in tasks.
"""

# ruff: noqa: RUF001 - the bars of the wire format are U+FF5C

from abc import ABC, abstractmethod
from collections.abc import Sequence

from moebeam.model_runner.encoding.chat.answers import END_OF_THINKING, THINK, ParsedAnswer, parse_answer
from moebeam.model_runner.encoding.chat.conversation import Turn, json_line, render_each
from moebeam.model_runner.encoding.chat.token_marks import NO_MARKS, TokenMarks
from moebeam.model_runner.encoding.deepseek.dsml import DSML, DsmlFormat
from moebeam.schemas.canonical import Json
from moebeam.schemas.chat_options import ChatOptions, Tool
from moebeam.schemas.errors import RowError
from moebeam.schemas.records import Message, ToolCall

BEGIN = "<｜begin▁of▁sentence｜>"
END = "<｜end▁of▁sentence｜>"
USER = "<｜User｜>"
ASSISTANT = "<｜Assistant｜>"


class DeepSeekDsml(ABC):
    """All of `ChatEncoding` but its name, its format of calls and how chats are rendered; immutable."""

    call_format: DsmlFormat
    markup: frozenset[str] = frozenset({THINK, END_OF_THINKING, DSML})
    has_reasoning: bool = True

    def __init__(self, marks: TokenMarks = NO_MARKS) -> None:
        """
        Args:
            marks: the tokens that data must not spell.
        """
        self._marks = marks

    def is_thinking(self, options: ChatOptions) -> bool:
        """DeepSeek thinks unless it is told not to."""
        return not options.is_thinking_off

    @abstractmethod
    def render(self, messages: Sequence[Message], options: ChatOptions) -> str:
        """See `ChatEncoding`."""

    def render_batch(self, chats: Sequence[tuple[Sequence[Message], ChatOptions]]) -> list[str | RowError]:
        return render_each(self.render, chats)

    def render_calls(self, calls: Sequence[ToolCall]) -> str:
        return self.call_format.render(calls, marks=self._marks)

    def parse(
        self,
        text: str,
        *,
        starts_in_reasoning: bool,
        has_tools: bool,
        tools: Sequence[Tool] = (),
        is_cut: bool = False,
    ) -> ParsedAnswer:
        return parse_answer(
            text,
            starts_in_reasoning=starts_in_reasoning,
            has_reasoning=True,
            call_format=self.call_format if has_tools else None,
            end_marker=END,
            tools=tools,
            is_cut=is_cut,
        )

    def starts_in_reasoning(self, prompt_tail: str) -> bool:
        """Whether the assistant's turn that the prompt leaves open has not closed its `<think>`."""
        turn = prompt_tail[prompt_tail.rfind(ASSISTANT) + 1 :]
        return turn.rfind(THINK) > turn.rfind(END_OF_THINKING)

    def _render_answer(self, turn: Turn, *, keeps_reasoning: bool) -> str:
        """An assistant's turn, after the `<think>` or `</think>` that opens it."""
        reasoning = ""
        if keeps_reasoning:
            goes_on_thinking = turn.is_prefix and not turn.content and not turn.calls
            reasoning = self._mark(turn.reasoning) + ("" if goes_on_thinking else END_OF_THINKING)
        calls = self.call_format.render(turn.calls, marks=self._marks, where=f"messages[{turn.index}].tool_calls")
        return f"{reasoning}{self._mark(turn.content)}{calls}{'' if turn.is_open else END}"

    def _render_attachments(self, turn: Turn) -> str:
        """The tools and the schema of the answer, behind the text of the message that brings them."""
        texts: list[str] = []
        if turn.tools:
            schemas = "\n".join(self._mark(json_line(tool.document)) for tool in turn.tools)
            texts.append(self._render_tools(schemas))
        if turn.response_format is not None:
            texts.append(self._render_response_format(turn.response_format))
        return "".join(f"\n\n{text}" for text in texts)

    @abstractmethod
    def _render_tools(self, schemas: str) -> str:
        """The text that presents the tools to the model.

        Args:
            schemas: their documents, one a line.
        """

    def _render_response_format(self, schema: Json) -> str:
        """The text that presents the answer's schema to the model."""
        return (
            "## Response Format:\n\nYou MUST strictly adhere to the following schema to reply:\n"
            f"{self._mark(json_line(schema))}"
        )

    def _mark(self, text: str) -> str:
        return self._marks.mark(text)
