"""DeepSeek-V3.2's prompts and answers, as its own encoder writes them.

    <｜begin▁of▁sentence｜>{system}<｜User｜>{text}<｜Assistant｜><think>{reasoning}</think>{content}{calls}<｜end▁of▁sentence｜>

Results of tools follow the calls in a block of their own, without a turn, and thinking begins anew behind them. There
are no efforts and no tasks.
"""

# ruff: noqa: RUF002 - the bars of the wire format are U+FF5C

from collections.abc import Sequence
from dataclasses import dataclass

from moebeam.model_runner.encoding.chat.answers import END_OF_THINKING, THINK
from moebeam.model_runner.encoding.chat.conversation import Turn, attach_options, drop_old_thinking, read_turns
from moebeam.model_runner.encoding.deepseek.deepseek_dsml import ASSISTANT, BEGIN, USER, DeepSeekDsml
from moebeam.model_runner.encoding.deepseek.dsml import DSML, V3_2_CALLS, DsmlFormat
from moebeam.schemas.chat_options import ChatOptions
from moebeam.schemas.errors import InvalidMessages
from moebeam.schemas.records import Message

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


class DeepSeekV32(DeepSeekDsml):
    """See `ChatEncoding`; immutable."""

    name: str = "deepseek_v3_2"
    call_format: DsmlFormat = V3_2_CALLS

    def render(self, messages: Sequence[Message], options: ChatOptions) -> str:
        turns = attach_options(read_turns(messages, ROLES, "\n"), options)
        thinks = self.is_thinking(options)
        if thinks:
            turns = drop_old_thinking(turns, _find_last_user(turns))
        chat = _Chat(turns, _find_last_user(turns), thinks)
        return BEGIN + "".join(self._render_turn(chat, at) for at in range(len(turns)))

    def _render_turn(self, chat: "_Chat", at: int) -> str:
        turn = chat.turns[at]
        opening = THINK if chat.thinks and at == chat.last_user else END_OF_THINKING
        match turn.role:
            case "system":
                return f"{self._mark(turn.content)}{self._render_attachments(turn)}"
            case "developer":
                text = f"{self._render_attachments(turn)}\n\n# The user's message is: {self._mark(turn.content)}"
                return f"{USER}{text}{ASSISTANT}{opening}"
            case "assistant":
                return self._render_assistant(chat, at)
            case "tool":
                return self._render_result(chat, at)
            case _:
                return f"{USER}{self._mark(turn.content)}{ASSISTANT}{opening}"

    def _render_assistant(self, chat: "_Chat", at: int) -> str:
        turn = chat.turns[at]
        keeps_reasoning = chat.thinks and at > chat.last_user
        if keeps_reasoning and not (turn.reasoning or turn.calls or turn.is_open):
            raise InvalidMessages(
                f"messages[{turn.index}].reasoning_content: expected the reasoning of an answer to the last user's "
                "message, found none: the model was not trained to think without"
            )
        return self._render_answer(turn, keeps_reasoning=keeps_reasoning)

    def _render_result(self, chat: "_Chat", at: int) -> str:
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
        text += f"\n<result>{self._mark(turn.content)}</result>"
        if is_last:
            opening = THINK if chat.thinks and at >= chat.last_user else END_OF_THINKING
            text += f"\n</function_results>\n\n{opening}"
        return text

    def _render_tools(self, schemas: str) -> str:
        return _TOOLS.format(dsml=DSML, schemas=schemas)


@dataclass(frozen=True, slots=True)
class _Chat:
    turns: Sequence[Turn]
    last_user: int
    thinks: bool


def _find_last_user(turns: Sequence[Turn]) -> int:
    return max((at for at, turn in enumerate(turns) if turn.role in ("user", "developer")), default=-1)
