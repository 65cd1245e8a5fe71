"""Tokenizers with the grammars of their answers, and schemas with answers that keep them."""

from pathlib import Path

import numpy as np
import tokenizers
from hypothesis import strategies as st

from moebeam.model_runner.grammar.constraint import Constraint, ConstraintCompiler, MaskFiller
from moebeam.model_runner.grammar.json_grammar import json_schema_grammar
from moebeam.schemas.canonical import Json

END = "<\uff5cend\u2581of\u2581sentence\uff5c>"
"""The demo tokenizer's end token, in DeepSeek's spelling."""


DEMO_TOKENIZER = Path("jobs/demo/checkpoint/tokenizer.json")


# No characters that JSON must escape by number, nor DEL, which llguidance lets no string hold.
texts = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=12)


SCHEMAS: dict[str, tuple[Json, st.SearchStrategy[Json]]] = {
    "ticket": (
        {
            "type": "object",
            "properties": {
                "name": {"type": "string", "minLength": 1, "maxLength": 12},
                "account": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
                "priority": {"enum": ["low", "lower", "high", None]},
                "amount": {"type": ["integer", "null"], "minimum": 0, "maximum": 1000},
                "is_open": {"type": "boolean"},
            },
            "required": ["name", "account", "priority", "amount", "is_open"],
            "additionalProperties": False,
        },
        st.fixed_dictionaries(
            {
                "name": texts.filter(bool),
                "account": st.from_regex(r"\A[A-Z]{2}-[0-9]{3}\Z"),
                "priority": st.sampled_from(["low", "lower", "high", None]),
                "amount": st.none() | st.integers(0, 1000),
                "is_open": st.booleans(),
            }
        ),
    ),
    "optional": (
        {
            "type": "object",
            "properties": {"a": {"type": "string", "maxLength": 12}, "b": {"type": "integer"}},
            "additionalProperties": False,
        },
        st.fixed_dictionaries({}, optional={"a": texts, "b": st.integers()}),
    ),
    "array": (
        {
            "type": "array",
            "items": {
                "anyOf": [
                    {"type": "number", "minimum": -500, "maximum": 0.5},
                    {"enum": ["<think>", "<think", "é€😀"]},
                    {"$ref": "#/$defs/pair"},
                ]
            },
            "maxItems": 3,
            "$defs": {"pair": {"type": "array", "prefixItems": [{"type": "null"}], "items": False, "minItems": 1}},
        },
        st.lists(
            st.integers(-500, 0)
            | st.floats(-500, 0.5).map(lambda number: round(number, 3) + 0.0)
            | st.sampled_from(["<think>", "<think", "é€😀", [None]]),
            max_size=3,
        ),
    ),
    "integer": ({"type": "integer"}, st.integers()),
    "specials": ({"const": f"a{END}<think> <|eos|>"}, st.just(f"a{END}<think> <|eos|>")),
}


class Tongue:
    """A tokenizer with its compiler, as an engine holds them."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, eos_token_id: int) -> None:
        self.tokenizer = tokenizer
        self.eos_token_id = eos_token_id
        self.vocab_size = tokenizer.get_vocab_size()
        self.compiler = ConstraintCompiler(tokenizer, self.vocab_size, [eos_token_id])
        self.filler = MaskFiller(self.vocab_size, num_threads=1)

    def compile(self, schema: Json, **options: int) -> Constraint:
        return self.compiler.compile(json_schema_grammar(schema, **options))

    def text(self, token_ids: list[int]) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=True)

    def allowed(self, constraint: Constraint) -> set[int]:
        """The tokens of the next mask."""
        masks = self.filler.start([constraint]).result()
        assert masks is not None
        bits = np.unpackbits(masks.numpy().view(np.uint8), bitorder="little")
        return {int(token_id) for token_id in np.flatnonzero(bits)}
