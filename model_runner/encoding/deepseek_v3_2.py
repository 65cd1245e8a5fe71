"""DeepSeek-V3.2's prompts and answers, as its own encoder writes them.

    <｜begin▁of▁sentence｜>{system}<｜User｜>{text}<｜Assistant｜><think>{reasoning}</think>{content}{calls}<｜end▁of▁sentence｜>

Results of tools follow the calls in a block of their own, without a turn, and thinking begins anew behind them. There
are no efforts and no tasks.
"""

# ruff: noqa: RUF002 - the bars of the wire format are U+FF5C

from collections.abc import Sequence
from dataclasses import dataclass

from model_runner.encoding.answers import END_OF_THINKING, THINK, ParsedAnswer, parse_answer
from model_runner.encoding.conversation import Turn, attach_options, drop_old_thinking, json_line, read_turns
from model_runner.encoding.deepseek_v4 import ASSISTANT, BEGIN, END, USER, response_format_text
from model_runner.encoding.dsml import DSML, V3_2_CALLS, DsmlFormat
from model_runner.encoding.token_marks import NO_MARKS, TokenMarks
from schemas.chat_options import ChatOptions, Tool
from schemas.errors import InvalidMessages
from schemas.records import Message, ToolCall

ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})

_TOOLS = """## Tools

You have access to a set of tools you can use to answer the user's question.
You can invoke functions by writing a "<{dsml}function_calls>" block like the following as part of your reply to \
the user:
<{dsml}function_calls>
<{dsml}invoke name="$FUNCTION_NAME">
<{dsml}parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</{dsml}parameter>
...
</{dsml}invoke>
<{dsml}invoke name="$FUNCTION_NAME2">
...
</{dsml}invoke>
</{dsml}function_calls>

String and scalar parameters should be specified as is without any escaping or quotes, while lists and objects should \
use JSON format. The "string" attribute should be set to "true" for string type parameters and "false" for other types \
(numbers, booleans, arrays, objects).

If the thinking_mode is enabled, then after function results you should strongly consider outputting a thinking block. \
Here is an example:

<{dsml}function_calls>
...
</{dsml}function_calls>

<function_results>
...
</function_results>

<think>...thinking about results</think>

Here are the functions available in JSONSchema format:
<functions>
{schemas}
</functions>
"""


class DeepSeekV32:
    """See `ChatEncoding`; immutable."""

    name: str = "deepseek_v3_2"
    call_format: DsmlFormat = V3_2_CALLS
    markup: frozenset[str] = frozenset({THINK, END_OF_THINKING, DSML})
    has_reasoning: bool = True

    def __init__(self, marks: TokenMarks = NO_MARKS) -> None:
        self._marks = marks

    def thinking_of(self, options: ChatOptions) -> bool:
        """DeepSeek thinks unless it is told not to."""
        return options.thinking is not False

    def render(self, messages: Sequence[Message], options: ChatOptions) -> str:
        turns = attach_options(read_turns(messages, ROLES), options)
        thinks = self.thinking_of(options)
        if thinks:
            turns = drop_old_thinking(turns, _last_user(turns))
        chat = _Chat(turns, _last_user(turns), thinks)
        return BEGIN + "".join(self._turn(chat, at) for at in range(len(turns)))

    def render_calls(self, calls: Sequence[ToolCall]) -> str:
        return self.call_format.render(calls, marks=self._marks)

    def parse(self, text: str, *, starts_in_reasoning: bool, has_tools: bool) -> ParsedAnswer:
        return parse_answer(
            text,
            starts_in_reasoning=starts_in_reasoning,
            has_reasoning=True,
            call_format=self.call_format if has_tools else None,
            end_marker=END,
        )

    def starts_in_reasoning(self, prompt_tail: str) -> bool:
        turn = prompt_tail[prompt_tail.rfind(ASSISTANT) + 1 :]
        return turn.rfind(THINK) > turn.rfind(END_OF_THINKING)

    def _turn(self, chat: "_Chat", at: int) -> str:
        turn = chat.turns[at]
        opening = THINK if chat.thinks and at == chat.last_user else END_OF_THINKING
        match turn.role:
            case "system":
                return f"{self._marks.mark(turn.content)}{self._attachments(turn)}"
            case "developer":
                text = f"{self._attachments(turn)}\n\n# The user's message is: {self._marks.mark(turn.content)}"
                return f"{USER}{text}{ASSISTANT}{opening}"
            case "assistant":
                return self._assistant(chat, at)
            case "tool":
                return self._result(chat, at)
            case _:
                return f"{USER}{self._marks.mark(turn.content)}{ASSISTANT}{opening}"

    def _assistant(self, chat: "_Chat", at: int) -> str:
        turn = chat.turns[at]
        reasoning = ""
        if chat.thinks and at > chat.last_user:
            if not (turn.reasoning or turn.calls or turn.is_open):
                raise InvalidMessages(
                    f"messages[{turn.index}].reasoning_content: expected the reasoning of an answer to the last user's "
                    "message, found none: the model was not trained to think without"
                )
            goes_on_thinking = turn.is_prefix and not turn.content and not turn.calls
            reasoning = self._marks.mark(turn.reasoning) + ("" if goes_on_thinking else END_OF_THINKING)
        calls = self.call_format.render(turn.calls, marks=self._marks, where=f"messages[{turn.index}].tool_calls")
        return f"{reasoning}{self._marks.mark(turn.content)}{calls}{'' if turn.is_open else END}"

    def _result(self, chat: "_Chat", at: int) -> str:
        turn = chat.turns[at]
        asked = max((before for before in range(at) if chat.turns[before].role != "tool"), default=None)
        num_calls = len(chat.turns[asked].calls) if asked is not None else 0
        position = at - asked if asked is not None else 0
        if asked is None or position > num_calls:
            raise InvalidMessages(
                f"messages[{turn.index}]: expected results of the calls before them ({num_calls}), found one more"
            )
        is_last = at + 1 == len(chat.turns) or chat.turns[at + 1].role != "tool"
        if is_last and position < num_calls:
            raise InvalidMessages(
                f"messages[{turn.index}]: expected a result for each of {num_calls} calls, found {position}"
            )
        text = "\n\n<function_results>" if position == 1 else ""
        text += f"\n<result>{self._marks.mark(turn.content)}</result>"
        if is_last:
            opening = THINK if chat.thinks and at >= chat.last_user else END_OF_THINKING
            text += f"\n</function_results>\n\n{opening}"
        return text

    def _attachments(self, turn: Turn) -> str:
        texts: list[str] = []
        if turn.tools:
            texts.append(self._tools(turn.tools))
        if turn.response_format is not None:
            texts.append(response_format_text(turn.response_format, self._marks))
        return "".join(f"\n\n{text}" for text in texts)

    def _tools(self, tools: Sequence[Tool]) -> str:
        schemas = "\n".join(self._marks.mark(json_line(tool.document)) for tool in tools)
        return _TOOLS.format(dsml=DSML, schemas=schemas)


@dataclass(frozen=True, slots=True)
class _Chat:
    turns: Sequence[Turn]
    last_user: int
    thinks: bool


def _last_user(turns: Sequence[Turn]) -> int:
    return max((at for at, turn in enumerate(turns) if turn.role in ("user", "developer")), default=-1)
