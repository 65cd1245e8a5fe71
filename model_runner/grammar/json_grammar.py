"""Turns JSON Schemas into llguidance grammars; `docs/adr/0007-schema-forms.md` says which keywords and why.

`render` makes a request's grammar text once, without a model. In-process engines compile it for their tokenizer
(`constraint.py`); vLLM takes the text as it is.

    enforceable = enforceable_schema(schema)
    grammar = json_schema_grammar(enforceable.document)
    for relaxation in enforceable.relaxed: ...  # what only validation checks
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, TypeAlias

from llguidance import LLMatcher, LLParserLimits

from moebeam.model_runner.grammar.schema_forms.document import BuiltDocument, build_document
from moebeam.model_runner.grammar.schema_forms.patterns import byte_tokenizer
from moebeam.model_runner.grammar.schema_forms.relaxation import Relaxation
from moebeam.schemas.canonical import Json
from moebeam.schemas.contract.strict_json import has_lone_surrogate
from moebeam.schemas.errors import InvalidGrammar, abbreviate

__all__ = [
    "DEFAULT_MAX_STRING_LENGTH",
    "DEFAULT_MAX_WHITESPACE",
    "EnforceableSchema",
    "Relaxation",
    "enforceable_schema",
    "json_object_grammar",
    "json_schema_grammar",
]

Formats: TypeAlias = Literal["assert", "annotate"]

DEFAULT_MAX_WHITESPACE = 16
"""Most characters of white space between two tokens of JSON: enough to indent, too few to use up an answer."""

DEFAULT_MAX_STRING_LENGTH: int | None = None
"""Most characters of a string that its schema does not bound; None leaves the bound to `max_tokens`.

Counting makes llguidance 1.9.1 derive a new state for each character: 0.1 ms a mask instead of 0.01 ms, for 129,280
tokens.
"""

MAX_CACHED_SCHEMAS = 256
MAX_PARTS = 8
"""Most parts into which `_bisect` divides the keywords of a schema that llguidance cannot compile."""

MAX_SEARCH_COST = 8_000
"""Most parts of a schema that are looked at, over and over, in search of the keywords that llguidance cannot compile;
beyond, all that may be at fault are left to validation."""

MAX_DOCUMENT_CHARACTERS = 500_000
"""Largest schema that llguidance is given; of 1.3 MB it took six seconds, then panicked."""

# Verbose errors quote what was generated, which belongs to the row and not to a log.
_LIMITS = LLParserLimits(verbose_errors=False)

_CONTROL = re.compile(r"\\u00(?:0[0-7bBeEfF]|1[0-9a-fA-F])")

_COSTLY = (
    ("patternProperties", "propertyNames"),
    ("pattern", "format"),
    ("minItems", "maxItems", "minLength", "maxLength", "minProperties", "maxProperties"),
    ("multipleOf", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
    ("properties", "items", "prefixItems", "additionalProperties", "unevaluatedProperties", "required", "type"),
)


@dataclass(frozen=True, slots=True)
class EnforceableSchema:
    """A schema that llguidance enforces exactly.

    Attributes:
        document: admits every value of the original schema, in one spelling; must not be changed.
        relaxed: keywords of the original that only validation checks; if empty, every text of the grammar is valid.
        narrowed: keywords by which valid values, or a usual way to write them, are left out.
    """

    document: Mapping[str, Json]
    relaxed: tuple[Relaxation, ...]
    narrowed: tuple[Relaxation, ...] = ()


def enforceable_schema(
    schema: Json, *, formats: Formats = "assert", max_string_length: int | None = DEFAULT_MAX_STRING_LENGTH
) -> EnforceableSchema:
    """Finds the tightest schema that a grammar can enforce, and lists what it leaves to validation.

    The grammar restricts spelling: properties come in the schema's order, integers have neither fraction nor exponent,
    strings hold no control characters except white space, and no DEL. What else it leaves out is named as narrowed:
    numbers with bounds have no exponent, and some formats admit their common texts only (see
    `schema_forms.formats.NARROWED`). A grammar does not count nesting or digits: recursive schemas admit values deeper
    than the 128 levels that validation reads, and numbers may exceed 4,300 digits or have such exponents.

    Never fetches a `$ref`: what lies outside the document is left to validation.

    Args:
        schema: an object or a boolean; `$schema` selects the draft, 2020-12 where there is none.
        formats: whether validation asserts `format`.
        max_string_length: most characters of a string that has neither `maxLength` nor a pattern; None leaves the
            bound to `max_tokens`.
    Raises:
        InvalidGrammar: not a schema, or no value is valid for it.
    """
    if not isinstance(schema, Mapping | bool):
        raise InvalidGrammar(f"expected a JSON Schema, found {abbreviate(schema)}")
    try:
        text = json.dumps(schema, ensure_ascii=False, allow_nan=False)
        text.encode()  # raises on a lone surrogate, which no answer can hold
        return _make_enforceable(text, formats == "assert", max_string_length)
    except (TypeError, ValueError, KeyError, AttributeError, RecursionError) as error:
        raise InvalidGrammar(f"expected a JSON Schema, found one that cannot be read: {error!r:.200}") from error


@lru_cache(MAX_CACHED_SCHEMAS)
def _make_enforceable(text: str, are_formats_asserted: bool, max_string_length: int | None) -> EnforceableSchema:
    document: Any = json.loads(text)

    def build(left_out: Sequence[tuple[str, str]]) -> BuiltDocument:
        return build_document(
            document,
            are_formats_asserted=are_formats_asserted,
            max_string_length=max_string_length,
            left_out=left_out,
        )

    built = build(())
    if built.schema is None:
        raise InvalidGrammar("expected a JSON Schema that some value keeps, found one that refuses every value")
    reason = _find_refusal(inline_schema(built.schema))
    if reason is None:
        return EnforceableSchema(built.schema, built.relaxed, built.narrowed)
    reason = f"llguidance cannot compile it: {reason[:120]}"

    cost = built.cost + len(str(built.schema)) // 100

    def fits(left_out: Sequence[tuple[str, str]]) -> bool:
        nonlocal cost
        if cost > MAX_SEARCH_COST:
            return False
        wider = build(left_out)
        cost += wider.cost
        return wider.schema is not None and _find_refusal(inline_schema(wider.schema)) is None

    left_out = _find_least_left_out(built.enforced, fits)
    if left_out is not None:
        wider = build(left_out)
        more = (Relaxation(pointer, keyword, reason) for pointer, keyword in left_out)
        return EnforceableSchema(wider.schema or {}, tuple(sorted({*wider.relaxed, *more})), wider.narrowed)
    everything = build_document(
        {"type": "object"} if _is_object(built.schema) else True,
        are_formats_asserted=are_formats_asserted,
        max_string_length=max_string_length,
    )
    more = (Relaxation(pointer, keyword, reason) for pointer, keyword in built.enforced)
    return EnforceableSchema(everything.schema or {}, tuple(sorted({*built.relaxed, *more})))


@lru_cache(MAX_CACHED_SCHEMAS)
def _find_refusal(document: str) -> str | None:
    """Why llguidance cannot compile a schema; None where it can."""
    if len(document) > MAX_DOCUMENT_CHARACTERS:
        return f"{len(document)} characters, more than {MAX_DOCUMENT_CHARACTERS}"
    grammar = f'{{"grammars": [{{"json_schema": {document}}}]}}'
    matcher = LLMatcher(byte_tokenizer(), grammar, log_level=0, limits=_LIMITS)
    return matcher.get_error().splitlines()[0] if matcher.is_error() else None


def _find_least_left_out(
    enforced: Sequence[tuple[str, str]], fits: Callable[[Sequence[tuple[str, str]]], bool]
) -> list[tuple[str, str]] | None:
    """The fewest keywords, by bisection, that must be dropped so that the rest compiles; cheap kinds are tried first.

    Returns:
        Pointers and keywords, innermost first; None where nothing helps.
    """
    together: list[tuple[str, str]] = []
    for keywords in _COSTLY:
        found = sorted((at for at in enforced if at[1] in keywords), key=lambda at: (-at[0].count("/"), at))
        if not found:
            continue
        if fits(found):
            return _bisect(found, fits)
        together += found
        if together != found and fits(together):
            return _bisect(together, fits)
    return None


def _bisect(found: list[tuple[str, str]], fits: Callable[[Sequence[tuple[str, str]]], bool]) -> list[tuple[str, str]]:
    num_parts = 2
    while len(found) > 1:
        size = -(-len(found) // num_parts)
        parts = [found[start : start + size] for start in range(0, len(found), size)]
        smaller = next((part for part in parts if fits(part)), None)
        if smaller is None:
            # No part suffices alone, but one may be superfluous.
            rests = ([at for at in found if at not in part] for part in parts) if num_parts > 2 else ()
            smaller = next((rest for rest in rests if fits(rest)), None)
        if smaller is not None:
            found, num_parts = smaller, 2
        elif num_parts >= min(len(found), MAX_PARTS):
            break
        else:
            num_parts *= 2
    return found


def _is_object(schema: Mapping[str, Json]) -> bool:
    return schema.get("type") == "object"


def json_schema_grammar(schema: Json, *, max_whitespace: int = DEFAULT_MAX_WHITESPACE) -> str:
    """Writes the grammar of a schema as it stands; pass it documents from `enforceable_schema`.

    Properties come in the schema's order, no white space stands around the value, and only characters that need it are
    escaped. Given any other schema, llguidance 1.9.1 may refuse it or admit too much: an unbounded `number` may be
    1e999, some patterns admit a quotation mark that they exclude, bounds of over 15 digits are read inexactly. Never
    fetches a `$ref`.

    Args:
        schema: an object or a boolean; `x-guidance`, llguidance's own keyword, does not count.
        max_whitespace: most characters of white space at one place; 0 asks for compact JSON.
    Raises:
        InvalidGrammar: not a schema, no value can be valid, or a keyword that cannot be enforced.
    """
    reason = _find_refusal(inline_schema(schema))
    if reason is not None:
        raise invalid_grammar(reason)
    return f'{{"grammars": [{{"json_schema": {inline_schema(schema, max_whitespace=max_whitespace)}}}]}}'


def json_object_grammar(
    *, max_whitespace: int = DEFAULT_MAX_WHITESPACE, max_string_length: int | None = DEFAULT_MAX_STRING_LENGTH
) -> str:
    """The grammar of any JSON object, nested to any depth."""
    enforceable = enforceable_schema({"type": "object"}, max_string_length=max_string_length)
    return json_schema_grammar(enforceable.document, max_whitespace=max_whitespace)


def inline_schema(schema: Json, *, max_whitespace: int = DEFAULT_MAX_WHITESPACE) -> str:
    """A schema with llguidance's options in it, as JSON: what stands after `%json` in a Lark grammar.

    Raises:
        InvalidGrammar: not a schema.
    """
    if schema is True:
        schema = {}
    if not isinstance(schema, Mapping):
        raise InvalidGrammar(f"expected a JSON Schema that some value keeps, found {abbreviate(schema)}")
    try:
        text = json.dumps({key: value for key, value in schema.items() if key != "x-guidance"}, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InvalidGrammar(f"expected a JSON Schema, found a value that is not JSON: {error}") from error
    if re.search(r"\\ud[89a-f]", text, re.IGNORECASE) and has_lone_surrogate(schema):
        raise InvalidGrammar("expected a JSON Schema, found a lone surrogate, which is no Unicode character")
    options: dict[str, Json] = {
        "whitespace_flexible": max_whitespace > 0,
        # With `u`, a name that `additionalProperties` allows could be a declared one, spelled otherwise.
        "json_allowed_escapes": 'nrbtf\\"u' if _CONTROL.search(text) else 'nrbtf\\"',
    }
    if max_whitespace > 0:
        options["whitespace_pattern"] = rf"[\x20\x0A\x0D\x09]{{1,{max_whitespace}}}"
    separator = ", " if text != "{}" else ""
    return f'{{"x-guidance": {json.dumps(options)}{separator}{text[1:]}'


def invalid_grammar(reason: str) -> InvalidGrammar:
    """The error of a grammar that llguidance refuses."""
    return InvalidGrammar(
        f"expected a grammar that can be enforced, found: {abbreviate(reason, 300)}; of a JSON Schema, "
        "enforceable_schema leaves to validation what a grammar cannot enforce"
    )
