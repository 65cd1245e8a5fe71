"""Chat messages into a model's own prompt, and prompts into token ids.

Stands in the *render* stage, after the row's own template. Needs a checkpoint's tokenizer and chat template, neither
its weights nor torch, so that planning and quoting run on machines without an accelerator.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Self, cast

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import numpy as np
import tokenizers

from model_runner.checkpoint import checkpoint_revision, read_checkpoint_file, read_json_object, read_tokenizer
from schemas import storage
from schemas.errors import EngineLoadError, InvalidMessages
from schemas.records import Message, TokenIds

__all__ = ["PromptEncoder", "checkpoint_revision"]

_TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class PromptEncoder:
    """A checkpoint's chat template and tokenizer.

    Pickles as its path: a worker reads the files again, so they must be reachable from there.
    """

    def __init__(
        self,
        path: str,
        *,
        tokenizer: tokenizers.Tokenizer,
        template: jinja2.Template,
        special_tokens: Mapping[str, str],
        context_length: int,
    ) -> None:
        self.path = path
        self.context_length = context_length
        self._tokenizer = tokenizer
        self._template = template
        self._special_tokens = dict(special_tokens)

    @classmethod
    def load(cls, path: str) -> Self:
        """Read `config.json`, `tokenizer.json`, `tokenizer_config.json` and the chat template of a checkpoint.

        Args:
            path: folder of a Hugging Face checkpoint, local or on an object store.
        Raises:
            EngineLoadError: a file is missing or not what it should be; names the file, the expected and the found.
        """
        config = read_json_object(path, "config.json")
        settings = read_json_object(path, "tokenizer_config.json")
        tokenizer = read_tokenizer(path)
        text_config = config.get("text_config")
        sizes = cast("Mapping[str, Any]", text_config) if isinstance(text_config, dict) else config
        context_length = sizes.get("max_position_embeddings")
        if not isinstance(context_length, int) or context_length <= 0:
            raise EngineLoadError(
                f"{storage.join(path, 'config.json')}: expected a positive integer `max_position_embeddings`, "
                f"found {context_length!r}"
            )
        num_embeddings = sizes.get("vocab_size")
        num_tokens = tokenizer.get_vocab_size(with_added_tokens=True)
        if isinstance(num_embeddings, int) and num_tokens > num_embeddings:
            raise EngineLoadError(
                f"{storage.join(path, 'tokenizer.json')}: has {num_tokens} tokens, but config.json's `vocab_size` "
                f"is {num_embeddings}: tokenizer and model do not belong together"
            )
        return cls(
            path,
            tokenizer=tokenizer,
            template=_load_template(path, settings),
            special_tokens=_special_tokens(path, settings),
            context_length=context_length,
        )

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return type(self).load, (self.path,)

    @property
    def vocab_size(self) -> int:
        """How many tokens the tokenizer knows, added ones included; every id is below it or an added token's."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt of a chat, ready for the model to answer, special tokens included.

        Raises:
            InvalidMessages: there is no message, one lacks a role or text, the template refuses the chat, or the
                text holds a lone surrogate, which UTF-8 cannot spell.
        """
        if not messages:
            raise InvalidMessages("expected at least one message, found none")
        chat = [_template_message(position, message) for position, message in enumerate(messages)]
        try:
            prompt = self._template.render(messages=chat, add_generation_prompt=True, **self._special_tokens)
        except jinja2.TemplateError as error:
            raise InvalidMessages(f"the chat template refused the messages: {error}") from error
        except Exception as error:
            # A template is a program of others, and what it does to a chat it did not expect can raise anything.
            raise InvalidMessages(f"the chat template failed: {type(error).__name__}: {error}") from error
        _check_utf8(prompt, "prompt")
        return prompt

    def encode_batch(self, prompts: Sequence[str]) -> list[TokenIds]:
        """Token ids of rendered prompts: int32, shape (num_prompt_tokens,) each, in order.

        No special token is added, because the chat template writes them; those spelled out in a text are recognised.

        Raises:
            InvalidMessages: a prompt holds a lone surrogate (`render` never returns one); names the first such.
        """
        try:
            encodings = self._tokenizer.encode_batch_fast(list(prompts), add_special_tokens=False)
        except TypeError:
            for position, prompt in enumerate(prompts):
                _check_utf8(prompt, f"prompt {position}")
            raise
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encodings]

    def decode(self, ids: Sequence[int] | TokenIds) -> str:
        """The text of generated token ids, special tokens left out; bytes that are no UTF-8 become U+FFFD."""
        return self._tokenizer.decode([int(token_id) for token_id in ids], skip_special_tokens=True)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}`: marks answers for training; a prompt keeps the body as it is."""

    tags = {"generation"}  # noqa: RUF012 - Jinja declares it as a plain set

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node | list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """The environment that Hugging Face documents for chat templates."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.filters["tojson"] = _to_json
    functions = cast("dict[str, Any]", environment.globals)
    functions["raise_exception"] = _raise_exception
    functions["strftime_now"] = _strftime_now
    return environment


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> str:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    # UTC, because the workers of one job may stand in several time zones.
    return datetime.now(UTC).strftime(pattern)


def _template_message(position: int, message: Message) -> dict[str, Any]:
    for name, value in (("role", message.role), ("content", message.content)):
        if not isinstance(value, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InvalidMessages(f"message {position}: expected text as {name}, found {type(value).__name__}")
    if not message.role:
        raise InvalidMessages(f"message {position}: expected a role, found an empty one")
    return {**message.extra, "role": message.role, "content": message.content}


def _check_utf8(text: str, what: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidMessages(
            f"{what}: expected Unicode text, found a lone surrogate {text[error.start]!a} at character {error.start}"
        ) from error


def _load_template(path: str, settings: Mapping[str, Any]) -> jinja2.Template:
    """Compile `chat_template.jinja`, or else `chat_template` of `tokenizer_config.json`."""
    file = "chat_template.jinja"
    if storage.exists(storage.join(path, file)):
        try:
            source = read_checkpoint_file(path, file).decode("utf-8")
        except UnicodeDecodeError as error:
            raise EngineLoadError(f"{storage.join(path, file)}: expected UTF-8 text, found: {error}") from error
    else:
        file = "tokenizer_config.json"
        source = _default_template(path, settings.get("chat_template"))
    try:
        return _environment().from_string(source)
    except jinja2.TemplateError as error:
        raise EngineLoadError(f"{storage.join(path, file)}: expected a Jinja chat template, found: {error}") from error


def _default_template(path: str, found: object) -> str:
    if isinstance(found, list):
        named = {
            str(entry.get("name")): entry.get("template")
            for entry in cast("list[Any]", found)
            if isinstance(entry, dict)
        }
        found = named.get("default")
        if found is None:
            raise EngineLoadError(
                f"{storage.join(path, 'tokenizer_config.json')}: expected a chat template named `default`, "
                f"found only: {', '.join(sorted(named)) or 'none'}"
            )
    if not isinstance(found, str):
        raise EngineLoadError(
            f"{path}: expected a chat template in chat_template.jinja or as `chat_template` in tokenizer_config.json, "
            f"found {'none' if found is None else type(found).__name__}. How this model wants its chats laid out is "
            "not guessed: put the template that its authors describe into chat_template.jinja"
        )
    return found


def _special_tokens(path: str, settings: Mapping[str, Any]) -> dict[str, str]:
    """`bos_token` and its kin as text; `tokenizer_config.json` wins over `special_tokens_map.json`."""
    sources = [settings]
    if storage.exists(storage.join(path, "special_tokens_map.json")):
        sources.append(read_json_object(path, "special_tokens_map.json"))
    tokens: dict[str, str] = {}
    for source in sources:
        for name in _TOKEN_NAMES:
            value: Any = source.get(name)
            if isinstance(value, dict):
                value = cast("dict[str, Any]", value).get("content")
            if isinstance(value, str):
                tokens.setdefault(name, value)
    return tokens
