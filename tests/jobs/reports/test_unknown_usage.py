"""Tokens and costs that a provider did not name stay unknown in every view of a run, and never become zero."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moebeam.jobs.quotes.earlier_run import read_earlier_run
from moebeam.jobs.reports.focus_export import focus_table
from moebeam.jobs.reports.reconcile import add_up_ledger
from moebeam.jobs.reports.value_chain_report import PricedModel, charge_chain, read_attempts
from moebeam.schemas.answers import AccountedAnswer, Totals
from moebeam.schemas.errors import NotJson, OutputError
from moebeam.schemas.job.sections import ValueChainSection
from moebeam.schemas.records import Usage
from moebeam.schemas.store import storage
from moebeam.transforms.answer.shard_tables import shard_tables
from moebeam.transforms.answer.spending import Spent
from moebeam.transforms.durable.commit import sum_tables
from moebeam.transforms.money.account import charge
from moebeam.transforms.publish.invariants import RowSums, check_invariants, sum_rows
from moebeam.transforms.publish.manifest_file import format_manifest
from moebeam.transforms.publish.rollup import GroupSums, largest_groups, merge_groups, roll_up
from tests.support.paths import ROOT
from tests.transforms.answer.test_shard_tables import LINE, RUN, accounted, planned

REPORTED, MISSING = Usage(9, 4, 3, 1), Usage(None, None).with_estimates(8, 2)
HALF, BEYOND, NEGATIVE = Usage(7, None).with_estimates(8, 2), Usage(9, 4, 20, 30), Usage(9, -4).with_estimates(8, 2)
USAGES = st.sampled_from([REPORTED, MISSING, HALF, BEYOND, NEGATIVE, Usage(5, 5), Usage(0, 0, 0)])
SHARDS = st.lists(st.lists(st.lists(USAGES, min_size=1, max_size=3), min_size=1, max_size=3), min_size=1, max_size=2)


def attempts(row: int, usages: Sequence[Usage]) -> list[AccountedAnswer]:
    """All but the last were not accepted."""
    found: list[AccountedAnswer] = []
    for attempt, usage in enumerate(usages, 1):
        error = NotJson("no") if attempt < len(usages) else None
        one = accounted(row, usage, priced=False, attempt=attempt, error=error)
        found.append(replace(one, charge=charge(usage, LINE) if usage.is_known else None))
    return found


def tables_of(shards: Sequence[Sequence[Sequence[Usage]]]) -> list[dict[Any, pa.Table]]:
    made: list[dict[Any, pa.Table]] = []
    for number, rows in enumerate(shards):
        answers = {row: attempts(row, usages) for row, usages in enumerate(rows)}
        made.append(
            shard_tables(f"s{number}", planned([[1, 2, row] for row in answers], [None] * len(rows)), answers, RUN)
        )
    return made


@settings(deadline=None, max_examples=30)
@given(SHARDS)
def test_every_sum_counts_what_is_known_and_how_much_is_not(shards: list[list[list[Usage]]]) -> None:
    usages = [usage for rows in shards for row in rows for usage in row]
    known = [usage for usage in usages if usage.is_known]
    cost = sum((charge(usage, LINE).cost for usage in known), Decimal(0))
    num_prompt_tokens = sum(usage.classes.num_prompt_tokens for usage in usages)
    tables = tables_of(shards)
    ledgers = [table["ledger"] for table in tables]

    totals = sum((sum_tables(table) for table in tables), Totals())
    assert (totals.num_attempts, totals.num_unknown_usage) == (len(usages), len(usages) - len(known))
    assert (totals.num_unpriced, totals.prompt_tokens) == (len(usages) - len(known), num_prompt_tokens)
    assert sum(map(Decimal, (totals.costs or {}).values()), Decimal(0)) == cost
    spent = Spent.from_totals(totals)
    assert spent.input_tokens == num_prompt_tokens + sum(usage.estimated_prompt_tokens or 0 for usage in usages)

    groups = merge_groups(roll_up(ledger, ("tenant",)) for ledger in ledgers)
    whole = sum(groups.values(), GroupSums())
    assert (whole.num_unknown_usage, whole.prompt_tokens, whole.cost) == (
        totals.num_unknown_usage,
        num_prompt_tokens,
        cost,
    )
    rows = sum((sum_rows(table[name]) for table in tables for name in ("results", "rejects")), RowSums())
    checks = check_invariants(largest_groups(groups.items(), ("tenant",)), rows, totals, {})
    is_sound = all(usage.status == "reported" for usage in usages)
    assert (checks["ledger_and_rows"] == "equal") == is_sound

    focus, num_left_out = focus_table(ledgers, "a")
    assert num_left_out == totals.num_unpriced
    assert sum(focus.column("BilledCost").to_pylist(), Decimal(0)) == cost
    billed, num_unpriced = add_up_ledger(ledgers, utc_offset=timedelta())
    assert (sum((one.amount for one in billed.values()), Decimal(0)), num_unpriced) == (cost, totals.num_unpriced)

    found = [attempt for ledger in ledgers for attempt in read_attempts(ledger)]
    assert sum(not attempt.usage.is_known for attempt in found) == totals.num_unknown_usage
    chain = charge_chain(
        ValueChainSection.model_validate({"parties": [{"name": "p"}, {"name": "c"}]}), ledgers, PricedModel()
    )
    assert chain is not None
    assert chain.num_unpriced.get("p", 0) == totals.num_unpriced


@settings(deadline=None, max_examples=10)
@given(SHARDS)
def test_duckdb_views_agree_and_find_nothing_broken(
    tmp_path_factory: pytest.TempPathFactory, shards: list[list[list[Usage]]]
) -> None:
    folder: Path = tmp_path_factory.mktemp("run")
    tables = tables_of(shards)
    for number, table in enumerate(tables):
        for name, rows in table.items():
            (folder / name).mkdir(exist_ok=True)
            pq.write_table(rows, folder / name / f"s{number}.parquet")
    totals = sum((sum_tables(table) for table in tables), Totals())
    with duckdb.connect() as database:
        database.execute(f"SET VARIABLE moebeam_run = '{folder}'")
        database.execute((ROOT / "jobs" / "run" / "sql" / "views.sql").read_text())
        assert database.execute("SELECT * FROM broken_invariants").fetchall() == []
        (found,) = database.execute(
            "SELECT sum(attempts), sum(unpriced), sum(unknown_usage), coalesce(sum(cost), 0) FROM cost_by_tenant"
        ).fetchall()
    cost = sum(map(Decimal, (totals.costs or {}).values()), Decimal(0))
    assert found == (totals.num_attempts, totals.num_unpriced, totals.num_unknown_usage, cost)


def test_row_without_a_usage_has_no_zero_in_place_of_its_tokens() -> None:
    (table,) = tables_of([[[MISSING]]])
    (row,) = table["results"].to_pylist()
    names = ("prompt_tokens", "cached_tokens", "completion_tokens", "reasoning_tokens", "cost", "cost_allocated")
    assert [row[name] for name in names] == [None] * len(names)


def write_run(folder: Path, ledger: pa.Table) -> str:
    path = folder / "ledger" / "s0.parquet"
    path.parent.mkdir()
    pq.write_table(ledger, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    text = format_manifest(
        {
            "status": "complete",
            "model": {"engine": "openai"},
            "engine": {},
            "files": {"ledger": [{"path": "ledger/s0.parquet", "sha256": digest}]},
        }
    )
    storage.write_whole(f"{folder}/manifest.json", text.encode())
    return str(folder)


def test_forecast_takes_only_attempts_whose_tokens_were_counted(tmp_path: Path) -> None:
    (table,) = tables_of([[[REPORTED], [MISSING], [HALF]]])
    earlier = read_earlier_run(write_run(tmp_path, table["ledger"]))
    assert (earlier.num_requests, earlier.output_tokens) == (1, 4)


def test_run_without_any_usage_says_so_where_a_forecast_is_asked_of_it(tmp_path: Path) -> None:
    (table,) = tables_of([[[MISSING]]])
    with pytest.raises(OutputError, match="found no usage in its ledger"):
        read_earlier_run(write_run(tmp_path, table["ledger"]))
