"""Which tokens end an answer of an engine in process: what the configuration names, and what only the tokenizer knows.

Chat models are often tuned to end their turns with another token than the base model's, of which `config.json` may know
nothing: it is the tokenizer's `eos_token`, or what the chat template writes behind an answer.
"""

from collections.abc import Collection, Iterator
from typing import cast

import tokenizers

from moebeam.model_runner.checkpoint.files import read_json_object
from moebeam.model_runner.checkpoint.model_config import CONFIG_NAME, language_model_values, refuse_value
from moebeam.model_runner.encoding.chat_encoding import ChatEncoding
from moebeam.model_runner.encoding.chat_template import SETTINGS_FILE, ChatTemplate, read_special_tokens
from moebeam.schemas.errors import EngineLoadError
from moebeam.schemas.store import storage

_GENERATION_NAME = "generation_config.json"
_KEY = "eos_token_id"


def read_end_token_ids(path: str, tokenizer: tokenizers.Tokenizer, encoding: ChatEncoding) -> tuple[int, ...]:
    """The ids of tokens that end an answer, those of `generation_config.json` (or else `config.json`) first.

    Raises:
        EngineLoadError: a file names what is no token of the model, or nothing names one.
    """
    names = storage.list_names(path)
    found = dict.fromkeys(_read_configured(path, names, tokenizer))
    found |= dict.fromkeys(_find_in_tokenizer(path, names, tokenizer))
    found |= dict.fromkeys(_find_in_template(tokenizer, encoding))
    if not found:
        raise EngineLoadError(
            f"{path}: expected `{_KEY}` in {_GENERATION_NAME} or {CONFIG_NAME}, or an `eos_token` of the tokenizer in "
            f"{SETTINGS_FILE}, found none: the model could not say that an answer is over"
        )
    return tuple(found)


def _read_configured(path: str, names: Collection[str], tokenizer: tokenizers.Tokenizer) -> list[int]:
    config = read_json_object(path, CONFIG_NAME) if CONFIG_NAME in names else {}
    sizes = language_model_values(config)
    stated: object = sizes.get("vocab_size")
    num_tokens = stated if isinstance(stated, int) else tokenizer.get_vocab_size(with_added_tokens=True)
    generation = read_json_object(path, _GENERATION_NAME) if _GENERATION_NAME in names else {}
    for name, source in ((_GENERATION_NAME, generation), (CONFIG_NAME, config), (CONFIG_NAME, sizes)):
        found: object = source.get(_KEY)
        if found is None or found == []:
            continue
        listed = cast("list[object]", found) if isinstance(found, list) else [found]
        token_ids = [entry for entry in listed if isinstance(entry, int) and not isinstance(entry, bool)]
        if len(token_ids) < len(listed) or not all(0 <= token_id < num_tokens for token_id in token_ids):
            raise refuse_value(
                storage.join(path, name), _KEY, f"token ids from 0 to {num_tokens - 1}, one or a list of them", found
            )
        return token_ids
    return []


def _find_in_tokenizer(path: str, names: Collection[str], tokenizer: tokenizers.Tokenizer) -> Iterator[int]:
    settings = read_json_object(path, SETTINGS_FILE) if SETTINGS_FILE in names else {}
    text = read_special_tokens(path, settings).get("eos_token")
    token_id = tokenizer.token_to_id(text) if text else None
    if token_id is not None:
        yield token_id


def _find_in_template(tokenizer: tokenizers.Tokenizer, encoding: ChatEncoding) -> Iterator[int]:
    if not isinstance(encoding, ChatTemplate):
        return  # the authors' encoders end turns with the `eos_token`
    behind = encoding.find_turn_end().lstrip()
    token_ids = tokenizer.encode(behind, add_special_tokens=False).ids
    added = tokenizer.get_added_tokens_decoder()
    if token_ids and token_ids[0] in added and added[token_ids[0]].content not in encoding.markup:
        yield int(token_ids[0])
