"""`moebeam report` and `moebeam reconcile` over real runs of the fake engine."""

import hashlib
import json
import shutil
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from moebeam.jobs.commands.cli import run_command
from moebeam.jobs.console.report_table import ReportTable
from moebeam.jobs.output.run_record import read_record
from moebeam.jobs.reports.report import make_report
from moebeam.jobs.run.launch import launch
from moebeam.schemas.errors import JobFileError, OutputError
from moebeam.schemas.store.sealed_json import seal_json, unseal_json
from tests.support.jobs.jobs_for_tests import fake_job, priced, write_parquet, write_script

NASTY = ['=HYPERLINK("http://x")', "<script>alert(1)</script>", "+1", "\x1b[2J"]
CHAIN = {
    "value_chain": {
        "parties": [{"name": "provider"}, {"name": "cloud", "markup_percent": "12.5"}, {"name": "customer"}]
    }
}


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Path:
    folder = tmp_path_factory.mktemp("report")
    rows = range(12)
    source = write_parquet(
        folder / "in" / "a.parquet",
        {
            "text": [f"the same beginning {row}" for row in rows],
            "tenant": [NASTY[row % 4] for row in rows],
            "team": [f"team {row % 2}" for row in rows],
        },
    )
    script = write_script(
        folder / "script.json",
        {"default": {"text": "fine"}, "rules": [{"contains": "beginning 7", "failure": "engine_failed"}]},
    )
    launch(
        fake_job(
            source,
            folder / "out",
            tiny_checkpoint,
            input={"tenant_column": "tenant"},
            accounting={**priced(folder), "tag_columns": ["team"]},
            model={"script": str(script)},
            output={"max_reject_share": 1.0},
            **CHAIN,
        )
    )
    return folder / "out"


def tables_of(output: Path, **arguments: Any) -> dict[str, ReportTable]:
    return {table.name: table for table in make_report(read_record(str(output)), **arguments).tables}


def column(table: ReportTable, name: str) -> list[Any]:
    place = [column.name for column in table.columns].index(name)
    return [row[place] for row in table.rows]


def total_of(output: Path) -> Decimal:
    return Decimal(json.loads((output / "manifest.json").read_text())["totals"]["costs"]["USD"])


@pytest.mark.parametrize("by", ["tenant,day", "team", "tags.team,outcome", "month", "custom_id", "error_type"])
def test_costs_by_any_column_add_up_to_the_manifest(output: Path, by: str) -> None:
    costs = tables_of(output, by=by)["costs"]
    assert sum(column(costs, "cost")) == sum(column(costs, "cost_allocated")) == total_of(output)
    assert sum(column(costs, "attempts")) == 12


def test_tags_of_the_job_are_columns_of_the_report(output: Path) -> None:
    costs = tables_of(output, by="team")["costs"]
    assert sorted(column(costs, "tags.team")) == ["team 0", "team 1"]


def test_rejects_checks_and_the_jobs_value_chain_are_in_it(output: Path) -> None:
    tables = tables_of(output)
    assert tables["rejects"].rows == (("engine_failed", 1, 1 / 12),)
    assert ("ledger_and_rows", "equal") in tables["checks"].rows
    chain = tables["value_chain"]
    assert column(chain, "party") == ["provider", "cloud", "customer"]
    charged, paid = column(chain, "charged"), column(chain, "paid")
    assert (charged[0], paid[2]) == (total_of(output), charged[1])
    assert charged[1] == total_of(output) * Decimal("1.125")


def test_what_data_brings_is_inert_in_every_file(
    output: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    page, csvs, parquets = tmp_path / "r.html", tmp_path / "csv", tmp_path / "parquet"
    words = ["report", str(output), "--html", str(page), "--csv", str(csvs), "--parquet", str(parquets)]
    assert run_command(words) == 0
    html = page.read_text()
    assert "<script" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    text = (csvs / "costs.csv").read_text()
    assert "'=HYPERLINK" in text
    assert "'+1," in text
    found = pq.read_table(parquets / "costs.parquet")
    assert set(found.column("tenant").to_pylist()) == set(NASTY)
    assert sum(found.column("cost").to_pylist()) == total_of(output)
    shown = capfd.readouterr().err
    assert "\x1b[2J" not in shown
    assert "\\x1b[2J" in shown


def test_a_quote_stands_beside_what_the_run_took(output: Path) -> None:
    table = tables_of(output)["quote"]
    totals = json.loads((output / "manifest.json").read_text())["totals"]
    actual = dict(zip(column(table, "figure"), column(table, "actual"), strict=True))
    assert actual["prompt tokens"] == totals["prompt_tokens"]
    assert "no" not in column(table, "is_within")


def test_json_is_one_line_on_standard_output(output: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run_command(["report", str(output), "--by", "outcome", "--json"]) == 0
    captured = capfd.readouterr()
    (line,) = captured.out.splitlines()
    answer = json.loads(line)
    assert sum(Decimal(group["cost"]) for group in answer["costs"]) == total_of(output)
    assert captured.err == ""


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_focus_is_written_by_the_files_ending(output: Path, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"focus.{suffix}"
    assert run_command(["report", str(output), "--quiet", "--focus", str(path)]) == 0
    if suffix == "parquet":
        assert sum(pq.read_table(path).column("BilledCost").to_pylist()) == total_of(output)
    else:
        assert path.read_text().startswith("BilledCost,")
    assert run_command(["report", str(output), "--quiet", "--focus", str(tmp_path / "focus.txt")]) == 2


def test_a_profile_beside_an_engine_that_does_not_count_says_so(output: Path, tmp_path: Path) -> None:
    from moebeam.jobs.reports.self_host import load_profile

    path = tmp_path / "p.toml"
    path.write_text('name = "x"\naccelerator = "card"\ncurrency = "USD"\n')
    found = tables_of(output, profile=load_profile(str(path)))["self_host"]
    assert found.note == "Not known: the engine 'fake' does not count its time."


def test_a_bill_that_matches_gives_0_and_one_that_does_not_gives_1(
    output: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    day = column(tables_of(output, by="day")["costs"], "day")[0]
    bill = tmp_path / "bill.csv"
    bill.write_text(f"day,model,amount\n{day},tiny,{total_of(output)}\n")
    words = ["reconcile", str(output), str(bill), "--currency", "USD", "--json"]
    assert run_command(words) == 0
    assert json.loads(capfd.readouterr().out)["counts"] == {"matched": 1}
    bill.write_text(f"day,model,amount\n{day},tiny,{total_of(output) * 2}\n")
    assert run_command(words) == 1
    assert json.loads(capfd.readouterr().out)["status"] == "different"
    assert run_command([*words, "--tolerance-percent", "100"]) == 0
    assert run_command([*words, "--tolerance-percent", "much"]) == 2


def test_a_wrong_column_and_a_folder_without_a_run_are_named(output: Path, tmp_path: Path) -> None:
    with pytest.raises(JobFileError, match="found 'tennant'"):
        make_report(read_record(str(output)), by="tennant")
    with pytest.raises(OutputError, match="found no such folder"):
        read_record(str(tmp_path / "none"))


def test_a_damaged_ledger_is_named(output: Path, tmp_path: Path) -> None:
    copy = tmp_path / "out"
    shutil.copytree(output, copy)
    path = next((copy / "ledger").glob("*.parquet"))
    whole = hashlib.sha256(path.read_bytes()).hexdigest()
    path.write_bytes(b"no")
    found = hashlib.sha256(b"no").hexdigest()
    damage = (
        rf"the ledger cannot be read: .*{path.name}: is damaged: expected content with SHA-256 {whole}, found {found}"
    )
    with pytest.raises(OutputError, match=damage):
        make_report(read_record(str(copy)))
    manifest = copy / "manifest.json"
    manifest.write_bytes(seal_json(unseal_json(manifest.read_bytes()).replace(whole.encode(), found.encode())))
    with pytest.raises(OutputError, match=rf"the ledger cannot be read: .*{path.name}: expected a file of the ledger"):
        make_report(read_record(str(copy)))
    shutil.rmtree(copy / "ledger")
    with pytest.raises(OutputError, match="found no such file"):
        make_report(read_record(str(copy)))
    (copy / "manifest.json").unlink()
    shutil.rmtree(copy / "_moebeam" / "plan")
    with pytest.raises(OutputError, match="expected the manifest of a run, or its plan, found neither; moebeam status"):
        make_report(read_record(str(copy)))
