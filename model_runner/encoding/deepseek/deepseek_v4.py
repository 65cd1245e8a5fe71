"""DeepSeek-V4's prompts and answers, as its release encoder writes them (the facts: `facts/deepseek.md`, the vectors).

    <｜begin▁of▁sentence｜>{effort}{system}<｜User｜>{text}<｜Assistant｜><think>{reasoning}</think>{content}{calls}<｜end▁of▁sentence｜>

Tools and the schema of the answer hang on the first system message, results of tools stand in a user's turn. Where no
tools are in sight, reasoning from before the last user's turn is dropped. V4.1 (`deepseek_v4_1.py`) is this with other
tags, a token before system text, and numbers for efforts.
"""

# ruff: noqa: RUF001, RUF002 - the bars of the wire format are U+FF5C

from collections.abc import Sequence

from moebeam.model_runner.encoding.chat.answers import END_OF_THINKING, THINK
from moebeam.model_runner.encoding.chat.conversation import (
    TASKS,
    Turn,
    attach_options,
    drop_old_thinking,
    merge_results,
    read_turns,
)
from moebeam.model_runner.encoding.chat.token_marks import NO_MARKS, TokenMarks
from moebeam.model_runner.encoding.deepseek.deepseek_dsml import ASSISTANT, BEGIN, USER, DeepSeekDsml
from moebeam.model_runner.encoding.deepseek.dsml import DSML, V4_CALLS, DsmlFormat
from moebeam.model_runner.encoding.deepseek.effort import V4_RELEASE, EffortProfile
from moebeam.schemas.chat_options import ChatOptions
from moebeam.schemas.records import Message

LATEST_REMINDER = "<｜latest_reminder｜>"
ROLES = frozenset({"system", "developer", "user", "assistant", "tool", "latest_reminder"})
_BETWEEN_PARTS = "\n\n"
"""Between the text parts of a message, and between the results and texts of a user's turn."""

_TOOLS = """## Tools

You have access to a set of tools to help answer the user's question. You can invoke tools by writing a \
"<{dsml}{block}>" block like the following:

<{dsml}{block}>
<{dsml}{invoke} name="$TOOL_NAME">
<{dsml}{parameter} name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</{dsml}{parameter}>
...
</{dsml}{invoke}>
<{dsml}{invoke} name="$TOOL_NAME2">
...
</{dsml}{invoke}>
</{dsml}{block}>

String parameters should be specified as is and set `string="true"`. For all other types (numbers, booleans, arrays, \
objects), pass the value in JSON format and set `string="false"`.

If thinking_mode is enabled (triggered by <think>), you MUST output your complete reasoning inside <think>...</think> \
BEFORE any tool calls or final response.

Otherwise, output directly after </think> with tool calls or final response.

### Available Tool Schemas

{schemas}

You MUST strictly follow the above defined tool name and parameter schemas to invoke tool calls.
"""


class DeepSeekV4(DeepSeekDsml):
    """See `ChatEncoding`; immutable.

    Args:
        efforts: the checkpoint's own encoder profile.
        marks: the tokens that data must not spell.
    """

    name: str = "deepseek_v4"
    call_format: DsmlFormat = V4_CALLS

    def __init__(self, efforts: EffortProfile = V4_RELEASE, marks: TokenMarks = NO_MARKS) -> None:
        super().__init__(marks)
        self._efforts = efforts

    def render(self, messages: Sequence[Message], options: ChatOptions) -> str:
        turns = merge_results(attach_options(read_turns(messages, ROLES, _BETWEEN_PARTS), options))
        thinks = self.is_thinking(options)
        keeps_all = any(turn.tools for turn in turns)
        if thinks and not keeps_all:
            turns = drop_old_thinking(turns, self._find_last_user(turns))
        last_user = self._find_last_user(turns)
        prompt = [BEGIN, self._render_head(turns, self._efforts.find_text(options.reasoning_effort) if thinks else "")]
        for at, turn in enumerate(turns):
            keeps_reasoning = thinks and (keeps_all or at > last_user)
            prompt.append(self._render_turn(turns, at, keeps_reasoning))
            following = turns[at + 1].role if at + 1 < len(turns) else None
            if following in (None, "assistant", "latest_reminder"):
                opens_thinking = thinks and (keeps_all or at >= last_user)
                is_asked = self._is_asked(turn, at, following)
                prompt.append(_render_transition(turn, is_asked, thinks, opens_thinking))
        return "".join(prompt)

    def starts_in_reasoning(self, prompt_tail: str) -> bool:
        """As for every encoding, except that tasks do not think."""
        is_task = prompt_tail.endswith(tuple(f"<｜{task}｜>" for task in TASKS))
        return not is_task and super().starts_in_reasoning(prompt_tail)

    def _find_last_user(self, turns: Sequence[Turn]) -> int:
        return max((at for at, turn in enumerate(turns) if turn.role in ("user", "developer")), default=-1)

    def _render_head(self, turns: Sequence[Turn], effort: str) -> str:
        """What stands between the first token and the first turn."""
        return effort

    def _render_system_begin(self, at: int) -> str:
        return ""

    def _render_turn(self, turns: Sequence[Turn], at: int, keeps_reasoning: bool) -> str:
        turn = turns[at]
        match turn.role:
            case "system":
                return f"{self._render_system_begin(at)}{self._mark(turn.content)}{self._render_attachments(turn)}"
            case "developer":
                return f"{USER}{self._mark(turn.content)}{self._render_attachments(turn)}"
            case "latest_reminder":
                return f"{LATEST_REMINDER}{self._mark(turn.content)}"
            case "assistant":
                answers_task = at > 0 and turns[at - 1].task is not None
                return self._render_answer(turn, keeps_reasoning=keeps_reasoning and not answers_task)
            case _:
                parts = [self._mark(part.text) for part in turn.parts]
                texts = [
                    f"<tool_result>{text}</tool_result>" if part.is_result else text
                    for part, text in zip(turn.parts, parts, strict=True)
                ]
                return USER + _BETWEEN_PARTS.join(texts)

    def _is_asked(self, turn: Turn, at: int, following: str | None) -> bool:
        """Whether a turn is answered by the assistant, who speaks next.

        DeepSeek's own encoder leaves a chat of system text alone without an assistant to answer it; a prompt must be
        ready to be answered, so system text counts where nobody else is asked (vLLM does the same).
        """
        return turn.role in ("user", "developer") or (turn.role == "system" and following != "latest_reminder")

    def _render_tools(self, schemas: str) -> str:
        calls = self.call_format
        return _TOOLS.format(
            dsml=DSML, block=calls.block, invoke=calls.invoke, parameter=calls.parameter, schemas=schemas
        )


def _render_transition(turn: Turn, is_asked: bool, thinks: bool, opens_thinking: bool) -> str:
    """What opens the answer to a turn, whether it stands in the chat or is to be written."""
    match turn.task:
        case None:
            return f"{ASSISTANT}{THINK if opens_thinking else END_OF_THINKING}" if is_asked else ""
        case "action":
            return f"{ASSISTANT}{THINK if thinks else END_OF_THINKING}<｜action｜>"
        case _:
            return f"<｜{turn.task}｜>"
