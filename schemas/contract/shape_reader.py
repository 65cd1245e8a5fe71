"""Reads out of a JSON Schema which shapes of values it expects (`schemas/contract/json_shape.py`).

Used by `schemas/contract/output_type.py` only.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from typing import TypeAlias
from urllib.parse import unquote

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

INT64 = range(-(2**63), 2**63)

_MAX_READS = 20_000
"""Most (sub)schemas read for one type: schemas that refer to each other unfold exponentially."""
_MAX_LEVELS = 100
"""Most schemas within each other, references followed; keeps far from Python's recursion limit."""

_Schema: TypeAlias = Mapping[str, Json]
_OLD_DRAFTS = ("draft-04", "draft-06", "draft-07")
_BEYOND_INT64 = JsonText("integers beyond 64 bits")
_RECURSION = JsonText("a schema that contains itself")
_TOO_DEEP = JsonText("values nested deeper than the levels of a column")


class TooLarge(Exception):
    """The shape would be too large at this depth."""


def read_shape(schema: Json, formats: Formats, *, max_depth: int) -> Shape:
    """The shape of valid values; what is nested deeper than `max_depth` lists, maps and structs is JSON text.

    Raises:
        TooLarge: references unfold to more schemas than anyone would write.
    """
    return _Reader(formats, _is_old(schema), max_depth).read(schema, ANYTHING, _Place(schema))


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a schema is read.

    Attributes:
        resource: the document that `#` refers to here.
        depth: lists, maps and structs around the value.
        open: depth at which each schema that is being read was entered, by its identity.
    """

    resource: Json
    depth: int = 0
    level: int = 0
    open: Mapping[int, int] = field(default_factory=dict[int, int])


@dataclass(slots=True)
class _Reader:
    """Reads shapes out of a schema; a schema narrows what is already known (`given`) about its value."""

    formats: Formats
    is_old: bool
    max_depth: int
    num_reads: int = 0

    def read(self, schema: Json, given: Shape, place: _Place) -> Shape:
        if not isinstance(schema, Mapping):
            return ONLY_NULL if schema is False else given
        self.num_reads += 1
        if self.num_reads > _MAX_READS:
            raise TooLarge
        entered = place.open.get(id(schema))
        if entered is not None:
            # Entered at this very place, it says nothing that is not being read already.
            return given if entered == place.depth else meet(given, _RECURSION)
        if place.level > _MAX_LEVELS:
            return meet(given, _TOO_DEEP)
        inner = replace(
            place,
            resource=schema if place.level and _is_resource(schema) else place.resource,
            level=place.level + 1,
            open={**place.open, id(schema): place.depth},
        )
        if self.is_old and "$ref" in schema:
            return self._follow(schema["$ref"], given, inner)
        shape = self._read_type(schema, given, inner)
        if "const" in schema:
            shape = _narrow_to_values(shape, [schema["const"]])
        if "enum" in schema:
            shape = _narrow_to_values(shape, _list(schema["enum"]))
        for keyword in ("$ref", "$dynamicRef", "$recursiveRef"):
            if keyword in schema:
                shape = self._follow(schema[keyword], shape, inner)
        for part in _list(schema.get("allOf")):
            shape = self.read(part, shape, inner)
        for branches in _alternatives(schema):
            shape = reduce(join, [self.read(branch, shape, inner) for branch in branches])
        return shape

    def _follow(self, reference: Json, given: Shape, place: _Place) -> Shape:
        target = _resolve(place.resource, reference)
        if target is None:
            return meet(given, JsonText("a reference that is not followed"))
        return self.read(target, given, place)

    def _read_type(self, schema: _Schema, given: Shape, place: _Place) -> Shape:
        declared = schema.get("type")
        if declared is None:
            if not schema.keys().isdisjoint(_OBJECT_KEYWORDS) and isinstance(given, Anything | Struct | MapOf):
                return meet(given, self._read_object(schema, place))
            if not schema.keys().isdisjoint(_LIST_KEYWORDS) and isinstance(given, Anything | ListOf):
                return meet(given, self._read_list(schema, place))
            return given
        names = declared if isinstance(declared, list) else [declared]
        return meet(given, reduce(join, [self._read_one_type(name, schema, place) for name in names], ONLY_NULL))

    def _read_one_type(self, name: Json, schema: _Schema, place: _Place) -> Shape:
        match name:
            case "object":
                return self._read_object(schema, place)
            case "array":
                return self._read_list(schema, place)
            case "string":
                is_date = schema.get("format") == "date" and self.formats == "assert"
                return Scalar("date" if is_date else "string")
            case "integer":
                return _BEYOND_INT64 if _is_beyond_int64(schema) else Scalar("integer")
            case "number":
                return Scalar("number")
            case "boolean":
                return Scalar("boolean")
            case "null":
                return ONLY_NULL
            case _:
                return ANY_VALUE

    def _read_object(self, schema: _Schema, place: _Place) -> Shape:
        inner = replace(place, depth=place.depth + 1)
        if inner.depth > self.max_depth:
            return _TOO_DEEP
        properties = _mapping(schema.get("properties"))
        if properties:
            return Struct(tuple((name, self.read(of, ANYTHING, inner)) for name, of in properties.items()))
        values = list(_mapping(schema.get("patternProperties")).values())
        if isinstance(schema.get("additionalProperties"), Mapping):
            values.append(schema["additionalProperties"])
        if not values:
            return ANY_OBJECT
        value = reduce(join, [self.read(of, ANYTHING, inner) for of in values])
        return ANY_OBJECT if isinstance(value, Anything) else MapOf(value)

    def _read_list(self, schema: _Schema, place: _Place) -> Shape:
        inner = replace(place, depth=place.depth + 1)
        if inner.depth > self.max_depth:
            return _TOO_DEEP
        first, rest = schema.get("prefixItems"), schema.get("items", schema.get("unevaluatedItems"))
        if isinstance(rest, list):
            first, rest = rest, schema.get("additionalItems")
        places = _list(first)
        max_items = schema.get("maxItems")
        if rest is not None:
            places = [*places, rest]
        elif not isinstance(max_items, int) or max_items > len(places):
            places = [*places, True]
        return ListOf(reduce(join, [self.read(of, ANYTHING, inner) for of in places], ONLY_NULL))


_OBJECT_KEYWORDS = frozenset({"properties", "patternProperties", "additionalProperties"})
_LIST_KEYWORDS = frozenset({"items", "prefixItems"})


def _alternatives(schema: _Schema) -> Iterable[Sequence[Json]]:
    """Groups of schemas of which one holds; `True` stands for a branch that says nothing."""
    for keyword in ("anyOf", "oneOf"):
        if branches := _list(schema.get(keyword)):
            yield branches
    if "if" in schema and ("then" in schema or "else" in schema):
        yield schema.get("then", True), schema.get("else", True)
    for keyword in ("dependentSchemas", "dependencies"):
        for dependent in _mapping(schema.get(keyword)).values():
            if isinstance(dependent, Mapping):
                yield dependent, True


def _narrow_to_values(shape: Shape, values: Sequence[Json]) -> Shape:
    """What remains of a shape where only some values are allowed (`enum`, `const`)."""
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


def _is_beyond_int64(schema: _Schema) -> bool:
    for keyword, step in (("minimum", 0), ("exclusiveMinimum", 1), ("maximum", 0), ("exclusiveMaximum", -1)):
        bound = schema.get(keyword)
        if isinstance(bound, int | float) and not isinstance(bound, bool):
            nearest = bound + step
            if not INT64.start <= nearest < INT64.stop:
                return True
    return False


def _resolve(resource: Json, reference: Json) -> Json:
    """What a reference within the document names; None if it leads elsewhere, as anchors and other documents do."""
    if not isinstance(reference, str) or not (reference == "#" or reference.startswith("#/")):
        return None
    found = resource
    for step in unquote(reference).split("/")[1:]:
        name = step.replace("~1", "/").replace("~0", "~")
        if isinstance(found, Mapping) and name in found:
            found = found[name]
        elif isinstance(found, list) and name.isdecimal() and int(name) < len(found):
            found = found[int(name)]
        else:
            return None
    return found


def _is_resource(schema: _Schema) -> bool:
    identifier = schema.get("$id", schema.get("id"))
    return isinstance(identifier, str) and not identifier.startswith("#")


def _is_old(schema: Json) -> bool:
    """Whether keywords beside `$ref` say nothing, as up to draft 7."""
    declared = schema.get("$schema") if isinstance(schema, Mapping) else None
    return isinstance(declared, str) and any(draft in declared for draft in _OLD_DRAFTS)


def _mapping(value: Json) -> _Schema:
    return value if isinstance(value, Mapping) else {}


def _list(value: Json) -> Sequence[Json]:
    return value if isinstance(value, list) else []
