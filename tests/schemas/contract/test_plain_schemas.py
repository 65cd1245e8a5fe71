"""What counts as a plain schema: known keywords of little cost, with every reference followed."""

from typing import Any

import pytest

from moebeam.schemas.contract import plain_schemas
from moebeam.schemas.contract.plain_schemas import MAX_OBJECTS, is_plain

ITEM = {"$ref": "#/$defs/item"}


def chain(keyword: str, depth: int) -> dict[str, Any]:
    levels: dict[str, Any] = {f"d{n}": {keyword: [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(depth)}
    return {"$ref": "#/$defs/d0", "$defs": levels | {f"d{depth}": {"type": "null"}}}


@pytest.mark.parametrize(
    "schema",
    [
        True,
        {"type": "object", "properties": {"a": {"enum": ["x"]}, "pattern": {"const": 1}}, "required": ["a"]},
        {"type": "array", "items": {"anyOf": [{"type": "null"}, {"type": "string", "format": "date"}]}, "maxItems": 9},
        {"properties": {"a": ITEM, "b": ITEM}, "$defs": {"item": {"type": "integer", "minimum": 0}}},
        {"type": "object", "properties": {"children": {"type": "array", "items": {"$ref": "#"}}}},
        chain("anyOf", 6),
    ],
)
def test_schemas_as_people_write_them_are_plain(schema: Any) -> None:
    assert is_plain(schema)


@pytest.mark.parametrize(
    "schema",
    [
        {"pattern": "a"},
        {"patternProperties": {}},
        {"format": "regex"},
        {"not": {}},
        {"unknown": 1},
        {"unevaluatedProperties": False},
        {"$ref": "https://example.com/schema"},
        {"$ref": "#/$defs/none"},
        {"minimum": 10**400},
        {"items": 1},
        {"properties": []},
        chain("anyOf", 30),
        chain("allOf", 11),
        {"allOf": [{"properties": {"a": {"$ref": "#"}}}, {"properties": {"a": {"$ref": "#"}}}]},
        {"properties": {f"p{n}": {} for n in range(MAX_OBJECTS)}},
        {"enum": ["x" * plain_schemas.MAX_CHARACTERS]},
        {"enum": [float("nan")], "x": {1, 2}},
        [],
    ],
)
def test_whatever_is_not_known_to_be_cheap_is_not_plain(schema: Any) -> None:
    assert not is_plain(schema)
