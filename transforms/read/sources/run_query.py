"""Runs a query by DuckDB, fenced, into a Parquet file.

DuckDB opens the files that `query_text.py` found and nothing else: no other file, no network, no extension that is not
in the package or installed already. Its memory is bounded; what does not fit lies in the scratch folder. Rows come in
the same order each time: a query whose operators keep their input's order runs on all cores, any other on one.
"""

import contextlib
import json
import re
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, cast

import duckdb

from moebeam.schemas.errors import InputPatternError
from moebeam.schemas.store import storage
from moebeam.schemas.store.object_store import is_local
from moebeam.transforms.read.sources.query_text import ParsedQuery

QUERY_MEMORY = "640MB"
_ROW_GROUP_ROWS = 10_240
_MAX_MESSAGE_CHARS = 600
_ORDERED = re.compile(
    "PROJECTION|FILTER|UNNEST|UNGROUPED_AGGREGATE|(STREAMING_)?LIMIT|DUMMY_SCAN|EMPTY_RESULT|COLUMN_DATA_SCAN|RANGE"
    "|(READ_|PARQUET_).*"
)
"""Operators that give rows in the order of their input on any number of cores."""

_AS_TEXT = re.compile(r"INTERVAL|BIT|TIME WITH TIME ZONE|TIMETZ|BIGNUM|VARINT|VARIANT|GEOMETRY|UNION\(.*")
"""Types that Parquet has not, or not exactly."""

_HUGE = re.compile(r'"(?:[^"]|"")*"|\bU?HUGEINT\b')
_QUOTED = re.compile(r"[\"'`]([^\"'`]+)[\"'`]")


def run_query(text: str, query: ParsedQuery, target: Path) -> None:
    """Write the rows of a query into a Parquet file.

    Args:
        text: as the job has it, for messages.
        target: in a folder of its own, in which DuckDB may also spill.
    Raises:
        InputPatternError: DuckDB refuses the query, or cannot run it.
    """
    with _telling_errors(text), duckdb.connect(":memory:", config=_settings(target)) as connection:
        _fence(connection, query, target)
        sql = _choose_types(connection, query.sql)
        if not _keeps_order(connection, sql):
            connection.execute("SET threads = 1")
        connection.execute("SET lock_configuration = true")
        connection.execute(
            f"COPY ({sql}) TO {_quote(str(target))} "
            f"(FORMAT parquet, ROW_GROUP_SIZE {_ROW_GROUP_ROWS}, COMPRESSION zstd, PER_THREAD_OUTPUT false)"
        )


def _settings(target: Path) -> dict[str, Any]:
    return {
        "memory_limit": QUERY_MEMORY,
        "temp_directory": str(target.parent / "spilled"),
        "autoinstall_known_extensions": False,
        "autoload_known_extensions": False,
        "python_enable_replacements": False,
        "allow_community_extensions": False,
    }


def _fence(connection: duckdb.DuckDBPyConnection, query: ParsedQuery, target: Path) -> None:
    stores = {file.path.partition("://")[0]: file.path for file in query.files if not is_local(file.path)}
    for path in stores.values():
        connection.register_filesystem(storage.file_system(path)[0])
    connection.execute("SET TimeZone = 'UTC'")
    if "read_xlsx" in query.sql:
        _load_excel(connection)
    allowed = ", ".join(_quote(path) for path in (*(file.path for file in query.files), str(target)))
    connection.execute(f"SET allowed_paths = [{allowed}]")
    connection.execute("SET enable_external_access = false")


def _load_excel(connection: duckdb.DuckDBPyConnection) -> None:
    try:
        connection.execute("LOAD excel")
    except duckdb.Error as error:
        raise InputPatternError(
            "[input] query: Excel files need DuckDB's extension `excel`, which is not installed and which no run "
            "downloads; install it once (INSTALL excel, in DuckDB), or save the sheet as CSV"
        ) from error


def _choose_types(connection: duckdb.DuckDBPyConnection, sql: str) -> str:
    """The query with a cast of each column that Parquet could not hold exactly.

    Raises:
        InputPatternError: two columns have one name.
    """
    described = connection.execute(f"DESCRIBE {sql}").fetchall()
    names = [str(row[0]) for row in described]
    lowered = [name.lower() for name in names]
    if twice := sorted({name for name in names if lowered.count(name.lower()) > 1}):
        raise InputPatternError(
            f"[input] query: expected columns whose names differ, found {', '.join(map(repr, twice))} more than once; "
            "name them with AS"
        )
    wanted = [_choose_type(str(row[1])) for row in described]
    if wanted == [str(row[1]) for row in described]:
        return sql
    columns = (f"{_name(name)}::{kind} AS {_name(name)}" for name, kind in zip(names, wanted, strict=True))
    return f"SELECT {', '.join(columns)} FROM ({sql})"


def _choose_type(found: str) -> str:
    if _AS_TEXT.fullmatch(found):
        return "VARCHAR"
    return _HUGE.sub(lambda match: match[0] if match[0].startswith('"') else "DECIMAL(38,0)", found)


def _keeps_order(connection: duckdb.DuckDBPyConnection, sql: str) -> bool:
    row = connection.execute(f"EXPLAIN (FORMAT json) {sql}").fetchone()
    assert row is not None
    return all(_ORDERED.fullmatch(name) for name in _list_operators(json.loads(row[1])))


def _list_operators(node: object) -> Iterator[str]:
    if isinstance(node, list):
        for inner in cast("list[object]", node):
            yield from _list_operators(inner)
    elif isinstance(node, dict):
        operator = cast("dict[str, Any]", node)
        yield str(operator["name"]).strip()
        yield from _list_operators(operator["children"])


@contextlib.contextmanager
def _telling_errors(text: str) -> Generator[None]:
    """Raise what DuckDB says of a query as one message with the place, if it names something that the query holds."""
    try:
        yield
    except duckdb.Error as error:
        message = " ".join(str(error).partition("\n\nLINE ")[0].split())
        quoted = next((found[1] for found in _QUOTED.finditer(message) if found[1] in text), None)
        line = "" if quoted is None else f"line {text[: text.index(quoted)].count(chr(10)) + 1}: "
        raise InputPatternError(f"[input] query: {line}{message[:_MAX_MESSAGE_CHARS]}{_advise(error)}") from error


def _advise(error: duckdb.Error) -> str:
    if isinstance(error, duckdb.OutOfMemoryException):
        return f"; a run's query has {QUERY_MEMORY}: write its result to Parquet with DuckDB, and name that as `path`"
    if isinstance(error, duckdb.PermissionException):
        return (
            "; a query reads the files that it names, each in single quotes, in FROM or in a function such as read_csv"
        )
    if isinstance(error, duckdb.CatalogException) and "Table with name" in str(error):
        return "; write the names of files in single quotes, such as 'reviews.csv'"
    return ""


def _quote(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _name(text: str) -> str:
    return '"' + text.replace('"', '""') + '"'
