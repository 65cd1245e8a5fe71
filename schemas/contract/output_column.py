"""Parsed answers as one typed Arrow column, of the type that `schemas/contract/output_type.py` derives.

Every value is fitted to its type in Python before Arrow sees it. `pa.array` alone is faster, but where a value is not
of its type it does not always raise: it makes 1.0 of true, a list of characters of a string, a struct of nulls of an
empty list.
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
    """A column, and how many of its values are null because they do not fit their type.

    Attributes:
        array: shape (num_rows,).
        num_misfits: values, not rows; they stand in the answer's JSON text.
    """

    array: "pa.Array[Any]"
    num_misfits: int


def output_column(values: Sequence[Json | None], type: OutputType) -> TypedColumn:
    """Build the column of answers; never raises for what an answer holds.

    A value that does not fit its type (an integer beyond int64, a number that no double holds exactly, a date of the
    year 0, or a value that the schema allows and the type did not foresee) is null in the column, and counted.
    Properties that the type does not name are left out uncounted: the schema did not name them either.

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
        """Count one; returns the null that takes its place."""
        self.count += 1


def _fit(shape: Shape, misfits: _Misfits) -> _Fit:
    """A function that turns a JSON value into what `pa.array` takes for the shape's type."""
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
    """JSON Schema counts 3.0 among the integers."""
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
    # Python also reads 20261123 and 2026-W48-1, which would not come back as they were written.
    return found if found.isoformat() == value else None


def _as_json_text(value: Json) -> str | None:
    return None if value is None else json.dumps(value, ensure_ascii=False, separators=(",", ":"))
