"""Shapes of JSON values: what a JSON Schema says about types, and how two statements about one value combine.

Read by `schemas/contract/shape_reader.py`, made a column's type by `schemas/contract/output_type.py`. A shape says
which values are *expected*; null is expected everywhere, and which strings or numbers are allowed does not matter here.
"""

from dataclasses import dataclass
from typing import Literal, TypeAlias

ScalarKind: TypeAlias = Literal["string", "date", "integer", "number", "boolean"]


@dataclass(frozen=True, slots=True)
class Anything:
    """Nothing was said about the value."""


@dataclass(frozen=True, slots=True)
class OnlyNull:
    """No value but null, or none at all."""


@dataclass(frozen=True, slots=True)
class Scalar:
    """A `date` is a string of RFC 3339's full-date; an `integer` fits int64."""

    kind: ScalarKind


@dataclass(frozen=True, slots=True)
class JsonText:
    """A value that no single column type holds; `reason` is a noun phrase for the user."""

    reason: str


@dataclass(frozen=True, slots=True)
class ListOf:
    item: "Shape"


@dataclass(frozen=True, slots=True)
class MapOf:
    """An object of names that are not known beforehand."""

    value: "Shape"


@dataclass(frozen=True, slots=True)
class Struct:
    """An object, with its declared properties in their order; none are declared where it is only known to be one."""

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
    """The shape of a value that has the one shape or the other (`anyOf`).

    Structs unite their properties, also those that only one of them knows.
    """
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
