"""Data frames in and out: what `run_job` takes becomes one Arrow table, and its answers become the same kind of frame.

polars and pandas are never imported here: whoever brings such a frame has imported them.
"""

import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, cast

import pyarrow as pa

from moebeam.schemas.column_types import storable_table
from moebeam.schemas.errors import InputPatternError, abbreviate

if TYPE_CHECKING:
    import pandas as pd

Restore: TypeAlias = Callable[[pa.Table], Any]
"""Makes the caller's kind of frame of answers, which are sorted by `source_row` and `sample`."""

_EXPECTED = "a data frame of pandas, polars or pyarrow, or a list of dicts"


class ArrowStream(Protocol):
    """Anything that hands out its rows by the Arrow C stream protocol, as polars' and pyarrow's frames do."""

    def __arrow_c_stream__(self, requested_schema: object | None = None) -> object: ...


@dataclass(frozen=True, slots=True)
class Frame:
    """Rows to answer: in plain Arrow types, without metadata."""

    table: pa.Table
    restore: Restore


def read_frame(data: object) -> Frame:
    """Read what the caller of `run_job` brings.

    Raises:
        InputPatternError: it is no frame, a column's name is no text or occurs twice, or a column has no Arrow type.
    """
    try:
        if _is_of("pandas", "DataFrame", data):
            return _read_pandas(cast("pd.DataFrame", data))
        if isinstance(data, Sequence) and not isinstance(data, str | bytes):
            return _read_dicts(cast("Sequence[object]", data))
        if hasattr(data, "__arrow_c_stream__"):
            return _read_arrow(data, _open_stream(data).read_all())
        if hasattr(data, "__arrow_c_array__"):
            return _read_arrow(data, pa.Table.from_batches([pa.record_batch(cast("Any", data))]))
    except (pa.ArrowException, ValueError, TypeError) as error:
        found = "; ".join(str(argument) for argument in error.args)
        raise InputPatternError(f"data: expected columns that Arrow can hold, found: {found}") from error
    raise _no_frame(data)


def _open_stream(data: object) -> pa.RecordBatchReader:
    try:
        return pa.RecordBatchReader.from_stream(cast("Any", data))
    except pa.ArrowInvalid as error:  # a stream of something else than rows, such as a Series
        raise _no_frame(data) from error


def _no_frame(data: object) -> InputPatternError:
    found = f"{type(data).__module__}.{type(data).__qualname__}"
    return InputPatternError(f"data: expected {_EXPECTED}, found {found}")


def _is_of(package: str, name: str, data: object) -> bool:
    known = getattr(sys.modules.get(package), name, None)
    return isinstance(known, type) and isinstance(data, known)


def _read_pandas(data: "pd.DataFrame") -> Frame:
    """A frame whose index comes back with its answers; `pd.DataFrame.index` itself is no input column."""
    _check_names(list(data.columns))
    index = data.index

    def restore(answers: pa.Table) -> "pd.DataFrame":
        frame = _to_pandas(answers)
        frame.index = index.take(answers.column("source_row").to_numpy())
        return frame

    return Frame(_plain_table(pa.Table.from_pandas(data, preserve_index=False)), restore)


def _to_pandas(answers: pa.Table) -> "pd.DataFrame":
    """Answers as a frame; a column that pandas' own types cannot hold, as of the year 14,000, stays one of Arrow's."""
    try:
        return answers.to_pandas()
    except Exception:  # each Arrow type raises its own errors
        pandas = cast("Any", sys.modules["pandas"])
        columns: dict[str, Any] = {}
        for name in answers.column_names:
            try:
                columns[name] = answers.column(name).to_pandas()
            except Exception:
                columns[name] = pandas.Series(pandas.arrays.ArrowExtensionArray(answers.column(name)))
        return pandas.DataFrame(columns)


def _read_dicts(rows: Sequence[object]) -> Frame:
    """Rows as dicts; a key that a row lacks is null."""
    if not rows:
        raise InputPatternError("data: expected at least one row, found an empty list, which has no columns")
    dicts: list[Mapping[object, object]] = []
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise InputPatternError(f"data[{number}]: expected a dict, found {abbreviate(row)}")
        dicts.append(cast("Mapping[object, object]", row))
    names = list(dict.fromkeys(name for row in dicts for name in row))
    _check_names(names)
    columns = {str(name): _array(str(name), [row.get(name) for row in dicts]) for name in names}
    return Frame(_plain_table(pa.table(columns)), _to_dicts)


def _to_dicts(answers: pa.Table) -> list[dict[str, Any]]:
    try:
        return answers.to_pylist()
    except Exception:  # each Arrow type raises its own errors
        columns = {name: _to_values(answers.column(name)) for name in answers.column_names}
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _to_values(column: "pa.ChunkedArray[Any]") -> list[Any]:
    """A column as Python values; of one that Python cannot hold, Arrow's scalars."""
    try:
        return column.to_pylist()
    except Exception:
        return list(column)


def _array(name: str, values: list[Any]) -> "pa.Array[Any]":
    try:
        return pa.array(values)
    except (pa.ArrowException, TypeError, OverflowError) as error:
        raise InputPatternError(f"data: column {name!r}: expected values of one type, found: {error}") from error


def _read_arrow(data: object, table: pa.Table) -> Frame:
    _check_names(table.column_names)
    if _is_of("polars", "DataFrame", data):
        return Frame(_plain_table(table), cast("Any", sys.modules["polars"]).from_arrow)
    return Frame(_plain_table(table), lambda answers: answers)


def _check_names(names: Sequence[object]) -> None:
    for name in names:
        if not isinstance(name, str):
            raise InputPatternError(
                f"data: expected column names that are text, found {abbreviate(name)} ({type(name).__name__}); "
                "rename it, for example by data.columns = data.columns.map(str)"
            )
    if twice := [str(name) for name, count in Counter(names).items() if count > 1]:
        raise InputPatternError(f"data: expected every column name once, found twice: {', '.join(twice)}")


def _plain_table(table: pa.Table) -> pa.Table:
    """The same values without metadata, in types that every Parquet reader knows."""
    return storable_table(table).replace_schema_metadata(None)
