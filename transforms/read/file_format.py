"""Which format the input's files have: by `[input] format`, their suffixes, and the first line of JSONL.

Part of the scan before *read*.
"""

import json
from collections.abc import Sequence
from typing import Literal, TypeAlias

import pyarrow as pa

from moebeam.schemas.canonical import Json
from moebeam.schemas.errors import InputPatternError
from moebeam.schemas.job.input_section import InputSection
from moebeam.transforms.read.rows.line_blocks import open_lines, strip_mark
from moebeam.transforms.read.transient_errors import retry_transient

InputFormat: TypeAlias = Literal["parquet", "csv", "jsonl", "jsonl_rows", "arrow"]
"""`jsonl` are lines of the OpenAI batch shape, `jsonl_rows` lines that are rows."""

_PACKED = (".gz", ".zst")
_SUFFIXES: dict[str, InputFormat] = {
    "csv": "csv",
    "tsv": "csv",
    "jsonl": "jsonl",
    "ndjson": "jsonl",
    "arrow": "arrow",
    "arrows": "arrow",
    "feather": "arrow",
    "ipc": "arrow",
}
_SHOWN = {"parquet": "Parquet", "csv": "CSV", "jsonl": "JSONL", "arrow": "Arrow"}
_BATCH_KEYS = {"custom_id", "method", "url", "body"}


def detect_format(section: InputSection, paths: Sequence[str]) -> InputFormat:
    """Find the one format of an input.

    Raises:
        InputPatternError: the files have several.
        OSError: a store failed.
    """
    found: InputFormat = section.format if section.format != "auto" else _detect_by_suffix(section, paths)
    return "jsonl_rows" if found == "jsonl" and _has_plain_rows(paths) else found


def _detect_by_suffix(section: InputSection, paths: Sequence[str]) -> InputFormat:
    formats: set[InputFormat] = {_read_suffix(path) for path in paths}
    if "parquet" in formats and "jsonl" not in formats:
        # A stray file beside Parquet is a reject of the run.
        return "parquet"
    if len(formats) > 1:
        shown = " and ".join(name for key, name in _SHOWN.items() if key in formats)
        raise InputPatternError(
            f"[input] path {section.shown_path}: expected files of one format, found {shown}; narrow the pattern"
        )
    return next(iter(formats))


def _read_suffix(path: str) -> InputFormat:
    name = path.lower()
    for suffix in _PACKED:
        name = name.removesuffix(suffix)
    return _SUFFIXES.get(name.rpartition(".")[2], "parquet")


def _has_plain_rows(paths: Sequence[str]) -> bool:
    """Whether the first object in the files is a row, and no request of an OpenAI batch file."""
    for path in paths:
        keys = read_first_keys(path)
        if keys is not None:
            return "body" not in keys and not set(keys) <= _BATCH_KEYS
    return False


def read_first_keys(path: str) -> Sequence[str] | None:
    """Keys of the JSON object in the first line that is not blank; None if there is none, or no such file."""
    try:
        return retry_transient(lambda: _read_first_keys(path))
    except (OSError, pa.ArrowException):
        # The scan of the file reports it.
        return None


def _read_first_keys(path: str) -> Sequence[str] | None:
    with open_lines(path, None) as (lines, _):
        first = next((line for line in lines if line.strip()), b"")
    try:
        value: Json = json.loads(strip_mark(first))
    except (ValueError, RecursionError):
        return None
    return list(value) if isinstance(value, dict) else None
