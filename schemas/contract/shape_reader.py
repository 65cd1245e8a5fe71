"""Reads the shapes (`schemas/contract/json_shape.py`) that a JSON Schema expects.

Only `schemas/contract/output_type.py` uses it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce

from moebeam.schemas.canonical import Json
from moebeam.schemas.contract.answer_schema import Formats
from moebeam.schemas.contract.json_shape import (
    ANY_OBJECT,
    ANY_VALUE,
    ANYTHING,
    ONLY_NULL,
    Anything,
    JsonText,
    ListOf,
    MapOf,
    Scalar,
    Shape,
    Struct,
    join,
    meet,
)
from moebeam.schemas.contract.references import References, SchemaLocation, make_schema

INT64 = range(-(2**63), 2**63)

_MAX_READS = 6_000
"""Most (sub)schemas read for one type: mutual references expand exponentially."""
_MAX_LEVELS = 100
"""Deepest nesting of schemas, references followed; stays far below Python's recursion limit."""

_BEYOND_INT64 = JsonText("integers beyond 64 bits")
_RECURSION = JsonText("a schema that contains itself")
_TOO_DEEP = JsonText("values nested deeper than the levels of a column")


class TooLarge(Exception):
    """The shape is too large at this depth."""


def read_shape(schema: Json, formats: Formats, *, max_depth: int) -> Shape:
    """The shape of valid values; anything below `max_depth` lists, maps and structs is JSON text.

    Raises:
        TooLarge: references expand to too many schemas.
    """
    references = References(schema)
    return _Reader(formats, references, max_depth).read(references.root, ANYTHING, _Place())


@dataclass(frozen=True, slots=True)
class _Place:
    """The place of the schema being read.

    Attributes:
        depth: lists, maps and structs around the value.
        open: schema identity -> depth at which it was entered, for all schemas being read.
    """

    depth: int = 0
    level: int = 0
    open: Mapping[int, int] = field(default_factory=dict[int, int])


@dataclass(slots=True)
class _Reader:
    """Reads shapes; each schema narrows what is already known (`given`) about its value."""

    formats: Formats
    references: References
    max_depth: int
    num_reads: int = 0

    def read(self, location: SchemaLocation, given: Shape, place: _Place) -> Shape:
        schema = location.schema
        if not isinstance(schema, Mapping):
            return ONLY_NULL if schema is False else given
        self.num_reads += 1
        if self.num_reads > _MAX_READS:
            raise TooLarge
        entered = place.open.get(id(schema))
        if entered is not None:
            # Entered at the same place again, it adds nothing.
            return given if entered == place.depth else meet(given, _RECURSION)
        if place.level > _MAX_LEVELS:
            return meet(given, _TOO_DEEP)
        inner = replace(place, level=place.level + 1, open={**place.open, id(schema): place.depth})
        if self.references.draft <= 7 and "$ref" in schema:
            return self._follow(location, "$ref", given, inner)
        shape = self._read_type(location, given, inner)
        if "const" in schema:
            shape = _narrow_to_values(shape, [schema["const"]])
        if "enum" in schema:
            shape = _narrow_to_values(shape, _list(schema["enum"]))
        for keyword in ("$ref", "$dynamicRef", "$recursiveRef"):
            if keyword in schema:
                shape = self._follow(location, keyword, shape, inner)
        for part in location.children("allOf"):
            shape = self.read(part, shape, inner)
        for branches in _alternatives(location):
            shape = reduce(join, [self.read(branch, shape, inner) for branch in branches])
        return shape

    def _follow(self, location: SchemaLocation, keyword: str, given: Shape, place: _Place) -> Shape:
        reference = location.get(keyword)
        # Pointers only: an anchor may be dynamic and depend on the path to it.
        is_pointer = isinstance(reference, str) and (reference == "#" or reference.startswith("#/"))
        target = self.references.find(str(reference), location.base) if is_pointer else None
        if target is None:
            return meet(given, JsonText("a reference that is not followed"))
        return self.read(target, given, place)

    def _read_type(self, location: SchemaLocation, given: Shape, place: _Place) -> Shape:
        declared = location.get("type")
        if declared is None:
            if _has_any(location, _OBJECT_KEYWORDS) and isinstance(given, Anything | Struct | MapOf):
                return meet(given, self._read_object(location, place))
            if _has_any(location, _LIST_KEYWORDS) and isinstance(given, Anything | ListOf):
                return meet(given, self._read_list(location, place))
            return given
        names = declared if isinstance(declared, list) else [declared]
        return meet(given, reduce(join, [self._read_one_type(name, location, place) for name in names], ONLY_NULL))

    def _read_one_type(self, name: Json, location: SchemaLocation, place: _Place) -> Shape:
        match name:
            case "object":
                return self._read_object(location, place)
            case "array":
                return self._read_list(location, place)
            case "string":
                is_date = location.get("format") == "date" and self.formats == "assert"
                return Scalar("date" if is_date else "string")
            case "integer":
                return _BEYOND_INT64 if _is_beyond_int64(location) else Scalar("integer")
            case "number":
                return Scalar("number")
            case "boolean":
                return Scalar("boolean")
            case "null":
                return ONLY_NULL
            case _:
                return ANY_VALUE

    def _read_object(self, location: SchemaLocation, place: _Place) -> Shape:
        inner = replace(place, depth=place.depth + 1)
        if inner.depth > self.max_depth:
            return _TOO_DEEP
        properties = location.get("properties")
        if isinstance(properties, Mapping) and properties:
            return Struct(
                tuple((name, self.read(location.child("properties", name), ANYTHING, inner)) for name in properties)
            )
        values = location.children("patternProperties")
        if isinstance(location.get("additionalProperties"), Mapping):
            values.append(location.child("additionalProperties"))
        if not values:
            return ANY_OBJECT
        value = reduce(join, [self.read(of, ANYTHING, inner) for of in values])
        return ANY_OBJECT if isinstance(value, Anything) else MapOf(value)

    def _read_list(self, location: SchemaLocation, place: _Place) -> Shape:
        inner = replace(place, depth=place.depth + 1)
        if inner.depth > self.max_depth:
            return _TOO_DEEP
        first = "prefixItems"
        rest = "items" if location.get("items") is not None else "unevaluatedItems"
        if isinstance(location.get(rest), list):
            first, rest = rest, "additionalItems"
        items = location.children(first)
        max_items = location.get("maxItems")
        if location.get(rest) is not None:
            items.append(location.child(rest))
        elif not isinstance(max_items, int) or max_items > len(items):
            items.append(_ANY_SCHEMA)
        return ListOf(reduce(join, [self.read(of, ANYTHING, inner) for of in items], ONLY_NULL))


_ANY_SCHEMA = make_schema(True, "")
_OBJECT_KEYWORDS = ("properties", "patternProperties", "additionalProperties")
_LIST_KEYWORDS = ("items", "prefixItems")


def _has_any(location: SchemaLocation, keywords: Iterable[str]) -> bool:
    return any(location.get(keyword) is not None for keyword in keywords)


def _alternatives(location: SchemaLocation) -> Iterable[Sequence[SchemaLocation]]:
    """Groups of alternatives: one schema of each group holds."""
    for keyword in ("anyOf", "oneOf"):
        if branches := location.children(keyword):
            yield branches
    choice = [location.child(name) if location.get(name) is not None else _ANY_SCHEMA for name in ("then", "else")]
    if location.get("if") is not None and choice != [_ANY_SCHEMA, _ANY_SCHEMA]:
        yield choice
    for keyword in ("dependentSchemas", "dependencies"):
        for dependent in location.children(keyword):
            if isinstance(dependent.schema, Mapping):
                yield dependent, _ANY_SCHEMA


def _narrow_to_values(shape: Shape, values: Sequence[Json]) -> Shape:
    """Narrow a shape to the allowed values (`enum`, `const`)."""
    if any(isinstance(value, list | Mapping) for value in values):
        return JsonText("an enum of lists or objects") if isinstance(shape, Anything) else shape
    return meet(shape, reduce(join, [_scalar_shape(value) for value in values], ONLY_NULL))


def _scalar_shape(value: Json) -> Shape:
    match value:
        case None:
            return ONLY_NULL
        case bool():
            return Scalar("boolean")
        case int():
            return Scalar("integer") if value in INT64 else _BEYOND_INT64
        case float():
            return Scalar("number")
        case _:
            return Scalar("string")


def _is_beyond_int64(location: SchemaLocation) -> bool:
    for keyword, step in (("minimum", 0), ("exclusiveMinimum", 1), ("maximum", 0), ("exclusiveMaximum", -1)):
        bound = location.get(keyword)
        if isinstance(bound, int | float) and not isinstance(bound, bool):
            nearest = bound + step
            if not INT64.start <= nearest < INT64.stop:
                return True
    return False


def _list(value: Json) -> Sequence[Json]:
    return value if isinstance(value, list) else []
