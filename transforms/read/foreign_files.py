"""Files of other formats than Parquet and OpenAI's batch lines, told by their first bytes, and what to do about each.

Part of the scan before *read*. An input without any file of a known format is refused, in a check and in a run; a
Parquet file that is damaged is a reject of a run, as it would be beside good ones.
"""

from collections.abc import Mapping, Sequence

from moebeam.schemas.errors import InputPatternError
from moebeam.schemas.job.input_section import InputSection
from moebeam.schemas.store import storage
from moebeam.transforms.read.file_format import read_first_keys
from moebeam.transforms.read.parquet_file import is_parquet

_HEAD_BYTES = 64 << 10
_NUM_TOLD = 3
_COMPRESSED = (".gz", ".bz2", ".zst", ".xz", ".zip", ".snappy", ".lz4")
_UNPACK = "files so compressed are not read (CSV and JSONL may be .gz or .zst); unpack it first"
_MAGIC = (
    (b"\x1f\x8b", _UNPACK),
    (b"\x28\xb5\x2f\xfd", _UNPACK),
    (b"BZh", _UNPACK),
    (b"\xfd7zXZ\x00", _UNPACK),
    (b"PK\x03\x04", f"a zip archive or an Office document: {_UNPACK}, or export it"),
    (b"Obj\x01", "Avro is not read; convert it to Parquet"),
    (b"SQLite format 3\x00", "a database is not read; export a table to Parquet"),
)


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
        return 'is a CSV file; write [input] format = "csv"'
    if f".{last}" in _COMPRESSED:
        return _UNPACK
    if head is None:
        return None
    if (reason := _explain_magic(head)) is not None:
        return reason
    if head.startswith((b"ARROW1", b"FEA1")):
        return 'is an Arrow file; write [input] format = "arrow"'
    if head.startswith(b"ORC"):
        return f"ORC is not read; {_tell_conversion(path)}"
    return _explain_text(head, path)


def _explain_lines(path: str) -> str | None:
    """Say why a JSONL file holds no requests of an OpenAI batch file; None if its first line is one, or no JSON
    object.
    """
    keys = read_first_keys(path)
    if keys is None:
        if is_parquet(path):
            return 'is a Parquet file; give it another suffix, or write [input] format = "parquet"'
        return _explain_magic(_read_head(path) or b"")
    return None


def _explain_magic(head: bytes) -> str | None:
    return next((reason for magic, reason in _MAGIC if head.startswith(magic)), None)


def _explain_text(head: bytes, path: str) -> str | None:
    text = head.decode("utf-8-sig", errors="replace").strip()
    if not text or "\x00" in text:
        return None
    if text.startswith("{"):
        return f'holds JSON; if it is an object a line, write [input] format = "jsonl", else {_tell_query(path)}'
    if text.startswith("["):
        return f"a JSON array is not read; {_tell_query(path)}"
    return 'is text; if it is CSV, write [input] format = "csv"'


def _tell_query(path: str) -> str:
    name = path.replace("'", "''")
    return f"write [input] query = \"FROM read_json('{name}')\" in place of the path"


def _tell_conversion(path: str) -> str:
    name = path.rpartition("/")[2]
    target = f"{name.partition('.')[0] or 'rows'}.parquet"
    if target == name:
        target = f"converted-{name}"
    command = f"from pyarrow import orc, parquet; parquet.write_table(orc.read_table('{path}'), '{target}')"
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
