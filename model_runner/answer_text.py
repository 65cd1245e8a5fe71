"""From tokens to text: where an answer ends, and what it says. Shared by the engines in process."""

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import tokenizers

from model_runner.checkpoint import read_json_object
from schemas import storage
from schemas.errors import EngineLoadError
from schemas.records import Request

_NUM_SPARE_TOKENS = 8


def cut_at_stop(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """The text before the first of the stop strings, and whether there was one."""
    starts = [start for string in stop if (start := text.find(string)) >= 0]
    return (text[: min(starts)], True) if starts else (text, False)


def text_of(token_ids: Sequence[int], tokenizer: tokenizers.Tokenizer, stop: Sequence[str]) -> tuple[str, bool]:
    """What an answer says, without special tokens and up to a stop string, and whether there was one."""
    return cut_at_stop(tokenizer.decode(list(token_ids), skip_special_tokens=True), stop)


class StopStrings:
    """Tells when an answer holds a stop string; call with the answer after each token.

    A string of n bytes spans at most n tokens that say anything, so only the last ones are decoded at each call.
    """

    def __init__(self, stop: Sequence[str], tokenizer: tokenizers.Tokenizer) -> None:
        self._stop = tuple(stop)
        self._tokenizer = tokenizer
        self._num_last = max(len(string.encode()) for string in stop) + _NUM_SPARE_TOKENS

    def __call__(self, token_ids: Sequence[int]) -> bool:
        last = token_ids[-self._num_last :]
        if not text_of(last, self._tokenizer, self._stop)[1]:
            return False
        return text_of(token_ids, self._tokenizer, self._stop)[1]


def seed_of(request: Request) -> int:
    """The request's own seed, or one that its tokens and attempt give, so that neighbours and order do not matter."""
    if request.sampling.seed is not None:
        return request.sampling.seed % 2**63
    digest = hashlib.sha256(request.prompt_token_ids.astype("<i4").tobytes())
    digest.update(request.attempt.to_bytes(8, "little"))
    return int.from_bytes(digest.digest()[:8], "little") % 2**63


@lru_cache(maxsize=16)
def read_end_token_ids(path: str) -> tuple[int, ...]:
    """The tokens that end an answer, of `generation_config.json` or else `config.json`.

    Raises:
        EngineLoadError: neither names one.
    """
    names = storage.list_names(path)
    for name in ("generation_config.json", "config.json"):
        found: object = read_json_object(path, name).get("eos_token_id") if name in names else None
        if isinstance(found, int):
            return (found,)
        if isinstance(found, list) and found and all(isinstance(token_id, int) for token_id in found):
            return tuple(found)
    raise EngineLoadError(
        f"{path}: expected `eos_token_id` in generation_config.json or config.json, found none: "
        "the model could not say that an answer is over"
    )
