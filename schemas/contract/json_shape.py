"""Shapes of JSON values: the types that a JSON Schema declares, and how two declarations about one value combine.

`schemas/contract/shape_reader.py` reads them, `schemas/contract/output_type.py` turns them into a column type. A shape
says which types are *expected*. Null is always expected; constraints on strings and numbers are not part of a shape.
"""

from dataclasses import dataclass
from typing import Literal, TypeAlias

ScalarKind: TypeAlias = Literal["string", "date", "integer", "number", "boolean"]


@dataclass(frozen=True, slots=True)
class Anything:
    """Unconstrained."""


@dataclass(frozen=True, slots=True)
class OnlyNull:
    """Only null, or no value at all."""


@dataclass(frozen=True, slots=True)
class Scalar:
    """A `date` is an RFC 3339 full-date string; an `integer` fits int64."""

    kind: ScalarKind


@dataclass(frozen=True, slots=True)
class JsonText:
    """A value that no single column type can hold; `reason` is a noun phrase for users."""

    reason: str


@dataclass(frozen=True, slots=True)
class ListOf:
    item: "Shape"


@dataclass(frozen=True, slots=True)
class MapOf:
    """An object whose property names are not declared."""

    value: "Shape"


@dataclass(frozen=True, slots=True)
class Struct:
    """An object with its declared properties in order; empty if only the type is known."""

    fields: tuple[tuple[str, "Shape"], ...]


Shape: TypeAlias = Anything | OnlyNull | Scalar | JsonText | ListOf | MapOf | Struct

ANYTHING = Anything()
ONLY_NULL = OnlyNull()
ANY_OBJECT = Struct(())

ANY_VALUE = JsonText("any value")
SEVERAL_TYPES = JsonText("values of several types")
CONTRADICTION = JsonText("types that contradict each other")

_UNION: dict[frozenset[ScalarKind], ScalarKind] = {
    frozenset(("integer", "number")): "number",
    frozenset(("string", "date")): "string",
}
_INTERSECTION: dict[frozenset[ScalarKind], ScalarKind] = {
    frozenset(("integer", "number")): "integer",
    frozenset(("string", "date")): "date",
}


def join(one: Shape, other: Shape) -> Shape:
    """The shape of a value that has either shape (`anyOf`). Structs unite all their properties."""
    match one, other:
        case _ if one == other:
            return one
        case (OnlyNull(), shape) | (shape, OnlyNull()):
            return shape
        case (JsonText() as text, _) | (_, JsonText() as text):
            return text
        case (Anything(), _) | (_, Anything()):
            return ANY_VALUE
        case Scalar(), Scalar():
            kind = _UNION.get(frozenset((one.kind, other.kind)))
            return SEVERAL_TYPES if kind is None else Scalar(kind)
        case ListOf(), ListOf():
            return ListOf(join(one.item, other.item))
        case MapOf(), MapOf():
            return MapOf(join(one.value, other.value))
        case Struct(), Struct():
            fields = dict(one.fields)
            for name, shape in other.fields:
                fields[name] = join(fields[name], shape) if name in fields else shape
            return Struct(tuple(fields.items()))
        case _:
            return SEVERAL_TYPES


def meet(one: Shape, other: Shape) -> Shape:
    """The shape of a value that has both shapes (`allOf`)."""
    match one, other:
        case _ if one == other:
            return one
        case (Anything(), shape) | (shape, Anything()):
            return shape
        case (OnlyNull(), _) | (_, OnlyNull()):
            return ONLY_NULL
        case (Scalar() as scalar, JsonText()) | (JsonText(), Scalar() as scalar):
            return scalar
        case (JsonText() as text, _) | (_, JsonText() as text):
            return text
        case Scalar(), Scalar():
            kind = _INTERSECTION.get(frozenset((one.kind, other.kind)))
            return CONTRADICTION if kind is None else Scalar(kind)
        case ListOf(), ListOf():
            return ListOf(meet(one.item, other.item))
        case MapOf(), MapOf():
            return MapOf(meet(one.value, other.value))
        case (Struct() as struct, MapOf() as map_) | (MapOf() as map_, Struct() as struct):
            return struct if struct.fields else map_
        case Struct(), Struct():
            fields = dict(one.fields)
            for name, shape in other.fields:
                fields[name] = meet(fields[name], shape) if name in fields else shape
            return Struct(tuple(fields.items()))
        case _:
            return CONTRADICTION
