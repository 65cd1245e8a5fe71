"""Schemas that one row of several brings as its `response_format`, or as the parameters of its tool.

Some harm when they are compiled, some when a grammar is made of them, some only when an answer is checked.
"""

import json
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from benchmarks.hostile_content.case import HostileCase, small_job_over


@dataclass(frozen=True, slots=True)
class HostileSchema:
    """A schema, and the answer that a model would give to it.

    Attributes:
        schema: a JSON Schema.
        answer: JSON text.
    """

    schema: dict[str, Any]
    answer: str = "{}"


def _double(keyword: str, depth: int, **more: Any) -> dict[str, Any]:
    """Definitions of which each names the next one twice under a keyword."""
    definitions: dict[str, Any] = {
        f"d{level}": {keyword: [{"$ref": f"#/$defs/d{level + 1}"}, {"$ref": f"#/$defs/d{level + 1}"}]}
        for level in range(depth)
    }
    return {"$defs": definitions | {f"d{depth}": {"type": "object"}}, "$ref": "#/$defs/d0", **more}


def _nest(depth: int, schema: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    nested: dict[str, Any] = dict(schema)
    for _ in range(depth):
        for key in reversed(keys):
            nested = {key: nested}
    return nested


def _nest_inline(keyword: str, depth: int) -> dict[str, Any]:
    nested: dict[str, Any] = {"type": "object"}
    for level in range(depth):
        nested = {keyword: [nested, {"required": [f"p{level}"]}, {"minProperties": level % 3}]}
    return nested


def _product(num_factors: int, num_options: int, keyword: str) -> dict[str, Any]:
    """Choices in `allOf`, whose alternatives multiply."""
    factors = [
        {keyword: [{"properties": {f"p{factor}": {"const": option}}} for option in range(num_options)]}
        for factor in range(num_factors)
    ]
    return {"type": "object", "allOf": factors}


def _many_properties(number: int) -> dict[str, Any]:
    return {"type": "object", "properties": {f"p{index}": {"type": "string"} for index in range(number)}}


_NOTHING_ELSE: dict[str, Any] = {"unevaluatedProperties": False}
_TWICE_ITSELF: dict[str, Any] = {
    "allOf": [
        {"properties": {"a": {"$ref": "#"}}, "minProperties": 0},
        {"properties": {"a": {"$ref": "#"}}, "maxProperties": 9},
    ],
    "type": "object",
}


def _hide(schema: dict[str, Any], num_levels: int) -> dict[str, Any]:
    """A schema that holds below so many levels of an object only."""
    hidden: dict[str, Any] = {key: value for key, value in schema.items() if key != "$defs"}
    return _nest(num_levels, hidden, "properties", "a") | {"$defs": schema["$defs"]}


def _hide_behind_others(schema: dict[str, Any], number: int) -> dict[str, Any]:
    """A schema that holds for the last of many properties only."""
    hidden: dict[str, Any] = {key: value for key, value in schema.items() if key != "$defs"}
    others = {f"p{index}": {"$ref": f"#/$defs/q{index}"} for index in range(number)}
    definitions = {f"q{index}": {"maxLength": index} for index in range(number)}
    return {"properties": others | {"z": hidden}, "$defs": schema["$defs"] | definitions}


_DEEP_ANSWER = '{"a":' * 60 + "{}" + "}" * 60
_MUTUAL: dict[str, Any] = {
    "$defs": {
        f"m{index}": {"anyOf": [{"properties": {"x": {"$ref": f"#/$defs/m{other}"}}} for other in range(12)]}
        for index in range(12)
    },
    "$ref": "#/$defs/m0",
}
_DYNAMIC: dict[str, Any] = {
    "$dynamicAnchor": "node",
    "allOf": [{"properties": {"a": {"$dynamicRef": "#node"}}}, {"properties": {"a": {"$dynamicRef": "#node"}}}],
}
_REGEX_ANSWER = json.dumps({"a": "a" * 30_000 + "!"})

SCHEMAS: Mapping[str, HostileSchema] = MappingProxyType(
    {
        "allOf doubles 20 times": HostileSchema(_double("allOf", 20)),
        "allOf doubles 28 times": HostileSchema(_double("allOf", 28)),
        "allOf doubles 28 times, unevaluatedProperties": HostileSchema(_double("allOf", 28, **_NOTHING_ELSE)),
        "anyOf doubles 28 times": HostileSchema(_double("anyOf", 28)),
        "oneOf doubles 24 times": HostileSchema(_double("oneOf", 24)),
        "oneOf doubles 13 times": HostileSchema(_double("oneOf", 13, **_NOTHING_ELSE)),
        "allOf doubles 13 times, unevaluatedProperties": HostileSchema(_double("allOf", 13, **_NOTHING_ELSE)),
        "allOf doubles 12 times, unevaluatedProperties": HostileSchema(_double("allOf", 12, **_NOTHING_ELSE)),
        "allOf doubles 24 times, ten levels down": HostileSchema(_hide(_double("allOf", 24, **_NOTHING_ELSE), 10)),
        "allOf doubles 24 times, behind 3,000 properties": HostileSchema(
            _hide_behind_others(_double("allOf", 24, **_NOTHING_ELSE), 3_000)
        ),
        "refers to itself twice at each level": HostileSchema(_TWICE_ITSELF, _DEEP_ANSWER),
        "refers to itself twice, dynamically": HostileSchema(_DYNAMIC, _DEEP_ANSWER),
        "refers to itself in place": HostileSchema({"allOf": [{"$ref": "#"}, {"$ref": "#"}], "type": "object"}),
        "a circle of references": HostileSchema(
            {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}
        ),
        "mutual references of twelve": HostileSchema(_MUTUAL, '{"x":' * 40 + "1" + "}" * 40),
        "a chain of 5,000 references": HostileSchema(
            {
                "$ref": "#/$defs/d0",
                "$defs": {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(5_000)} | {"d5000": {}},
            }
        ),
        "nested 90 levels": HostileSchema(_nest(40, {"type": "object"}, "properties", "a")),
        "not nested 60 times": HostileSchema(_nest(60, {"type": "object"}, "not")),
        "allOf nested inline": HostileSchema(_nest_inline("allOf", 50)),
        "oneOf nested inline": HostileSchema(_nest_inline("oneOf", 50)),
        "a product of choices": HostileSchema(_product(12, 12, "anyOf"), json.dumps({f"p{i}": 0 for i in range(12)})),
        "a product of exclusive choices": HostileSchema(
            _product(10, 10, "oneOf"), json.dumps({f"p{i}": 0 for i in range(10)})
        ),
        "20,000 properties": HostileSchema(_many_properties(20_000)),
        "5,000 required properties": HostileSchema(
            _many_properties(5_000) | {"required": [f"p{i}" for i in range(5_000)]}
        ),
        "an enum of 300,000 values": HostileSchema({"enum": [f"value {index}" for index in range(300_000)]}, '"none"'),
        "minItems of a billion": HostileSchema({"type": "array", "items": {"type": "string"}, "minItems": 10**9}, "[]"),
        "minLength of a billion": HostileSchema({"type": "string", "minLength": 10**9, "maxLength": 10**12}, '"a"'),
        "arrays in arrays with bounds": HostileSchema(
            _nest(8, {"type": "string"}, "items") | {"minItems": 900, "maxItems": 1000, "type": "array"}, "[]"
        ),
        "a pattern of nested counts": HostileSchema(
            {"type": "object", "properties": {"a": {"pattern": "^((((a{1,100}){1,100}){1,100}){1,100}){1,100}$"}}},
            '{"a":"aaaa"}',
        ),
        "a pattern that backtracks": HostileSchema(
            {"properties": {"a": {"pattern": r"^(?=(a+)+$)((a|aa)+)+\1$"}}}, _REGEX_ANSWER
        ),
        "a pattern of quadratic time": HostileSchema(
            {"items": {"pattern": "(?=.*x)(?=.*y)(a*a*a*a*)b"}}, json.dumps(["a" * 3_000] * 200)
        ),
        "a pattern of 300,000 characters": HostileSchema(
            {"pattern": "(" + "|".join(f"x{i}.*y{i}" for i in range(25_000)) + ")"}, '"a"'
        ),
        "1,000 pattern properties": HostileSchema(
            {"patternProperties": {f"^.*{index}.*{index % 7}.*$": {"type": "string"} for index in range(1_000)}},
            json.dumps({"a" * 500 + str(i): "1" for i in range(50)}),
        ),
        "numbers of 4,000 digits": HostileSchema(
            {"type": "number", "minimum": int("9" * 4_000), "multipleOf": int("7" * 4_000)}, "9" * 4_000
        ),
        "multipleOf of tiny numbers": HostileSchema(
            {"type": "number", "multipleOf": 1e-300, "maximum": 1e300}, "1e300"
        ),
        "80 conditions": HostileSchema(
            {
                "allOf": [
                    {
                        "if": {"properties": {f"p{i}": {"const": i}}},
                        "then": {"required": [f"p{i + 1}"]},
                        "else": {"maxProperties": i},
                    }
                    for i in range(80)
                ]
            }
        ),
        "60 dependent schemas": HostileSchema(
            {
                "dependentSchemas": {
                    f"p{i}": {"properties": {f"p{j}": {"const": i} for j in range(60)}} for i in range(60)
                }
            },
            json.dumps({f"p{i}": i for i in range(60)}),
        ),
    }
)
"""Each by what it does."""


_ORDINARY = frozenset({"first", "last"})


def _prepare(folder: Path, hostile: HostileSchema, *, is_tool: bool) -> AbstractContextManager[Path]:
    """A file of batch lines with one hostile row between two ordinary ones."""
    if is_tool:
        own: dict[str, Any] = {"tools": [{"type": "function", "function": {"name": "f", "parameters": hostile.schema}}]}
        reply: dict[str, Any] = {"tool_calls": [{"name": "f", "arguments": hostile.answer}]}
    else:
        own = {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": hostile.schema}}}
        reply = {"text": hostile.answer}
    lines = [_line("first", {}), _line("hostile", own), _line("last", {})]
    source = folder / "in.jsonl"
    source.write_text("\n".join(lines))
    script = folder / "script.json"
    script.write_text(json.dumps({"default": {"text": "fine"}, "rules": [{"contains": "hostile", **reply}]}))
    return small_job_over(
        folder, source, input={"id_column": None}, prompt={"template": None}, model={"script": str(script)}
    )


def _line(custom_id: str, own: Mapping[str, Any]) -> str:
    body = {"model": "tiny", "messages": [{"role": "user", "content": custom_id}], **own}
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body})


def _make_case(name: str, hostile: HostileSchema, *, is_tool: bool) -> HostileCase:
    where = "tool" if is_tool else "response_format"
    return HostileCase(
        f"{where}: {name}",
        lambda folder: _prepare(folder, hostile, is_tool=is_tool),
        others=_ORDINARY,
        is_harmless=True,
    )


_OF_TOOLS = ("allOf doubles 24 times, ten levels down", "a pattern of quadratic time", "20,000 properties")

CASES = (
    *(_make_case(name, hostile, is_tool=False) for name, hostile in SCHEMAS.items()),
    *(_make_case(name, SCHEMAS[name], is_tool=True) for name in _OF_TOOLS),
)
