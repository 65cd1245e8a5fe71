"""Whatever a keyword lets through validation can be generated, byte by byte, or the schema is named as narrowed."""

import json
import re
from decimal import Decimal
from itertools import permutations
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moebeam.model_runner.grammar.json_grammar import enforceable_schema
from moebeam.model_runner.grammar.schema_forms.formats import FORMATS, NARROWED
from moebeam.schemas.canonical import Json
from moebeam.schemas.contract.answer_schema import AnswerSchema
from moebeam.schemas.errors import InvalidGrammar, RowError
from tests.support.models.grammar_sampling import allows
from tests.support.paths import SHARED

BIG = 6.02e23
_AB = {"a": {"type": "integer"}, "b": {"type": "string"}}
_UNIT = {"type": "number", "minimum": 0, "maximum": 1}

CASES: dict[str, list[tuple[Json, list[Json]]]] = {
    "type": [
        ({}, [None, True, 1, -0.5, BIG, 1e-9, 10**30, "é", [], [1, [2]], {}, {"a": {"b": None}}]),
        ({"type": "number"}, [0, 0.1, -1.5, BIG, -BIG, 1e-300, 1.7e308, 10**40]),
        ({"type": "integer"}, [0, -7, 2**63, 10**40]),
        ({"type": ["string", "null"]}, ["", "a\n\t\"\\", "日本", None]),
    ],
    "enum": [({"enum": ["a", 1, 2.5, None, [1], {"a": 1}, BIG, 2**60]}, ["a", 1, None, [1], {"a": 1}, BIG, 2**60])],
    "const": [({"const": {"a": [1, "x"]}}, [{"a": [1, "x"]}]), ({"const": BIG}, [BIG])],
    "minimum": [
        ({"type": "number", "minimum": 0}, [0, 0.25, 10**20, 12.5]),
        ({"type": "number", "minimum": -1e28}, [0, -(10**20), 0.5]),
        ({"type": "integer", "minimum": 10**28}, [10**28, 10**30]),
    ],
    "maximum": [
        (_UNIT, [0, 1, 0.5, 0.00001]),
        ({"type": "number", "maximum": 1.79769e308}, [0, -5, 0.25, 10**30]),
        ({"type": "integer", "maximum": -(10**30)}, [-(10**30), -(10**31)]),
    ],
    "exclusiveMinimum": [({"type": "number", "exclusiveMinimum": 0}, [0.001, 3, 10**19])],
    "exclusiveMaximum": [({"type": "number", "exclusiveMaximum": 1e40}, [0, -0.5, 10**39])],
    "multipleOf": [({"type": "number", "multipleOf": 0.25}, [0, 0.25, -1.5, 7]), ({"multipleOf": 3}, [9, "a"])],
    "minLength": [({"type": "string", "minLength": 2}, ["ab", "日本", "a b c"])],
    "maxLength": [({"type": "string", "maxLength": 2}, ["", "ab", "日本", "😀😀"])],
    "pattern": [
        ({"type": "string", "pattern": r"^\w+\s\d*$"}, ["ab 1", "a\u00a0"]),
        ({"type": "string", "pattern": "a|b", "maxLength": 5}, ["xxa", "b", '"a"']),
        ({"type": "string", "pattern": r"^(?:\S+\s+){0,49}\S+$", "maxLength": 500}, ["a b c", "x " * 40 + "é"]),
    ],
    "items": [({"type": "array", "items": {"type": "number"}}, [[], [1, BIG, 0.5]]), ({"items": _UNIT}, [[0.5], {}])],
    "prefixItems": [({"type": "array", "prefixItems": [{"type": "string"}, {}]}, [[], ["a"], ["a", 1, None]])],
    "minItems": [({"type": "array", "minItems": 2}, [[1, 2], [1, [], {}]])],
    "maxItems": [({"type": "array", "maxItems": 1}, [[], [{"a": 1}]])],
    "uniqueItems": [({"type": "array", "uniqueItems": True}, [[], [1, 2]])],
    "contains": [({"type": "array", "contains": {"const": 1}, "minContains": 2}, [[1, 1], [0, 1, 1]])],
    "unevaluatedItems": [({"prefixItems": [{"type": "null"}], "unevaluatedItems": False}, [[], [None]])],
    "properties": [({"type": "object", "properties": _AB}, [{}, {"a": 1}, {"b": ""}, {"a": 1, "b": "x", "z": BIG}])],
    "required": [({"type": "object", "properties": _AB, "required": ["b", "z"]}, [{"b": "", "z": 1}])],
    "additionalProperties": [
        ({"type": "object", "properties": _AB, "additionalProperties": {"type": "boolean"}}, [{"a": 1, "z": True}])
    ],
    "patternProperties": [({"type": "object", "patternProperties": {"^x": _UNIT}}, [{"x1": 0.5, "z": 1}, {}])],
    "propertyNames": [({"type": "object", "propertyNames": {"pattern": "^[a-z]+$"}}, [{}, {"ab": 1, "cd": []}])],
    "minProperties": [({"type": "object", "minProperties": 1}, [{"a": 1}, {"a": 1, "b": 2}])],
    "maxProperties": [({"type": "object", "maxProperties": 1}, [{}, {"a": 1}])],
    "dependentRequired": [({"type": "object", "dependentRequired": {"a": ["z"]}}, [{}, {"a": 1, "z": 2}, {"z": 1}])],
    "dependentSchemas": [({"type": "object", "dependentSchemas": {"a": {"required": ["z"]}}}, [{}, {"a": 1, "z": 2}])],
    "unevaluatedProperties": [
        ({"type": "object", "allOf": [{"properties": _AB}], "unevaluatedProperties": False}, [{}, {"a": 1, "b": ""}])
    ],
    "allOf": [({"allOf": [{"type": "number"}, {"minimum": 2}, {"maximum": 3}]}, [2, 2.5, 3])],
    "anyOf": [({"anyOf": [{"type": "number"}, {"type": "string", "minLength": 1}]}, [BIG, "a", 0.5])],
    "oneOf": [({"oneOf": [{"type": "integer"}, {"minimum": 2, "type": "number"}]}, [1, 2.5, -3])],
    "not": [({"type": "number", "not": {"const": 5}}, [4, 5.5, 0.1]), ({"not": {"type": "string"}}, [BIG, None, [1]])],
    "if": [({"if": {"type": "number"}, "then": {"minimum": 1}, "else": {"type": "string"}}, [1, 2.5, "a"])],
    "$ref": [({"$ref": "#/$defs/n", "$defs": {"n": {"type": ["number", "array"], "items": {"$ref": "#"}}}}, [[BIG]])],
    "format": [
        ({"type": "string", "format": "uri"}, ["file:///C:/x", "http://[::1]:80/?a#b", "urn:a:b", "http:", "a://u@/%41"]),
        ({"type": "string", "format": "uri-reference"}, ["", "//", "../a?b#c", "//[v1.a]/", "a:b"]),
        ({"type": "string", "format": "iri"}, ["http://日本.jp/é?ü#ü", "file:///ü", "x:?\ue000", "x:\U00010000"]),
        ({"type": "string", "format": "idn-hostname"}, ["münchen.de", "日本.jp", "пример.рф", "한국.kr", "a-b.c"]),
        ({"type": "string", "format": "idn-email"}, ["é@a.de", "用户@例子.广告", "a.b@ü.de"]),
        ({"type": "string", "format": "uri-template"}, ["/x/{a.b}{?c:3,d*}", "é{+a}", ""]),
        ({"type": "string", "format": "date-time"}, ["2024-02-29T23:59:59.5+02:00", "1990-12-31T23:59:60Z"]),
    ],
}  # fmt: skip


def write(value: Json, *, has_exponents: bool = False) -> str:
    """The text of a value, with numbers in digits or as Python writes them."""
    match value:
        case bool() | None | str():
            return json.dumps(value, ensure_ascii=False)
        case int() | float():
            digits = format(Decimal(repr(value)), "f")
            return json.dumps(value) if has_exponents else re.sub(r"\.0+$", "", digits)
        case list():
            return f"[{', '.join(write(item, has_exponents=has_exponents) for item in value)}]"
        case dict():
            items = (f"{json.dumps(name)}: {write(item, has_exponents=has_exponents)}" for name, item in value.items())
            return f"{{{', '.join(items)}}}"


def can_be_generated(schema: Json, value: Json) -> bool:
    """Whether a grammar allows a value in a spelling: names in some order, numbers with exponent or without."""
    orders = [value]
    if isinstance(value, dict):
        orders = [dict(found) for found in permutations(value.items())]
    return any(
        allows(schema, write(found, has_exponents=has_exponents)) for found in orders for has_exponents in (True, False)
    )


def check_value(schema: Json, value: Json) -> bool:
    """Whether validation takes a value; then a grammar must, or say what it leaves out."""
    contract = AnswerSchema.from_json(schema, formats="assert", source="schema")
    try:
        contract.check(write(value, has_exponents=True))
    except RowError:
        return False
    narrowed = enforceable_schema(schema).narrowed
    assert narrowed or can_be_generated(schema, value), f"{schema} refuses {value!r} and names nothing"
    return True


@pytest.mark.parametrize("keyword", CASES)
def test_valid_instances_of_a_keyword_can_be_generated(keyword: str) -> None:
    for schema, values in CASES[keyword]:
        for value in values:
            assert check_value(schema, value), f"the case is wrong: {schema} refuses {value!r}"
            assert can_be_generated(schema, value), f"{schema} refuses {value!r}"


_names = st.sampled_from(["a", "b", "x1", "z"])
_scalars: st.SearchStrategy[Any] = st.one_of(
    st.none() | st.booleans() | st.integers() | st.sampled_from([10**30, BIG, 1e-7, 0.5, 2.25]),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=6),
    st.from_regex(r"\A[a-z]+:(//[a-z.]*)?[a-z/]*\Z"),
)
instances: st.SearchStrategy[Any] = st.recursive(
    _scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_names, inner, max_size=3),
    max_leaves=4,
)


@pytest.mark.parametrize("keyword", CASES)
@settings(deadline=None, max_examples=12)
@given(data=st.data())
def test_any_valid_instance_can_be_generated_or_the_keyword_is_named(keyword: str, data: st.DataObject) -> None:
    schema, values = data.draw(st.sampled_from(CASES[keyword]))
    check_value(schema, data.draw(instances | st.sampled_from(values)))


@pytest.mark.parametrize("kind", ["number", "integer"])
@pytest.mark.parametrize("keyword", ["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"])
@settings(deadline=None, max_examples=15)
@given(exponent=st.integers(-324, 308), digits=st.integers(1, 9_999), sign=st.sampled_from([1, -1]), value=instances)
def test_bounds_of_any_magnitude_compile(
    kind: str, keyword: str, exponent: int, digits: int, sign: int, value: Json
) -> None:
    bound = float(f"{digits}e{max(-324, min(304, exponent))}")
    if keyword == "multipleOf":
        sign, bound = 1, bound or 1.0
    schema: Json = {"type": kind, keyword: sign * bound}
    try:
        check_value(schema, value)
    except InvalidGrammar:
        pytest.fail(f"{schema} is said to refuse every value")


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_that_leaves_texts_out_is_named(name: str) -> None:
    narrowed = enforceable_schema({"type": "object", "properties": {"a": {"format": name}}}).narrowed
    assert [(entry.pointer, entry.keyword) for entry in narrowed] == (
        [("/properties/a", "format")] if name in NARROWED else []
    )


def test_numbers_with_bounds_are_named_for_what_they_cannot_be_written_like() -> None:
    schema: Json = {"properties": {"a": {"type": "number", "minimum": 0}, "b": {"type": "number"}}, "type": "object"}
    assert [(entry.pointer, entry.keyword) for entry in enforceable_schema(schema).narrowed] == [
        ("/properties/a", "minimum")
    ]
    assert allows(schema, '{"b": 6.02e23}')
    assert not allows(schema, '{"a": 6.02e23}')


HELD = SHARED / "cases" / "held" / "JsonSchemaStore---templatesources.json"


@pytest.mark.conformance
@pytest.mark.skipif(not HELD.is_file(), reason="../shared/cases is not there")
def test_uris_without_a_host_can_be_generated() -> None:
    found = json.loads(HELD.read_text())
    for test in found["tests"]:
        if test["valid"]:
            assert allows(found["schema"], write(test["data"]))
