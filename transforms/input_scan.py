"""What the input is, before any row is read: files, row counts, one schema for all, and the units to read.

Stands before *read*, in the launcher: it reads footers (Parquet) or counts lines (JSONL), never rows' contents.
The result fingerprints the input, gives every unit its place in the input order, and fixes the output's types.
"""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any, Literal, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from schemas import storage
from schemas.canonical import Json, fingerprint
from schemas.errors import InputPatternError
from schemas.job import InputSection
from transforms.coders import register_record

InputFormat: TypeAlias = Literal["parquet", "jsonl"]

JSONL_UNIT_BYTES = 8 << 20
JSONL_SCHEMA = pa.schema([pa.field("custom_id", pa.string()), pa.field("line", pa.large_binary())])
"""What a JSONL file's rows look like to later stages: the raw line, parsed in *read*."""


@register_record
@dataclass(frozen=True, slots=True)
class InputUnit:
    """A piece of the input that is read at once: a row group, or some lines of a JSONL file.

    Attributes:
        label: the file's path below the folder that all input files share; derived ids begin with it.
        ordinal: place in the input order, from 0; files sorted by name, pieces in file order.
        row_group: index in its Parquet file; for JSONL the number of the piece.
        first_row: index in its file of the unit's first row.
        num_rows: rows to read; fewer than the file holds under `--limit`; None for an unreadable file.
        num_bytes: uncompressed size; decides how many rows make a record batch.
        offset: where the piece starts in a JSONL file, in bytes.
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
    error: str | None = None


@dataclass(frozen=True, slots=True)
class InputScan:
    """The whole input. `schema` holds every column of every readable file, dictionaries decoded."""

    units: tuple[InputUnit, ...]
    schema: pa.Schema
    format: InputFormat
    num_files: int
    fingerprint: str

    @property
    def num_rows(self) -> int:
        """Rows that readable files hold, by their footers."""
        return sum(unit.num_rows or 0 for unit in self.units)

    @property
    def num_unreadable_files(self) -> int:
        return sum(unit.error is not None for unit in self.units)


@dataclass(frozen=True, slots=True)
class _FileScan:
    units: tuple[InputUnit, ...]
    schema: pa.Schema | None


def scan_input(section: InputSection, *, limit: int | None = None) -> InputScan:
    """List the input's files and look at their footers.

    Args:
        section: the job's `[input]`.
        limit: read only the first so many rows, in input order.
    Raises:
        InputPatternError: nothing matches, formats are mixed, or two files' schemas contradict each other.
    """
    files = _list_input_files(section.path)
    input_format = _format_of(section, [path for path, _ in files])
    scan_file = _scan_parquet_file if input_format == "parquet" else _scan_jsonl_file
    with ThreadPoolExecutor(max_workers=16) as pool:
        scans = list(pool.map(scan_file, (path for path, _ in files)))
    root = _shared_folder([path for path, _ in files])
    units = (unit for scan in scans for unit in scan.units)
    numbered = tuple(replace(unit, ordinal=ordinal, label=unit.path[len(root) :]) for ordinal, unit in enumerate(units))
    return InputScan(
        units=tuple(_first_rows(numbered, limit)),
        schema=_unify([(path, scan.schema) for (path, _), scan in zip(files, scans, strict=True)]),
        format=input_format,
        num_files=len(files),
        fingerprint=fingerprint([_file_identity(path, info) for path, info in files]),
    )


def _list_input_files(pattern: str) -> list[tuple[str, Mapping[str, Any]]]:
    try:
        files = storage.list_files(pattern)
    except OSError as error:
        raise InputPatternError(f"[input] path {pattern!r}: cannot be listed: {error}") from error
    hidden = ("_", ".")
    if storage.is_folder(pattern):
        root = pattern.rstrip("/") + "/"
        files = [f for f in files if not any(part.startswith(hidden) for part in f[0][len(root) :].split("/"))]
    if not files:
        raise InputPatternError(f"[input] path {pattern!r}: expected at least one file, found none")
    return files


def _shared_folder(paths: list[str]) -> str:
    """The longest folder, with its slash, that all paths lie in."""
    folders = [path.split("/")[:-1] for path in paths]
    shared = [names[0] for names in takewhile(lambda names: len(set(names)) == 1, zip(*folders, strict=False))]
    return "".join(f"{name}/" for name in shared)


def _format_of(section: InputSection, paths: list[str]) -> InputFormat:
    if section.format != "auto":
        return section.format
    formats = {("jsonl" if path.lower().endswith((".jsonl", ".ndjson")) else "parquet") for path in paths}
    if len(formats) > 1:
        raise InputPatternError(
            f"[input] path {section.path!r}: expected files of one format, found Parquet and JSONL; narrow the pattern"
        )
    return "jsonl" if "jsonl" in formats else "parquet"


def _file_identity(path: str, info: Mapping[str, Any]) -> Json:
    """What changes when a file changes: its size and the store's own version mark or time."""
    marks = {key: str(info[key]) for key in ("ETag", "etag", "mtime", "generation", "LastModified") if info.get(key)}
    return {"path": path, "size": int(info.get("size") or 0), **marks}


def _scan_parquet_file(path: str) -> _FileScan:
    try:
        with storage.open_input(path) as source, pq.ParquetFile(source) as parquet:
            schema = pa.schema([_decoded(field) for field in parquet.schema_arrow])
            metadata = parquet.metadata
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
    except (pa.ArrowException, OSError, ValueError) as error:
        return _FileScan((_unreadable(path, "parquet", _one_line(error)),), None)
    return _FileScan(tuple(units), schema)


def _scan_jsonl_file(path: str) -> _FileScan:
    units: list[InputUnit] = []
    try:
        with storage.open_input(path) as source:
            offset = start = first_row = num_rows = 0
            for line in source:
                offset += len(line)
                num_rows += bool(line.strip())
                if offset - start >= JSONL_UNIT_BYTES:
                    units.append(
                        InputUnit(0, path, "", "jsonl", len(units), first_row, num_rows, offset - start, start)
                    )
                    first_row, num_rows, start = first_row + num_rows, 0, offset
            if num_rows:
                units.append(InputUnit(0, path, "", "jsonl", len(units), first_row, num_rows, offset - start, start))
    except OSError as error:
        return _FileScan((_unreadable(path, "jsonl", _one_line(error)),), None)
    return _FileScan(tuple(units), JSONL_SCHEMA)


def _unreadable(path: str, input_format: InputFormat, message: str) -> InputUnit:
    return InputUnit(0, path, "", input_format, 0, 0, None, error=message)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _decoded(field: "pa.Field[Any]") -> "pa.Field[Any]":
    """A field without its dictionary encoding and nullable: files differ in both without differing in values."""
    value_type = field.type
    if pa.types.is_dictionary(value_type):
        value_type = value_type.value_type
    return pa.field(field.name, value_type, nullable=True)


def _unify(schemas: list[tuple[str, pa.Schema | None]]) -> pa.Schema:
    unified: pa.Schema | None = None
    for path, schema in schemas:
        if schema is None:
            continue
        names = [name.lower() for name in schema.names]
        if len(set(names)) < len(names):
            twice = sorted({name for name in names if names.count(name) > 1})
            raise InputPatternError(f"{path}: expected column names that differ (ignoring case), found twice: {twice}")
        try:
            both = [unified, schema] if unified is not None else [schema]
            unified = pa.unify_schemas(both, promote_options="permissive")
        except (pa.ArrowException, TypeError) as error:
            raise InputPatternError(
                f"{path}: its columns contradict those of earlier files: {_one_line(error)}; "
                "expected the same column to have compatible types in every file"
            ) from error
    return unified if unified is not None else pa.schema([])


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
