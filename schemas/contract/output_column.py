"""Parsed answers as one typed Arrow column, of the type that `schemas/contract/output_type.py` derives.

Values are checked and converted in Python first. `pa.array` alone is faster, but does not always raise on a type
mismatch: it turns true into 1.0, a string into a list of characters, and an empty list into a struct of nulls.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any, TypeAlias

import pyarrow as pa

from moebeam.schemas.canonical import Json
from moebeam.schemas.contract.json_shape import ListOf, MapOf, Scalar, Shape, Struct
from moebeam.schemas.contract.output_type import OutputType
from moebeam.schemas.contract.shape_reader import INT64

_Fit: TypeAlias = Callable[[Json], Any]


@dataclass(frozen=True, slots=True)
class TypedColumn:
    """A column and the number of values that are null because they do not fit their type.

    Attributes:
        array: shape (num_rows,).
        num_misfits: counts values, not rows; the answer's JSON text still has them.
    """

    array: "pa.Array[Any]"
    num_misfits: int


def output_column(values: Sequence[Json | None], type: OutputType) -> TypedColumn:
    """Build the column of answers; never raises because of an answer's content.

    A value that does not fit its type is null in the column and counted: an integer beyond int64, a number that no
    double holds exactly, a date in year 0, or a value that the schema allows but the type does not. Properties
    missing from the type are dropped uncounted, because the schema does not declare them either.

    Args:
        values: parsed answers, None for rows without one; shape (num_rows,).
    """
    misfits = _Misfits()
    fit = _fit(type.shape, misfits)
    fitted = [fit(value) for value in values]
    return TypedColumn(pa.array(fitted, type.arrow), misfits.count)


class _Misfits:
    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0

    def note(self) -> None:
        """Count one; returns None as its replacement."""
        self.count += 1


def _fit(shape: Shape, misfits: _Misfits) -> _Fit:
    """Build a function that converts a JSON value to what `pa.array` accepts for the shape's type."""
    match shape:
        case Struct(fields):
            return _fit_struct([(name, _fit(of, misfits)) for name, of in fields], misfits)
        case ListOf(item):
            return _fit_list(_fit(item, misfits), misfits)
        case MapOf(value):
            return _fit_map(_fit(value, misfits), misfits)
        case Scalar("string"):
            return _fit_exactly(str, misfits)
        case Scalar("boolean"):
            return _fit_exactly(bool, misfits)
        case Scalar("integer"):
            return _fit_scalar(_as_int64, misfits)
        case Scalar("number"):
            return _fit_scalar(_as_double, misfits)
        case Scalar("date"):
            return _fit_scalar(_as_date, misfits)
        case _:
            return _as_json_text


def _fit_struct(fields: Sequence[tuple[str, _Fit]], misfits: _Misfits) -> _Fit:
    def fit(value: Json) -> Any:
        if isinstance(value, dict):
            return {name: fit_field(value.get(name)) for name, fit_field in fields}
        return None if value is None else misfits.note()

    return fit


def _fit_list(fit_item: _Fit, misfits: _Misfits) -> _Fit:
    def fit(value: Json) -> Any:
        if isinstance(value, list):
            return [fit_item(item) for item in value]
        return None if value is None else misfits.note()

    return fit


def _fit_map(fit_value: _Fit, misfits: _Misfits) -> _Fit:
    def fit(value: Json) -> Any:
        if isinstance(value, dict):
            return [(name, fit_value(inner)) for name, inner in value.items()]
        return None if value is None else misfits.note()

    return fit


def _fit_exactly(type_: type, misfits: _Misfits) -> _Fit:
    def fit(value: Json) -> Any:
        return value if value is None or type(value) is type_ else misfits.note()

    return fit


def _fit_scalar(convert: _Fit, misfits: _Misfits) -> _Fit:
    def fit(value: Json) -> Any:
        if value is None:
            return None
        converted = convert(value)
        return misfits.note() if converted is None else converted

    return fit


def _as_int64(value: Json) -> int | None:
    """Convert an integer; JSON Schema counts 3.0 as one."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if type(value) is int and value in INT64 else None


def _as_double(value: Json) -> float | None:
    if type(value) is float:
        return value
    if type(value) is not int:
        return None
    try:
        double = float(value)
    except OverflowError:
        return None
    return double if double == value else None


def _as_date(value: Json) -> date | None:
    if not isinstance(value, str):
        return None
    try:
        found = date.fromisoformat(value)
    except ValueError:
        return None
    # Python also parses 20261123 and 2026-W48-1, which would not round-trip.
    return found if found.isoformat() == value else None


def _as_json_text(value: Json) -> str | None:
    return None if value is None else json.dumps(value, ensure_ascii=False, separators=(",", ":"))
