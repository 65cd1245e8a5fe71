"""The part of `fenced_grammar.py` that runs behind the fence: makes the grammar of one kind of request."""

import json
from collections.abc import Callable, Mapping
from dataclasses import astuple
from typing import TypeAlias

from moebeam.model_runner.grammar.answer_grammar import build_answer_grammar
from moebeam.schemas.chat_options import parse_options_json
from moebeam.schemas.contract.answer_schema import Formats

GRAMMAR_ENTRY = "moebeam.model_runner.grammar.grammar_program:make_builder"

Source: TypeAlias = "tuple[str | None, Mapping[str, int]]"
"""The encoding's way to write calls, and the ids of its markup, as far as it is tokens."""

Item: TypeAlias = "tuple[str, str | None, Formats, bool]"
"""The options and the schema of the content, both as JSON, whether formats are asserted, and whether the prompt ends in
the reasoning."""


def make_builder(source: Source) -> Callable[[Item], str]:
    """What makes a grammar, as JSON of the fields of a `BuiltGrammar`, or null where any text is an answer."""
    call_format, token_ids = source

    def build(item: Item) -> str:
        options, schema, formats, starts_in_reasoning = item
        built = build_answer_grammar(
            parse_options_json(options),
            schema=None if schema is None else json.loads(schema),
            call_format=call_format,
            starts_in_reasoning=starts_in_reasoning,
            token_id=token_ids.get,
            formats=formats,
        )
        return json.dumps(built and astuple(built))

    return build
