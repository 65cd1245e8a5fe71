"""Answers drawn under a grammar, a byte a token: what it allows, and whether it allows a text."""

import json
import re
import tempfile
from functools import lru_cache
from pathlib import Path

import numpy as np
import tokenizers
from llguidance.numpy import fill_next_token_bitmask

from moebeam.model_runner.grammar.constraint import Constraint, ConstraintCompiler, num_mask_words
from moebeam.model_runner.grammar.json_grammar import enforceable_schema, json_schema_grammar
from moebeam.schemas.canonical import Json
from moebeam.schemas.errors import EngineFailed
from tests.support.models.checkpoints import EOS, save_tiny_tokenizer

MAX_TOKENS = 600
_BEYOND_INTEGERS = re.compile(r"\d[eE]\+?\d{4}")


@lru_cache(maxsize=1)
def byte_tokenizer() -> tokenizers.Tokenizer:
    with tempfile.TemporaryDirectory() as folder:
        return save_tiny_tokenizer(Path(folder)).backend_tokenizer


@lru_cache(maxsize=1)
def compiler() -> ConstraintCompiler:
    tokenizer = byte_tokenizer()
    return ConstraintCompiler(tokenizer, tokenizer.get_vocab_size(), [tokenizer.token_to_id(EOS)])


def compile_constraint(schema: Json, *, max_whitespace: int = 2) -> Constraint:
    """The constraint of a schema as jobs use it: relaxed where it must be."""
    return compiler().compile(json_schema_grammar(enforceable_schema(schema).document, max_whitespace=max_whitespace))


def allows(schema: Json, text: str) -> bool:
    """Whether the grammar of a schema allows a text and nothing less."""
    constraint = compile_constraint(schema)
    for token_id in byte_tokenizer().encode(text, add_special_tokens=False).ids:
        try:
            constraint.accept(token_id)
        except EngineFailed:
            return False
    return constraint.can_end


def allows_value(schema: Json, value: Json) -> bool:
    return allows(schema, json.dumps(value, ensure_ascii=False))


def draw(schema: Json, seed: int, num_answers: int) -> list[str]:
    """Random complete answers under the grammar that jobs use for a schema."""
    return draw_answers(compile_constraint(schema), seed, num_answers)


def draw_answers(first: Constraint, seed: int, num_answers: int) -> list[str]:
    """Random complete answers under a fresh constraint; the longer one is, the likelier a quote, a bracket or the end.

    Answers that do not end within `MAX_TOKENS` are left out, and those with a number of over 4,300 digits, which a
    grammar does not count.
    """
    tokenizer = byte_tokenizer()
    end = tokenizer.token_to_id(EOS)
    closing = {end, *(tokenizer.token_to_id(char) for char in '"}]')}
    mask = np.zeros((1, num_mask_words(tokenizer.get_vocab_size())), dtype=np.int32)
    found: list[str] = []
    for answer in range(num_answers):
        rng = np.random.default_rng([seed, answer])
        constraint = Constraint(first.matcher.deep_copy(), first.num_words)
        token_ids: list[int] = []
        while not constraint.is_over and len(token_ids) < MAX_TOKENS:
            fill_next_token_bitmask(constraint.matcher, mask, 0)
            assert constraint.failure is None
            allowed = np.flatnonzero(np.unpackbits(mask[0].view(np.uint8), bitorder="little")).tolist()
            ends = [token_id for token_id in allowed if token_id in closing]
            candidates = ends if ends and rng.random() < 0.1 + len(token_ids) / 150 else allowed
            token_id = int(rng.choice(candidates))
            constraint.accept(token_id)
            token_ids.append(token_id)
        text = tokenizer.decode(token_ids, skip_special_tokens=True)
        if constraint.is_over and not _BEYOND_INTEGERS.search(text):
            found.append(text)
    return found
