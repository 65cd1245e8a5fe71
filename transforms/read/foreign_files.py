"""Files of other formats than Parquet and OpenAI's batch lines, told by their first bytes, and what to do about each.

Part of the scan before *read*. An input without any file of a known format is refused, in a check and in a run; a
Parquet file that is damaged is a reject of a run, as it would be beside good ones.
"""

import json
from collections.abc import Mapping, Sequence

from moebeam.schemas.canonical import Json
from moebeam.schemas.errors import InputPatternError
from moebeam.schemas.job.input_section import InputSection
from moebeam.schemas.store import storage
from moebeam.transforms.read.parquet_file import is_parquet

_HEAD_BYTES = 64 << 10
_MAX_LINE_BYTES = 1 << 20
_NUM_TOLD = 3
_COMPRESSED = (".gz", ".bz2", ".zst", ".xz", ".zip", ".snappy", ".lz4")
_UNPACK = "compressed files are not read (Parquet compresses its own columns); unpack it first"
_MAGIC = (
    (b"\x1f\x8b", _UNPACK),
    (b"\x28\xb5\x2f\xfd", _UNPACK),
    (b"BZh", _UNPACK),
    (b"\xfd7zXZ\x00", _UNPACK),
    (b"PK\x03\x04", f"a zip archive or an Office document: {_UNPACK}, or export it"),
    (b"Obj\x01", "Avro is not read; convert it to Parquet"),
    (b"SQLite format 3\x00", "a database is not read; export a table to Parquet"),
)
_READERS = {
    "csv": ("csv", "csv.read_csv('{path}')"),
    "tsv": ("csv", "csv.read_csv('{path}', parse_options=csv.ParseOptions(delimiter='\\t'))"),
    "json": ("json", "json.read_json('{path}')"),
    "arrow": ("feather", "feather.read_table('{path}')"),
    "orc": ("orc", "orc.read_table('{path}')"),
}
"""Modules of pyarrow that read other formats, and how."""


def refuse_foreign_files(section: InputSection, errors: Mapping[str, str]) -> None:
    """Refuse an input of which no file is Parquet.

    Args:
        errors: the files, none of which can be read, and why.
    Raises:
        InputPatternError: names the first files, and for each the reason and the mend.
    """
    if any(_is_parquet(path) for path in errors):
        return
    told = [f"{path}: {explain_foreign_file(path) or error}" for path, error in [*errors.items()][:_NUM_TOLD]]
    if len(told) < len(errors):
        told.append(f"and {len(errors) - len(told):,} more")
    raise InputPatternError(f"[input] path {section.shown_path}: no file can be read: {'; '.join(told)}")


def refuse_foreign_lines(section: InputSection, paths: Sequence[str]) -> None:
    """Refuse a JSONL input without a file of OpenAI's batch lines.

    Raises:
        InputPatternError: names the first file, the reason and the mend.
        OSError: the store failed.
    """
    reason: str | None = None
    for path in reversed(paths):
        if (reason := _explain_lines(path)) is None:
            return
    if reason is not None:
        raise InputPatternError(f"[input] path {section.shown_path}: {paths[0]}: {reason}")


def explain_foreign_file(path: str) -> str | None:
    """Say why a file that is no Parquet cannot be an input, and the mend; None if nothing is known of it."""
    head = _read_head(path)
    if head == b"":
        return "expected a Parquet file, found an empty one"
    name = path.rpartition("/")[2].lower()
    stem, _, last = name.rpartition(".")
    if last in ("csv", "tsv") or stem.endswith((".csv", ".tsv")):
        return f"CSV is not read; {_tell_conversion('tsv' if '.tsv' in name else 'csv', path)}"
    if f".{last}" in _COMPRESSED:
        return _UNPACK
    if head is None:
        return None
    if (reason := _explain_magic(head)) is not None:
        return reason
    if head.startswith((b"ARROW1", b"FEA1")):
        return f"Arrow's IPC files are not read; {_tell_conversion('arrow', path)}"
    if head.startswith(b"ORC"):
        return f"ORC is not read; {_tell_conversion('orc', path)}"
    return _explain_text(head, path)


def _explain_lines(path: str) -> str | None:
    """Say why a JSONL file holds no requests of an OpenAI batch file; None if its first line is one, or no JSON
    object.
    """
    keys = _read_first_keys(path)
    if keys is None:
        if is_parquet(path):
            return 'is a Parquet file; give it another suffix, or write [input] format = "parquet"'
        return _explain_magic(_read_head(path) or b"")
    if {"custom_id", "body"} & set(keys):
        return None
    return (
        "not an OpenAI batch line: expected custom_id, method, url and body, "
        f"found {', '.join(keys[:5]) or 'an empty object'}; plain JSONL is not read; {_tell_conversion('json', path)}"
    )


def _explain_magic(head: bytes) -> str | None:
    return next((reason for magic, reason in _MAGIC if head.startswith(magic)), None)


def _explain_text(head: bytes, path: str) -> str | None:
    text = head.decode("utf-8-sig", errors="replace").strip()
    if not text or "\x00" in text:
        return None
    if text.startswith("{"):
        if '"custom_id"' in text.splitlines()[0]:
            return 'holds JSON lines; if they are OpenAI batch lines, write [input] format = "jsonl"'
        return f"JSON is not read; {_tell_conversion('json', path)}"
    if text.startswith("["):
        return "JSON is not read; convert it to Parquet, for example by pandas: read_json, to_parquet"
    line = text.splitlines()[0]
    kind = "tsv" if line.count("\t") > line.count(",") else "csv"
    return f"text is not read; if it is CSV, {_tell_conversion(kind, path)}"


def _tell_conversion(kind: str, path: str) -> str:
    module, read = _READERS[kind]
    name = path.rpartition("/")[2]
    target = f"{name.partition('.')[0] or 'rows'}.parquet"
    if target == name:
        target = f"converted-{name}"
    command = f"from pyarrow import {module}, parquet; parquet.write_table({read.format(path=path)}, '{target}')"
    return f'convert it: python -c "{command}"'


def _is_parquet(path: str) -> bool:
    try:
        return is_parquet(path)
    except OSError:
        return False


def _read_head(path: str) -> bytes | None:
    """A file's first bytes; None where it cannot be read."""
    try:
        with storage.open_input(path) as source:
            return source.read(_HEAD_BYTES)
    except OSError:
        return None


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
