"""Value chains of job files and files of their own, and the worked example of the guide."""

import re
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from moebeam.jobs.check.job_file import load_job
from moebeam.jobs.console.report_table import ReportTable
from moebeam.jobs.reports.value_chain_report import PricedModel, chain_tables, charge_chain, load_chain
from moebeam.schemas.errors import JobFileError
from moebeam.schemas.job.sections import ValueChainSection
from moebeam.schemas.tables import LEDGER_SCHEMA
from tests.support.paths import ROOT

GUIDE = ROOT / "docs" / "value-chain.md"
PRICES = re.findall("```csv\n(.*?)```", GUIDE.read_text(), re.DOTALL)[0]
EXAMPLE = re.findall("```toml\n(.*?)```", GUIDE.read_text(), re.DOTALL)[0]


def ledger(*lines: dict[str, Any]) -> pa.Table:
    default = {
        "tenant": "t",
        "provider": "p",
        "model": "m",
        "outcome": "answered",
        "started_at": datetime(2026, 11, 24, 12, tzinfo=UTC),
        "cache_hit_tokens": 600_000_000,
        "cache_miss_tokens": 400_000_000,
        "visible_output_tokens": 150_000_000,
        "reasoning_tokens": 0,
        "cost": Decimal("1.5"),
        "currency": "USD",
    }
    return pa.Table.from_pylist([{**default, **line} for line in lines], schema=LEDGER_SCHEMA)


def job_with(tmp_path: Path, chain: str) -> ValueChainSection:
    (tmp_path / "prices.csv").write_text(PRICES)
    text = '[input]\npath = "in"\n[prompt]\ntemplate = "x"\n[output]\npath = "out"\n' + chain
    (tmp_path / "job.toml").write_text(text)
    return load_job(str(tmp_path / "job.toml")).value_chain


def tables(section: ValueChainSection, *ledgers: pa.Table) -> tuple[ReportTable, ReportTable]:
    chain = charge_chain(section, ledgers, PricedModel())
    assert chain is not None
    return chain_tables(chain)


def test_the_example_of_the_guide_is_what_the_code_computes(tmp_path: Path) -> None:
    parties, days = tables(job_with(tmp_path, EXAMPLE), ledger({}))
    found = [
        f"| {party} | " + " | ".join("" if cell is None else f"{cell:.2f}" for cell in cells[2:6]) + " |"
        for party, *cells in parties.rows
    ]
    told = [
        line
        for line in GUIDE.read_text().splitlines()
        if re.match(r"\| (model provider|cloud|application|customer)", line)
    ]
    assert [line.replace("|  |", "| |").replace("|  |", "| |") for line in found] == told
    assert "151.80 + 50.60 + 121.44 = 323.84" in GUIDE.read_text()
    assert Decimal("151.80") + Decimal("50.60") + Decimal("121.44") == Decimal("323.84")
    assert {row[1:3] for row in days.rows} == {("t", "2026-11-24")}


def test_a_chain_adds_up_by_party_tenant_and_day(tmp_path: Path) -> None:
    section = job_with(tmp_path, EXAMPLE)
    later = datetime(2026, 11, 25, tzinfo=UTC)
    parties, days = tables(section, ledger({}, {"tenant": "u"}), ledger({"started_at": later}))
    assert [row[:3] for row in days.rows][:3] == [
        ("model provider", "t", "2026-11-24"),
        ("model provider", "t", "2026-11-25"),
        ("model provider", "u", "2026-11-24"),
    ]
    for place in (-1, -2, -3, -4):
        for party in ("model provider", "cloud", "application"):
            whole = next(row for row in parties.rows if row[0] == party)[place - 1]
            assert sum(row[place] for row in days.rows if row[0] == party) == whole  # type: ignore[misc]


def test_a_first_party_without_a_book_charges_what_the_ledger_says(tmp_path: Path) -> None:
    chain = '[[value_chain.parties]]\nname = "a"\n[[value_chain.parties]]\nname = "b"\n'
    parties, _ = tables(job_with(tmp_path, chain), ledger({}, {"cost": None, "currency": None}))
    assert parties.rows[0][3] == Decimal("1.5")
    assert parties.note == "Lines without a price, which are in no sum: 1 by a."


def test_a_chain_of_its_own_file_finds_books_beside_it(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "prices.csv").write_text(PRICES)
    (tmp_path / "sub" / "chain.toml").write_text(EXAMPLE.replace("value_chain.parties", "parties"))
    parties, _ = tables(load_chain(str(tmp_path / "sub" / "chain.toml")), ledger({}))
    assert parties.rows[-1][4] == Decimal("323.84")


def test_without_parties_there_is_no_chain(tmp_path: Path) -> None:
    assert charge_chain(job_with(tmp_path, ""), [ledger({})], PricedModel()) is None


PARTY = "[[value_chain.parties]]\n"


@pytest.mark.parametrize(
    ("chain", "expected"),
    [
        (f'{PARTY}name = "a"\n', "expected at least a seller and a customer, found only 'a'"),
        (f'{PARTY}name = "a"\n{PARTY}name = "a"\n', "expected every name once, found a again"),
        (
            f'{PARTY}name = "a"\n{PARTY}name = "b"\nmarkup_percent = 1\n',
            "the last one to be the customer, found that 'b' sells",
        ),
        (f'{PARTY}name = "a"\nmarkup_percent = 1\n{PARTY}name = "b"\n', "'a' buys from nobody"),
        (
            f'{PARTY}name = "a"\n{PARTY}name = "b"\n{PARTY}name = "c"\n',
            "'b': expected `price_book` or `markup_percent`",
        ),
        (
            f'{PARTY}name = "a"\nprice_book = "p.csv"\nmarkup_percent = 1\n{PARTY}name = "b"\n',
            "party 'a': expected `price_book` or `markup_percent`, found both",
        ),
    ],
)
def test_a_chain_that_makes_no_sense_is_refused_with_the_job(chain: str, expected: str, tmp_path: Path) -> None:
    with pytest.raises(JobFileError, match=re.escape(expected)):
        job_with(tmp_path, chain)


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ('provider = "cloud"', 'provider = "clod"', "party 'cloud': expected prices of provider 'clod' in"),
        (
            'name = "cloud"',
            'name = "cloud"\ncurrency = "CNY"',
            "party 'cloud': expected prices in CNY, found USD on line 3",
        ),
    ],
)
def test_a_book_that_does_not_fit_its_party_is_named(old: str, new: str, expected: str, tmp_path: Path) -> None:
    with pytest.raises(JobFileError, match=re.escape(expected)):
        tables(job_with(tmp_path, EXAMPLE.replace(old, new)), ledger({}))


def test_a_ledger_of_two_currencies_needs_one_for_the_report(tmp_path: Path) -> None:
    chain = '[[value_chain.parties]]\nname = "a"\n[[value_chain.parties]]\nname = "b"\n'
    mixed = ledger({}, {"currency": "CNY"})
    with pytest.raises(JobFileError, match="currency: expected one, as the ledger has several: CNY, USD"):
        tables(job_with(tmp_path, chain), mixed)
    stated = '[value_chain]\ncurrency = "USD"\nrates = { CNY = "0.14" }\n' + chain
    parties, _ = tables(job_with(tmp_path, stated), mixed)
    assert parties.rows[0][3] == Decimal("1.71")
    assert parties.rows[0][-1] == "1.500000000000 CNY, 1.500000000000 USD"
