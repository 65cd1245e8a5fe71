"""Schemas that ask for more checks than a process can make are refused before anything is built of them."""

from typing import Any

import pytest

from moebeam.schemas.canonical import Json
from moebeam.schemas.contract.answer_schema import AnswerSchema
from moebeam.schemas.contract.output_type import output_type
from moebeam.schemas.contract.schema_bounds import MAX_APPLIED, MAX_OBJECTS, find_excess
from moebeam.schemas.errors import JobFileError


def chain(num_levels: int, *, keyword: str = "allOf", times: int = 2, **more: Any) -> dict[str, Any]:
    """Definitions of which each refers to the next a number of times."""
    definitions: dict[str, Any] = {
        f"d{level}": {keyword: [{"$ref": f"#/$defs/d{level + 1}"}] * times} for level in range(num_levels)
    }
    definitions[f"d{num_levels}"] = {"type": "object"}
    return {"$ref": "#/$defs/d0", "$defs": definitions, **more}


@pytest.mark.parametrize("keyword", ["allOf", "anyOf", "oneOf"])
@pytest.mark.parametrize("more", [{}, {"unevaluatedProperties": False}])
def test_schemas_that_double_at_each_level_are_refused(keyword: str, more: dict[str, Json]) -> None:
    with pytest.raises(JobFileError, match=f"at most {MAX_APPLIED} schemas that apply to one value"):
        AnswerSchema.from_json(chain(40, keyword=keyword, **more), formats="assert", source="schema")


def test_doubling_below_items_is_refused_at_its_place() -> None:
    definitions: dict[str, Any] = {
        f"d{level}": {"allOf": [{"items": {"$ref": f"#/$defs/d{level + 1}"}}] * 6} for level in range(12)
    }
    schema: Json = {"$ref": "#/$defs/d0", "$defs": {**definitions, "d12": {"type": "object"}}}
    assert "items" in str(find_excess(schema))


def test_a_chain_of_references_is_bounded() -> None:
    assert "at most 200" in str(find_excess(chain(300, times=1)))
    assert find_excess(chain(90, times=1)) is None


def test_a_document_of_too_many_objects_is_refused() -> None:
    assert f"at most {MAX_OBJECTS} objects, found {MAX_OBJECTS + 2}" in str(
        find_excess({"anyOf": [{}] * (MAX_OBJECTS + 1)})
    )


@pytest.mark.parametrize(
    "schema",
    [
        {"$ref": "#"},
        {"allOf": [{"$ref": "#"}, {"$ref": "#"}]},
        {"anyOf": [{"properties": {name: {"items": {"$ref": "#"}}}} for name in ("and", "or", "not")]},
        {"properties": {"left": {"$ref": "#"}, "right": {"$ref": "#"}}},
        {"anyOf": [{"items": {"$ref": "#"}}, {"type": "array", "items": {"$ref": "#"}}]},
        chain(10),
        {
            "$ref": "#/$defs/d0",
            "$defs": {
                **{f"d{n}": {"properties": {name: {"$ref": f"#/$defs/d{n + 1}"} for name in "ab"}} for n in range(60)},
                "d60": {"type": "object"},
            },
        },
    ],
)
def test_recursion_and_trees_of_properties_are_not(schema: Json) -> None:
    assert find_excess(schema) is None
    AnswerSchema.from_json(schema, formats="assert", source="schema").check("{}")


def test_the_column_type_of_a_doubling_schema_is_given_up_early() -> None:
    assert output_type(chain(40)) is None
