"""`moebeam report`: costs of a finished or stopped run, by any ledger columns, and its results.

Reads only the output folder: manifest, ledger and job record. Each part is a `ReportTable`, written by
`jobs/console/report_table.py`.
"""

import contextlib
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from typing import Any

from moebeam.jobs.console.report_table import Cell, Column, ReportTable, encode_parquet, format_csv, format_html
from moebeam.jobs.output.current_run import CurrentRun, read_current_run
from moebeam.jobs.output.run_record import RunRecord
from moebeam.jobs.quotes.quote_record import compare_quote_with_run
from moebeam.jobs.reports.focus_export import FOCUS_VERSION, focus_report_table, focus_table
from moebeam.jobs.reports.paid_tables import messages_table, paid_table
from moebeam.jobs.reports.self_host import SelfHostProfile, self_host_tables
from moebeam.jobs.reports.value_chain_report import PricedModel, chain_tables, charge_chain
from moebeam.schemas.arrow import encode_parquet_file
from moebeam.schemas.canonical import Json
from moebeam.schemas.errors import CommitError, OutputError
from moebeam.schemas.job.sections import ValueChainSection
from moebeam.schemas.store import storage
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.transforms.publish.manifest_file import count_answers
from moebeam.transforms.publish.rollup import (
    GroupKey,
    GroupSums,
    Rollup,
    largest_groups,
    merge_groups,
    parse_by,
    roll_up,
)
from moebeam.transforms.publish.run_account import RunAccount

DEFAULT_BY = "tenant,day"

_SUMS = (
    Column("currency", "text"),
    Column("attempts", "count"),
    Column("cached_tokens", "count"),
    Column("prompt_tokens", "count"),
    Column("hit_rate", "share"),
    Column("completion_tokens", "count"),
    Column("reasoning_tokens", "count"),
    Column("cost", "money"),
    Column("cost_allocated", "money"),
    Column("accelerator_s", "number"),
)


@dataclass(frozen=True, slots=True)
class RunReport:
    """A run as tables.

    Attributes:
        status: `complete`, or `incomplete` for a resumable run, whose sums cover the committed shards.
    """

    run_id: str
    output: str
    status: str
    tables: tuple[ReportTable, ...]

    def to_json(self) -> dict[str, Json]:
        """The tables by name, money as decimal text."""
        return {
            "run_id": self.run_id,
            "output": self.output,
            "status": self.status,
            **{table.name: table.to_json() for table in self.tables},
        }


def make_report(
    record: RunRecord,
    *,
    by: str = DEFAULT_BY,
    chain: ValueChainSection | None = None,
    profile: SelfHostProfile | None = None,
) -> RunReport:
    """Build the tables of a run's costs and results.

    Args:
        by: ledger columns, separated by commas.
        chain: replaces the job's value chain.
        profile: accelerators to compare the run's cost with.
    Raises:
        JobFileError: `by` or the value chain is wrong.
        OutputError: the run has no manifest yet, or its ledger is damaged.
    """
    layout, job = record.layout, record.request.job
    columns = parse_by(by, job.accounting.tag_columns)
    with ledger_errors(layout):
        run, manifest = require_run(layout)
        groups = merge_groups(roll_up(ledger, columns) for ledger in run.read_ledgers())
        outcomes = merge_groups(roll_up(ledger, ("outcome",)) for ledger in run.read_ledgers())
        made = charge_chain(chain or job.value_chain, run.read_ledgers(), PricedModel(job.accounting.model))
    costs = largest_groups(groups.items(), columns)
    tables = [
        _run_table(manifest, run.account, merge_groups([groups])),
        paid_table(run.account),
        _costs_table(costs),
        _outcomes_table(outcomes),
        _rejects_table(manifest),
        messages_table(manifest),
        _checks_table(manifest),
        _quote_table(layout, manifest),
    ]
    if made is not None:
        tables += chain_tables(made)
    if profile is not None:
        tables += self_host_tables(profile, manifest, costs.by_currency, job)
    return RunReport(manifest["run_id"], layout.output, manifest["status"], tuple(tables))


def require_run(layout: RunLayout) -> tuple[CurrentRun, dict[str, Any]]:
    """Read a run, finished, stopped, killed or at work, and its manifest as of now.

    Raises:
        OutputError: nothing is planned yet, or the manifest is damaged.
        CommitError: a record is damaged.
        OSError: the store failed.
    """
    run = read_current_run(layout)
    if run.manifest is None:
        raise OutputError(
            f"{layout.manifest}: expected the manifest of a run, or its plan, found neither; moebeam status "
            f"{layout.output} shows how far it is"
        )
    return run, run.manifest


@contextlib.contextmanager
def ledger_errors(layout: RunLayout) -> Generator[None]:
    """Turn errors of reading the ledger into `OutputError`."""
    try:
        yield
    except (CommitError, OSError) as error:
        raise OutputError(f"{layout.output}: the ledger cannot be read: {error}") from error


def _run_table(manifest: Mapping[str, Any], account: RunAccount, groups: Mapping[GroupKey, GroupSums]) -> ReportTable:
    whole = sum(groups.values(), GroupSums())
    totals = manifest["totals"]
    model = manifest["model"]
    answers_in = count_answers(manifest)
    rows: list[tuple[str, Cell]] = [
        ("run", manifest["run_id"]),
        ("status", manifest["status"]),
        ("engine and model", f"{model['engine']}, {model['name']}"),
        ("price book", manifest["price_book"]),
        ("rows", f"{manifest['rows_in']:,}"),
        *([("answers", f"{answers_in:,}")] if answers_in != manifest["rows_in"] else []),
        ("results", f"{totals['num_results']:,}"),
        ("rejects", f"{totals['num_rejects']:,}"),
        ("unreadable files or row groups", f"{totals['num_unreadable']:,}"),
        *([("answers in journals", f"{account.num_journaled_rows:,}")] if account.num_journaled_rows else []),
        ("attempts", f"{whole.num_attempts:,}"),
        ("prompt tokens", f"{whole.prompt_tokens:,}" if _has_tokens(whole) else "unknown"),
        ("cached tokens", "unknown" if whole.num_unknown_hits else f"{whole.cache_hit_tokens:,}"),
        ("hit rate", "unknown" if whole.hit_rate is None else f"{whole.hit_rate:.2%}"),
        ("highest possible hit rate", f"{manifest['max_hit_rate']:.2%}"),
        ("completion tokens", f"{whole.completion_tokens:,}" if _has_tokens(whole) else "unknown"),
        ("reasoning tokens", f"{whole.reasoning_tokens:,}" if _has_tokens(whole) else "unknown"),
    ]
    for name, part in (("cost", account.committed), ("journaled", account.journaled), ("wasted", account.wasted)):
        rows += [(f"{name} in {currency}", amount) for currency, amount in (part.costs or {}).items()]
    if not account.paid.costs:
        is_uncounted = 0 < whole.num_attempts == whole.num_unknown_usage
        rows.append(("cost", "unknown: no answer has a usage" if is_uncounted else "unknown: no price"))
    if num_priced_not := whole.num_unpriced - whole.num_unknown_usage:
        rows.append(("attempts without a price", f"{num_priced_not:,}"))
    if whole.num_unknown_usage:
        rows.append(("answers without a usage: their tokens and cost are unknown", f"{whole.num_unknown_usage:,}"))
        for name in ("prompt", "completion"):
            about: int = getattr(account.paid, f"estimated_{name}_tokens")
            rows.append((f"their {name} tokens by an estimate, in no sum", f"{about:,}"))
    if whole.num_upper_bound:
        rows.append(("attempts whose cost is an upper bound", f"{whole.num_upper_bound:,}"))
    if account.paid.num_lost_calls:
        rows.append(("calls that ended without a usage", f"{account.paid.num_lost_calls:,}"))
    journaled, wasted = (", of answers in journals", account.journaled), (", of wasted work", account.wasted)
    for name, part in (("", account.committed), journaled, wasted):
        for currency, amount in (part.lost_costs_at_most or {}).items():
            rows.append((f"billed for these at most, in {currency}{name}", amount))
    if account.num_damaged:
        rows.append(("lines of journals that cannot be read", f"{account.num_damaged:,}"))
    return ReportTable("run", "Run", (Column("what", "text"), Column("value", "text")), tuple(rows))


def _costs_table(costs: Rollup) -> ReportTable:
    """Build the cost table; currency None holds the lines without a price, with null amounts."""
    columns = (*(Column(name, "text") for name in costs.by), *_SUMS)
    note = None
    if any(sums.num_unpriced for _, sums in costs.groups):
        note = "Lines without a price stand under no currency; their cost is unknown, not zero."
    if num_unknown := sum(sums.num_unknown_usage for _, sums in costs.groups):
        note = f"{note or ''} {num_unknown:,} answers have no usage: their tokens are in no sum.".strip()
    rows = tuple((*key, *_measures(key[-1], sums)) for key, sums in costs.groups)
    return ReportTable("costs", f"Costs by {', '.join(costs.by)}", columns, rows, note)


def _has_tokens(sums: GroupSums) -> bool:
    """Whether sums of tokens are more than nothing known."""
    return sums.num_unknown_usage < sums.num_attempts or not sums.num_attempts


def _measures(currency: str | None, sums: GroupSums) -> tuple[Cell, ...]:
    """The cells of `_SUMS` after the currency; tokens of which nothing is known are null, not zero."""
    is_known = _has_tokens(sums)
    return (
        sums.num_attempts,
        None if sums.num_unknown_hits else sums.cache_hit_tokens,
        sums.prompt_tokens if is_known else None,
        sums.hit_rate,
        sums.completion_tokens if is_known else None,
        sums.reasoning_tokens if is_known else None,
        None if currency is None else sums.cost,
        None if currency is None else sums.cost_allocated,
        None if sums.num_untimed else sums.accelerator_s,
    )


def _outcomes_table(groups: Mapping[GroupKey, GroupSums]) -> ReportTable:
    rows = tuple(
        (key[0], key[1], *_measures(key[1], sums))
        for key, sums in sorted(groups.items(), key=lambda group: tuple(part or "" for part in group[0]))
    )
    note = (
        "rejected: paid, but no valid answer. wasted: paid for answers that were not used. journaled: paid for answers "
        "of shards that are not finished."
    )
    return ReportTable("outcomes", "Costs by outcome of the attempt", (Column("outcome", "text"), *_SUMS), rows, note)


def _rejects_table(manifest: Mapping[str, Any]) -> ReportTable:
    counts: Mapping[str, int] = manifest["totals"]["rejects_by_type"] or {}
    answers_in = count_answers(manifest)
    rows = tuple((kind, count, count / answers_in if answers_in else None) for kind, count in sorted(counts.items()))
    columns = (Column("error_type", "text"), Column("rows", "count"), Column("share_of_rows", "share"))
    return ReportTable("rejects", "Rejects by type", columns, rows, None if rows else "None.")


def _checks_table(manifest: Mapping[str, Any]) -> ReportTable:
    checks: Mapping[str, str] = manifest.get("checks") or {}
    columns = (Column("accounts", "text"), Column("found", "text"))
    note = None if checks else "Not checked: the run is at work, or was written by a version that did not check them."
    return ReportTable("checks", "Accounts held against each other", columns, tuple(checks.items()), note)


def _quote_table(layout: RunLayout, manifest: Mapping[str, Any]) -> ReportTable:
    """Compare the quote, or else the plan, with the actual run."""
    columns = (
        Column("figure", "text"),
        Column("low", "money"),
        Column("expected", "money"),
        Column("high", "money"),
        Column("actual", "money"),
        Column("unit", "text"),
        Column("is_within", "text"),
    )
    words = {True: "yes", False: "no", None: None}
    rows = tuple(
        (
            figure.name,
            figure.low,
            figure.expected,
            figure.high,
            figure.actual,
            figure.currency or figure.unit,
            words[figure.is_within],
        )
        for figure in compare_quote_with_run(layout, manifest)
    )
    note = "`moebeam estimate --save` keeps a quote before the run; without one the plan's own figures stand here."
    return ReportTable("quote", "Quote beside actual", columns, rows, note)


def write_report(
    report: RunReport, *, html: str | None = None, csv: str | None = None, parquet: str | None = None
) -> list[str]:
    """Write a report in the requested formats; returns what was written, in words.

    Args:
        html: a file; csv, parquet: folders, one file per table.
    Raises:
        OSError: the store failed.
    """
    written: list[str] = []
    if html is not None:
        storage.write_whole(html, format_html(f"Run {report.run_id}", report.tables).encode())
        written.append(f"wrote {html}")
    for folder, suffix in ((csv, "csv"), (parquet, "parquet")):
        if folder is not None:
            for table in report.tables:
                content = format_csv(table).encode() if suffix == "csv" else encode_parquet(table)
                storage.write_whole(storage.join(folder, f"{table.name}.{suffix}"), content)
            written.append(f"wrote {len(report.tables)} tables to {folder}")
    return written


def write_focus(record: RunRecord, path: str) -> list[str]:
    """Write a run's ledger as FOCUS rows; returns what was written, in words.

    Raises:
        OutputError: the ledger cannot be read.
        OSError: the store failed.
    """
    with ledger_errors(record.layout):
        run, manifest = require_run(record.layout)
        table, num_unpriced = focus_table(run.read_ledgers(), f"moebeam run {manifest['run_id']}")
    is_csv = path.endswith(".csv")
    storage.write_whole(path, format_csv(focus_report_table(table)).encode() if is_csv else encode_parquet_file(table))
    left_out = f"; {num_unpriced:,} attempts without a price are not in it" if num_unpriced else ""
    return [f"wrote {table.num_rows:,} rows of FOCUS {FOCUS_VERSION} to {path}{left_out}"]
