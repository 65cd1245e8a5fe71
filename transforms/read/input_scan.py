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
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from moebeam.schemas.column_types import agree_on_types, note_categories, plain_field
from moebeam.schemas.errors import InputPatternError
from moebeam.schemas.job.input_section import InputSection
from moebeam.schemas.store.file_mark import FileMark
from moebeam.transforms.read.file_format import InputFormat, detect_format
from moebeam.transforms.read.foreign_files import refuse_foreign_files, refuse_foreign_lines
from moebeam.transforms.read.input_files import InputFile, files_fingerprint, list_input_files
from moebeam.transforms.read.parquet_file import open_parquet, read_schema
from moebeam.transforms.read.partitions import unify_partitions
from moebeam.transforms.read.rows.merged_types import declare_types, merge_schemas, refuse_declared, settle_nulls
from moebeam.transforms.read.rows.scan_rows import RowsFormat, scan_rows
from moebeam.transforms.read.transient_errors import is_permanent, retry_transient

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
    """A piece of the input that is read at once: a row group, a record batch, or some lines of a file.

    Attributes:
        label: the file's path below the folder that all input files share; derived ids begin with it.
        ordinal: place in the input order, from 0; files sorted by name, pieces in file order.
        group: units of one group are read together, so that small files and row groups share a sorted run.
        row_group: index in its Parquet or Arrow file; for others, the piece's number.
        first_row: index of the unit's first row in its file.
        num_rows: rows to read; fewer than the file holds under `--limit`; None for an unreadable file.
        num_bytes: uncompressed size; decides how many rows make a record batch.
        offset: byte offset of the piece in a file of lines; 0 in a packed one.
        first_line: number of the line there, from 1.
        delimiter: of a CSV file.
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
    first_line: int = 1
    delimiter: str = ""


@dataclass(frozen=True, slots=True)
class UnitGroup:
    """Neighbouring units that one worker reads, in order."""

    units: tuple[InputUnit, ...]


@dataclass(frozen=True, slots=True, weakref_slot=True)
class StagedInput:
    """Rows of an input in a scratch folder, which is removed with this object; see `sources/staged_input.py`.

    Attributes:
        key: digest of where the rows come from.
        sha256: of the file.
    """

    key: str
    path: str
    sha256: str
    num_rows: int


@dataclass(frozen=True, slots=True)
class InputScan:
    """The whole input.

    Attributes:
        schema: the needed columns, each in one plain type for all files, with a note of what they all declare.
        names: every column of every readable file, in order of appearance.
        staged: rows that the scan had to make and that the run is still to keep; None where there are none.
    """

    units: tuple[InputUnit, ...]
    schema: pa.Schema
    names: tuple[str, ...]
    format: InputFormat
    num_files: int
    fingerprint: str
    staged: StagedInput | None = None

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
    input_format = detect_format(section, paths)
    with ThreadPoolExecutor(max_workers=16) as pool:
        scans = list(pool.map(partial(_scan_file, section, input_format, needed), files))
    scans = _settle_types(section, scans, input_format)
    _refuse_foreign_files(section, paths, scans, input_format)
    schemas = [(path, scan.schema) for path, scan in zip(paths, scans, strict=True) if scan.schema is not None]
    own = _unify(schemas, needed)
    # Lines of JSONL bring all that belongs to their requests.
    has_folders = input_format != "jsonl"
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
    elif input_format == "parquet" and all(scan.schema is None for scan in scans):
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


def _settle_types(section: InputSection, scans: list[_FileScan], input_format: InputFormat) -> list[_FileScan]:
    """Give each column of files without declared types one type for all of them.

    Raises:
        InputPatternError: `[input] types` names a type or a column that there is not.
    """
    if input_format not in ("csv", "jsonl_rows"):
        refuse_declared(section, input_format)
        return scans
    merged = settle_nulls(merge_schemas(scan.schema for scan in scans if scan.schema is not None))
    merged = declare_types(section, merged)
    types = {field.name: field for field in merged}
    return [
        scan if scan.schema is None else replace(scan, schema=pa.schema([types[name] for name in scan.schema.names]))
        for scan in scans
    ]


def _scan_file(
    section: InputSection, input_format: InputFormat, needed: Collection[str] | None, file: InputFile
) -> _FileScan:
    path = file.path
    try:
        return retry_transient(
            lambda: (
                _scan_parquet_file(file, needed)
                if input_format == "parquet"
                else _scan_rows_file(file, input_format, section.delimiter, needed)
            )
        )
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


def _scan_rows_file(
    file: InputFile, input_format: RowsFormat, delimiter: str | None, needed: Collection[str] | None
) -> _FileScan:
    found = scan_rows(file.path, file.mark, input_format, delimiter, needed)
    if len(found.schema) > MAX_COLUMNS:
        raise pa.ArrowInvalid(f"expected at most {MAX_COLUMNS:,} columns, found {len(found.schema):,}")
    units = (
        InputUnit(
            0,
            file.path,
            "",
            input_format,
            index,
            piece.first_row,
            piece.num_rows,
            piece.num_bytes,
            piece.offset,
            first_line=piece.first_line,
            delimiter=found.delimiter,
        )
        for index, piece in enumerate(found.pieces)
    )
    return _FileScan(tuple(units), JSONL_SCHEMA if input_format == "jsonl" else found.schema)


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
