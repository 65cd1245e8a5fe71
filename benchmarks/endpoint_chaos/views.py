"""The account of a run as each view tells it: all must say the same, whenever and however the run stopped."""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from decimal import Decimal
from pathlib import Path
from typing import Any

import duckdb
import pyarrow.parquet as pq

from moebeam.jobs.output.batch_export import export_batch
from moebeam.jobs.output.run_record import RunRecord, read_record
from moebeam.jobs.output.status import read_status
from moebeam.jobs.reports.report import make_report


@dataclass(frozen=True, slots=True)
class Account:
    """What was asked and paid, and what may be billed beside it; None is what a view does not tell.

    Attributes:
        cost: in USD, without answers of unknown cost.
        lost_cost: the most that lost calls may cost.
        num_answered_rows: rows in results, in rejects, or with a journaled answer.
    """

    num_attempts: int | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    cost: Decimal | None = None
    num_lost_calls: int | None = None
    lost_cost: Decimal | None = None
    num_answered_rows: int | None = None


def read_status_account(output: Path) -> Account:
    """As `moebeam status --json` tells it."""
    status = read_status(read_record(str(output))).to_json()
    return Account(
        _count(status["num_requests"]),
        _count(status["prompt_tokens"]),
        _count(status["completion_tokens"]),
        _amount(status["cost"]),
        _count(status["num_lost_calls"]),
        _amount(status["lost_cost_at_most"]),
    )


def read_views(folder: Path, output: Path, answer: Mapping[str, Any]) -> dict[str, Account]:
    """All views of a run that has planned its shards; none of one that has not.

    Args:
        folder: where the export goes, below `export`.
        answer: the JSON line of its last command; empty if that was killed.
    """
    manifest_path, record = output / "manifest.json", read_record(str(output))
    views: dict[str, Account] = {}
    if "account" in answer:
        views["--json"] = _from_states(answer["account"])
    if answer and manifest_path.exists():
        views["manifest at the end"] = _from_manifest(manifest_path)
    views["status"] = read_status_account(output)
    if not (output / "_moebeam" / "plan" / "plan.json").exists():
        return views
    report = make_report(record).to_json()
    assert isinstance(report["paid"], list)
    views["report"] = _from_report(report["paid"])
    if manifest_path.exists():
        views["manifest"] = _from_manifest(manifest_path)
        views["views.sql"] = _from_duckdb(output)
        views["Parquet files"] = _from_files(output)
    views["export"] = _from_export(record, folder / "export")
    return views


def find_differences(views: Mapping[str, Account]) -> list[str]:
    """What the views do not agree on."""
    problems: list[str] = []
    for name in (field.name for field in fields(Account)):
        found = {view: told for view, account in views.items() if (told := getattr(account, name)) is not None}
        if len({*found.values()}) > 1:
            problems.append(f"{name} differs: " + ", ".join(f"{view} {value}" for view, value in found.items()))
    return problems


def _from_states(account: Mapping[str, Any]) -> Account:
    """Of the account as commands print it."""
    return _from_totals(account["paid"], account["num_answered_rows"])


def _from_manifest(path: Path) -> Account:
    manifest = json.loads(path.read_text())
    parts = [_from_totals(manifest[name], None) for name in ("totals", "journaled", "wasted")]
    return _add(parts, manifest["num_answered_rows"])


def _from_totals(totals: Mapping[str, Any], num_answered_rows: int | None) -> Account:
    return Account(
        totals["num_attempts"],
        totals["prompt_tokens"],
        totals["completion_tokens"],
        _sum_amounts((totals["costs"] or {}).values()),
        totals["num_lost_calls"],
        _sum_amounts((totals["lost_costs_at_most"] or {}).values()),
        num_answered_rows,
    )


def _add(parts: Iterable[Account], num_answered_rows: int | None) -> Account:
    values: dict[str, Any] = {
        field.name: sum(getattr(part, field.name) for part in parts)
        for parts in [[*parts]]
        for field in fields(Account)
        if field.name != "num_answered_rows"
    }
    return Account(**values, num_answered_rows=num_answered_rows)


def _from_report(rows: Iterable[Any]) -> Account:
    states = [row for row in rows if row["state"] != "paid"]
    return Account(
        sum(row["attempts"] or 0 for row in states),
        sum(row["prompt_tokens"] or 0 for row in states),
        sum(row["completion_tokens"] or 0 for row in states),
        _sum_amounts(row["cost"] for row in states),
        sum(row["lost_calls"] or 0 for row in states),
        _sum_amounts(row["lost_cost_at_most"] for row in states),
    )


def _from_duckdb(output: Path) -> Account:
    with duckdb.connect() as connection:
        connection.execute("SET VARIABLE moebeam_run = ?", [str(output)])
        connection.execute((output / "views.sql").read_text())
        rows = connection.execute(
            "SELECT attempts, prompt_tokens, completion_tokens, cost, lost_calls, lost_cost_at_most "
            "FROM spending_by_state"
        ).fetchall()
    sums = [sum((row[place] or 0 for row in rows), 0) for place in range(6)]
    return Account(int(sums[0]), int(sums[1]), int(sums[2]), Decimal(sums[3]), int(sums[4]), Decimal(sums[5]))


def _from_files(output: Path) -> Account:
    lines = [*_read_lines(output / "ledger"), *_read_lines(output / "partial")]
    rows = {row["source_row"] for table in ("results", "rejects") for row in _read_lines(output / table)}
    # A request that was given up at a stop stands in partial/ too, for its lost call.
    rows |= {row["source_row"] for row in _read_lines(output / "partial") if row["error_type"] != "given_up"}
    return Account(
        len(lines),
        sum((line["cache_hit_tokens"] or 0) + (line["cache_miss_tokens"] or 0) for line in lines),
        sum((line["visible_output_tokens"] or 0) + (line["reasoning_tokens"] or 0) for line in lines),
        _sum_amounts(line["cost"] for line in lines),
        sum(line["num_lost_calls"] or 0 for line in lines),
        _sum_amounts(line["lost_cost_at_most"] for line in lines),
        len(rows),
    )


def _read_lines(folder: Path) -> Iterator[Mapping[str, Any]]:
    for path in sorted(folder.glob("*.parquet")):
        yield from pq.read_table(path).to_pylist()


def _from_export(record: RunRecord, folder: Path) -> Account:
    export = export_batch(record, str(folder), is_partial=True)
    return Account(num_answered_rows=export.num_answers + export.num_errors)


def _count(value: object) -> int:
    assert isinstance(value, int)
    return value


def _amount(value: object) -> Decimal:
    return Decimal(str(value)) if value is not None else Decimal(0)


def _sum_amounts(amounts: Iterable[Any]) -> Decimal:
    return sum((_amount(amount) for amount in amounts), Decimal(0))
