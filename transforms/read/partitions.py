"""Partition folders, as Spark, Hive, Beam and DuckDB write them: `year=2026/month=01` gives each row two columns.

Part of the scan before *read*. As DuckDB, Spark and polars have it, the folder's value stands where the file has a
column of the same name too.
"""

import re
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any, TypeAlias
from urllib.parse import unquote

import pyarrow as pa

from moebeam.schemas.errors import InputPatternError

Partitions: TypeAlias = Mapping[str, str | None]
"""Columns that a file's folders give: name and text, None for a null."""

_NULL = "__HIVE_DEFAULT_PARTITION__"
_INTEGER = re.compile(r"-?[0-9]{1,19}", re.ASCII)


def read_partitions(path: str, root: str) -> dict[str, str | None]:
    """Read the partitions in the names of a file's folders.

    Args:
        root: the folder that the job names. Below it every folder counts; above, those that lead to it without a gap,
            so that `in/year=2026` is read alike by its own path.
    """
    below = path[len(root) + 1 :].split("/")[:-1]
    above = [*takewhile(_is_partition, reversed(root.split("/")))]
    found: dict[str, str | None] = {}
    for part in filter(_is_partition, [*reversed(above), *below]):
        key, _, text = part.partition("=")
        found[_decode(key)] = None if text == _NULL else _decode(text)
    return found


def unify_partitions(
    files: Sequence[Partitions], schema: pa.Schema
) -> "tuple[list[pa.Field[Any]], list[tuple[tuple[str, str | None], ...]]]":
    """Give the partitions of all files one type each: int64 where every value is a whole number, else text.

    Args:
        files: the partitions of each file.
        schema: columns in the files themselves; one with a partition's name keeps its type.
    Returns:
        The columns, and the partitions of each file with their texts as values of the type, `01` as `1`.
    Raises:
        InputPatternError: a value is none of the type that the files' own column has.
    """
    names = list(dict.fromkeys(name for partitions in files for name in partitions))
    fields: list[pa.Field[Any]] = []
    texts: dict[str, dict[str | None, str | None]] = {}
    for name in names:
        values = list(dict.fromkeys(partitions[name] for partitions in files if name in partitions))
        own = schema.field(name).type if name in schema.names else None
        value_type = own if own is not None and not pa.types.is_null(own) else _find_type(values)
        fields.append(pa.field(name, value_type))
        try:
            cast = pa.array(values, pa.string()).cast(value_type)
            texts[name] = dict(zip(values, cast.cast(pa.string()).to_pylist(), strict=True))
        except pa.ArrowException as error:
            raise InputPatternError(
                f"[input] path: the files' own column {name!r} is of type {value_type}, the folders {name}=… say "
                f"otherwise: {' '.join(str(error).split())}; rename one of the two"
            ) from error
    return fields, [tuple((name, texts[name][text]) for name, text in partitions.items()) for partitions in files]


def _is_partition(name: str) -> bool:
    return name.find("=") > 0


def _decode(text: str) -> str:
    """Text as it was before a writer escaped what file names cannot hold; names that were never escaped stay."""
    try:
        return unquote(text, errors="strict")
    except UnicodeDecodeError:
        return text


def _find_type(values: Sequence[str | None]) -> pa.DataType:
    texts = [text for text in values if text is not None]
    is_whole = bool(texts) and all(_INTEGER.fullmatch(text) and -(2**63) <= int(text) < 2**63 for text in texts)
    return pa.int64() if is_whole else pa.string()
