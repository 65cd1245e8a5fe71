"""Commands about money that start from the output folder of a run: `moebeam report | reconcile`.

As in `jobs/commands/cli.py`, Beam and pyarrow are imported inside commands.
"""

from collections.abc import Callable, Mapping
from datetime import timedelta
from decimal import Decimal, InvalidOperation
from typing import Annotated, Any

import typer
from rich.console import Console

from moebeam.jobs.commands.output_commands import OutputPath, parse_output_folder
from moebeam.jobs.console.console import Answer, AsJson, Debug, Quiet, run_and_report
from moebeam.schemas.errors import JobFileError, OutputError

EXIT_DIFFERENT = 1

_REPORT_HELP = """Show what a run cost: by any column of the ledger, by outcome, along the value chain, and against a \
quote.

Columns are tenant, cost_center, day, month, hour, provider, model, outcome, price_line, error_type and the other \
columns of the ledger, and the tags of the job. Amounts of different currencies are never added.

--value-chain reads parties from a file instead of the job file. --self-host sets the run's own throughput \
against the hour price, power and utilisation of a profile. --focus writes the ledger in FOCUS 1.2, as CSV or Parquet \
by the file's ending.

Examples:
  moebeam report out
  moebeam report out --by tenant,day --html report.html
  moebeam report out --by team --csv tables --focus focus.parquet
  moebeam report out --self-host my-cluster.toml
"""
_RECONCILE_HELP = """Compare a run's ledger with a provider's bill, by day and model.

The bill is CSV with the columns day, model and amount, and optionally currency, cache_hit_tokens, \
cache_miss_tokens and output_tokens; --columns maps other names. Exit code 0 if all is within the tolerance, \
else 1.

Examples:
  moebeam reconcile out invoice.csv --currency USD --tolerance-amount 0.01
  moebeam reconcile out invoice.csv --columns day=utc_date,amount=cost --utc-offset-hours 8
"""

_By = Annotated[str, typer.Option("--by", metavar="COLUMN,...", help="Columns to add costs up by.")]


def report(
    output: OutputPath,
    by: _By = "tenant,day",
    html: Annotated[str | None, typer.Option("--html", metavar="FILE", help="Write a page of all tables.")] = None,
    csv: Annotated[str | None, typer.Option("--csv", metavar="DIR", help="Write each table as CSV.")] = None,
    parquet: Annotated[
        str | None, typer.Option("--parquet", metavar="DIR", help="Write each table as Parquet.")
    ] = None,
    focus: Annotated[
        str | None, typer.Option("--focus", metavar="FILE", help="Write the ledger as FOCUS 1.2, .csv or .parquet.")
    ] = None,
    value_chain: Annotated[
        str | None, typer.Option("--value-chain", metavar="CHAIN.toml", help="Parties in place of the job's.")
    ] = None,
    self_host: Annotated[
        str | None, typer.Option("--self-host", metavar="PROFILE.toml", help="Accelerators to compare with.")
    ] = None,
    is_json: AsJson = False,
    is_quiet: Quiet = False,
    is_debug: Debug = False,
) -> None:
    def work(console: Console) -> tuple[int, Answer]:
        folder = parse_output_folder(output, "moebeam report OUTPUT")
        if focus is not None and not focus.endswith((".csv", ".parquet")):
            raise JobFileError(f"--focus: expected a file that ends in .csv or .parquet, found {focus!r}")
        from moebeam.jobs.console.report_table import print_table
        from moebeam.jobs.output.run_record import read_record
        from moebeam.jobs.reports.report import make_report, write_focus, write_report
        from moebeam.jobs.reports.self_host import load_profile
        from moebeam.jobs.reports.value_chain_report import load_chain

        record = read_record(folder)
        made = make_report(
            record,
            by=by,
            chain=None if value_chain is None else load_chain(value_chain),
            profile=None if self_host is None else load_profile(self_host),
        )
        try:
            written = write_report(made, html=html, csv=csv, parquet=parquet)
            written += write_focus(record, focus) if focus is not None else []
        except OSError as error:
            raise OutputError(f"the report cannot be written: {error}") from error
        if not is_json and not is_quiet:
            for table in made.tables:
                print_table(console, table)
        for line in written:
            console.print(line, highlight=False, markup=False, soft_wrap=True)
        return 0, {**made.to_json(), "exit_code": 0}

    run_and_report(work, is_json=is_json, is_debug=is_debug)


def reconcile(
    output: OutputPath,
    invoice: Annotated[str, typer.Argument(metavar="INVOICE.csv", help="The provider's bill.")],
    columns: Annotated[
        str | None, typer.Option("--columns", metavar="OURS=THEIRS,...", help="The bill's own column names.")
    ] = None,
    currency: Annotated[
        str | None, typer.Option("--currency", metavar="USD", help="Currency of a bill that names none.")
    ] = None,
    provider: Annotated[
        str | None, typer.Option("--provider", metavar="NAME", help="Only ledger lines of this provider.")
    ] = None,
    model: Annotated[str | None, typer.Option("--model", metavar="NAME", help="The model's name on the bill.")] = None,
    utc_offset_hours: Annotated[
        float, typer.Option("--utc-offset-hours", metavar="HOURS", min=-12, max=14, help="Where the bill's days begin.")
    ] = 0.0,
    tolerance_percent: Annotated[
        str, typer.Option("--tolerance-percent", metavar="P", help="Allowed share of the ledger's figure.")
    ] = "0",
    tolerance_amount: Annotated[
        str, typer.Option("--tolerance-amount", metavar="A", help="Allowed amount a day and model.")
    ] = "0",
    is_json: AsJson = False,
    is_debug: Debug = False,
) -> None:
    def work(console: Console) -> tuple[int, Answer]:
        folder = parse_output_folder(output, "moebeam reconcile OUTPUT INVOICE.csv")
        from moebeam.jobs.console.report_table import print_table
        from moebeam.jobs.output.run_record import read_record
        from moebeam.jobs.reports.reconcile import Tolerance, add_up_ledger, comparison_table, parse_columns, read_bill
        from moebeam.jobs.reports.reconcile import reconcile as compare
        from moebeam.jobs.reports.report import ledger_errors, require_run

        tolerance = Tolerance(
            _decimal("--tolerance-percent", tolerance_percent), _decimal("--tolerance-amount", tolerance_amount)
        )
        layout = read_record(folder).layout
        bill = read_bill(invoice, parse_columns(columns), currency)
        with ledger_errors(layout):
            run, _ = require_run(layout)
            ledger, num_unpriced = add_up_ledger(
                run.read_ledgers(),
                utc_offset=timedelta(hours=utc_offset_hours),
                provider=provider,
                model=model,
            )
        found = compare(ledger, bill, tolerance)
        table = comparison_table(found, num_unpriced)
        num_damaged = run.account.num_damaged
        if not is_json:
            print_table(console, table)
            if num_damaged:
                console.print(f"{num_damaged:,} lines of journals cannot be read: what they cost is in no sum")
        counts: dict[str, int] = {}
        for one in found:
            counts[one.verdict] = counts.get(one.verdict, 0) + 1
        exit_code = 0 if set(counts) <= {"matched"} and not num_unpriced else EXIT_DIFFERENT
        status = "reconciled" if exit_code == 0 else "different"
        answer = {"status": status, "exit_code": exit_code, "num_unpriced": num_unpriced, "counts": counts}
        return exit_code, {**answer, "num_damaged_journal_lines": num_damaged, "lines": table.to_json()}

    run_and_report(work, is_json=is_json, is_debug=is_debug)


def _decimal(option: str, text: str) -> Decimal:
    try:
        value = Decimal(text)
    except InvalidOperation:
        value = Decimal(-1)
    if not value.is_finite() or value < 0:
        raise JobFileError(f"{option}: expected a number of at least 0, found {text!r}")
    return value


COMMANDS: tuple[tuple[str, str, Callable[..., None], Mapping[str, Any]], ...] = (
    ("report", _REPORT_HELP, report, {}),
    ("reconcile", _RECONCILE_HELP, reconcile, {}),
)
"""Name, help, function and settings of each command here, for `jobs/commands/cli.py`."""
