"""Tells which strings llguidance's lexer can follow within its limits.

Part of `moebeam.model_runner.grammar.schema_forms`, for `values`. Counting two things at once (at most 50 words and at
most 500 characters) gives a lexer as many states as the product of both counts, and each new one costs a proof that
some text still ends it. Such a string compiles at once and fails in the middle of an answer.
"""

import json
import re
from functools import lru_cache

import numpy as np
from llguidance import LLMatcher, LLParserLimits
from llguidance.numpy import fill_next_token_bitmask

from moebeam.model_runner.grammar.schema_forms.patterns import byte_tokenizer

MAX_STEP_FUEL = 60_000
"""Of llguidance's units (some 0.1 us) for a step over single bytes. Of 18 strings tried, those that ran out of the
200,000 that llguidance grants for a step over 129,280 tokens need more than this here, the others mostly half of it."""

NUM_STEPS = 24
_LARGE_COUNT = re.compile(r"\{(?:\d+,)?(?:[5-9]|\d\d+)\}|\{\d\d+,")
_LIMITS = LLParserLimits(verbose_errors=False, step_lexer_fuel=MAX_STEP_FUEL)
_QUOTES = frozenset(b'"\\')
_SPACES = frozenset(b" ,.-/")


@lru_cache(maxsize=4096)
def is_affordable(patterns: tuple[str, ...], min_length: int, max_length: int | None) -> bool:
    """Whether a text of the string can be generated; found by generating the beginning of one.

    Args:
        patterns: translated expressions, all of which the text matches.
    """
    if len(patterns) < 2 and not any(map(_LARGE_COUNT.search, patterns)):
        return True
    schema = {"type": "string", "minLength": min_length} | ({} if max_length is None else {"maxLength": max_length})
    parts = [schema, *({"type": "string", "pattern": pattern} for pattern in patterns)]
    grammar = json.dumps({"grammars": [{"json_schema": {"allOf": parts}}]})
    matcher = LLMatcher(byte_tokenizer(), grammar, log_level=0, limits=_LIMITS)
    if matcher.is_error():
        return True  # llguidance says so at once, and the whole document is looked at for that.
    mask = np.zeros((1, (byte_tokenizer().vocab_size + 31) // 32), dtype=np.int32)
    rng = np.random.default_rng(0)
    for _ in range(NUM_STEPS):
        fill_next_token_bitmask(matcher, mask, 0)
        if matcher.is_error():
            return False
        allowed = np.flatnonzero(np.unpackbits(mask[0].view(np.uint8), bitorder="little")).tolist()
        words = [byte for byte in allowed if byte < 128 and byte not in _QUOTES] or allowed
        spaces = [byte for byte in words if byte in _SPACES]
        # A space in five, so that texts come to count words too.
        byte = int(rng.choice(spaces if spaces and rng.random() < 0.2 else words))
        if not matcher.consume_token(byte):
            return False
        if matcher.is_stopped():
            return True
    return True
