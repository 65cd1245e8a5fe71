"""Makes the grammars of requests, behind the fence where a schema of theirs is not plain.

To turn a schema into a grammar takes more than to compile it, and what its parts multiply to is known only afterwards.
"""

import json
import pickle
from collections.abc import Callable, Mapping
from typing import Any, cast

from moebeam.model_runner.encoding.chat.answers import END_OF_THINKING
from moebeam.model_runner.fence.fence import Program
from moebeam.model_runner.grammar.answer_grammar import (
    CALL_FORMATS,
    BuiltGrammar,
    build_answer_grammar,
    find_content_schema,
)
from moebeam.model_runner.grammar.grammar_program import GRAMMAR_ENTRY
from moebeam.model_runner.grammar.schema_forms.relaxation import Relaxation
from moebeam.schemas.canonical import Json
from moebeam.schemas.chat_options import ChatOptions, options_json
from moebeam.schemas.contract.answer_schema import Formats
from moebeam.schemas.contract.plain_schemas import is_plain
from moebeam.schemas.errors import InvalidGrammar, RowError

MAX_GRAMMAR_CPU_S = 3.0
"""Processor time to make one grammar. A schema that takes more is left to validation."""


def make_answer_grammar(
    options: ChatOptions,
    *,
    schema: Json | None,
    call_format: str | None,
    starts_in_reasoning: bool,
    token_id: Callable[[str], int | None],
    formats: Formats = "assert",
) -> BuiltGrammar | None:
    """As `build_answer_grammar`.

    Raises:
        InvalidGrammar: also where it takes too much to make.
    """
    schema = find_content_schema(options, schema)
    if (schema is None or is_plain(schema)) and all(is_plain(tool.parameters) for tool in options.tools):
        return build_answer_grammar(
            options,
            schema=schema,
            call_format=call_format,
            starts_in_reasoning=starts_in_reasoning,
            token_id=token_id,
            formats=formats,
        )
    source = pickle.dumps((call_format, _find_ids(call_format, token_id)))
    program = Program(GRAMMAR_ENTRY, source, "the grammar of its schema", MAX_GRAMMAR_CPU_S)
    content = None if schema is None else json.dumps(schema)
    (found,) = program.run([(options_json(options), content, formats, starts_in_reasoning)])
    if isinstance(found, RowError):
        raise found if isinstance(found, InvalidGrammar) else InvalidGrammar(str(found)) from found
    return _read_grammar(json.loads(cast("str", found)))


def _find_ids(call_format: str | None, token_id: Callable[[str], int | None]) -> Mapping[str, int]:
    style = CALL_FORMATS.get(call_format) if call_format is not None else None
    markup = {END_OF_THINKING} | (style.markup if style is not None else frozenset[str]())
    return {text: number for text in sorted(markup) if (number := token_id(text)) is not None}


def _read_grammar(fields: "list[Any] | None") -> BuiltGrammar | None:
    if fields is None:
        return None
    text, relaxed, narrowed = fields
    return BuiltGrammar(
        text, tuple(Relaxation(*entry) for entry in relaxed), tuple(Relaxation(*entry) for entry in narrowed)
    )
