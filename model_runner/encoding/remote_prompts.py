"""Estimates order, shared prefixes and size of prompts for models behind an endpoint, whose tokenizer is not at hand.

Used by the *render* stage, beside `prompt_encoder.py`. The request carries the chat itself; here it is laid out as
bytes in the order in which providers assemble a prompt (system text, tools, the answer's schema, then the turns), so
that chats with a common prompt prefix have a common layout prefix. Four bytes make a *word*, which stands for a token:
UTF-8 has about four bytes a token in English and Chinese text alike. DeepSeek's rule of thumb, 0.3 tokens an English
and 0.6 a Chinese character, is 1.2 and 0.8 tokens a word. Counts in words are therefore estimates: they serve to order,
to cut shards and to quote, never to charge, and a prompt is refused only if half as many tokens would not fit.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TypeAlias

import numpy as np

from moebeam.model_runner.checkpoint.model_limits import find_limits
from moebeam.model_runner.encoding.chat.conversation import render_each
from moebeam.model_runner.encoding.prompt_encoder import PromptEncoder
from moebeam.schemas.canonical import Json, canonical_json
from moebeam.schemas.chat_options import DEFAULT_OPTIONS, ChatOptions, options_json
from moebeam.schemas.errors import InvalidMessages, RowError
from moebeam.schemas.records import Message, TokenIds, ToolCall

NUM_BYTES_PER_WORD = 4
LEAST_TOKENS_A_WORD = 0.5
"""A prompt may have as few tokens as this for each word; only one that is too long even so is refused."""

# Bytes that UTF-8 never uses, so that no text can spell the border between two parts; in a `str` they are the lone
# surrogates of Python's `surrogateescape`, which texts are not allowed to hold.
_PART, _FIELD, _PADDING = "\udcfe", "\udcfd", b"\xff"

_SYSTEM_ROLES = ("system", "developer")


@dataclass(frozen=True, slots=True)
class RemotePrompts:
    """Lays chats out as words; stands where a `PromptEncoder` stands for a model whose tokenizer is at hand.

    Attributes:
        model: as the provider calls it; its limits are looked up by this name.
        context_length: most tokens of prompt and answer together; None where nobody knows.
    """

    model: str
    context_length: int | None = None

    @classmethod
    def of_model(cls, model: str, max_model_len: int = 0) -> "RemotePrompts":
        """The prompts of a model, with the job's `max_model_len`, else its limits as of now where they are known."""
        if max_model_len:
            return cls(model, max_model_len)
        limits = find_limits(model, datetime.now(UTC))
        return cls(model, limits.context_tokens if limits is not None else None)

    @property
    def is_estimated(self) -> bool:
        """Whether token ids and their number are only guesses: always."""
        return True

    def thinks(self, options: ChatOptions) -> bool:
        """Whether the model will think, as far as its limits tell what it does by default."""
        if options.asked_thinking is not None:
            return options.asked_thinking
        limits = find_limits(self.model, datetime.now(UTC))
        return limits is not None and limits.is_api and limits.thinking != "never"

    def render(self, messages: Sequence[Message], options: ChatOptions = DEFAULT_OPTIONS) -> str:
        """The layout of a chat; equal only for chats and options that are sent alike.

        Raises:
            InvalidMessages: there is no message, or a text holds a lone surrogate, which UTF-8 cannot spell.
        """
        if not messages:
            raise InvalidMessages("messages: expected at least one, found none")
        layout = "".join(f"{_PART}{_FIELD.join(map(_check_text, part))}" for part in _list_parts(messages, options))
        return layout + _PART

    def render_batch(self, chats: Sequence[tuple[Sequence[Message], ChatOptions]]) -> list[str | RowError]:
        """As `render`, for many chats; an error stands in a layout's place."""
        return render_each(self.render, chats)

    def encode_batch(self, prompts: Sequence[str]) -> list[TokenIds]:
        """The words of layouts: int32 of any sign, shape (num_words,) each; as unsigned numbers in bytewise order."""
        return [_split_words(prompt) for prompt in prompts]

    def fits(self, num_prompt_tokens: int, max_tokens: int) -> bool:
        """Whether a prompt of so many words and its longest answer may have room in the context."""
        if self.context_length is None:
            return True
        return num_prompt_tokens * LEAST_TOKENS_A_WORD + max_tokens <= self.context_length


def estimate_output_tokens(text: str, reasoning: str | None, calls: Sequence[ToolCall]) -> int:
    """Words of an answer, for one whose provider did not count its tokens."""
    parts = (text, reasoning or "", *(part for call in calls for part in (call.name, call.arguments)))
    return sum(-(-len(part.encode("utf-8", "surrogatepass")) // NUM_BYTES_PER_WORD) for part in parts)


Encoder: TypeAlias = PromptEncoder | RemotePrompts
"""What lays out the prompts of a job: exactly, or by estimates."""


def load_encoder(path: str, encoding: str, model: str, max_model_len: int = 0) -> Encoder:
    """The encoder of a tokenizer's folder, or estimates where there is no folder.

    Args:
        path: of a checkpoint, or of its `tokenizer.json` and `config.json` alone; empty for a model behind an endpoint
            whose tokenizer is not at hand.
        encoding: see `load_encoding`.
        max_model_len: the context that the job asks for; 0 means what is known of the model.
    Raises:
        EngineLoadError: the folder cannot be read.
    """
    if not path:
        return RemotePrompts.of_model(model, max_model_len)
    return PromptEncoder.load(path, encoding, max_model_len)


def _list_parts(messages: Sequence[Message], options: ChatOptions) -> Iterator[tuple[str, ...]]:
    """What a prompt is made of, what is likeliest to be shared first; the first of each part is its name."""
    if options.reasoning_effort is not None:
        yield "effort", options.reasoning_effort
    num_system = next((i for i, message in enumerate(messages) if message.role not in _SYSTEM_ROLES), len(messages))
    for message in messages[:num_system]:
        yield _render_message(message)
    for tool in options.tools:
        yield "tool", _format_json(tool.document)
    if options.response_format.type != "text":
        yield options.response_format.type, _format_json(options.response_format.schema)
    for message in messages[num_system:]:
        yield _render_message(message)
    # Last, because how an answer begins is no part of what prompts share.
    if options != DEFAULT_OPTIONS:
        yield "options", options_json(_strip_shared(options))


def _strip_shared(options: ChatOptions) -> ChatOptions:
    """The options that `_parts` has not laid out before the turns."""
    return ChatOptions(
        tool_choice=options.tool_choice,
        parallel_tool_calls=options.parallel_tool_calls,
        thinking=options.thinking,
        max_reasoning_tokens=options.max_reasoning_tokens,
    )


def _render_message(message: Message) -> tuple[str, ...]:
    extra = (canonical_json(dict(message.extra)),) if message.extra else ()
    return (message.role, *(message.parts or (message.content,)), *extra)


def _format_json(value: Json) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _check_text(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidMessages(
            f"prompt: expected Unicode text, found a lone surrogate {text[error.start]!a} at character {error.start}"
        ) from error
    return text


def _split_words(prompt: str) -> TokenIds:
    content = prompt.encode("utf-8", "surrogateescape")
    content += _PADDING * (-len(content) % NUM_BYTES_PER_WORD)
    return np.frombuffer(content, dtype=">u4").astype(np.uint32).view(np.int32)
