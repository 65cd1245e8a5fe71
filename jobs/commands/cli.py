"""The command line: `moebeam run | validate`, which start from a job file. Commands that start from an output folder
are in `output_commands.py` and `money_commands.py`.

Standard output carries one JSON line and only with `--json`; everything for people goes to standard error. Exit codes:
0 done, 1 failed, 2 job file or command wrong, 3 more rejects than allowed, 4 stopped and resumable.
Beam, torch and pyarrow are imported inside commands, so that `--help` answers at once.
"""

import atexit
import importlib.metadata
import os
import sys
import threading
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from typer.exceptions import TyperException

from moebeam.jobs.commands import (
    compare_command,
    estimate_command,
    export_command,
    money_commands,
    output_commands,
    prices_command,
    serve_command,
)
from moebeam.jobs.console.console import (
    Answer,
    AsJson,
    Debug,
    Overrides,
    Quiet,
    format_json_line,
    make_failure_answer,
    open_closed_streams,
    print_error,
    run_and_report,
    stderr_console,
)
from moebeam.jobs.console.signals import draining_command
from moebeam.jobs.console.summary import EXIT_FAILED, EXIT_WRONG_JOB, PIPELINE_THREAD
from moebeam.schemas.errors import JobFileError

# Rich keeps the line breaks of all paragraphs but the first: one line a paragraph lets it wrap to any width.
_RUN_HELP = """Answer every row of a job.

Everything is checked before the first row. Running a finished job again does nothing; running an unfinished one \
again continues where it stopped, as moebeam resume does. After Ctrl-C no request leaves any more; answers on their \
way are awaited for [failures] drain_s, and the run stops. A second Ctrl-C stops at once.

Beam options follow in Beam's own spelling (--runner, --direct_num_workers, --region, ...). Unknown ones are refused, \
and so are options that carry secrets.

--reuse takes answers from an earlier output where the same model got the same tokens and sampling: only new or \
changed rows are asked and paid.

Examples:
  moebeam run job.toml
  moebeam run job.toml --limit 20 --set sampling.max_tokens=64
  moebeam run job.toml --set output.path=today --reuse yesterday
  moebeam run job.toml --json --runner=FlinkRunner --parallelism=4
"""
_VALIDATE_HELP = """Check a job and the files it names, as run does before its first row, without running it.

Example:
  moebeam validate job.toml --set input.path=more.parquet
"""

app = typer.Typer(
    name="moebeam",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

JobPath = Annotated[str, typer.Argument(metavar="JOB.toml", help="Job file: a path or an object-store URL.")]
Limit = Annotated[int | None, typer.Option("--limit", min=1, metavar="N", help="Only the first N rows, as a trial.")]


def main() -> NoReturn:
    """Entry point of the `moebeam` command."""
    exit_code = EXIT_FAILED

    def end() -> None:
        # A reader that went away is no reason to fail.
        with suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(exit_code)

    # Registered first, it runs after all other exit handlers, in place of the interpreter's teardown, which takes 1 to
    # 2 s to free what Beam and torch have loaded.
    atexit.register(end)
    open_closed_streams()
    exit_code = run_command(sys.argv[1:])
    if any(thread.name == PIPELINE_THREAD and thread.is_alive() for thread in threading.enumerate()):
        # A normal exit would wait for Beam's worker threads to finish their bundles.
        end()
    sys.exit(exit_code)


def run_command(args: Sequence[str]) -> int:
    """Run one command line and return its exit code; nothing is raised but what ends the process."""
    try:
        exit_code: object = app(args=list(args), prog_name="moebeam", standalone_mode=False)
    except TyperException as error:
        message = error.format_message()
        if message:
            print_error(stderr_console(), f"{message}\nmoebeam --help shows the commands and their options.")
        if "--json" in args:
            print(format_json_line(make_failure_answer(EXIT_WRONG_JOB, message)))
        return EXIT_WRONG_JOB
    except OSError as error:
        # A command maps its own: this is of the help or the version, which go to standard output as they are.
        print_error(stderr_console(), f"standard output: {error}")
        return EXIT_FAILED
    return exit_code if isinstance(exit_code, int) else 0


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        try:
            version = importlib.metadata.version("moebeam")
        except importlib.metadata.PackageNotFoundError:
            version = "(not installed, from a checkout)"
        print(f"moebeam {version}")
        raise typer.Exit


@app.callback()
def moebeam(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Batch inference for mixture-of-experts models: prompts in Parquet become validated JSON in Parquet, with a
    ledger of what every token cost."""


@app.command(help=_RUN_HELP, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def run(
    context: typer.Context,
    job: JobPath,
    overrides: Overrides = None,
    limit: Limit = None,
    reuse: Annotated[
        str | None,
        typer.Option("--reuse", metavar="OUTPUT", help="Take over what this earlier run answered, at no cost."),
    ] = None,
    is_json: AsJson = False,
    is_quiet: Quiet = False,
    is_debug: Debug = False,
) -> None:
    def work(console: Console) -> tuple[int, Answer]:
        from moebeam.jobs.check.job_file import load_job
        from moebeam.jobs.run.progress import print_summary, show_progress

        _check_job_comes_first(job)
        loaded = load_job(job, overrides or ())
        beam_args = list(context.args)
        with draining_command(console, loaded) as stop:
            if beam_args:
                from moebeam.jobs.check.beam_options import parse_beam_options

                parse_beam_options(beam_args)
            from moebeam.jobs.check.reuse import prepare_reuse
            from moebeam.jobs.run.launch import launch
            from moebeam.jobs.run.summarize import telling_what_was_paid

            source = (
                None if reuse is None else prepare_reuse(output_commands.parse_output_folder(reuse, "--reuse OUTPUT"))
            )
            view = nullcontext() if is_quiet else show_progress(console)
            with view as progress, telling_what_was_paid(loaded.output.path):
                summary = launch(loaded, limit=limit, beam_args=beam_args, stop=stop, progress=progress, reuse=source)
        if not is_quiet:
            print_summary(console, summary)
        return summary.exit_code, summary.to_json()

    run_and_report(work, is_json=is_json, is_debug=is_debug)


@app.command(help=_VALIDATE_HELP)
def validate(
    job: JobPath,
    overrides: Overrides = None,
    limit: Limit = None,
    is_json: AsJson = False,
    is_quiet: Quiet = False,
    is_debug: Debug = False,
) -> None:
    def work(console: Console) -> tuple[int, Answer]:
        from moebeam.jobs.check.job_file import load_job
        from moebeam.jobs.run.progress import print_report

        _check_job_comes_first(job)
        loaded = load_job(job, overrides or ())
        from moebeam.jobs.check.preflight import check_job
        from moebeam.model_runner.protocol import check_loadable, require_packages

        checked = check_job(loaded, limit=limit)
        checked.check_readable()
        report = checked.report()
        require_packages(loaded.model)
        check_loadable(checked.engine.config)
        if not is_quiet:
            print_report(console, report)
        return 0, {"status": "valid", "exit_code": 0, **report.to_json()}

    run_and_report(work, is_json=is_json, is_debug=is_debug)


for _name, _help, _command, _settings in (
    *estimate_command.COMMANDS,
    *output_commands.COMMANDS,
    *money_commands.COMMANDS,
    *export_command.COMMANDS,
    *compare_command.COMMANDS,
    *serve_command.COMMANDS,
):
    app.command(name=_name, help=_help, context_settings=dict(_settings))(_command)
app.add_typer(prices_command.app, name="prices")


def _check_job_comes_first(job: str) -> None:
    # Unknown options pass through to Beam, so one in front of the job file is taken for it.
    if job.startswith("-"):
        raise JobFileError(f"{job}: found where the job file belongs; write moebeam run JOB.toml, then options")
