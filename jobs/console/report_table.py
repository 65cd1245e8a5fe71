"""A table of a report, and its ways out: terminal, CSV, Parquet and HTML.

What stands in a cell may come from anybody's data: a tenant's name can be markup, a spreadsheet's formula or a
terminal's control sequence. Each way out makes it inert in its own form; numbers stay numbers.
"""

import csv
import io
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

from moebeam.jobs.console.formats import format_money
from moebeam.schemas.arrow import parquet_bytes
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
_FORMULA_MARKS = ("=", "+", "-", "@", "\t", "\r", "\n")
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
        note: what a reader has to know to read it right.
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


def csv_text(table: ReportTable) -> str:
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
    return f"'{text}" if text.startswith(_FORMULA_MARKS) else text


def table_bytes(table: ReportTable) -> bytes:
    """A table as Parquet, with the type of each column fixed whatever its values."""
    arrays = [
        pa.array([row[place] for row in table.rows], _ARROW[column.kind]) for place, column in enumerate(table.columns)
    ]
    return parquet_bytes(pa.table(arrays, names=[column.name for column in table.columns]))


def html_text(title: str, tables: Sequence[ReportTable]) -> str:
    """A page of tables that holds no script and loads nothing."""
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template("report.html").render(title=title, tables=tables, spelled=_spelled)


def print_table(console: Console, table: ReportTable) -> None:
    """A table for a person; a long one is cut, and says so."""
    console.print(Text(printable(table.title), style="bold"), soft_wrap=True)
    # A column that says nothing only takes room.
    places = [place for place in range(len(table.columns)) if any(row[place] is not None for row in table.rows)]
    shown = Table(box=None, padding=(0, 2, 0, 0))
    for column in (table.columns[place] for place in places):
        shown.add_column(column.name, justify="left" if column.kind == "text" else "right", no_wrap=True)
    for row in table.rows[:_MAX_SHOWN_ROWS]:
        cells = (_spelled(row[place], table.columns[place]) for place in places)
        shown.add_row(*(Text(printable(cell)) for cell in cells))
    # Rich would cut cells to the terminal's width; a line that the terminal wraps still holds its figures.
    wide = Console(file=io.StringIO(), width=_MAX_WIDTH)
    with wide.capture() as captured:
        wide.print(shown)
    for line in captured.get().splitlines():
        console.print(Text(line.rstrip()), soft_wrap=True)
    if len(table.rows) > _MAX_SHOWN_ROWS:
        console.print(f"… and {len(table.rows) - _MAX_SHOWN_ROWS:,} more rows; --csv DIR writes all", highlight=False)
    if table.note is not None:
        console.print(Text(printable(table.note)), soft_wrap=True)
    console.print()


def printable(text: str) -> str:
    """A text without what a terminal would obey."""
    return "".join(letter if letter.isprintable() else f"\\x{ord(letter):02x}" for letter in text)


def _spelled(cell: Cell, column: Column) -> str:
    """A cell for reading; files hold the exact value."""
    if cell is None:
        return "—" if column.kind != "text" else ""
    if isinstance(cell, Decimal):
        return format_money(cell, None)
    if isinstance(cell, int):
        return f"{cell:,}"
    if isinstance(cell, float):
        return f"{cell:.1%}" if column.kind == "share" else f"{cell:,.4g}"
    return cell
