"""The Arrow type of answers that satisfy a JSON Schema, so that `select output.category` works.

The type is derived once, before the run; `schemas/contract/output_column.py` builds columns of it. Results keep the
answer's JSON text too.

The type is as precise as the schema, Parquet, DuckDB, Spark and pandas together allow. Values without such a type
(anything, several types at once, recursion) become strings of JSON text; `OutputType` says where and why. Every field
is nullable, so absent and null properties look the same. Undeclared properties are only in the JSON text.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import pyarrow as pa

from moebeam.schemas.canonical import Json
from moebeam.schemas.contract.answer_schema import Formats
from moebeam.schemas.contract.json_shape import (
    ANY_VALUE,
    Anything,
    JsonText,
    ListOf,
    MapOf,
    OnlyNull,
    Scalar,
    ScalarKind,
    Shape,
    Struct,
)
from moebeam.schemas.contract.references import escape_step
from moebeam.schemas.contract.shape_reader import TooLarge, read_shape

MAX_DEPTH = 16
"""Most nested lists, maps and structs. DuckDB 2.0 opens 16 levels in 4 ms and 32 in 25 ms; at 64 it does not finish."""

MAX_FIELDS = 2_000

ARROW_OF: Mapping[ScalarKind, "pa.DataType"] = {
    "string": pa.string(),
    "date": pa.date32(),
    "integer": pa.int64(),
    "number": pa.float64(),
    "boolean": pa.bool_(),
}


@dataclass(frozen=True, slots=True)
class JsonTextAt:
    """A place in the answer that stays JSON text.

    Attributes:
        pointer: JSON pointer into the answer, with `*` for list items and map values.
    """

    pointer: str
    reason: str


@dataclass(frozen=True, slots=True)
class OutputType:
    """The type of the `output` column.

    Attributes:
        shape: distinguishes strings from strings of JSON text, which have the same Arrow type.
    """

    arrow: pa.DataType
    shape: Shape
    json_texts: tuple[JsonTextAt, ...]

    @property
    def json_text_at(self) -> tuple[str, ...]:
        """Pointers to the strings of JSON text, in document order."""
        return tuple(text.pointer for text in self.json_texts)


def output_type(schema: Json, formats: Formats = "assert") -> OutputType | None:
    """Derive the column type of valid answers.

    An object becomes a struct in property order, or a map if only its value type is known. An integer is int64, a
    number double, and a string with `format: date` a date32 if formats are asserted. Other formats stay strings:
    RFC 3339 allows instants that no timestamp holds. Alternatives unite: objects by property, integer and number to
    double. Objects without properties, with an empty name, or with names that differ only in case (DuckDB and Spark
    would confuse them) stay JSON text, as do integers declared beyond int64.

    `properties` and `items` without `type` are read as object and list, although any scalar is valid there;
    `output_column` counts the answers that differ.

    Args:
        schema: a valid JSON Schema; external references are not followed.
    Returns:
        None if the whole answer would be JSON text, which has a column already.
    """
    for max_depth in (MAX_DEPTH, 8, 4, 2, 1):
        settling = _Settling()
        try:
            shape = settling.settle(read_shape(schema, formats, max_depth=max_depth), "")
        except TooLarge:
            continue
        if isinstance(shape, JsonText):
            return None
        return OutputType(_arrow(shape), shape, tuple(settling.json_texts))
    return None


def describe_output_type(type: OutputType, max_characters: int = 400) -> str:
    """Format the type on one line, such as `struct<category: string, priority: string>`; folds inner structs if long.

    `json` marks strings of JSON text.
    """
    for depth in (MAX_DEPTH, 4, 3, 2, 1, 0):
        text = _describe(type.shape, depth)
        if len(text) <= max_characters:
            return text
    return text[: max_characters - 1] + "…"


def _describe(shape: Shape, depth: int) -> str:
    match shape:
        case Scalar(kind):
            return "int64" if kind == "integer" else "double" if kind == "number" else kind
        case ListOf(item):
            return f"list<{_describe(item, depth)}>"
        case MapOf(value):
            return f"map<string, {_describe(value, depth)}>"
        case Struct(fields) if depth == 0:
            return f"struct<{len(fields)} fields>"
        case Struct(fields):
            return f"struct<{', '.join(f'{name}: {_describe(of, depth - 1)}' for name, of in fields)}>"
        case _:
            return "json"


@dataclass(slots=True)
class _Settling:
    """Reduces a shape to writable ones: scalars, lists, maps, structs with fields, and JSON text."""

    json_texts: list[JsonTextAt] = field(default_factory=list[JsonTextAt])
    num_fields: int = 0

    def settle(self, shape: Shape, pointer: str) -> Shape:
        match shape:
            case Scalar():
                return shape
            case ListOf(item):
                return ListOf(self.settle(item, f"{pointer}/*"))
            case MapOf(value):
                return MapOf(self.settle(value, f"{pointer}/*"))
            case Struct(fields):
                problem = _name_problem([name for name, _ in fields])
                if problem is not None:
                    return self._leave(JsonText(problem), pointer)
                self.num_fields += len(fields)
                if self.num_fields > MAX_FIELDS:
                    raise TooLarge
                return Struct(tuple((name, self.settle(of, f"{pointer}/{escape_step(name)}")) for name, of in fields))
            case Anything():
                return self._leave(ANY_VALUE, pointer)
            case OnlyNull():
                return self._leave(JsonText("nothing but null"), pointer)
            case JsonText():
                return self._leave(shape, pointer)

    def _leave(self, text: JsonText, pointer: str) -> JsonText:
        self.json_texts.append(JsonTextAt(pointer, text.reason))
        return text


def _name_problem(names: Sequence[str]) -> str | None:
    """Why an object with these properties cannot be a struct whose fields every reader can distinguish."""
    if not names:
        return "an object without declared properties"  # Parquet has no empty structs.
    seen: dict[str, str] = {}
    for name in names:
        if not name or "\0" in name:
            return "a property whose name is empty or holds a NUL"
        twin = seen.setdefault(name.casefold(), name)
        if twin != name:
            return f"property names that differ only in case: {twin}, {name}"
    return None


def _arrow(shape: Shape) -> pa.DataType:
    match shape:
        case Scalar(kind):
            return ARROW_OF[kind]
        case ListOf(item):
            return pa.list_(_arrow(item))
        case MapOf(value):
            return pa.map_(pa.string(), _arrow(value))
        case Struct(fields):
            return pa.struct(cast("Any", [(name, _arrow(of)) for name, of in fields]))
        case _:
            return pa.string()
