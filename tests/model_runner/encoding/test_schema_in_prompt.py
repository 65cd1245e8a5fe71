"""A schema asked for in words: the text that is added, and examples that keep the schema."""

import json
from typing import Any

import pytest

from moebeam.model_runner.encoding.schema_in_prompt import make_example, with_schema_in_prompt
from moebeam.schemas.contract.answer_schema import AnswerSchema
from moebeam.schemas.records import Message

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string", "description": "Größe"}, "days": {"type": "integer", "minimum": 3}},
    "required": ["city", "days"],
}


def test_schema_the_word_json_and_an_example_stand_behind_the_system_text() -> None:
    system, user = with_schema_in_prompt([Message("system", "Be brief.", {"x": 1}), Message("user", "q")], SCHEMA)
    assert system.content.startswith("Be brief.\n\n")
    assert "JSON" in system.content
    assert json.dumps(SCHEMA, ensure_ascii=False) in system.content
    assert system.content.endswith('{"city": "text", "days": 3}')
    assert system.extra == {"x": 1}
    assert user == Message("user", "q")


def test_system_message_is_put_first_where_there_is_none() -> None:
    messages = with_schema_in_prompt([Message("user", "q")], SCHEMA)
    assert [message.role for message in messages] == ["system", "user"]


@pytest.mark.parametrize(
    "schema",
    [
        SCHEMA,
        {"type": "array", "items": {"type": "number", "exclusiveMinimum": 2, "maximum": 4}, "minItems": 2},
        {"enum": ["a", "b"]},
        {"const": {"a": [1]}},
        {"type": ["null", "string"], "minLength": 9},
        {"type": "string", "maxLength": 2},
        {"type": "string", "format": "date"},
        {"type": "boolean"},
        {"type": "integer", "maximum": -5},
        {"anyOf": [{"type": "integer"}, {"type": "string"}]},
        {"$ref": "#/$defs/p", "$defs": {"p": {"type": "object", "required": ["n"], "properties": {"n": {"const": 1}}}}},
        {
            "allOf": [{"properties": {"a": {"type": "integer"}}, "required": ["a"]}, {"required": ["b"]}],
            "type": "object",
        },
    ],
)
def test_example_keeps_its_schema(schema: Any) -> None:
    example = make_example(schema)
    assert example is not None
    AnswerSchema.from_json(schema, formats="assert", source="test").check(json.dumps(example))


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "pattern": "^[0-9]{7}$"},
        {
            "$ref": "#/$defs/n",
            "$defs": {"n": {"type": "object", "properties": {"n": {"$ref": "#/$defs/n"}}, "required": ["n"]}},
        },
        {"type": "array", "uniqueItems": True, "minItems": 2, "items": {"const": 1}},
        {"type": "no such"},
        False,
    ],
)
def test_no_example_is_shown_where_none_was_found(schema: Any) -> None:
    assert make_example(schema) is None
    (system,) = with_schema_in_prompt([Message("system", "")], schema)
    assert "example" not in system.content
    assert "JSON" in system.content


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "array", "minItems": 10**12},
        {"type": "string", "minLength": 10**12},
        {"$defs": {"a": {"type": "array", "minItems": 50, "items": {"$ref": "#/$defs/a"}}}, "$ref": "#/$defs/a"},
    ],
)
def test_there_is_no_example_where_it_would_be_huge(schema: dict[str, Any]) -> None:
    assert make_example(schema) is None
