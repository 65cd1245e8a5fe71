"""Scans the input before any row is read: files, row counts, one schema for all, and the units to read.

Runs before *read*, in the launcher: reads footers (Parquet) or counts lines (JSONL), never the contents of rows. The
result fingerprints the input, gives every unit its place in the input order, and fixes the output's types.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby, takewhile
from typing import Any, Literal, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from moebeam.schemas.canonical import Json, fingerprint
from moebeam.schemas.errors import InputPatternError
from moebeam.schemas.job.sections import InputSection
from moebeam.schemas.store import storage
from moebeam.schemas.store.run_layout import find_frame_digest
from moebeam.transforms.read.foreign_files import explain_foreign_file, explain_plain_jsonl
from moebeam.transforms.read.transient_errors import is_permanent, retry_transient

InputFormat: TypeAlias = Literal["parquet", "jsonl"]

JSONL_UNIT_BYTES = 8 << 20
GROUP_BYTES = 32 << 20
MAX_COLUMNS = 10_000
"""Most columns of a Parquet file, struct fields included: wider footers take minutes and gigabytes to read."""

GROUP_ROWS = 20_000
JSONL_SCHEMA = pa.schema([pa.field("custom_id", pa.string()), pa.field("line", pa.large_binary())])
"""Schema of a JSONL file's rows for later stages: the raw line, parsed in *read*."""


@dataclass(frozen=True, slots=True)
class InputUnit:
    """A piece of the input that is read at once: a row group, or some lines of a JSONL file.

    Attributes:
        label: the file's path below the folder that all input files share; derived ids begin with it.
        ordinal: place in the input order, from 0; files sorted by name, pieces in file order.
        group: units of one group are read together, so that small files and row groups share a sorted run.
        row_group: index in its Parquet file; for JSONL, the piece's number.
        first_row: index of the unit's first row in its file.
        num_rows: rows to read; fewer than the file holds under `--limit`; None for an unreadable file.
        num_bytes: uncompressed size; decides how many rows make a record batch.
        offset: byte offset of the piece in a JSONL file.
        error: why the file could not be opened, if so; the unit then stands for the whole file.
    """

    ordinal: int
    path: str
    label: str
    format: InputFormat
    row_group: int
    first_row: int
    num_rows: int | None
    num_bytes: int = 0
    offset: int = 0
    group: int = 0
    error: str | None = None


@dataclass(frozen=True, slots=True)
class UnitGroup:
    """Neighbouring units that one worker reads, in order."""

    units: tuple[InputUnit, ...]


@dataclass(frozen=True, slots=True)
class InputScan:
    """The whole input.

    Attributes:
        schema: the needed columns, each in one type for all files, dictionaries decoded.
        names: every column of every readable file, in order of appearance.
    """

    units: tuple[InputUnit, ...]
    schema: pa.Schema
    names: tuple[str, ...]
    format: InputFormat
    num_files: int
    fingerprint: str

    @property
    def num_rows(self) -> int:
        """Rows in readable files, by their footers."""
        return sum(unit.num_rows or 0 for unit in self.units)

    @property
    def groups(self) -> tuple[UnitGroup, ...]:
        """The units by group, in input order."""
        by_group = groupby(self.units, key=lambda unit: unit.group)
        return tuple(UnitGroup(tuple(units)) for _, units in by_group)

    @property
    def num_unreadable_files(self) -> int:
        return sum(unit.error is not None for unit in self.units)


@dataclass(frozen=True, slots=True)
class _FileScan:
    units: tuple[InputUnit, ...]
    schema: pa.Schema | None


def scan_input(section: InputSection, *, limit: int | None = None, needed: Collection[str] | None = None) -> InputScan:
    """List the input's files and read their footers.

    Args:
        section: the job's `[input]`.
        limit: read only the first `limit` rows, in input order.
        needed: columns that the job reads; files may disagree about others. None means all.
    Raises:
        InputPatternError: nothing matches, formats are mixed, or two files' schemas contradict each other.
    """
    files = _list_input_files(section.path)
    input_format = _detect_format(section, [path for path, _ in files])
    with ThreadPoolExecutor(max_workers=16) as pool:
        scans = list(pool.map(partial(_scan_file, input_format), (path for path, _ in files)))
    _refuse_foreign_files(section, [path for path, _ in files], scans, input_format)
    root = _shared_folder([path for path, _ in files])
    units = (unit for scan in scans for unit in scan.units)
    numbered = tuple(
        replace(unit, ordinal=ordinal, label=unit.path[len(root) :], group=group)
        for ordinal, (group, unit) in enumerate(_number_groups(units))
    )
    schemas = [(path, scan.schema) for (path, _), scan in zip(files, scans, strict=True) if scan.schema is not None]
    return InputScan(
        units=tuple(_first_rows(numbered, limit)),
        schema=_unify(schemas, needed),
        names=tuple(dict.fromkeys(name for _, schema in schemas for name in schema.names)),
        format=input_format,
        num_files=len(files),
        fingerprint=files_fingerprint({path: _file_identity(path, info) for path, info in files}),
    )


def identify_files(section: InputSection) -> dict[str, Json]:
    """Identity of each input file, which changes when the file does; only lists, opens nothing.

    Raises:
        InputPatternError: nothing matches, or the store cannot be listed.
    """
    return {path: _file_identity(path, info) for path, info in _list_input_files(section.path)}


def files_fingerprint(files: Mapping[str, Json]) -> str:
    """The input's fingerprint, `InputScan.fingerprint`, from the result of `identify_files`."""
    return fingerprint(list(files.values()))


def _refuse_foreign_files(
    section: InputSection, paths: Sequence[str], scans: Sequence[_FileScan], input_format: InputFormat
) -> None:
    """Refuse an input without any file of a known format, by the first that can be told; others become rejects."""
    reason: str | None = None
    path = paths[0]
    if input_format == "jsonl":
        reason = retry_transient(lambda: explain_plain_jsonl(path)) if scans[0].units else None
    elif all(scan.schema is None for scan in scans):
        told = ((path, explain_foreign_file(path)) for path in paths)
        path, reason = next(((path, reason) for path, reason in told if reason is not None), (path, None))
    if reason is not None:
        raise InputPatternError(f"[input] path {section.path!r}: {path}: {reason}")


def _number_groups(units: Iterable[InputUnit]) -> Iterator[tuple[int, InputUnit]]:
    """Number groups of neighbouring units, by size only, so that the plan depends on the input alone."""
    group = num_bytes = num_rows = 0
    for unit in units:
        num_bytes += unit.num_bytes
        num_rows += unit.num_rows or 0
        if num_bytes > GROUP_BYTES or num_rows > GROUP_ROWS:
            group, num_bytes, num_rows = group + 1, unit.num_bytes, unit.num_rows or 0
        yield group, unit


def _list_input_files(pattern: str) -> list[tuple[str, Mapping[str, Any]]]:
    try:
        files = storage.list_files(pattern)
    except OSError as error:
        raise InputPatternError(f"[input] path {pattern!r}: cannot be listed: {error}") from error
    hidden = ("_", ".")
    if storage.is_folder(pattern):
        root = storage.normalize_path(pattern).rstrip("/") + "/"
        files = [f for f in files if not any(part.startswith(hidden) for part in f[0][len(root) :].split("/"))]
    if not files:
        raise InputPatternError(f"[input] path {pattern!r}: expected at least one file, found none")
    for path, _ in files:
        if any("\ud800" <= character <= "\udfff" for character in path):
            raise InputPatternError(f"[input] path {pattern!r}: expected file names in UTF-8, found {path!r}")
    return files


def _shared_folder(paths: list[str]) -> str:
    """The longest folder that contains all paths, with its slash."""
    folders = [path.split("/")[:-1] for path in paths]
    shared = [names[0] for names in takewhile(lambda names: len(set(names)) == 1, zip(*folders, strict=False))]
    return "".join(f"{name}/" for name in shared)


def _detect_format(section: InputSection, paths: list[str]) -> InputFormat:
    if section.format != "auto":
        return section.format
    formats = {("jsonl" if path.lower().endswith((".jsonl", ".ndjson")) else "parquet") for path in paths}
    if len(formats) > 1:
        raise InputPatternError(
            f"[input] path {section.path!r}: expected files of one format, found Parquet and JSONL; narrow the pattern"
        )
    return "jsonl" if "jsonl" in formats else "parquet"


def _file_identity(path: str, info: Mapping[str, Any]) -> Json:
    """What changes when a file changes: its size, and the store's version mark or time; a frame's digest is enough."""
    if (digest := find_frame_digest(path)) is not None:
        return {"frame": digest}
    marks = {key: str(info[key]) for key in ("ETag", "etag", "mtime", "generation", "LastModified") if info.get(key)}
    return {"path": path, "size": int(info.get("size") or 0), **marks}


def _scan_file(input_format: InputFormat, path: str) -> _FileScan:
    scan = _scan_parquet_file if input_format == "parquet" else _scan_jsonl_file
    try:
        return retry_transient(lambda: scan(path))
    except (pa.ArrowException, OSError, ValueError) as error:
        if not is_permanent(error):
            raise InputPatternError(f"[input] path: {path}: cannot be read now: {_one_line(error)}") from error
        return _FileScan((_unreadable(path, input_format, _one_line(error)),), None)


def _scan_parquet_file(path: str) -> _FileScan:
    with storage.open_input(path) as source, pq.ParquetFile(source) as parquet:
        schema = pa.schema([_plain_field(field) for field in parquet.schema_arrow])
        metadata = parquet.metadata
        if metadata.num_columns > MAX_COLUMNS:
            message = f"expected at most {MAX_COLUMNS:,} columns, found {metadata.num_columns:,}"
            return _FileScan((_unreadable(path, "parquet", message),), None)
        units: list[InputUnit] = []
        first_row = 0
        for index in range(metadata.num_row_groups):
            group = metadata.row_group(index)
            unit = InputUnit(0, path, "", "parquet", index, first_row, group.num_rows, group.total_byte_size)
            units.append(unit)
            first_row += group.num_rows
        if first_row != metadata.num_rows:
            message = f"footer promises {metadata.num_rows} rows, its row groups hold {first_row}"
            return _FileScan((_unreadable(path, "parquet", message),), None)
    return _FileScan(tuple(units), schema)


def _scan_jsonl_file(path: str) -> _FileScan:
    units: list[InputUnit] = []
    with storage.open_input(path) as source:
        offset = start = first_row = num_rows = 0
        for line in source:
            offset += len(line)
            num_rows += bool(line.strip())
            if offset - start >= JSONL_UNIT_BYTES:
                units.append(InputUnit(0, path, "", "jsonl", len(units), first_row, num_rows, offset - start, start))
                first_row, num_rows, start = first_row + num_rows, 0, offset
        if num_rows:
            units.append(InputUnit(0, path, "", "jsonl", len(units), first_row, num_rows, offset - start, start))
    return _FileScan(tuple(units), JSONL_SCHEMA)


def _unreadable(path: str, input_format: InputFormat, message: str) -> InputUnit:
    return InputUnit(0, path, "", input_format, 0, 0, None, error=message)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _plain_field(field: "pa.Field[Any]") -> "pa.Field[Any]":
    """A nullable field in a plain type: files differ in encodings without differing in values."""
    return pa.field(field.name, plain_type(field.type), nullable=True)


def plain_type(value_type: Any) -> Any:
    """An Arrow type without dictionaries, views and extensions, at any level."""
    types = pa.types
    if isinstance(value_type, pa.BaseExtensionType):
        return plain_type(value_type.storage_type)
    if types.is_dictionary(value_type):
        return plain_type(value_type.value_type)
    if types.is_string_view(value_type):
        return pa.large_string()
    if types.is_binary_view(value_type):
        return pa.large_binary()
    if types.is_struct(value_type):
        return pa.struct([_plain_field(value_type.field(index)) for index in range(value_type.num_fields)])
    if types.is_map(value_type):
        return pa.map_(plain_type(value_type.key_type), plain_type(value_type.item_type))
    if types.is_fixed_size_list(value_type):
        return pa.list_(plain_type(value_type.value_type), value_type.list_size)
    if types.is_large_list(value_type):
        return pa.large_list(plain_type(value_type.value_type))
    if types.is_list(value_type):
        return pa.list_(plain_type(value_type.value_type))
    return value_type


def _unify(schemas: list[tuple[str, pa.Schema]], needed: Collection[str] | None) -> pa.Schema:
    unified = pa.schema([])
    for path, schema in schemas:
        fields = [field for field in schema if needed is None or field.name in needed]
        if len({field.name for field in fields}) < len(fields):
            twice = sorted({field.name for field in fields if schema.names.count(field.name) > 1})
            raise InputPatternError(f"{path}: expected every column name once, found twice: {twice}")
        try:
            unified = pa.unify_schemas([unified, pa.schema(fields)], promote_options="permissive")
        except (pa.ArrowException, TypeError) as error:
            raise InputPatternError(
                f"{path}: its columns contradict those of earlier files: {_one_line(error)}; "
                "expected the same column to have compatible types in every file"
            ) from error
    lowered = [name.lower() for name in unified.names]
    if len(set(lowered)) < len(lowered):
        twice = sorted(name for name in unified.names if lowered.count(name.lower()) > 1)
        raise InputPatternError(f"expected columns whose names differ by more than case, found {', '.join(twice)}")
    return unified


def _first_rows(units: tuple[InputUnit, ...], limit: int | None) -> Iterator[InputUnit]:
    if limit is None:
        yield from units
        return
    remaining = limit
    for unit in units:
        if unit.num_rows is None:
            yield unit
        elif remaining > 0:
            taken = min(unit.num_rows, remaining)
            remaining -= taken
            yield replace(unit, num_rows=taken)
