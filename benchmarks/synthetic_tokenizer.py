"""A byte-level tokenizer of any size, the same on every machine: for measurements at a model's vocabulary.

Its tokens are made, not learnt: all bytes, what JSON is full of, numbers, syllables with and without a space, Chinese
characters and punctuation, each with all its beginnings, so that merges build it from left to right.
"""

import random
from collections.abc import Iterator, Sequence
from functools import lru_cache

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

DEEPSEEK_VOCAB_SIZE = 129_280
SPECIAL_TOKENS = (
    "<\uff5cbegin\u2581of\u2581sentence\uff5c>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "<think>",
    "</think>",
)
END_TOKEN_ID = 1

_STRUCTURE = (
    *('":', '":"', '","', '",', '"},', '"}', '"]', '{"', '["', "}]", "},{", "null", "true", "false", '": ', '": "'),
    *(', "', ",\n", '",\n', "\n\n", "\\n", '\\"', " " * 2, " " * 4, " " * 8, "\n" + " " * 2, "\n" + " " * 4),
)
_PUNCTUATION = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~ "


@lru_cache(maxsize=4)
def synthetic_tokenizer(
    vocab_size: int = DEEPSEEK_VOCAB_SIZE, special_tokens: tuple[str, ...] = SPECIAL_TOKENS
) -> tokenizers.Tokenizer:
    """A tokenizer of exactly so many tokens, special ones first; not to be changed.

    Raises:
        ValueError: too few for all bytes.
    """
    letters = _byte_letters()
    vocab = {text: token_id for token_id, text in enumerate([*special_tokens, *letters])}
    if vocab_size < len(vocab):
        raise ValueError(f"expected at least {len(vocab)} tokens, found {vocab_size}")
    merges: list[tuple[str, str]] = []
    for text in _texts():
        spelled = "".join(letters[byte] for byte in text.encode())
        for end in range(2, len(spelled) + 1):
            if len(vocab) == vocab_size:
                break
            if spelled[:end] not in vocab:
                vocab[spelled[:end]] = len(vocab)
                merges.append((spelled[: end - 1], spelled[end - 1]))
        if len(vocab) == vocab_size:
            break
    made = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(list(special_tokens))
    return made


def _byte_letters() -> Sequence[str]:
    """The character that stands for each byte in a byte-level vocabulary."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def _texts() -> Iterator[str]:
    yield from _STRUCTURE
    rng = random.Random(0)
    while True:
        kind = rng.random()
        if kind < 0.05:
            yield str(rng.randrange(1000))
        elif kind < 0.20:
            yield "".join(chr(rng.randrange(0x4E00, 0x9FA6)) for _ in range(rng.randint(1, 3)))
        elif kind < 0.25:
            yield "".join(rng.choice(_PUNCTUATION) for _ in range(rng.randint(2, 4)))
        else:
            word = "".join(rng.choice("bcdfghjklmnprstvwz") + rng.choice("aeiou") for _ in range(rng.randint(1, 5)))
            yield {0: word.capitalize(), 1: word.upper(), 2: f"_{word}", 3: word}.get(rng.randrange(10), f" {word}")
