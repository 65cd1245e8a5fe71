"""What data brings into a report is inert in every form of it, and numbers stay numbers."""

import csv
import io
from decimal import Decimal
from html.parser import HTMLParser

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from moebeam.jobs.console.formats import escape_control_characters
from moebeam.jobs.console.report_table import (
    Column,
    ReportTable,
    encode_parquet,
    format_csv,
    format_html,
    print_table,
)
from moebeam.schemas.tables import MONEY

COLUMNS = (Column("name", "text"), Column("rows", "count"), Column("cost", "money"), Column("share", "share"))


def table(name: str | None, *cells: object) -> ReportTable:
    row = cells or (3, Decimal("-1.500000000001"), -0.25)
    return ReportTable("costs", "Costs", COLUMNS, ((name, *row),))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "mark",
    [
        *("=", "+", "-", "@", "|", "\t", "\r", "\n", " =", "\u00a0 @", "\u200b=", "\ufeff-", "\x00+", " \t|"),
        *("\N{FULLWIDTH EQUALS SIGN}", "\N{FULLWIDTH PLUS SIGN}", "\N{FULLWIDTH HYPHEN-MINUS}", "\N{MINUS SIGN}"),
        *(
            "\N{FULLWIDTH COMMERCIAL AT}",
            "\N{SMALL EQUALS SIGN}",
            " \N{FULLWIDTH VERTICAL LINE}",
            "\N{IDEOGRAPHIC SPACE}=",
        ),
    ],
)
def test_text_that_begins_like_a_formula_is_escaped_in_csv(mark: str) -> None:
    (_, row) = csv.reader(io.StringIO(format_csv(table(f'{mark}HYPERLINK("x")')), newline=""))
    assert row[0] == f'\'{mark}HYPERLINK("x")'


@given(st.text())
def test_no_text_cell_of_a_csv_begins_like_a_formula(text: str) -> None:
    (_, row) = csv.reader(io.StringIO(format_csv(table(text)), newline=""))
    assert not row[0].lstrip().startswith(("=", "+", "-", "@", "|"))
    assert not row[0].startswith(("\t", "\r", "\n"))
    assert row[0].removeprefix("'") == text.removeprefix("'")


def test_negative_numbers_stay_numbers_in_csv() -> None:
    (_, row) = csv.reader(io.StringIO(format_csv(table("x")), newline=""))
    assert row[1:] == ["3", "-1.500000000001", "-0.25"]


class _Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[str] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [name for name, _ in attrs]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


@pytest.mark.parametrize(
    "markup",
    [
        "<script>alert(1)</script>",
        '"><img src=x onerror=alert(1)>',
        "</td></table><iframe>",
        "{{ 7 * 7 }}",
        "&lt;b&gt;",
    ],
)
def test_markup_in_data_is_text_in_html(markup: str) -> None:
    def page(text: str) -> _Tags:
        parser = _Tags()
        parser.feed(
            format_html(f"Run {text}", [ReportTable(*("costs", text, COLUMNS), ((text, 1, None, None),), text)])
        )
        return parser

    plain, found = page("plain"), page(markup)
    assert (found.tags, found.attributes) == (plain.tags, plain.attributes)
    assert "script" not in found.tags
    assert found.texts.count(markup) == plain.texts.count("plain") >= 3


def test_control_sequences_in_data_do_not_reach_the_terminal() -> None:
    sink = io.StringIO()
    print_table(Console(file=sink, width=200), table("\x1b[2J\x9b31mred[bold]"))
    assert "\\x1b[2J\\x9b31mred[bold]" in sink.getvalue()
    assert "\x1b" not in sink.getvalue()
    assert escape_control_characters("plain ünïcode") == "plain ünïcode"


def test_a_table_keeps_its_types_in_parquet_when_it_is_null_or_empty() -> None:
    for made in (table("x"), table(None, None, None, None), ReportTable("costs", "Costs", COLUMNS, ())):
        found = pq.read_table(pa.BufferReader(encode_parquet(made)))
        assert found.schema.types == [pa.string(), pa.int64(), MONEY, pa.float64()]
    assert pq.read_table(pa.BufferReader(encode_parquet(table("x")))).column("cost").to_pylist() == [
        Decimal("-1.500000000001")
    ]


def test_a_long_table_says_how_many_rows_are_not_shown() -> None:
    sink = io.StringIO()
    rows = tuple((f"n{place}", place, None, None) for place in range(50))
    print_table(Console(file=sink, width=200), ReportTable("costs", "Costs", COLUMNS, rows))
    assert "n39" in sink.getvalue()
    assert "n40" not in sink.getvalue()
    assert "and 10 more rows" in sink.getvalue()
