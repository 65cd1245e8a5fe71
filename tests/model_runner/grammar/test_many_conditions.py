"""Schemas of very many conditions are rewritten in a time that grows with them, not with their square."""

from typing import Any

import pytest

from moebeam.model_runner.grammar.json_grammar import enforceable_schema
from moebeam.model_runner.grammar.schema_forms import choices, negation
from moebeam.schemas.canonical import Json
from moebeam.schemas.contract.references import SchemaLocation


def test_a_thousand_conditions_are_negated_once_each_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """One left out after the other, each round negating all, took minutes."""
    asked: list[str] = []

    def negate(location: SchemaLocation, *known: Any, **others: Any) -> Any:
        asked.append(location.pointer)
        return negation.negate(location, *known, **others)

    monkeypatch.setattr(choices, "negate", negate)
    conditions = [
        {"if": {"properties": {"a": {"const": number}}, "required": ["a"]}, "then": {"required": ["b"]}}
        for number in range(400)
    ]
    schema: Json = {"type": "object", "properties": {"a": {}, "b": {}}, "allOf": conditions}
    relaxed = enforceable_schema(schema).relaxed
    assert 144 <= len(relaxed) <= len(conditions)
    assert {entry.keyword for entry in relaxed} == {"if"}
    assert len(asked) <= 2 * len(conditions)
