"""Files of other formats than Parquet and OpenAI's batch lines, told by their names and first lines, and what to do."""

import json
from collections.abc import Sequence

from moebeam.schemas.canonical import Json
from moebeam.schemas.store import storage

_MAX_LINE_BYTES = 1 << 20
_WITH_PYARROW = (
    'convert it: python -c "from pyarrow import {module}, parquet; '
    "parquet.write_table({module}.read_{module}('{path}'), '{target}')\""
)
_COMPRESSED = (".gz", ".bz2", ".zst", ".xz", ".zip")


def explain_foreign_file(path: str) -> str | None:
    """Say why a file with this name cannot be an input, and the mend; None if its name says nothing."""
    name = path.rpartition("/")[2].lower()
    stem, dot, last = name.rpartition(".")
    target = f"{path.rpartition('/')[2].partition('.')[0]}.parquet"
    if last in ("csv", "tsv") or stem.endswith((".csv", ".tsv")):
        return f"CSV is not read; {_WITH_PYARROW.format(module='csv', path=path, target=target)}"
    if f"{dot}{last}" in _COMPRESSED:
        return "compressed files are not read (Parquet compresses its own columns); unpack it first"
    if last in ("json", "xlsx", "xls", "avro", "orc", "arrow", "feather", "txt"):
        return f"{last} is not read; convert it to Parquet"
    return None


def explain_plain_jsonl(path: str) -> str | None:
    """Say that a JSONL file holds plain rows and not requests of an OpenAI batch file; None if its first line is one,
    or no JSON object.

    Raises:
        OSError: the store failed.
    """
    keys = _read_first_keys(path)
    if keys is None or {"custom_id", "body"} & set(keys):
        return None
    target = f"{path.rpartition('/')[2].rpartition('.')[0]}.parquet"
    return (
        "not an OpenAI batch line: expected custom_id, method, url and body, "
        f"found {', '.join(keys[:5]) or 'an empty object'}; plain JSONL is not read; "
        + _WITH_PYARROW.format(module="json", path=path, target=target)
    )


def _read_first_keys(path: str) -> Sequence[str] | None:
    """Keys of the JSON object in the first line that is not blank; None if it is none."""
    with storage.open_input(path) as source:
        line = b""
        while not line.strip():
            line = source.readline(_MAX_LINE_BYTES)
            if not line:
                return None
    try:
        value: Json = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return list(value) if isinstance(value, dict) else None
