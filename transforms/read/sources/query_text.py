"""A query's text: the files that it names, and the query again with each of them spelled out.

Part of the scan before *read*. DuckDB's own parser makes a tree of the query; file names in it become lists of absolute
paths, so that what is fingerprinted, what DuckDB may open and what it opens are the same files.
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import duckdb

from moebeam.schemas.errors import InputPatternError
from moebeam.schemas.store import storage
from moebeam.schemas.store.file_patterns import FoundFile, find_files

_READERS = {
    "parquet": "read_parquet",
    "csv": "read_csv",
    "tsv": "read_csv",
    "json": "read_json",
    "jsonl": "read_json",
    "ndjson": "read_json",
    "xlsx": "read_xlsx",
}
_FUNCTIONS = {
    *_READERS.values(),
    "read_csv_auto",
    "read_json_auto",
    "read_json_objects",
    "read_json_objects_auto",
    "read_ndjson",
    "read_ndjson_auto",
    "read_ndjson_objects",
    "parquet_scan",
    "read_text",
    "read_blob",
}
"""Table functions whose first argument names files."""

_PACKED = (".gz", ".zst")


@dataclass(frozen=True, slots=True)
class ParsedQuery:
    """A query whose files are found.

    Attributes:
        sql: the query with absolute paths.
        files: each once, by path.
    """

    sql: str
    files: tuple[FoundFile, ...]


def parse_query(text: str, folder: str | None) -> ParsedQuery:
    """Parse a query and find its files.

    Args:
        folder: relative file names are relative to it; None means the working directory.
    Raises:
        InputPatternError: not one SELECT statement, or a file that it names is not there.
    """
    with duckdb.connect(":memory:", config={"autoload_known_extensions": False}) as connection:
        tree = _read_tree(connection, text)
        files: dict[str, FoundFile] = {}
        for node in list(_find_tables(tree, set())):
            _spell_out(connection, node, folder or os.getcwd(), files)
        row = connection.execute("SELECT json_deserialize_sql(?)", [json.dumps(tree)]).fetchone()
    assert row is not None
    return ParsedQuery(str(row[0]), tuple(files[path] for path in sorted(files)))


def _read_tree(connection: duckdb.DuckDBPyConnection, text: str) -> dict[str, Any]:
    row = connection.execute("SELECT json_serialize_sql(?::VARCHAR)", [text]).fetchone()
    assert row is not None
    tree: dict[str, Any] = json.loads(row[0])
    if tree["error"]:
        if tree.get("error_type") != "parser":
            raise InputPatternError("[input] query: expected one SELECT statement, found another kind of statement")
        position = str(tree.get("position", ""))
        place = f" in {describe_place(text, int(position))}" if position.isdecimal() else ""
        raise InputPatternError(f"[input] query: expected SQL, found{place} a {tree['error_message']}")
    if (found := len(tree["statements"])) != 1:
        raise InputPatternError(f"[input] query: expected one SELECT statement, found {found}")
    return tree


def describe_place(text: str, position: int) -> str:
    """Line and column of a place in a query, both from 1."""
    before = text.encode()[:position].decode(errors="replace")
    return f"line {before.count(chr(10)) + 1}, column {len(before) - before.rfind(chr(10))}"


def _find_tables(node: object, known: set[str]) -> Iterator[dict[str, Any]]:
    """Nodes of tables that name files; `known` are names of common table expressions."""
    if isinstance(node, dict):
        found = cast("dict[str, Any]", node)
        names = {str(entry.get("key")) for entry in (found.get("cte_map") or {}).get("map", ())}
        known = known | names
        kind = found.get("type")
        is_file = kind == "BASE_TABLE" and not found.get("schema_name") and found["table_name"] not in known
        is_function = kind == "TABLE_FUNCTION" and found["function"].get("function_name", "").lower() in _FUNCTIONS
        if (is_file and not {".", "/"}.isdisjoint(found["table_name"])) or is_function:
            yield found
        for value in found.values():
            yield from _find_tables(value, known)
    elif isinstance(node, list):
        for value in cast("list[object]", node):
            yield from _find_tables(value, known)


def _spell_out(
    connection: duckdb.DuckDBPyConnection, node: dict[str, Any], folder: str, files: dict[str, FoundFile]
) -> None:
    """Replace the file names of a node by the paths that they mean."""
    if node["type"] == "BASE_TABLE":
        pattern = node["table_name"]
        paths = _find(pattern, folder, files)
        if len(paths) == 1 and not pattern.lower().endswith(".xlsx"):
            node["table_name"] = paths[0]
            if "qualified_name" in node:
                node["qualified_name"] = {"path": [paths[0]]}
            return
        made = _make_table(connection, _choose_reader(pattern), paths)
        made["alias"] = node["alias"] or pattern.rpartition("/")[2].partition(".")[0]
        made["sample"], made["column_name_alias"] = node["sample"], node["column_name_alias"]
        node.clear()
        node.update(made)
        return
    function = node["function"]
    arguments = function["arguments"] if "arguments" in function else function["children"]
    first: dict[str, Any] = arguments[0] if arguments else {}
    patterns = list(_find_names(first.get("expression", first)))
    if not patterns:
        raise InputPatternError(
            f"[input] query: {function['function_name']}: expected file names as text in its first argument, found none"
        )
    paths = [path for pattern in patterns for path in _find(pattern, folder, files)]
    made = _make_table(connection, function["function_name"], paths)["function"]
    arguments[0] = (made["arguments"] if "arguments" in made else made["children"])[0]


def _find(pattern: str, folder: str, files: dict[str, FoundFile]) -> list[str]:
    path = os.path.expanduser(pattern)
    if "://" not in path and not os.path.isabs(path):
        path = storage.join(folder, path) if "://" in folder else os.path.normpath(os.path.join(folder, path))
    try:
        found = find_files(path)
    except OSError as error:
        raise InputPatternError(f"[input] query: {pattern!r} cannot be listed: {error}") from error
    if not found:
        raise InputPatternError(f"[input] query: expected a file {path!r}, found none")
    files.update({file.path: file for file in found})
    return [file.path for file in found]


def _choose_reader(pattern: str) -> str:
    name = pattern.lower()
    for suffix in _PACKED:
        name = name.removesuffix(suffix)
    reader = _READERS.get(name.rpartition(".")[2])
    if reader is None:
        raise InputPatternError(
            f"[input] query: {pattern!r} names several files: expected a suffix of {', '.join(_READERS)}, or a "
            "function such as read_csv"
        )
    return reader


def _make_table(connection: duckdb.DuckDBPyConnection, function: str, paths: Sequence[str]) -> dict[str, Any]:
    """The tree of a table function over a list of files."""
    quoted = ", ".join("'" + path.replace("'", "''") + "'" for path in paths)
    single = function in ("read_xlsx",) and len(paths) == 1
    tree = _read_tree(connection, f"FROM {function}({quoted if single else f'[{quoted}]'})")
    return tree["statements"][0]["node"]["from_table"]


def _find_names(node: dict[str, Any]) -> Iterator[str]:
    """File names in an argument that is a text, or a list of texts; none in any other expression."""
    literal = node.get("literal")
    if isinstance(literal, dict) and cast("dict[str, Any]", literal).get("kind") == "STRING":
        yield str(cast("dict[str, Any]", literal)["text"])
    elif node.get("function_name") == "list_value":
        for argument in node["arguments"] if "arguments" in node else node["children"]:
            yield from _find_names(argument.get("expression", argument))
