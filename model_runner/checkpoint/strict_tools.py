"""The rules of DeepSeek's API for strict tools, which are narrower than JSON Schema."""

from collections.abc import Iterator, Mapping

from moebeam.schemas.canonical import Json
from moebeam.schemas.chat_options import Tool
from moebeam.schemas.errors import abbreviate

_REFUSED_KEYWORDS = ("minLength", "maxLength", "minItems", "maxItems")
_ONE_SCHEMA = ("items", "additionalProperties", "not")
_SCHEMA_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_SCHEMA_MAPS = ("properties", "$defs", "definitions", "patternProperties")


def strict_tool_problems(tool: Tool) -> list[str]:
    """Why DeepSeek's API would refuse a tool in strict mode: pointer into the function, expected and found.

    Every function is strict, and in every object all properties are required and no others allowed; lengths of strings
    and lists cannot be bounded.
    """
    problems = [] if tool.is_strict else [f"at /strict: expected true, found {tool.document.get('strict')!r}"]
    return problems + list(_strict_problems(tool.parameters, "/parameters"))


def _strict_problems(schema: Json, pointer: str) -> Iterator[str]:
    if not isinstance(schema, Mapping):
        return
    properties = schema.get("properties")
    if schema.get("type") == "object" or isinstance(properties, Mapping):
        names = list(properties) if isinstance(properties, Mapping) else []
        required = schema.get("required")
        missing = [name for name in names if not isinstance(required, list) or name not in required]
        if missing:
            yield f"at {pointer}/required: expected all properties, found {abbreviate(missing)} missing"
        if schema.get("additionalProperties") is not False:
            found = abbreviate(schema.get("additionalProperties"))
            yield f"at {pointer}/additionalProperties: expected false, found {found}"
    for keyword in _REFUSED_KEYWORDS:
        if keyword in schema:
            yield f"at {pointer}/{keyword}: expected no such keyword, found {abbreviate(schema[keyword])}"
    for keyword in _ONE_SCHEMA:
        yield from _strict_problems(schema.get(keyword), f"{pointer}/{keyword}")
    for keyword in _SCHEMA_LISTS:
        parts = schema.get(keyword)
        for index, part in enumerate(parts if isinstance(parts, list) else []):
            yield from _strict_problems(part, f"{pointer}/{keyword}/{index}")
    for keyword in _SCHEMA_MAPS:
        named = schema.get(keyword)
        for name, part in named.items() if isinstance(named, Mapping) else ():
            escaped = name.replace("~", "~0").replace("/", "~1")
            yield from _strict_problems(part, f"{pointer}/{keyword}/{escaped}")
