"""Rows as other transforms make them become Arrow tables, each row with a digest of its values.

The pure part of *keep*. A row is a named tuple or `beam.Row`, a mapping, an Arrow record batch or table of many, or a
pandas frame of many. Whichever it is, equal values have equal digests: files, ids and order follow from these, so that
neither bundles nor retries can be seen in them.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from typing import Any, cast

import numpy as np
import pyarrow as pa

from moebeam.schemas.column_types import storable_table
from moebeam.schemas.errors import InputPatternError, abbreviate

DIGEST = "moebeam_digest"
PROBLEM = "moebeam_problem"
"""Column of a kept file: why a value of the row could not be kept, where one could not."""

ROW_ID = "moebeam_row"
"""Column of a kept file: the id of a row that brings none, by its content."""


@dataclass(frozen=True, slots=True)
class RowColumns:
    """The columns of the rows that are kept.

    Attributes:
        names: of the columns; None keeps all of each row.
        types: Arrow types of those that are declared; others are found by their values.
        is_complete: whether rows have no columns but those of `types`, as rows with a schema.
    """

    names: tuple[str, ...] | None = None
    types: Mapping[str, "pa.DataType"] | None = None
    is_complete: bool = False

    def find_type(self, name: str) -> "pa.DataType | None":
        return (self.types or {}).get(name)


def read_rows(elements: Sequence[object], columns: RowColumns) -> Iterator[pa.Table]:
    """Tables of the values and digests of some elements; one for neighbours of one kind.

    Raises:
        InputPatternError: an element is no row, or its columns have no Arrow type.
    """
    plain: list[object] = []
    for element in elements:
        table = _read_many(element)
        if table is None:
            plain.append(element)
            continue
        if plain:
            yield _read_plain(plain, columns)
            plain = []
        yield _read_table(table, columns)
    if plain:
        yield _read_plain(plain, columns)


def count_rows(element: object) -> int:
    """How many rows an element holds; 1 for what is no batch."""
    return element.num_rows if isinstance(element, pa.RecordBatch | pa.Table) else 1


def _read_many(element: object) -> pa.Table | None:
    """The table of an element that holds many rows."""
    if isinstance(element, pa.RecordBatch):
        return pa.Table.from_batches([element])
    if isinstance(element, pa.Table):
        return element
    if type(element).__module__.partition(".")[0] == "pandas" and hasattr(element, "columns"):
        return pa.Table.from_pandas(cast("Any", element), preserve_index=False)
    return None


def _read_table(table: pa.Table, columns: RowColumns) -> pa.Table:
    names = (
        table.column_names if columns.names is None else [name for name in columns.names if name in table.schema.names]
    )
    table = storable_table(table.select(names)).replace_schema_metadata(None)
    values = [_python_values(table.column(name)) for name in names]
    digests = _digest_rows(names, values, table.num_rows)
    arrays: dict[str, Any] = {}
    problems = _Problems(table.num_rows)
    for name, column in zip(names, values, strict=True):
        wanted, found = columns.find_type(name), table.column(name)
        arrays[name] = found if wanted is None or found.type == wanted else problems.array(name, column, wanted)
    return _assemble(arrays, digests, problems)


def _python_values(column: "pa.ChunkedArray[Any]") -> list[Any]:
    try:
        return column.to_pylist()
    except (ValueError, OverflowError):  # a time that Python cannot hold
        return column.cast(pa.string()).to_pylist()


def _read_plain(rows: Sequence[object], columns: RowColumns) -> pa.Table:
    names, values = _list_values(rows, columns.names)
    digests = _digest_rows(names, values, len(rows))
    problems = _Problems(len(rows))
    arrays = {
        name: problems.array(name, column, columns.find_type(name)) for name, column in zip(names, values, strict=True)
    }
    return _assemble(arrays, digests, problems)


def _list_values(rows: Sequence[object], wanted: tuple[str, ...] | None) -> tuple[list[str], list[Sequence[Any]]]:
    """The values of rows by column."""
    first = rows[0]
    if isinstance(first, tuple) and hasattr(first, "_fields") and all(type(row) is type(first) for row in rows):
        fields = cast("tuple[str, ...]", cast("Any", first)._fields)
        columns = dict(zip(fields, zip(*cast("Sequence[tuple[Any, ...]]", rows), strict=True), strict=True))
        names = list(fields) if wanted is None else [name for name in wanted if name in columns]
        return names, [columns[name] for name in names]
    mappings = [_as_mapping(row) for row in rows]
    names = sorted({name for row in mappings for name in row}) if wanted is None else list(wanted)
    if odd := [name for name in names if not isinstance(cast("object", name), str)]:
        raise InputPatternError(f"rows: expected column names that are text, found {abbreviate(odd[0])}")
    return names, [[row.get(name) for row in mappings] for name in names]


def _as_mapping(row: object) -> Mapping[str, Any]:
    if isinstance(row, Mapping):
        return cast("Mapping[str, Any]", row)
    for method in ("_asdict", "as_dict"):
        if hasattr(row, method):
            return getattr(row, method)()
    raise InputPatternError(
        "rows: expected Beam rows, dicts, Arrow record batches or pandas frames, "
        f"found {type(row).__module__}.{type(row).__qualname__}: {abbreviate(row)}"
    )


class _Problems:
    """Columns of some rows, with a note for each row that has a value that could not be kept."""

    def __init__(self, num_rows: int) -> None:
        self.texts: list[str | None] = [None] * num_rows

    def array(self, name: str, values: Sequence[Any], wanted: "pa.DataType | None") -> "pa.Array[Any]":
        """A column of a type, or of the type of its values; of one that does not fit only its row knows."""
        plain = [value if value is None or type(value) in _AS_THEY_ARE else _plain(value) for value in values]
        try:
            return pa.array(plain, wanted)
        except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
            if wanted is None:
                wanted = _find_type(plain)
                if wanted is None:
                    raise InputPatternError(
                        f"rows: column {name!r}: expected values of one type, found: {error}; give the rows a schema, "
                        "as Beam rows or by Infer(job, schema=…)"
                    ) from error
        kept: list[Any] = []
        for row, value in enumerate(plain):
            try:
                kept.append(pa.scalar(value, wanted))
            except (pa.ArrowException, TypeError, ValueError, OverflowError):
                kept.append(pa.scalar(None, wanted))
                if self.texts[row] is None:
                    self.texts[row] = f"column {name!r}: expected {wanted}, found {abbreviate(values[row])}"
        return pa.array([scalar.as_py() for scalar in kept], wanted)


def _find_type(values: Iterable[Any]) -> "pa.DataType | None":
    """The type that the first value has which has one; None if every value fits, so that a mixture is the trouble."""
    for value in values:
        if value is not None:
            try:
                return pa.scalar(value).type
            except (pa.ArrowException, TypeError, ValueError, OverflowError):
                continue
    return None


_AS_THEY_ARE = (str, int, float, bool, bytes)


def _plain(value: Any) -> Any:
    """A value in Python's own types: rows become dicts, Beam's instants datetimes."""
    if value is None or type(value) in _AS_THEY_ARE or isinstance(value, date | time | timedelta | Decimal):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return [_plain(inner) for inner in cast("list[Any]", value.tolist())]
    if isinstance(value, Mapping):
        return {name: _plain(inner) for name, inner in cast("Mapping[Any, Any]", value).items()}
    if hasattr(value, "_asdict") or hasattr(value, "as_dict"):
        return {name: _plain(inner) for name, inner in _as_mapping(value).items()}
    if hasattr(value, "micros") and hasattr(value, "to_utc_datetime"):
        return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=int(value.micros))
    if isinstance(value, Sequence | set | frozenset) and not isinstance(value, str | bytes):
        return [_plain(inner) for inner in cast("Iterable[Any]", value)]
    return value


def _digest_rows(names: Sequence[str], columns: Sequence[Sequence[Any]], num_rows: int) -> list[bytes]:
    """SHA-256 of each row: of its values that are not null, by name, as canonical JSON."""
    heads = {name: f"{json.dumps(name)}:" for name in sorted(names)}
    by_name = dict(zip(names, columns, strict=True))
    encode: Callable[[Any], str] = _ENCODER.encode
    parts = [
        [None if value is None else head + encode(value) for value in by_name[name]] for name, head in heads.items()
    ]
    rows = zip(*parts, strict=True) if parts else ((),) * num_rows
    sha256 = hashlib.sha256
    return [sha256(",".join(filter(None, row)).encode("utf-8", "surrogatepass")).digest() for row in rows]


def _jsonable(value: Any) -> Any:
    plain = _plain(value)
    if isinstance(plain, bytes):
        return {"bytes": plain.hex()}
    if isinstance(plain, dict | list | str | int | float):
        return cast("Any", plain)
    return {type(plain).__name__: str(plain)}


_ENCODER = json.JSONEncoder(ensure_ascii=False, sort_keys=True, separators=(",", ":"), default=_jsonable)


def _assemble(arrays: Mapping[str, Any], digests: list[bytes], problems: _Problems) -> pa.Table:
    columns = dict(arrays)
    if any(text is not None for text in problems.texts):
        columns[PROBLEM] = pa.array(problems.texts, pa.string())
    return pa.table({**columns, DIGEST: pa.array(digests, pa.binary(32))})
