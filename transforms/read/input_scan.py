"""Scans the input before any row is read: files, row counts, one schema for all, and the units to read.

Runs before *read*, in the launcher: reads footers (Parquet) or counts lines (JSONL), never the contents of rows. The
result fingerprints the input, gives every unit its place in the input order, and fixes the output's types.
"""

import contextlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby, islice, takewhile
from typing import Any, Literal, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from moebeam.schemas.column_types import agree_on_types, note_categories, plain_field
from moebeam.schemas.errors import InputPatternError
from moebeam.schemas.job.input_section import InputSection
from moebeam.schemas.store.file_mark import FileMark
from moebeam.transforms.read.claimed_file import open_claimed
from moebeam.transforms.read.foreign_files import refuse_foreign_files, refuse_foreign_lines
from moebeam.transforms.read.input_files import InputFile, files_fingerprint, list_input_files
from moebeam.transforms.read.parquet_file import open_parquet, read_schema
from moebeam.transforms.read.partitions import unify_partitions
from moebeam.transforms.read.transient_errors import is_permanent, retry_transient

InputFormat: TypeAlias = Literal["parquet", "jsonl"]

JSONL_UNIT_BYTES = 8 << 20
GROUP_BYTES = 32 << 20
MAX_COLUMNS = 10_000
"""Most columns of a Parquet file, struct fields included: wider footers take minutes and gigabytes to read."""

_FOOTER_ERRORS = (pa.ArrowException, OSError, ValueError, TypeError, LookupError, ArithmeticError, RuntimeError)
"""What a footer and the types in it provoke; a failed assertion of ours is none of it."""

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
        partitions: columns that the file's folders give, such as `month=01`: name and text, None for a null.
        claim: what the file must be when the unit is read; None checks nothing.
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
    partitions: tuple[tuple[str, str | None], ...] = ()
    claim: FileMark | None = None


@dataclass(frozen=True, slots=True)
class UnitGroup:
    """Neighbouring units that one worker reads, in order."""

    units: tuple[InputUnit, ...]


@dataclass(frozen=True, slots=True)
class InputScan:
    """The whole input.

    Attributes:
        schema: the needed columns, each in one plain type for all files, with a note of what they all declare.
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
        InputChanged: a file changed meanwhile.
    """
    files = list_input_files(section)
    paths = [file.path for file in files]
    input_format = _detect_format(section, paths)
    with ThreadPoolExecutor(max_workers=16) as pool:
        scans = list(pool.map(partial(_scan_file, input_format, needed), files))
    _refuse_foreign_files(section, paths, scans, input_format)
    schemas = [(path, scan.schema) for path, scan in zip(paths, scans, strict=True) if scan.schema is not None]
    own = _unify(schemas, needed)
    # Lines of JSONL bring all that belongs to their requests.
    has_folders = input_format == "parquet"
    folders, partitions = unify_partitions([file.partitions if has_folders else {} for file in files], own)
    root = _shared_folder(paths)
    units = (
        replace(unit, partitions=of_file, claim=file.mark)
        for file, scan, of_file in zip(files, scans, partitions, strict=True)
        for unit in scan.units
    )
    numbered = tuple(
        replace(unit, ordinal=ordinal, label=unit.path[len(root) :], group=group)
        for ordinal, (group, unit) in enumerate(_number_groups(units))
    )
    names = (*(name for _, schema in schemas for name in schema.names), *(folder.name for folder in folders))
    return InputScan(
        units=tuple(_first_rows(numbered, limit)),
        schema=_add_folders(own, folders, needed),
        names=tuple(dict.fromkeys(names)),
        format=input_format,
        num_files=len(files),
        fingerprint=files_fingerprint({file.path: file.identity for file in files}),
    )


def _refuse_foreign_files(
    section: InputSection, paths: Sequence[str], scans: Sequence[_FileScan], input_format: InputFormat
) -> None:
    """Refuse an input without any file of a known format; others become rejects."""
    if input_format == "jsonl":
        if any(scan.units for scan in scans):
            retry_transient(lambda: refuse_foreign_lines(section, paths))
    elif all(scan.schema is None for scan in scans):
        refuse_foreign_files(section, {unit.path: unit.error or "" for scan in scans for unit in scan.units})


def _number_groups(units: Iterable[InputUnit]) -> Iterator[tuple[int, InputUnit]]:
    """Number groups of neighbouring units, by size only, so that the plan depends on the input alone."""
    group = num_bytes = num_rows = 0
    for unit in units:
        num_bytes += unit.num_bytes
        num_rows += unit.num_rows or 0
        if num_bytes > GROUP_BYTES or num_rows > GROUP_ROWS:
            group, num_bytes, num_rows = group + 1, unit.num_bytes, unit.num_rows or 0
        yield group, unit


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
            f"[input] path {section.shown_path}: expected files of one format, found Parquet and JSONL; "
            "narrow the pattern"
        )
    return "jsonl" if "jsonl" in formats else "parquet"


def _scan_file(input_format: InputFormat, needed: Collection[str] | None, file: InputFile) -> _FileScan:
    path = file.path
    scan = partial(_scan_parquet_file, file, needed) if input_format == "parquet" else partial(_scan_jsonl_file, file)
    try:
        return retry_transient(scan)
    except _FOOTER_ERRORS as error:
        if not is_permanent(error):
            raise InputPatternError(f"[input] path: {path}: cannot be read now: {_one_line(error)}") from error
        return _FileScan((_unreadable(path, input_format, _one_line(error)),), None)


def _scan_parquet_file(file: InputFile, needed: Collection[str] | None) -> _FileScan:
    path = file.path
    with open_parquet(path, file.mark) as parquet:
        metadata = parquet.metadata
        if metadata.num_columns > MAX_COLUMNS:
            raise pa.ArrowInvalid(f"expected at most {MAX_COLUMNS:,} columns, found {metadata.num_columns:,}")
        schema = _note_categories(parquet, pa.schema([plain_field(field) for field in read_schema(parquet)]))
        counts = Counter(name for name in schema.names if needed is None or name in needed)
        if twice := [name for name, count in counts.items() if count > 1]:
            raise pa.ArrowInvalid(f"expected every column name once, found twice: {', '.join(map(repr, twice))}")
        units: list[InputUnit] = []
        first_row = 0
        for index in range(metadata.num_row_groups):
            group = metadata.row_group(index)
            unit = InputUnit(0, path, "", "parquet", index, first_row, group.num_rows, group.total_byte_size)
            units.append(unit)
            first_row += group.num_rows
        if first_row != metadata.num_rows:
            raise pa.ArrowInvalid(f"footer promises {metadata.num_rows} rows, its row groups hold {first_row}")
    return _FileScan(tuple(units), schema)


def _scan_jsonl_file(file: InputFile) -> _FileScan:
    path = file.path
    units: list[InputUnit] = []
    with open_claimed(path, file.mark) as source:
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
    if isinstance(error, RecursionError):
        return "its columns are nested too deeply to be read"
    return " ".join(str(error).split()) or type(error).__name__


def _note_categories(parquet: pq.ParquetFile, schema: pa.Schema) -> pa.Schema:
    """The schema with the order of each ordered dictionary, which stands before its first value and in no footer."""
    types = {field.name: field.type for field in parquet.schema_arrow}
    names = [name for name, found in types.items() if pa.types.is_dictionary(found) and found.ordered]
    if names and parquet.metadata.num_row_groups:
        # A page that cannot be read is for *read* to report.
        with contextlib.suppress(pa.ArrowException, OSError):
            for batch in islice(parquet.iter_batches(1, [0], names, use_threads=False), 1):
                for name in names:
                    index = schema.names.index(name)
                    column: Any = batch.column(name)
                    schema = schema.set(index, note_categories(schema.field(index), column))
    return schema


def _unify(schemas: list[tuple[str, pa.Schema]], needed: Collection[str] | None) -> pa.Schema:
    unified = pa.schema([])
    for path, schema in schemas:
        fields = [field for field in schema if needed is None or field.name in needed]
        try:
            unified = pa.unify_schemas([unified, pa.schema(fields)], promote_options="permissive")
        except (pa.ArrowException, TypeError) as error:
            raise InputPatternError(
                f"{path}: its columns contradict those of earlier files: {_one_line(error)}; "
                "expected the same column to have compatible types in every file"
            ) from error
    unified = agree_on_types(unified, [schema for _, schema in schemas])
    lowered = [name.lower() for name in unified.names]
    if len(set(lowered)) < len(lowered):
        twice = sorted(name for name in unified.names if lowered.count(name.lower()) > 1)
        raise InputPatternError(f"expected columns whose names differ by more than case, found {', '.join(twice)}")
    return unified


def _add_folders(own: pa.Schema, folders: Sequence["pa.Field[Any]"], needed: Collection[str] | None) -> pa.Schema:
    """The files' own columns and, after them, those of their folders that are needed and have other names."""
    added = [folder for folder in folders if needed is None or folder.name in needed]
    return pa.schema([*own, *(folder for folder in added if folder.name not in own.names)])


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
