"""Schemas as grammars: what comes out is valid, what is valid can come out, and what is left to validation is named."""

import json
import math
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from llguidance import LLMatcher

from moebeam.model_runner.grammar.json_grammar import (
    enforceable_schema,
    inline_schema,
    json_object_grammar,
    json_schema_grammar,
)
from moebeam.model_runner.grammar.schema_forms.formats import FORMATS
from moebeam.schemas.canonical import Json
from moebeam.schemas.contract.answer_schema import AnswerSchema
from moebeam.schemas.errors import InvalidGrammar, RowError
from tests.support.contracts.example_schemas import EXACT, REFUSED, RELAXED
from tests.support.contracts.random_schemas import schemas
from tests.support.models.grammar_sampling import allows, allows_value, compiler, draw
from tests.support.paths import SHARED

SUITE = SHARED / "conformance" / "json_schema_test_suite" / "draft2020-12"


def contract_of(schema: Json) -> AnswerSchema:
    return AnswerSchema.from_json(schema, formats="assert", source="schema")


def check_answers(schema: Json, *, seed: int = 0, num_answers: int = 15, least: int = 5) -> None:
    """Every answer drawn is valid for the schema itself."""
    contract = contract_of(schema)
    found = draw(schema, seed, num_answers)
    assert len(found) >= least
    for text in found:
        contract.check(text)


@pytest.mark.parametrize("name", EXACT)
def test_every_answer_is_valid_where_nothing_is_relaxed(name: str) -> None:
    assert enforceable_schema(EXACT[name]).relaxed == ()
    check_answers(EXACT[name])


@pytest.mark.parametrize("name", RELAXED)
def test_what_is_left_to_validation_is_named(name: str) -> None:
    schema, expected = RELAXED[name]
    relaxed = enforceable_schema(schema).relaxed
    assert {(entry.pointer, entry.keyword) for entry in relaxed} == expected
    for entry in relaxed:
        assert entry.reason
        assert str(entry) == f"{entry.keyword} at {entry.pointer or 'the root'}: {entry.reason}"
    assert draw(schema, 0, 3)


@pytest.mark.parametrize("name", REFUSED)
def test_a_schema_that_no_value_keeps_is_refused(name: str) -> None:
    with pytest.raises(InvalidGrammar, match="refuses every value"):
        enforceable_schema(REFUSED[name])


@pytest.mark.parametrize("schema", [[], "x", None, {"const": math.nan}, {"const": "\ud800"}, {"type": 3, "x": {1, 2}}])
def test_what_is_no_schema_is_refused(schema: Json) -> None:
    with pytest.raises(InvalidGrammar, match="expected a JSON Schema"):
        enforceable_schema(schema)


VALID: list[tuple[str, Json]] = [
    (
        "invoice",
        {
            "number": "INV-2024",
            "issued": "2024-02-29",
            "total": 0.1,
            "currency": "CNY",
            "lines": [{"text": "", "quantity": 3, "discount": 0}],
        },
    ),
    ("discriminated", {"kind": "square", "side": 0.5, "more": [1]}),
    ("openapi", {"id": -5, "code": 404, "more": {}}),
    ("tree", {"value": 1.5, "children": [{"value": None}, {"value": "x", "children": []}]}),
    ("conditional", {"country": "CA", "code": "K1A"}),
    ("condition_on_any_text", {"kind": "fully"}),
    ("condition_on_any_text", {"kind": "ful", "other": 1}),
    ("dependent", {"owner": "x"}),
    ("dependent", {"card": "1", "owner": "x", "cvc": "3"}),
    ("dependent_schema", {"unit": 5}),
    ("exactly_one", {"phone": "1"}),
    ("at_least_one", {"z": 1}),
    ("at_least_one", {"b": 1, "z": 1}),
    ("not_reserved", "roo"),
    ("not_reserved", "r"),
    ("not_reserved", "roof"),
    ("not_these_numbers", -1),
    ("not_these_numbers", 5),
    ("not_these_numbers", 8),
    ("headers", {"x-id": "ab", "x-b": ""}),
    ("closed_by_unevaluated", {"id": 1, "extra": True}),
    ("draft_4", {"share": 0.9, "unit": 1}),
    (
        "numbers",
        {"above": 0.2, "below": 0.99, "step": 0.5, "even": -4, "halves": 3, "one": 3, "long": 0.15, "int64": 2**62},
    ),
    ("siblings_of_ref_in_draft_7", {"a": "long"}),
    ("dynamic", True),
    ("password", "Abcdefg1"),
    ("quotes", ["a b", "é"]),
    ("white_space", "a\u00a0b"),
    ("classes", "a&[-"),
    ("any_number", 123456789012345678901234567890),
    ("any_number", 0.1),
    ("anything", {"a": [1.5, {"b": None}], "": "\n"}),
    ("multi_type", [1, 2]),
    ("typeless", [1]),
    ("joined", {"a": 2, "b": "x"}),
    ("joined_recursion", {"size": 9, "next": {"size": 99}}),
]

INVALID: list[tuple[str, Json]] = [
    ("discriminated", {"kind": "square", "radius": 1}),
    ("conditional", {"country": "CA", "code": "12345"}),
    ("condition_on_any_text", {"kind": "full"}),
    ("condition_on_any_text", {"kind": "ful", "body": 1}),
    ("dependent", {"card": "1", "owner": "x"}),
    ("dependent_schema", {"size": 1, "unit": 5}),
    ("exactly_one", {"email": "1", "phone": "1"}),
    ("exactly_one", {}),
    ("at_least_one", {}),
    ("not_reserved", "root"),
    ("not_reserved", 'a"b'),
    ("not_these_numbers", 7),
    ("enum_without", 3),
    ("forbidden_property", {"secret": 1}),
    ("map_of_listed_names", {"z": None}),
    ("headers", {"x-id": "a"}),
    ("closed_by_unevaluated", {"id": 1, "other": 1}),
    ("draft_4", {"share": 1, "unit": 1}),
    ("password", "abcdefg1"),
    ("quotes", ['a"b']),
    ("white_space", "a\u0085b"),
    ("joined", {"a": 4}),
    ("joined_recursion", {"size": 10}),
]


@pytest.mark.parametrize(("name", "value"), VALID)
def test_a_valid_value_can_be_generated(name: str, value: Json) -> None:
    contract_of(EXACT[name]).check(json.dumps(value))
    assert allows_value(EXACT[name], value)


@pytest.mark.parametrize(("name", "value"), INVALID)
def test_an_invalid_value_cannot_be_generated(name: str, value: Json) -> None:
    with pytest.raises(RowError):
        contract_of(EXACT[name]).check(json.dumps(value))
    assert not allows_value(EXACT[name], value)


@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({"type": "number", "exclusiveMinimum": 0, "maximum": 0.25}, "0"),
        ({"type": "number", "exclusiveMaximum": 1}, "0.99999999999999999999"),
        ({"type": "number", "exclusiveMaximum": 1}, "1"),
        ({"properties": {"a": {"type": "integer"}}, "type": "object"}, '{"a":1,"a":"x"}'),
        ({"properties": {"a": {"type": "integer"}}, "type": "object"}, r'{"\u0061":"x"}'),
        ({"type": "string"}, r'"\ud800"'),
        ({"type": "string", "pattern": '^[^"]*$'}, r'"\""'),
        ({"type": "string", "pattern": r"^[\x00-!]$"}, r'"\""'),
        ({"type": "string", "format": "date"}, '"2023-02-29"'),
        ({"type": "string", "format": "hostname"}, '"ab--c"'),
        ({"type": "string", "format": "email"}, json.dumps("a" * 65 + "@b.co")),
    ],
)
def test_gaps_of_llguidance_are_closed(schema: Json, text: str) -> None:
    with pytest.raises(RowError):
        contract_of(schema).check(text)
    assert not allows(schema, text)


@pytest.mark.parametrize("name", FORMATS)
def test_texts_of_a_format_are_valid(name: str) -> None:
    check_answers({"type": "string", "format": name}, num_answers=60, least=30)


def test_formats_that_validation_does_not_assert_are_not_asked_for() -> None:
    assert allows_value({"type": "string", "format": "color"}, "any")
    assert allows_value(
        {"$schema": "http://json-schema.org/draft-07/schema#", "type": "string", "format": "uuid"}, "any"
    )
    annotated = enforceable_schema({"type": "string", "format": "date"}, formats="annotate")
    assert annotated.document == {"type": "string"}


@given(schema=schemas(), seed=st.integers(0, 2**32))
def test_answers_of_any_schema_are_valid_unless_it_is_relaxed(schema: Json, seed: int) -> None:
    contract = contract_of(schema)
    try:
        relaxed = enforceable_schema(schema).relaxed
    except InvalidGrammar:
        return
    for text in draw(schema, seed, 4):
        if not relaxed:
            contract.check(text)


@given(
    schema=schemas(),
    value=st.recursive(
        st.sampled_from([None, True, 0, 1, 2.5, -3, "", "a", "ab", "12"]),
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "b", "kind"]), inner, max_size=2)
        ),
        max_leaves=4,
    ),
)
def test_a_schema_is_refused_only_if_no_value_keeps_it(schema: Json, value: Json) -> None:
    try:
        enforceable_schema(schema)
    except InvalidGrammar:
        with pytest.raises(RowError):
            contract_of(schema).check(json.dumps(value))


@pytest.mark.conformance
@pytest.mark.skipif(not SUITE.is_dir(), reason="../shared/conformance is not there")
@pytest.mark.parametrize("path", sorted(SUITE.glob("*.json")), ids=lambda path: path.stem)
def test_valid_instances_of_the_suite_can_be_generated(path: Path) -> None:
    for group in json.loads(path.read_text()):
        try:
            contract = contract_of(group["schema"])
            enforceable = enforceable_schema(group["schema"])
        except Exception:  # remote references and schemas that refuse everything
            assert (
                not any(test["valid"] for test in group["tests"])
                or "ref" in json.dumps(group["schema"]).lower()
                or path.stem == "vocabulary"
            )
            continue
        for test in group["tests"]:
            is_plain = not isinstance(test["data"], dict) and path.stem not in ("format",)
            if test["valid"] and is_plain and "." not in json.dumps(test["data"]):
                assert allows_value(group["schema"], test["data"]), (group["description"], test["data"])
        if not enforceable.relaxed:
            for text in draw(group["schema"], 0, 3):
                contract.check(text)


def test_a_schema_that_cannot_be_compiled_loses_only_what_is_at_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    schema: Json = {
        "type": "object",
        "properties": {
            "a": {"type": "string", "pattern": "^a+$", "minLength": 2},
            "b": {"type": "array", "items": {"type": "integer"}, "maxItems": 3},
        },
        "required": ["a", "b"],
    }
    from moebeam.model_runner.grammar import json_grammar

    refused = re.compile('"maxItems"')
    real = json_grammar._find_refusal
    monkeypatch.setattr(json_grammar, "_find_refusal", lambda text: "too large" if refused.search(text) else real(text))
    json_grammar._make_enforceable.cache_clear()
    found = enforceable_schema(schema)
    json_grammar._make_enforceable.cache_clear()
    assert [(entry.pointer, entry.keyword) for entry in found.relaxed] == [("/properties/b", "maxItems")]
    assert '"minLength": 2' in json.dumps(found.document)


def test_where_nothing_can_be_compiled_any_object_is_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    from moebeam.model_runner.grammar import json_grammar

    monkeypatch.setattr(json_grammar, "_find_refusal", lambda text: "too large")
    json_grammar._make_enforceable.cache_clear()
    found = enforceable_schema({"type": "object", "properties": {"a": {"type": "integer", "minimum": 3}}})
    json_grammar._make_enforceable.cache_clear()
    assert found.document["type"] == "object"
    assert {(entry.pointer, entry.keyword) for entry in found.relaxed} == {
        ("", "properties"),
        ("", "type"),
        ("/properties/a", "minimum"),
        ("/properties/a", "type"),
    }


def test_a_pattern_that_names_match_is_joined_with_their_own_schema() -> None:
    schema: Json = {"type": "object", "properties": {"ab": {}}, "patternProperties": {"^a": {}}}
    assert enforceable_schema(schema).relaxed == ()
    check_answers(schema)


def test_a_maximum_for_strings_can_be_asked_for() -> None:
    document = enforceable_schema(
        {"properties": {"a": {"type": "string"}, "b": {"maxLength": 3}}}, max_string_length=50
    ).document
    assert "50" in json.dumps(document)
    bounded = json_schema_grammar(enforceable_schema({"type": "string"}, max_string_length=2).document)
    constraint = compiler().compile(bounded)
    assert not constraint.failure


def test_equal_schemas_give_equal_grammars() -> None:
    for schema in EXACT.values():
        first = json_schema_grammar(enforceable_schema(schema).document)
        assert json_schema_grammar(enforceable_schema(json.loads(json.dumps(schema))).document) == first


def test_the_caller_s_schema_is_not_changed() -> None:
    for schema in EXACT.values():
        before = json.dumps(schema)
        enforceable_schema(schema)
        assert json.dumps(schema) == before


@pytest.mark.parametrize(
    ("text", "is_allowed"), [("{}", True), ('{"a": [1, {"b": null}]}', True), ("[]", False), ("1", False)]
)
def test_an_object_is_any_object(text: str, is_allowed: bool) -> None:
    constraint = compiler().compile(json_object_grammar())
    token_ids = compiler()._tokenizer.tokenize_str(text)
    assert (constraint.matcher.try_consume_tokens(token_ids) == len(token_ids)) == is_allowed


@pytest.mark.parametrize(
    "schema",
    [
        False,
        [],
        {"type": "text"},
        {"type": 3},
        {"const": math.nan},
        {"const": "\ud800"},
        {"$ref": "#/$defs/missing"},
        {"$ref": "https://example.com/schema.json"},
        {"type": "string", "pattern": "(?=a)b"},
        {"type": "array", "items": False, "minItems": 1},
        {"type": "array", "uniqueItems": True},
        {"oneOf": [{"type": "integer"}, {"type": "number"}]},
    ],
)
def test_a_schema_that_llguidance_cannot_enforce_as_it_stands_is_refused(schema: Json) -> None:
    with pytest.raises(InvalidGrammar, match="expected"):
        json_schema_grammar(schema)


def test_a_schema_cannot_set_options_of_the_grammar() -> None:
    schema: Json = {"type": "array", "x-guidance": {"item_separator": ";", "lenient": True}, "items": {"const": 1}}
    assert json_schema_grammar(schema) == json_schema_grammar({"type": "array", "items": {"const": 1}})


@pytest.mark.parametrize(
    ("text", "max_whitespace", "is_allowed"),
    [
        ("[1,2]", 0, True),
        ("[1, 2]", 0, False),
        ("[1,\n  2]", 3, True),
        ("[1,\n   2]", 3, False),
        (" [1]", 3, False),
        ("[1] ", 3, False),
    ],
)
def test_white_space_is_bounded(text: str, max_whitespace: int, is_allowed: bool) -> None:
    grammar = json_schema_grammar({"type": "array", "items": {"type": "integer"}}, max_whitespace=max_whitespace)
    constraint = compiler().compile(grammar)
    token_ids = compiler()._tokenizer.tokenize_str(text)
    assert (constraint.matcher.validate_tokens(token_ids) == len(token_ids)) == is_allowed


def test_a_schema_stands_in_other_grammars_with_its_options() -> None:
    document = json.loads(inline_schema({"type": "string"}, max_whitespace=5))
    assert document["type"] == "string"
    assert "{1,5}" in document["x-guidance"]["whitespace_pattern"]
    assert not LLMatcher.validate_grammar(f"start: %json {json.dumps(document)}")


def test_control_characters_are_escaped_only_where_a_value_has_them() -> None:
    assert allows_value({"const": "a\x01"}, "a\x01")
    assert not allows({"type": "string"}, r'"\u0001"')
    schema: Json = {"properties": {"a": {"const": "\x01"}}, "type": "object"}
    assert {entry.keyword for entry in enforceable_schema(schema).relaxed} == {"additionalProperties"}
