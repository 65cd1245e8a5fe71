"""What the schema of a function says of the JSON types of a parameter."""

from collections.abc import Collection, Mapping, Sequence

from moebeam.schemas.canonical import Json
from moebeam.schemas.chat_options import Tool

ONLY_TEXT = frozenset({"string"})


def find_types(tools: Sequence[Tool], function: str, parameter: str) -> frozenset[str] | None:
    """The JSON types that a parameter takes: empty where its schema does not say, None where it is not declared."""
    tool = next((tool for tool in tools if tool.name == function), None)
    properties = tool.parameters.get("properties") if tool and isinstance(tool.parameters, Mapping) else None
    if not isinstance(properties, Mapping) or parameter not in properties:
        return None
    schema = properties[parameter]
    types = schema.get("type") if isinstance(schema, Mapping) else None
    if isinstance(types, str):
        return frozenset({types})
    return frozenset(map(str, types)) if isinstance(types, Sequence) else frozenset()


def is_of_types(value: Json, types: Collection[str]) -> bool:
    """Whether a value has one of several JSON types."""
    match value:
        case None:
            return "null" in types
        case bool():
            return "boolean" in types
        case int():
            return "integer" in types or "number" in types
        case float():
            return "number" in types or ("integer" in types and value.is_integer())
        case str():
            return "string" in types
        case Mapping():
            return "object" in types
        case _:
            return "array" in types
