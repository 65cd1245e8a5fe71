"""Negates a schema: what must hold where it must not.

Part of `moebeam.model_runner.grammar.schema_forms`; `choices` asks here for `not`, for the `else` of a condition, and
for the branches of a `oneOf` that must not match beside another.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise, product
from typing import TypeAlias, cast

from moebeam.schemas.canonical import Json, json_key
from moebeam.schemas.contract.references import References, SchemaLocation, read_draft

Option: TypeAlias = tuple[SchemaLocation | Mapping[str, Json], ...]
Negations: TypeAlias = tuple[list[Option], bool]
"""Options of which a value that breaks a schema takes at least one, and whether no other value does."""

MAX_OPTIONS = 64
MAX_OTHER_STRINGS = 32
"""Most strings whose complement is written as an expression."""

_TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")
_ANNOTATIONS = frozenset(
    {"$schema", "$id", "id", "$anchor", "$defs", "definitions", "$comment", "title", "description", "default"}
    | {"examples", "example", "deprecated", "readOnly", "writeOnly", "contentMediaType", "contentEncoding"}
)
_OPPOSITE_BOUNDS: dict[str, tuple[str, str, int]] = {
    "minimum": ("number", "exclusiveMaximum", 0),
    "maximum": ("number", "exclusiveMinimum", 0),
    "exclusiveMinimum": ("number", "maximum", 0),
    "exclusiveMaximum": ("number", "minimum", 0),
    "minLength": ("string", "maxLength", -1),
    "maxLength": ("string", "minLength", 1),
    "minItems": ("array", "maxItems", -1),
    "maxItems": ("array", "minItems", 1),
    "minProperties": ("object", "maxProperties", -1),
    "maxProperties": ("object", "minProperties", 1),
}
_ANYTHING: Negations = ([()], False)


def negate(
    location: SchemaLocation,
    known: tuple[SchemaLocation, ...],
    pointer: str,
    *,
    references: References,
    list_values: Callable[[tuple[SchemaLocation, ...]], list[Json] | None],
    children: Callable[[tuple[SchemaLocation, ...], str], tuple[SchemaLocation, ...]],
    depth: int = 0,
) -> Negations:
    """Writes the opposite of a schema, as far as that is possible without `not`.

    Args:
        location: the schema.
        known: what else holds for the value; the negation of one value of an `enum` is its other values.
        list_values: all values that satisfy some locations; None where they cannot be listed.
        children: what some locations say of a property.
    Returns:
        The single option `()`, and False, where nothing better is known.
    """
    schema = location.schema
    if not isinstance(schema, Mapping):
        return ([()], True) if schema is False else ([], True)
    if depth > 8 or read_draft(schema) not in (None, references.draft):
        return _ANYTHING

    def negate_inner(other: SchemaLocation, context: tuple[SchemaLocation, ...] = known) -> Negations:
        return negate(
            other, context, pointer, references=references, list_values=list_values, children=children, depth=depth + 1
        )

    if "$ref" in schema:
        target = references.resolve(location, "$ref")
        others = {keyword for keyword in schema if keyword not in _ANNOTATIONS and keyword != "$ref"}
        return _ANYTHING if target is None or (others and references.draft > 7) else negate_inner(target)
    options: list[Option] = []
    is_exact = True
    for keyword, value in schema.items():
        if keyword in _ANNOTATIONS:
            continue
        match keyword:
            case "type":
                found = _negate_type(value)
            case "const" | "enum":
                values = [value] if keyword == "const" else list(cast("Sequence[Json]", value))
                found = _negate_values(values, known, list_values)
            case "required":
                found = (
                    [({"type": "object", "properties": {name: False}},) for name in cast("Sequence[str]", value)],
                    True,
                )
            case "properties":
                found = [], True
                for name in cast("Mapping[str, Json]", value):
                    below = children(known, name)
                    some, is_some_exact = negate_inner(location.child("properties", name), below)
                    for option in some:
                        if any(isinstance(part, SchemaLocation) and '"$' in json.dumps(part.schema) for part in option):
                            # Its references may be relative to where it stands, and it is moved here.
                            return _ANYTHING
                        parts: list[Json] = [
                            part.schema if isinstance(part, SchemaLocation) else part for part in option
                        ]
                        child: Json = {"allOf": parts} if parts else True
                        found[0].append(({"type": "object", "required": [name], "properties": {name: child}},))
                    found = found[0], found[1] and is_some_exact
            case "not":
                found = [(location.child("not"),)], True
            case "anyOf":
                branches = [
                    negate_inner(location.child("anyOf", index)) for index in range(len(cast("Sequence[Json]", value)))
                ]
                joined = [
                    tuple(part for option in chosen for part in option)
                    for chosen in product(*(some for some, _ in branches))
                ]
                found = joined, all(is_some_exact for _, is_some_exact in branches)
            case "allOf":
                branches = [
                    negate_inner(location.child("allOf", index)) for index in range(len(cast("Sequence[Json]", value)))
                ]
                found = [option for some, _ in branches for option in some], all(exact for _, exact in branches)
            case _ if keyword in _OPPOSITE_BOUNDS and isinstance(value, int | float) and not isinstance(value, bool):
                found = _negate_bound(keyword, value)
            case _:
                return _ANYTHING
        options += found[0]
        is_exact = is_exact and found[1]
        if len(options) > MAX_OPTIONS:
            return _ANYTHING
    return options, is_exact


def _negate_type(value: Json) -> Negations:
    refused = {value} if isinstance(value, str) else set(cast("Sequence[str]", value))
    if "number" in refused:
        refused.add("integer")
    # No schema says "a number but not an integer", so all numbers are admitted.
    is_exact = "integer" not in refused or "number" in refused
    left: list[Json] = [name for name in _TYPES if name not in refused and name != "integer"]
    if "integer" not in refused and "number" not in left:
        left.append("integer")
    return ([({"type": left},)] if left else []), is_exact


def _negate_values(
    values: Sequence[Json],
    known: tuple[SchemaLocation, ...],
    list_values: Callable[[tuple[SchemaLocation, ...]], list[Json] | None],
) -> Negations:
    refused = {json_key(value) for value in values}
    possible = list_values(known)
    if possible is not None:
        left: list[Json] = [value for value in possible if json_key(value) not in refused]
        return ([({"enum": left},)] if left else []), True
    strings = [value for value in values if isinstance(value, str)]
    numbers = sorted({value for value in values if isinstance(value, int | float) and not isinstance(value, bool)})
    types: list[Json] = [name for name in _TYPES if name != "integer" and name not in _find_types(values)]
    options: list[Option] = [({"type": types},)] if types else []
    if bool in map(type, values):
        kept: list[Json] = [value for value in (True, False) if json_key(value) not in refused]
        options += [({"enum": kept},)] if kept else []
    if strings:
        options += [({"type": "string", **other},) for other in _exclude_strings(strings)]
    if numbers:
        bounds: list[float | None] = [None, *numbers, None]
        for low, high in pairwise(bounds):
            between: dict[str, Json] = {"type": "number"}
            if low is not None:
                between["exclusiveMinimum"] = low
            if high is not None:
                between["exclusiveMaximum"] = high
            options.append((between,))
    is_exact = not any(isinstance(value, list | dict) for value in values) and len(strings) <= MAX_OTHER_STRINGS
    return options, is_exact


def _find_types(values: Sequence[Json]) -> set[str]:
    """The types whose values are excluded one by one; never arrays or objects."""
    names: dict[type, str] = {type(None): "null", bool: "boolean", int: "number", float: "number", str: "string"}
    return {names[type(value)] for value in values if type(value) in names}


def _exclude_strings(strings: Sequence[str]) -> list[dict[str, Json]]:
    """Strings that are none of a few."""
    if set(strings) == {""}:
        return [{"minLength": 1}]
    if len(strings) > MAX_OTHER_STRINGS:
        return [{}]
    return [{"pattern": f"^{_write_complement(sorted(set(strings)))}$"}]


def _write_complement(strings: Sequence[str]) -> str:
    """An expression for all texts except these: texts that end early, deviate from or extend their common prefixes."""
    by_first: dict[str, list[str]] = {}
    for text in strings:
        if text:
            by_first.setdefault(text[0], []).append(text[1:])
    firsts = "".join(map(_escape_character, by_first))
    branches = [f"[^{firsts}][\\s\\S]*" if firsts else "[\\s\\S]+"]
    branches += [_escape_character(first) + _write_complement(rest) for first, rest in by_first.items()]
    if "" not in strings:
        branches.append("")
    return f"(?:{'|'.join(branches)})"


def _escape_character(char: str) -> str:
    return char if char.isalnum() else f"\\x{ord(char):02x}" if ord(char) < 256 else f"\\u{{{ord(char):x}}}"


def _negate_bound(keyword: str, value: float) -> Negations:
    kind, opposite, step = _OPPOSITE_BOUNDS[keyword]
    bound = value + step
    if bound < 0 and kind != "number":
        return [], True
    return [({"type": kind, opposite: bound},)], True
