"""Schemas as people write them for extraction and APIs, and some that are meant to be difficult."""

from moebeam.schemas.canonical import Json

_ADDRESS: Json = {
    "type": "object",
    "properties": {
        "street": {"type": "string", "minLength": 1},
        "zip": {"type": "string", "pattern": r"^\d{5}(-\d{4})?$"},
        "country": {"type": "string", "pattern": "^[A-Z]{2}$"},
    },
    "required": ["street", "country"],
    "additionalProperties": False,
}

EXACT: dict[str, Json] = {
    "invoice": {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "properties": {
            "number": {"type": "string", "pattern": "^INV-[0-9]{4,8}$"},
            "issued": {"type": "string", "format": "date"},
            "total": {"type": "number", "minimum": 0, "multipleOf": 0.01},
            "currency": {"enum": ["EUR", "USD", "CNY"]},
            "lines": {
                "type": "array",
                "minItems": 1,
                "maxItems": 5,
                "items": {
                    "type": "object",
                    "properties": {
                        "text": {"type": "string", "maxLength": 40},
                        "quantity": {"type": "integer", "exclusiveMinimum": 0},
                        "discount": {"type": "number", "minimum": 0, "exclusiveMaximum": 1},
                    },
                    "required": ["text", "quantity"],
                    "additionalProperties": False,
                },
            },
            "ship_to": {"$ref": "#/$defs/address"},
        },
        "required": ["number", "issued", "total", "currency", "lines"],
        "additionalProperties": False,
        "$defs": {"address": _ADDRESS},
    },
    "pydantic": {
        "$defs": {
            "Color": {"enum": ["red", "green"], "title": "Color", "type": "string"},
            "Pet": {
                "properties": {
                    "name": {"title": "Name", "type": "string"},
                    "color": {"$ref": "#/$defs/Color"},
                    "age": {"anyOf": [{"type": "integer"}, {"type": "null"}], "default": None, "title": "Age"},
                },
                "required": ["name", "color"],
                "title": "Pet",
                "type": "object",
            },
        },
        "properties": {
            "pets": {"items": {"$ref": "#/$defs/Pet"}, "type": "array"},
            "note": {"default": "", "type": "string"},
        },
        "required": ["pets"],
        "type": "object",
    },
    "discriminated": {
        "oneOf": [
            {
                "type": "object",
                "properties": {"kind": {"const": "circle"}, "radius": {"type": "number", "exclusiveMinimum": 0}},
                "required": ["kind", "radius"],
            },
            {
                "type": "object",
                "properties": {"kind": {"const": "square"}, "side": {"type": "number", "exclusiveMinimum": 0}},
                "required": ["kind", "side"],
            },
        ]
    },
    "openapi": {
        "definitions": {
            "Base": {
                "type": "object",
                "properties": {"id": {"type": "integer", "format": "int64"}},
                "required": ["id"],
            },
            "Error": {
                "allOf": [
                    {"$ref": "#/definitions/Base"},
                    {
                        "type": "object",
                        "properties": {"code": {"type": "integer", "minimum": 100, "maximum": 599}},
                        "required": ["code"],
                    },
                ]
            },
        },
        "$ref": "#/definitions/Error",
    },
    "tree": {
        "$ref": "#/$defs/node",
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "value": {"type": ["string", "number", "null"]},
                    "children": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 2},
                },
                "required": ["value"],
                "additionalProperties": False,
            }
        },
    },
    "conditional": {
        "type": "object",
        "properties": {"country": {"enum": ["US", "CA"]}, "code": {"type": "string"}},
        "required": ["country", "code"],
        "if": {"properties": {"country": {"const": "US"}}},
        "then": {"properties": {"code": {"pattern": "^[0-9]{5}$"}}},
        "else": {"properties": {"code": {"pattern": "^[A-Z][0-9][A-Z]$"}}},
    },
    "condition_on_any_text": {
        "type": "object",
        "properties": {"kind": {"type": "string", "maxLength": 6}},
        "required": ["kind"],
        "if": {"properties": {"kind": {"const": "full"}}, "required": ["kind"]},
        "then": {"required": ["body"]},
        "else": {"properties": {"body": False}},
    },
    "dependent": {
        "type": "object",
        "properties": {"card": {"type": "string"}, "owner": {"type": "string"}, "cvc": {"type": "string"}},
        "dependentRequired": {"card": ["owner", "cvc"]},
        "additionalProperties": False,
    },
    "dependent_schema": {
        "type": "object",
        "properties": {"size": {"type": "integer"}},
        "dependentSchemas": {"size": {"properties": {"unit": {"enum": ["cm", "in"]}}, "required": ["unit"]}},
    },
    "exactly_one": {
        "type": "object",
        "properties": {"email": {"type": "string"}, "phone": {"type": "string"}},
        "oneOf": [{"required": ["email"]}, {"required": ["phone"]}],
        "additionalProperties": False,
    },
    "at_least_one": {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}, "c": {"type": "integer"}},
        "minProperties": 1,
    },
    "not_empty": {"type": "string", "not": {"const": ""}},
    "not_reserved": {"type": "string", "maxLength": 4, "not": {"enum": ["root", "ro", 'a"b', ""]}},
    "not_these_numbers": {"type": "integer", "not": {"enum": [0, 1, 7]}},
    "enum_without": {"enum": ["a", "b", 3, None], "not": {"enum": ["b", 3.0]}},
    "forbidden_property": {"type": "object", "not": {"required": ["secret"]}},
    "map": {"type": "object", "additionalProperties": {"type": "integer", "minimum": 0}},
    "map_of_names": {
        "type": "object",
        "propertyNames": {"pattern": "^[a-z_]{1,8}$"},
        "additionalProperties": {"type": "boolean"},
    },
    "map_of_listed_names": {
        "type": "object",
        "propertyNames": {"enum": ["x", "y"]},
        "additionalProperties": {"type": "null"},
    },
    "headers": {
        "type": "object",
        "properties": {"x-id": {"minLength": 2}},
        "patternProperties": {"^x-": {"type": "string"}},
        "additionalProperties": False,
    },
    "closed_by_unevaluated": {
        "allOf": [{"$ref": "#/$defs/base"}],
        "type": "object",
        "properties": {"extra": {"type": "boolean"}},
        "unevaluatedProperties": False,
        "$defs": {"base": {"type": "object", "properties": {"id": {"type": "integer"}}, "required": ["id"]}},
    },
    "tuple": {"type": "array", "prefixItems": [{"type": "number"}, {"type": "string"}], "items": False, "minItems": 2},
    "tuple_of_draft_7": {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "type": "array",
        "items": [{"type": "integer"}, {"type": "boolean"}],
        "additionalItems": {"type": "null"},
        "maxItems": 4,
    },
    "draft_4": {
        "$schema": "http://json-schema.org/draft-04/schema#",
        "type": "object",
        "properties": {"share": {"type": "number", "minimum": 0, "maximum": 1, "exclusiveMaximum": True}},
        "required": ["share"],
        "dependencies": {"share": ["unit"]},
    },
    "siblings_of_ref_in_draft_7": {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "properties": {"a": {"$ref": "#/definitions/text", "maxLength": 0}},
        "required": ["a"],
        "definitions": {"text": {"type": "string"}},
    },
    "anchors": {"$ref": "#item", "$defs": {"x": {"$anchor": "item", "type": "integer"}}},
    "identified": {
        "$id": "https://example.com/root.json",
        "$ref": "item.json",
        "$defs": {
            "item": {
                "$id": "item.json",
                "type": "array",
                "items": {"$ref": "#/$defs/n"},
                "$defs": {"n": {"type": "null"}},
            }
        },
    },
    "dynamic": {"$dynamicRef": "#node", "$defs": {"n": {"$dynamicAnchor": "node", "type": "boolean"}}},
    "password": {"type": "string", "pattern": r"^(?=.*[A-Z])(?=.*\d)[A-Za-z\d]{8,12}$"},
    "quotes": {"type": "array", "items": {"type": "string", "pattern": r"^[^\"\\]+$"}, "minItems": 1},
    "white_space": {"type": "string", "pattern": r"^\S+\s\S+$"},
    "classes": {"type": "string", "pattern": r"^[\w.&&[-]{2,4}$"},
    "numbers": {
        "type": "object",
        "properties": {
            "above": {"type": "number", "exclusiveMinimum": 0, "maximum": 0.25},
            "below": {"type": "number", "exclusiveMaximum": 1},
            "step": {"type": "number", "multipleOf": 0.25, "minimum": -2, "maximum": 2},
            "even": {"type": "integer", "multipleOf": 2},
            "halves": {"type": "integer", "multipleOf": 1.5},
            "one": {"type": "number", "minimum": 3, "maximum": 3},
            "long": {"type": "number", "minimum": 0.1234567890123456789, "maximum": 0.2},
            "int64": {"type": "integer", "maximum": 9223372036854775807},
        },
        "required": ["above", "below", "step", "even", "halves", "one", "long", "int64"],
        "additionalProperties": False,
    },
    "any_number": {"type": "number"},
    "anything": {},
    "true": True,
    "multi_type": {"type": ["string", "integer", "null", "array"], "minLength": 2, "maxItems": 2, "minimum": 5},
    "typeless": {"properties": {"a": {"type": "integer"}}, "required": ["a"]},
    "joined": {
        "allOf": [
            {"type": "object", "properties": {"a": {"type": "number", "minimum": 1}}, "required": ["a"]},
            {"properties": {"a": {"type": "integer", "maximum": 3}}, "additionalProperties": {"type": "string"}},
        ]
    },
    "joined_recursion": {
        "allOf": [{"$ref": "#/$defs/tree"}, {"properties": {"size": {"maximum": 9}}}],
        "$defs": {
            "tree": {
                "type": "object",
                "properties": {"size": {"type": "integer"}, "next": {"$ref": "#/$defs/tree"}},
                "required": ["size"],
                "additionalProperties": False,
            }
        },
    },
    "nested_consts": {"const": {"a": [1, 2.5, {"b": None}], "c": 'é"\\\n'}},
    "zero_items": {"type": "array", "uniqueItems": True, "maxItems": 1, "contains": True},
}
"""Grammars enforce all of these."""

RELAXED: dict[str, tuple[Json, set[tuple[str, str]]]] = {
    "unique": ({"type": "array", "items": {"enum": ["a", "b"]}, "uniqueItems": True}, {("", "uniqueItems")}),
    "contains": ({"type": "array", "contains": {"const": 1}}, {("", "contains")}),
    "not_pattern": ({"type": "string", "not": {"pattern": "a"}}, {("", "not")}),
    "overlapping": (
        {"oneOf": [{"type": "string", "pattern": "a"}, {"type": "string", "pattern": "b"}]},
        {("", "oneOf")},
    ),
    "look_behind": (
        {"type": "object", "properties": {"a": {"type": "string", "pattern": "(?<!x)y"}}},
        {("/properties/a", "pattern")},
    ),
    "back_reference": ({"type": "string", "pattern": r"^(a|b)\1$"}, {("", "pattern")}),
    "regex": ({"type": "string", "format": "regex"}, {("", "format")}),
    "if_pattern": (
        {"type": "string", "if": {"pattern": "^a"}, "then": {"maxLength": 3}, "else": {"minLength": 3}},
        {("", "if")},
    ),
    "two_of_many": (
        {"type": "object", "properties": {"a": True, "b": True, "c": True}, "minProperties": 2},
        {("", "minProperties")},
    ),
    "two_names": ({"type": "object", "minProperties": 2}, {("", "minProperties")}),
    "at_most": (
        {"type": "object", "properties": {"a": True, "b": True, "c": True}, "maxProperties": 2},
        {("", "maxProperties")},
    ),
    "overlapping_patterns": (
        {"type": "object", "patternProperties": {"a": {"type": "integer"}, "b": {"maximum": 3}}},
        {("", "patternProperties")},
    ),
    "remote": (
        {"type": "object", "properties": {"a": {"$ref": "https://json-schema.org/draft/2020-12/schema"}}},
        {("/properties/a", "$ref")},
    ),
    "unevaluated": (
        {
            "type": "object",
            "anyOf": [{"properties": {"a": {"type": "null"}}}, {"properties": {"b": {"type": "null"}}}],
            "unevaluatedProperties": False,
        },
        {("", "unevaluatedProperties")},
    ),
    "divisor": ({"type": "integer", "multipleOf": 123456789}, {("", "multipleOf")}),
    "uint64": ({"type": "integer", "minimum": 0, "maximum": 18446744073709551615}, {("", "maximum")}),
    "big_constant": ({"const": 10**30}, {("", "const")}),
    "deleted": ({"enum": ["a\x7f", "b"]}, {("", "enum")}),
    "tilde": (
        {"properties": {"a/b": {"properties": {"~": {"not": {"pattern": "x"}}}}}},
        {("/properties/a~1b/properties/~0", "not")},
    ),
}
"""With the pointers and keywords that grammars leave to validation."""

REFUSED: dict[str, Json] = {
    "false": False,
    "required_false": {"type": "object", "properties": {"a": False}, "required": ["a"]},
    "no_items": {"type": "array", "items": False, "minItems": 1},
    "empty_enum": {"enum": []},
    "two_constants": {"allOf": [{"const": 1}, {"const": 2}]},
    "bounds": {"type": "integer", "minimum": 3, "maximum": 2},
    "between": {"type": "integer", "exclusiveMinimum": 2, "exclusiveMaximum": 3},
    "endless": {
        "$ref": "#/$defs/a",
        "$defs": {"a": {"type": "object", "properties": {"a": {"$ref": "#/$defs/a"}}, "required": ["a"]}},
    },
}
"""No value keeps these."""
