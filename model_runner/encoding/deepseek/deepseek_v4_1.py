"""DeepSeek-V4.1: V4 with a token before system text, DSML tags that begin with a space, and efforts from 1 to 100.

A system message in the midst of a chat is answered like a user's, so it also counts as the last of them. A user's turn
made of tool results alone does not: what was thought before the calls is kept while their turn goes on.
"""

# ruff: noqa: RUF001 - the bars of the wire format are U+FF5C

from collections.abc import Sequence

from moebeam.model_runner.encoding.chat.conversation import Turn
from moebeam.model_runner.encoding.chat.token_marks import NO_MARKS, TokenMarks
from moebeam.model_runner.encoding.deepseek.deepseek_v4 import DeepSeekV4
from moebeam.model_runner.encoding.deepseek.dsml import V4_1_CALLS, DsmlFormat
from moebeam.model_runner.encoding.deepseek.effort import V4_1_RELEASE, EffortProfile

SYSTEM = "<｜System｜>"


class DeepSeekV41(DeepSeekV4):
    """See `ChatEncoding`; immutable."""

    name: str = "deepseek_v4_1"
    call_format: DsmlFormat = V4_1_CALLS

    def __init__(self, efforts: EffortProfile = V4_1_RELEASE, marks: TokenMarks = NO_MARKS) -> None:
        super().__init__(efforts, marks)

    def _find_last_user(self, turns: Sequence[Turn]) -> int:
        return max(
            (
                at
                for at, turn in enumerate(turns)
                if turn.role == "developer"
                or (turn.role == "user" and not all(part.is_result for part in turn.parts))
                or (turn.role == "system" and at > 0)
            ),
            default=-1,
        )

    def _render_head(self, turns: Sequence[Turn], effort: str) -> str:
        return f"{SYSTEM}{effort}" if effort or turns[0].role == "system" else ""

    def _render_system_begin(self, at: int) -> str:
        return SYSTEM if at > 0 else ""

    def _is_asked(self, turn: Turn, at: int, following: str | None) -> bool:
        if turn.role == "system":
            return at > 0 or following is None
        return super()._is_asked(turn, at, following)
