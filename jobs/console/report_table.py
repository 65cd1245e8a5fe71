"""A report's table and its outputs: terminal, CSV, Parquet and HTML.

Cells hold users' data: a tenant's name can be markup, a spreadsheet's formula or a terminal's control sequence. Each
output escapes them in its own way; numbers stay numbers.
"""

import csv
import io
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Literal, TypeAlias

import pyarrow as pa
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich.console import Console
from rich.table import Table
from rich.text import Text

from moebeam.jobs.console.formats import escape_control_characters, format_money
from moebeam.schemas.arrow import encode_parquet_file
from moebeam.schemas.canonical import Json
from moebeam.schemas.tables import MONEY

Kind: TypeAlias = Literal["text", "count", "money", "share", "number"]
Cell: TypeAlias = str | int | float | Decimal | None

_ARROW: Mapping[Kind, pa.DataType] = {
    "text": pa.string(),
    "count": pa.int64(),
    "money": MONEY,
    "share": pa.float64(),
    "number": pa.float64(),
}
_FORMULA_MARKS = frozenset("=+-@|\N{MINUS SIGN}")
_BREAKS = ("\t", "\r", "\n")
_TEMPLATES = Path(__file__).parent / "templates"
_MAX_SHOWN_ROWS = 40
_MAX_WIDTH = 1000


@dataclass(frozen=True, slots=True)
class Column:
    """A column; `share` is 0 to 1, `number` any other float, whose unit is in the name."""

    name: str
    kind: Kind


@dataclass(frozen=True, slots=True)
class ReportTable:
    """A part of a report.

    Attributes:
        name: of its file.
        note: what one must know to read the figures.
    """

    name: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str | None = None

    def to_json(self) -> Json:
        """The rows as objects; money as decimal text."""
        names = [column.name for column in self.columns]
        return [
            {name: format(c, "f") if isinstance(c, Decimal) else c for name, c in zip(names, row, strict=True)}
            for row in self.rows
        ]


def format_csv(table: ReportTable) -> str:
    """A table as CSV with a header; text that a spreadsheet would compute begins with an apostrophe."""
    sink = io.StringIO(newline="")
    writer = csv.writer(sink, lineterminator="\r\n")
    writer.writerow([_inert(column.name) for column in table.columns])
    writer.writerows([_csv_cell(cell) for cell in row] for row in table.rows)
    return sink.getvalue()


def _csv_cell(cell: Cell) -> str:
    if cell is None:
        return ""
    if isinstance(cell, Decimal):
        return format(cell, "f")
    return _inert(cell) if isinstance(cell, str) else str(cell)


def _inert(text: str) -> str:
    """Text that no spreadsheet computes: some pass over what is not seen, and take the wide forms for the marks."""
    seen = next((letter for letter in text if letter.isprintable() and not letter.isspace()), "")
    is_formula = bool(_FORMULA_MARKS.intersection(unicodedata.normalize("NFKC", seen)[:1]))
    return f"'{text}" if is_formula or text.startswith(_BREAKS) else text


def encode_parquet(table: ReportTable) -> bytes:
    """A table as Parquet, with the type of each column fixed whatever its values."""
    arrays = [
        pa.array([row[place] for row in table.rows], _ARROW[column.kind]) for place, column in enumerate(table.columns)
    ]
    return encode_parquet_file(pa.table(arrays, names=[column.name for column in table.columns]))


def format_html(title: str, tables: Sequence[ReportTable]) -> str:
    """A page of tables that holds no script and loads nothing."""
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template("report.html").render(title=title, tables=tables, format_cell=_format_cell)


def print_table(console: Console, table: ReportTable) -> None:
    """Print a table; a long one is cut, with a note."""
    console.print(Text(escape_control_characters(table.title), style="bold"), soft_wrap=True)
    # Empty columns only take room.
    places = [place for place in range(len(table.columns)) if any(row[place] is not None for row in table.rows)]
    shown = Table(box=None, padding=(0, 2, 0, 0))
    for column in (table.columns[place] for place in places):
        shown.add_column(column.name, justify="left" if column.kind == "text" else "right", no_wrap=True)
    for row in table.rows[:_MAX_SHOWN_ROWS]:
        cells = (_format_cell(row[place], table.columns[place]) for place in places)
        shown.add_row(*(Text(escape_control_characters(cell)) for cell in cells))
    # Rich would cut cells to the terminal's width; a line that the terminal wraps still holds its figures.
    wide = Console(file=io.StringIO(), width=_MAX_WIDTH)
    with wide.capture() as captured:
        wide.print(shown)
    for line in captured.get().splitlines():
        console.print(Text(line.rstrip()), soft_wrap=True)
    if len(table.rows) > _MAX_SHOWN_ROWS:
        console.print(f"… and {len(table.rows) - _MAX_SHOWN_ROWS:,} more rows; --csv DIR writes all", highlight=False)
    if table.note is not None:
        console.print(Text(escape_control_characters(table.note)), soft_wrap=True)
    console.print()


def _format_cell(cell: Cell, column: Column) -> str:
    """A cell as a person reads it; files hold the exact value."""
    if cell is None:
        return "—" if column.kind != "text" else ""
    if isinstance(cell, Decimal):
        return format_money(cell, None)
    if isinstance(cell, int):
        return f"{cell:,}"
    if isinstance(cell, float):
        return f"{cell:.1%}" if column.kind == "share" else f"{cell:,.4g}"
    return cell
