"""Writes a file of kept rows, in the order of their digests, with ids by content.

Part of *keep*; *read* reads the files as it reads any others. A file's name says which rows it holds, so it is created
once, and never again or otherwise, however often its bundle runs.
"""

from collections.abc import Iterable, Sequence
from typing import cast

import pyarrow as pa
import pyarrow.parquet as pq

from moebeam.schemas.errors import InputPatternError
from moebeam.schemas.store import storage
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.transforms.keep.cut_files import FileCut
from moebeam.transforms.keep.row_batches import DIGEST, PROBLEM, ROW_ID, RowColumns

_ROW_GROUP_ROWS = 10_000
_ID_CHARACTERS = 32


def write_kept_file(
    layout: RunLayout, cut: FileCut, number: int, tables: Iterable[pa.Table], columns: RowColumns
) -> str:
    """Write the rows of a file, unless an earlier try or run did; returns its path.

    Raises:
        InputPatternError: a column has several types, or one that Parquet cannot hold.
        OSError: the store failed.
    """
    path = layout.kept_file(cut.digest, number)
    if storage.exists(path):
        return path
    table = _identify(_join(tables))
    for name in columns.names or ():
        if name not in table.schema.names:
            # Of a column that no row has, files tell the type all the same.
            table = table.append_column(name, pa.array([None] * table.num_rows, columns.find_type(name) or pa.string()))
    sink = pa.BufferOutputStream()
    try:
        pq.write_table(_typed(table), sink, row_group_size=_ROW_GROUP_ROWS)
    except (pa.ArrowException, ValueError) as error:
        raise InputPatternError(f"rows: expected columns that Parquet can hold, found: {error}") from error
    storage.create_exclusive(path, sink.getvalue().to_pybytes())
    return path


def _join(tables: Iterable[pa.Table]) -> pa.Table:
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except (pa.ArrowException, TypeError) as error:
        raise InputPatternError(
            f"rows: expected values of one type in each column, found: {error}; give the rows a schema, as Beam "
            "rows or by Infer(job, schema=…)"
        ) from error


def _identify(table: pa.Table) -> pa.Table:
    """Rows in the order of their digests, with an id each: the digest, numbered where rows are equal."""
    if not table.num_columns:
        return pa.table({ROW_ID: pa.array([], pa.string())})
    table = table.sort_by([(DIGEST, "ascending")])
    ids = _number_copies(
        [digest.hex()[:_ID_CHARACTERS] for digest in cast("list[bytes]", table.column(DIGEST).to_pylist())]
    )
    return table.drop_columns([DIGEST]).append_column(ROW_ID, pa.array(ids, pa.string()))


def _number_copies(names: Sequence[str]) -> list[str]:
    ids: list[str] = []
    before, copies = "", 0
    for name in names:
        copies = copies + 1 if name == before else 0
        before = name
        ids.append(f"{name}-{copies}" if copies else name)
    return ids


def _typed(table: pa.Table) -> pa.Table:
    """Columns in alphabetical order; one without any value is a text, as Parquet readers expect some type."""
    names = sorted(name for name in table.schema.names if name not in (ROW_ID, PROBLEM))
    names += [name for name in (PROBLEM, ROW_ID) if name in table.schema.names]
    fields = [table.schema.field(name) for name in names]
    is_null = [pa.types.is_null(field.type) for field in fields]
    schema = pa.schema(
        [field.with_type(pa.string()) if null else field for field, null in zip(fields, is_null, strict=True)]
    )
    return table.select(names).cast(schema)
