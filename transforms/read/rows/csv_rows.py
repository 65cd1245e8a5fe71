"""Rows of CSV files (RFC 4180, any delimiter) with a header.

Part of *read* and of the scan before the run. The scan finds the type of each column from all of its values; rows are
then read as text and cast, so that a value of another type costs its own row alone.
"""

import io
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv

from moebeam.schemas.errors import InvalidLine, RowError
from moebeam.transforms.read.rows.line_blocks import Block, IsOpen, strip_mark

_DELIMITERS = (b",", b";", b"\t", b"|")
_LEADING_ZERO = r"^\s*[-+]?0[0-9]"
_LONG_NUMBER_DIGITS = 18


def find_delimiter(header: bytes) -> str:
    """The delimiter that a header line holds most often; a comma where it holds none."""
    bare = re.sub(rb'"[^"]*"', b"", header)
    return max(_DELIMITERS, key=bare.count).decode()


def read_header(line: bytes, delimiter: str) -> list[str]:
    """The columns that a file's first record names.

    Raises:
        pa.ArrowInvalid: a name is not UTF-8 or there twice, or there is none.
    """
    try:
        table = _parse([strip_mark(line)], None, delimiter, [])
    except UnicodeDecodeError as error:
        raise pa.ArrowInvalid(f"expected column names in UTF-8, found {line[:100]!r}") from error
    try:
        names = [str(column[0].as_py() or "") for column in table.columns] if table.num_rows else []
    except UnicodeDecodeError as error:
        raise pa.ArrowInvalid(f"expected column names in UTF-8, found {line[:100]!r}") from error
    if not any(names):
        raise pa.ArrowInvalid("expected a header with the names of columns in the first line, found none")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise pa.ArrowInvalid(f"expected every column name once, found twice: {', '.join(map(repr, twice))}")
    return names


def make_is_open(delimiter: str) -> IsOpen:
    """Tell records by their quotes: one goes on while a field that begins with a quote has not ended with one."""
    mark = re.escape(delimiter.encode())
    closing = re.compile(rb'[^"]*+(?:""[^"]*+)*+"(?!")')
    # After a field has been closed, the rest of the line; it stops before a quote that opens and is not closed.
    rest = re.compile(rb'[^%b]*+(?:%b(?:"[^"]*+(?:""[^"]*+)*+"(?!")[^%b]*+|(?!")[^%b]*+))*+' % (mark, mark, mark, mark))

    def is_open(line: bytes, was_open: bool) -> bool:
        if b'"' not in line:
            return was_open
        if not was_open and not line.startswith(b'"'):
            found = rest.match(line)
        else:
            closed = closing.match(line, 0 if was_open else 1)
            if closed is None:
                return True
            found = rest.match(line, closed.end())
        return found is None or found.end() < len(line)

    return is_open


def find_types(block: Block, names: Sequence[str], delimiter: str, needed: Collection[str] | None) -> pa.Schema:
    """The columns of a block in the narrowest types of pyarrow that hold all values as written.

    Numbers with zeros in front, such as postal codes, are text.
    """
    wanted = [name for name in names if needed is None or name in needed]
    if not wanted:
        return pa.schema([])
    inferred = _parse(block.records, names, delimiter, [], wanted, is_text=False)
    texts = _parse(block.records, names, delimiter, [], wanted)
    return pa.schema([pa.field(name, _keep_text(inferred[name].type, texts[name])) for name in wanted])


def _keep_text(found: pa.DataType, texts: "pa.ChunkedArray[Any]") -> pa.DataType:
    if pa.types.is_binary(found):
        return pa.string()
    if pa.types.is_integer(found) or pa.types.is_floating(found):
        has_zeros = pc.any(pc.match_substring_regex(texts, _LEADING_ZERO)).as_py()
        is_long = pa.types.is_floating(found) and (pc.max(pc.binary_length(texts)).as_py() or 0) > _LONG_NUMBER_DIGITS
        return pa.string() if has_zeros or is_long else found
    return found


def read_csv_block(
    block: Block, names: Sequence[str], delimiter: str, wanted: Sequence[str], types: Mapping[str, pa.DataType]
) -> tuple[pa.RecordBatch, dict[int, RowError]]:
    """Read a block's rows.

    Args:
        wanted: columns to read, all of them in `names`.
        types: of the columns that will be cast; spaces around their values are no part of them.
    Returns:
        Columns of text, and the errors of records that are no rows, whose values are null.
    Raises:
        pa.ArrowInvalid: pyarrow sees other records than we do.
    """
    bad: list[csv.InvalidRow] = []
    table = _parse(block.records, names, delimiter, bad, [*wanted] or [names[0]])
    size = len(block.records)
    if (found := table.num_rows + len(bad)) != size:
        raise pa.ArrowInvalid(
            f"lines {block.lines[0]} to {block.end_line - 1}: expected {size} records, found {found}; "
            "quotes within fields must be doubled"
        )
    errors: dict[int, RowError] = {}
    for row in bad:
        assert row.number is not None, "rows are numbered where one thread reads"
        place = row.number - 1
        errors[place] = InvalidLine(
            f"line {block.lines[place]}: expected {row.expected_columns} fields, found {row.actual_columns}"
        )
    batch = table.select([*wanted]).combine_chunks()
    if errors:
        good = iter(range(table.num_rows))
        batch = batch.take(pa.array([None if row in errors else next(good) for row in range(size)], pa.int64()))
    arrays = [_trim(_one_chunk(batch[name]), types.get(name)) for name in wanted]
    if not arrays:
        return make_empty_batch(size), errors
    return pa.RecordBatch.from_arrays(arrays, [*wanted]), errors


def make_empty_batch(size: int) -> pa.RecordBatch:
    """Rows without columns; of those Arrow knows the number through a struct alone."""
    rows: Any = pa.array([{}] * size, pa.struct([]))
    return pa.RecordBatch.from_struct_array(rows)


def _trim(texts: "pa.Array[Any]", wanted: pa.DataType | None) -> "pa.Array[Any]":
    if wanted is None or pa.types.is_string(wanted) or pa.types.is_large_string(wanted):
        return texts
    try:
        return pc.utf8_trim_whitespace(texts)
    except pa.ArrowInvalid:
        return texts


def _one_chunk(column: "pa.ChunkedArray[Any]") -> "pa.Array[Any]":
    combined: Any = column.combine_chunks()
    return combined if isinstance(combined, pa.Array) else pa.concat_arrays(combined.chunks)


def _parse(
    records: Sequence[bytes],
    names: Sequence[str] | None,
    delimiter: str,
    bad: list[csv.InvalidRow],
    wanted: Sequence[str] = (),
    *,
    is_text: bool = True,
) -> pa.Table:
    """Parse records; those with too few or too many fields end in `bad`."""

    def skip(row: csv.InvalidRow) -> Literal["skip", "error"]:
        bad.append(row)
        return "skip"

    content = b"".join(records)
    texts = dict.fromkeys(wanted if names is not None else (), pa.string())
    if names is None:
        texts = {f"f{number}": pa.string() for number in range(content.count(delimiter.encode()) + 1)}
    return csv.read_csv(
        io.BytesIO(content),
        read_options=csv.ReadOptions(
            use_threads=False,
            block_size=len(content) + 1,
            column_names=None if names is None else [*names],
            autogenerate_column_names=names is None,
        ),
        parse_options=csv.ParseOptions(delimiter=delimiter, newlines_in_values=True, invalid_row_handler=skip),
        convert_options=csv.ConvertOptions(
            check_utf8=False,
            column_types=texts if is_text else None,
            null_values=[""],
            strings_can_be_null=True,
            quoted_strings_can_be_null=False,
            include_columns=[*wanted] or None,
        ),
    )
