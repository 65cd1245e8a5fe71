"""Reads an answer from generated tokens: where it ends, its text, reasoning and calls. Used by in-process engines."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import tokenizers

from moebeam.model_runner.encoding.chat.answers import END_OF_THINKING
from moebeam.model_runner.encoding.chat_encoding import ChatEncoding
from moebeam.schemas.errors import RowError
from moebeam.schemas.records import FinishReason, Request, TokenIds, ToolCall

_NUM_SPARE_TOKENS = 8
_NUM_TAIL_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer as read from its tokens.

    Attributes:
        text: what is meant for the user, up to a stop string.
        num_reasoning_tokens: tokens of the reasoning, the one that closes it included.
        error: why markup in the answer cannot be read; the text then holds all of it.
        repaired: what was mended in the markup.
    """

    text: str
    finish_reason: FinishReason
    reasoning_content: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    num_reasoning_tokens: int = 0
    error: RowError | None = None
    repaired: tuple[str, ...] = ()


class AnswerReader:
    """Reads one model's answers, with its tokenizer and the encoding of its prompts."""

    def __init__(
        self, tokenizer: tokenizers.Tokenizer, encoding: ChatEncoding, end_token_ids: Iterable[int] = ()
    ) -> None:
        """
        Args:
            end_token_ids: tokens that end an answer; they are no part of its text, special or not.
        """
        self._tokenizer = tokenizer
        self._encoding = encoding
        markup = {token_id for text in encoding.markup if (token_id := tokenizer.token_to_id(text)) is not None}
        special = {token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        self._silent = (special | set(end_token_ids)) - markup
        self._think_end_id = tokenizer.token_to_id(END_OF_THINKING)

    def read(self, request: Request, token_ids: Sequence[int], finish_reason: FinishReason) -> Answer:
        """Splits an answer into reasoning, content and calls.

        Args:
            token_ids: as generated; tokens that end an answer may be among them.
            finish_reason: why the engine stopped; an answer that stops after calling tools has `tool_calls`.
        """
        spoken = [token_id for token_id in token_ids if token_id not in self._silent]
        text, _ = cut_at_stop(self._tokenizer.decode(spoken, skip_special_tokens=False), request.sampling.stop)
        tools = request.options.callable_tools
        if not self._encoding.has_reasoning and not tools:
            return Answer(text, finish_reason)
        starts_in_reasoning = self._encoding.has_reasoning and self._encoding.starts_in_reasoning(
            decode_tail(self._tokenizer, request.prompt_token_ids)
        )
        parsed = self._encoding.parse(
            text,
            starts_in_reasoning=starts_in_reasoning,
            has_tools=bool(tools),
            tools=tools,
            is_cut=finish_reason == "length",
        )
        num_reasoning = 0
        if parsed.reasoning_content is not None:
            num_reasoning = self._num_reasoning_tokens(token_ids, parsed.reasoning_content)
        is_calling = bool(parsed.tool_calls) and finish_reason == "stop"
        return Answer(
            parsed.content,
            "tool_calls" if is_calling else finish_reason,
            parsed.reasoning_content,
            parsed.tool_calls,
            num_reasoning,
            parsed.error,
            parsed.repaired,
        )

    def _num_reasoning_tokens(self, token_ids: Sequence[int], reasoning: str) -> int:
        if self._think_end_id is not None and self._think_end_id in token_ids:
            return list(token_ids).index(self._think_end_id) + 1
        if END_OF_THINKING in self._tokenizer.decode(list(token_ids), skip_special_tokens=False):
            # `</think>` is several tokens here, so the reasoning is tokenized and counted on its own.
            num_tokens = len(self._tokenizer.encode(reasoning + END_OF_THINKING, add_special_tokens=False).ids)
            return min(num_tokens, len(token_ids))
        return len(token_ids)


def decode_tail(tokenizer: tokenizers.Tokenizer, prompt_token_ids: TokenIds) -> str:
    """Decodes the end of a prompt, special tokens included: enough to see whether it opens the model's reasoning."""
    tail = [int(token_id) for token_id in prompt_token_ids[-_NUM_TAIL_TOKENS:]]
    return tokenizer.decode(tail, skip_special_tokens=False)


def cut_at_stop(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """The text before the first of the stop strings, and whether there was one."""
    starts = [start for string in stop if (start := text.find(string)) >= 0]
    return (text[: min(starts)], True) if starts else (text, False)


def decode_answer(token_ids: Sequence[int], tokenizer: tokenizers.Tokenizer, stop: Sequence[str]) -> tuple[str, bool]:
    """The answer's text up to a stop string, without special tokens, and whether there was a stop string."""
    return cut_at_stop(tokenizer.decode(list(token_ids), skip_special_tokens=True), stop)


class StopStrings:
    """Detects a stop string; call with the whole answer after each token.

    A string of n bytes spans at most n tokens that say anything, so only the last ones are decoded at each call.
    """

    def __init__(self, stop: Sequence[str], tokenizer: tokenizers.Tokenizer) -> None:
        self._stop = tuple(stop)
        self._tokenizer = tokenizer
        self._num_last = max(len(string.encode()) for string in stop) + _NUM_SPARE_TOKENS

    def __call__(self, token_ids: Sequence[int]) -> bool:
        last = token_ids[-self._num_last :]
        if not decode_answer(last, self._tokenizer, self._stop)[1]:
            return False
        return decode_answer(token_ids, self._tokenizer, self._stop)[1]
