"""Renders chat messages as a model's prompt and encodes prompts as token ids.

Used by the *render* stage, after the row's own template. Needs a checkpoint's tokenizer and its `ChatEncoding`, neither
its weights nor torch, so that planning and quoting run on machines without an accelerator.
"""

import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, Self

import numpy as np
import tokenizers

from moebeam.model_runner.checkpoint.files import compute_checkpoint_revision, read_json_object, read_tokenizer
from moebeam.model_runner.checkpoint.model_config import CONFIG_NAME, find_context_length, language_model_values
from moebeam.model_runner.encoding.answer_text import decode_tail
from moebeam.model_runner.encoding.chat.token_marks import MARK, TokenMarks
from moebeam.model_runner.encoding.chat_encoding import ChatEncoding, load_encoding
from moebeam.model_runner.encoding.end_tokens import read_end_token_ids
from moebeam.schemas.chat_options import DEFAULT_OPTIONS, ChatOptions
from moebeam.schemas.errors import EngineLoadError, InvalidMessages, RowError
from moebeam.schemas.records import Message, TokenIds
from moebeam.schemas.store import storage

__all__ = ["PromptEncoder", "compute_checkpoint_revision"]

_PIECE_CHARACTERS = 256 << 10
"""A tokenizer takes some 150 bytes for each byte of text: 40 MB for a piece."""

_BATCH_CHARACTERS = 1 << 20
"""Most characters of prompts that are encoded at once, unless one alone has more."""

_PIECE_ERROR = 1.25
"""A text has no fewer tokens than its pieces have together, divided by this: only those at their borders differ."""


class PromptEncoder:
    """A checkpoint's tokenizer and chat encoding.

    Pickles as its path: a worker reads the files again, so they must be reachable from there.

    Attributes:
        encoding: prompts and answers of the model's family.
        context_length: most tokens of prompt and answer together.
        is_estimated: whether token ids and their number are only guesses; see `remote_prompts.py`.
    """

    is_estimated = False

    def __init__(
        self,
        path: str,
        *,
        tokenizer: tokenizers.Tokenizer,
        encoding: ChatEncoding,
        marks: TokenMarks,
        context_length: int,
        encoding_name: str = "auto",
        max_model_len: int = 0,
    ) -> None:
        self.path = path
        self.encoding = encoding
        self.context_length = context_length
        self._tokenizer = tokenizer
        self._marks = marks
        self._encoding_name = encoding_name
        self._max_model_len = max_model_len

    @classmethod
    def load(cls, path: str, encoding: str = "auto", max_model_len: int = 0) -> Self:
        """Read `config.json`, `tokenizer.json`, `tokenizer_config.json` and what lays out the chats of a checkpoint.

        Args:
            path: folder of a Hugging Face checkpoint, local or on an object store.
            encoding: see `load_encoding`.
            max_model_len: the context that the job asks for; 0 means what `config.json` implies.
        Raises:
            EngineLoadError: a file is missing or not what it should be; names the file, the expected and the found.
        """
        config = read_json_object(path, CONFIG_NAME)
        tokenizer = read_tokenizer(path)
        context_length = find_context_length(config, storage.join(path, CONFIG_NAME), max_model_len)
        num_embeddings = language_model_values(config).get("vocab_size")
        num_tokens = tokenizer.get_vocab_size(with_added_tokens=True)
        if isinstance(num_embeddings, int) and num_tokens > num_embeddings:
            raise EngineLoadError(
                f"{storage.join(path, 'tokenizer.json')}: has {num_tokens} tokens, but config.json's `vocab_size` "
                f"is {num_embeddings}: tokenizer and model do not belong together"
            )
        token_texts = [token.content for token in tokenizer.get_added_tokens_decoder().values()]
        return cls(
            path,
            tokenizer=tokenizer,
            encoding=load_encoding(path, encoding, token_texts=token_texts),
            marks=TokenMarks(token_texts),
            context_length=context_length,
            encoding_name=encoding,
            max_model_len=max_model_len,
        )

    def __reduce__(self) -> tuple[Any, tuple[str, str, int]]:
        return type(self).load, (self.path, self._encoding_name, self._max_model_len)

    def fits(self, num_prompt_tokens: int, max_tokens: int) -> bool:
        """Whether a prompt and its longest answer have room in the context."""
        return num_prompt_tokens + max_tokens <= self.context_length

    @property
    def vocab_size(self) -> int:
        """How many tokens the tokenizer knows, added ones included; every id is below it or an added token's."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def end_token_ids(self) -> tuple[int, ...]:
        """The ids of tokens that end an answer.

        Raises:
            EngineLoadError: see `read_end_token_ids`.
        """
        return read_end_token_ids(self.path, self._tokenizer, self.encoding)

    def token_id(self, text: str) -> int | None:
        """The id of the token with this text, or None."""
        return self._tokenizer.token_to_id(text)

    def render(self, messages: Sequence[Message], options: ChatOptions = DEFAULT_OPTIONS) -> str:
        """The prompt of a chat, ready for the model to answer, special tokens included.

        Where data spells one of the tokenizer's tokens there is a mark in it, by which `encode_batch` tells it from the
        token itself; `plain` takes the marks away.

        Raises:
            InvalidMessages: there is no message, one lacks a role or text, the encoding refuses the chat, or the
                text holds a lone surrogate, which UTF-8 cannot spell.
            InvalidTools: a message brings tools without the documented shape.
        """
        prompt = self.encoding.render(messages, options)
        _check_utf8(prompt, "prompt")
        return prompt

    def render_batch(self, chats: Sequence[tuple[Sequence[Message], ChatOptions]]) -> list[str | RowError]:
        """As `render`, for many chats; an error stands in a prompt's place."""
        return [_check_prompt(prompt) for prompt in self.encoding.render_batch(chats)]

    def plain(self, prompt: str) -> str:
        """A rendered prompt as people read it, without the marks of `render`."""
        return self._marks.plain(prompt)

    def starts_in_reasoning(self, prompt_token_ids: TokenIds) -> bool:
        """Whether an encoded prompt leaves the model inside its thinking."""
        encoding = self.encoding
        return encoding.has_reasoning and encoding.starts_in_reasoning(decode_tail(self._tokenizer, prompt_token_ids))

    def encode_batch(self, prompts: Sequence[str]) -> list[TokenIds]:
        """Token ids of rendered prompts: int32, shape (num_prompt_tokens,) each, in order.

        No special token is added, because the encoding writes them; those that data spells and `render` marked become
        text like any other.

        Raises:
            InvalidMessages: a prompt holds a lone surrogate (`render` never returns one); names the first such. Or the
                tokenizer gives up on one, as its regular expressions do after ten million steps back.
        """
        try:
            return [token_ids for batch in _cut_batches(prompts) for token_ids in self._encode(batch)]
        except TypeError:
            for position, prompt in enumerate(prompts):
                _check_utf8(prompt, f"prompt {position}")
            raise
        except BaseException as error:  # a panic of the Rust extension, which is no Exception
            if type(error).__name__ != "PanicException":
                raise
            raise InvalidMessages(f"prompt: expected text that the tokenizer encodes, found: {error!s:.300}") from error

    def has_more_tokens(self, prompt: str, num_tokens: int) -> bool:
        """Whether a long prompt surely has more tokens than these, found without encoding it whole.

        A prompt of 20 MiB would take 6 GB to encode. Its pieces are counted one by one until they are too many; for
        one that is short enough to be encoded, the answer is always no.
        """
        if len(prompt) <= _PIECE_CHARACTERS:
            return False
        num_counted = 0
        for start in range(0, len(prompt), _PIECE_CHARACTERS):
            piece = self._marks.plain(prompt[start : start + _PIECE_CHARACTERS])
            num_counted += sum(ids.shape[0] for ids in self.encode_batch([piece]))
            if num_counted > num_tokens * _PIECE_ERROR:
                return True
        return False

    def decode(self, ids: Sequence[int] | TokenIds) -> str:
        """The text of generated token ids, special tokens left out; bytes that are no UTF-8 become U+FFFD."""
        return self._tokenizer.decode([int(token_id) for token_id in ids], skip_special_tokens=True)

    def _encode(self, prompts: list[str]) -> list[TokenIds]:
        encodings = self._tokenizer.encode_batch_fast(prompts, add_special_tokens=False)
        return [
            self._encode_marked(prompt) if MARK in prompt else np.array(encoding.ids, dtype=np.int32)
            for prompt, encoding in zip(prompts, encodings, strict=True)
        ]

    def _encode_marked(self, prompt: str) -> TokenIds:
        ids: list[int] = []
        for text, is_data in self._marks.sections(prompt):
            ids += self._encode_data(text) if is_data else self._encode_text(self._tokenizer, text)
        return np.array(ids, dtype=np.int32)

    def _encode_data(self, text: str) -> list[int]:
        """Token ids of text whose tokens are only spelled: as the tokenizer would encode it if it had no added ones."""
        ids = self._encode_text(self._text_tokenizer, text)
        if self._token_ids.isdisjoint(ids):
            return ids
        # Some vocabularies hold their control tokens as pieces of text too: cut each where it was marked.
        pieces = self._marks.mark(text).split(MARK)
        return [token_id for piece in pieces for token_id in self._encode_text(self._text_tokenizer, piece)]

    @staticmethod
    def _encode_text(tokenizer: tokenizers.Tokenizer, text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False).ids)

    @cached_property
    def _token_ids(self) -> frozenset[int]:
        """The ids that data must not have."""
        tokens = self._tokenizer.get_added_tokens_decoder().items()
        return frozenset(token_id for token_id, token in tokens if token.content in self._marks.texts)

    @cached_property
    def _text_tokenizer(self) -> tokenizers.Tokenizer:
        """The tokenizer without its added tokens; built when the first data spells one."""
        document = json.loads(self._tokenizer.to_str())
        document |= {
            "added_tokens": [token for token in document["added_tokens"] if token["content"] not in self._marks.texts],
            "post_processor": None,
        }
        return tokenizers.Tokenizer.from_str(json.dumps(document))


def _cut_batches(prompts: Sequence[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    num_characters = 0
    for prompt in prompts:
        if batch and num_characters + len(prompt) > _BATCH_CHARACTERS:
            yield batch
            batch, num_characters = [], 0
        batch.append(prompt)
        num_characters += len(prompt)
    if batch:
        yield batch


def _check_prompt(prompt: str | RowError) -> str | RowError:
    if isinstance(prompt, RowError):
        return prompt
    try:
        _check_utf8(prompt, "prompt")
    except InvalidMessages as error:
        return error
    return prompt


def _check_utf8(text: str, what: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidMessages(
            f"{what}: expected Unicode text, found a lone surrogate {text[error.start]!a} at character {error.start}"
        ) from error
