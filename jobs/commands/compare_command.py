"""`moebeam compare`: two runs side by side, from their output folders.

As in `jobs/commands/cli.py`, Beam and pyarrow are imported inside commands.
"""

from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer
from rich.console import Console

from moebeam.jobs.commands.output_commands import parse_output_folder
from moebeam.jobs.console.console import Answer, AsJson, Debug, Quiet, run_and_report
from moebeam.schemas.errors import JobFileError

EXIT_DIFFERENT = 1

_COMPARE_HELP = """Compare two runs: which rows say something else, what both cost, and why.

Rows are matched by id and sample. They differ in status, error, tool calls, JSON (by value), text (by letter) or \
reasoning, or one run alone has them. Beside them stand tokens, cost, speed, cache hits and latency of both, the keys \
in which the jobs differ, and what each engine promises about repeated answers. Unfinished runs are compared as far as \
they are; answers in journals as the model gave them.

Exit code 0 if all rows are the same, else 1.

Examples:
  moebeam compare monday tuesday
  moebeam compare out s3://bucket/out --rows 50 --output differences.parquet
  moebeam compare cache_on cache_off --json
"""


def compare(
    a: Annotated[str, typer.Argument(metavar="A", help="Output folder of a run: a path or an object-store URL.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Output folder of another run.")],
    num_rows: Annotated[
        int, typer.Option("--rows", min=0, metavar="N", help="How many of the rows that differ to show.")
    ] = 10,
    output: Annotated[
        str | None, typer.Option("--output", metavar="FILE", help="Write all rows that differ as Parquet.")
    ] = None,
    is_json: AsJson = False,
    is_quiet: Quiet = False,
    is_debug: Debug = False,
) -> None:
    def work(console: Console) -> tuple[int, Answer]:
        folders = [parse_output_folder(folder, "moebeam compare A B") for folder in (a, b)]
        if output is not None and not output.endswith(".parquet"):
            raise JobFileError(f"--output: expected a file that ends in .parquet, found {output!r}")
        target = None if output is None else parse_output_folder(output, "--output FILE")
        from moebeam.jobs.compare.comparison import compare_runs
        from moebeam.jobs.console.report_table import print_table
        from moebeam.jobs.output.run_record import read_record

        records = [read_record(folder) for folder in folders]
        found = compare_runs(*records, num_shown=num_rows, target=target)
        if not is_json and not is_quiet:
            for table in found.tables():
                print_table(console, table)
            console.print(found.verdict, highlight=False, markup=False, soft_wrap=True)
        if target is not None:
            console.print(
                f"wrote {found.num_written:,} rows that differ to {target}",
                highlight=False,
                markup=False,
                soft_wrap=True,
            )
        exit_code = 0 if found.is_same else EXIT_DIFFERENT
        status = "same" if found.is_same else "different"
        return exit_code, {"status": status, "exit_code": exit_code, **found.to_json()}

    run_and_report(work, is_json=is_json, is_debug=is_debug)


COMMANDS: tuple[tuple[str, str, Callable[..., None], Mapping[str, Any]], ...] = (
    ("compare", _COMPARE_HELP, compare, {}),
)
"""Name, help, function and settings of each command here, for `jobs/commands/cli.py`."""
