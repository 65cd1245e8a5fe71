"""Commands that start from the output folder of a run: `moebeam resume | status | retry-failed | clean | repair`.

As in `jobs/commands/cli.py`, Beam and pyarrow are imported inside commands.
"""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Annotated, Any

import typer
from rich.console import Console

from moebeam.jobs.console.console import Answer, AsJson, Debug, Overrides, Quiet, run_and_report
from moebeam.jobs.console.signals import draining_command
from moebeam.schemas.errors import JobFileError, OutputError

_RESUME_HELP = """Resume a stopped run from its output folder alone.

Finished shards are kept, and the input is not read again: its files are listed and must be the same. Whatever shapes \
answers must be the same too; --set may change limits, failures, output.max_reject_share, and the model's device and \
sizes, for this and later attempts. A finished run only prints its summary and returns its exit code.

Beam options are not kept: give them again, as to moebeam run.

Examples:
  moebeam resume out
  moebeam resume s3://bucket/out --set limits.max_cost=20
"""
_STATUS_HELP = """Show a run from its files: its progress, live workers, cost so far, and why it stopped.

Example:
  moebeam status out --json
"""
_RETRY_HELP = """Answer rejected rows of a finished run again, as a run of its own.

Only rows that the model was asked can be retried, by kind of error or with --kinds all. They go to an output of \
their own: the first run's results, rejects and ledger stay as they are; the new run has its own, and its manifest \
names the first run in retry_of. Read both, for example as ['out/results/*.parquet', 'retry/results/*.parquet'].

--set may change sampling and repair beside what resume may; a row's own sampling stays. Interrupted, it goes on by \
moebeam resume NEW or by the same command.

Examples:
  moebeam retry-failed out --kinds engine_timeout,engine_overloaded --output retry
  moebeam retry-failed out --kinds truncated --output retry --set sampling.max_tokens=2048
  moebeam retry-failed out --kinds all --output retry
"""
_CLEAN_HELP = """Remove what ended attempts of a run left behind, and prompts that were kept long enough.

Removes staged tables that were never committed, sorted runs, leases, progress and temporary files; the plan of a \
run that ended --older-than days ago, which holds its prompts and which retry-failed needs. Keeps results, rejects, \
ledger, manifest, commits, and all that an unfinished run needs to resume. A run at work is left alone.

Examples:
  moebeam clean out --dry-run
  moebeam clean out --older-than 0 --yes
"""
_REPAIR_HELP = """Check every file of a run, and make a damaged folder usable again.

Holds each file against the checksum that was written with it. What other files hold is made again at once; the rest \
is set aside below _moebeam/damaged, so that moebeam resume makes it again: the plan from the input, a shard's tables \
from its journal or by asking the model. Nothing is deleted. A run at work is left alone.

Examples:
  moebeam repair out
  moebeam repair s3://bucket/out --json
"""

OutputPath = Annotated[
    str, typer.Argument(metavar="OUTPUT", help="Output folder of a run: a path or an object-store URL.")
]


def resume(
    context: typer.Context,
    output: OutputPath,
    overrides: Overrides = None,
    is_json: AsJson = False,
    is_quiet: Quiet = False,
    is_debug: Debug = False,
) -> None:
    def work(console: Console) -> tuple[int, Answer]:
        folder = parse_output_folder(output, "moebeam resume OUTPUT")
        from moebeam.jobs.check.identity import why_not_resumable
        from moebeam.jobs.check.job_file import override_job
        from moebeam.jobs.output.run_record import read_record
        from moebeam.jobs.run.progress import print_summary, show_progress

        record = read_record(folder)
        job = override_job(record.request.job, overrides or (), why_not_resumable)
        with draining_command(console, job) as stop:
            _check_beam(context.args)
            from moebeam.jobs.run.launch import resume as resume_run
            from moebeam.jobs.run.summarize import telling_what_was_paid

            view = nullcontext() if is_quiet else show_progress(console)
            with view as progress, telling_what_was_paid(folder):
                summary = resume_run(record, job, beam_args=context.args, stop=stop, progress=progress)
        if not is_quiet:
            print_summary(console, summary)
        return summary.exit_code, summary.to_json()

    run_and_report(work, is_json=is_json, is_debug=is_debug)


def status(output: OutputPath, is_json: AsJson = False, is_debug: Debug = False) -> None:
    def work(console: Console) -> tuple[int, Answer]:
        folder = parse_output_folder(output, "moebeam status OUTPUT")
        from moebeam.jobs.output.run_record import read_record
        from moebeam.jobs.output.status import print_status, read_status

        report = read_status(read_record(folder))
        if not is_json:
            print_status(console, report)
        return 0, {**report.to_json(), "exit_code": 0}

    run_and_report(work, is_json=is_json, is_debug=is_debug)


def retry_failed(
    context: typer.Context,
    output: OutputPath,
    kinds: Annotated[
        str, typer.Option("--kinds", metavar="KIND,...", help="Error types, such as engine_timeout; or all.")
    ],
    new_output: Annotated[str, typer.Option("--output", metavar="NEW", help="Output folder of the retry.")],
    overrides: Overrides = None,
    is_json: AsJson = False,
    is_quiet: Quiet = False,
    is_debug: Debug = False,
) -> None:
    def work(console: Console) -> tuple[int, Answer]:
        folder = parse_output_folder(output, "moebeam retry-failed OUTPUT")
        from moebeam.jobs.check.identity import why_not_resumable
        from moebeam.jobs.check.job_file import override_job
        from moebeam.jobs.run.progress import print_summary, show_progress
        from moebeam.jobs.run.retry_failed import parse_kinds, prepare_retry, retry_job, why_not_retryable

        retry = prepare_retry(folder, parse_kinds(kinds))
        job = retry_job(retry, retry.source.request.job, parse_output_folder(new_output, "--output NEW"))
        job = override_job(job, overrides or (), lambda place: why_not_retryable(place, why_not_resumable))
        if retry.note is not None and not is_quiet:
            console.print(retry.note, soft_wrap=True, markup=False, highlight=False)
        with draining_command(console, job) as stop:
            _check_beam(context.args)
            from moebeam.jobs.run.launch import launch
            from moebeam.jobs.run.summarize import telling_what_was_paid

            view = nullcontext() if is_quiet else show_progress(console)
            with view as progress, telling_what_was_paid(job.output.path):
                summary = launch(
                    job,
                    beam_args=context.args,
                    stop=stop,
                    progress=progress,
                    retry_of=retry.retry_of,
                    retried=retry.retried,
                )
        if not is_quiet:
            print_summary(console, summary)
        return summary.exit_code, summary.to_json()

    run_and_report(work, is_json=is_json, is_debug=is_debug)


def clean(
    output: OutputPath,
    older_than_days: Annotated[
        float, typer.Option("--older-than", min=0, metavar="DAYS", help="How long plans are kept, with their prompts.")
    ] = 30.0,
    is_sure: Annotated[bool, typer.Option("--yes", help="Remove without asking.")] = False,
    is_dry_run: Annotated[bool, typer.Option("--dry-run", help="Only list what would be removed.")] = False,
    is_json: AsJson = False,
    is_debug: Debug = False,
) -> None:
    def work(console: Console) -> tuple[int, Answer]:
        folder = parse_output_folder(output, "moebeam clean OUTPUT")
        from moebeam.jobs.output.clean import clean as remove
        from moebeam.jobs.output.clean import plan_cleaning, print_cleaning
        from moebeam.jobs.output.run_record import read_record

        plan = plan_cleaning(read_record(folder), older_than_days)
        print_cleaning(console, plan)
        has_removed = bool(plan.removals) and not is_dry_run and (is_sure or _has_agreed(console))
        if has_removed:
            remove(plan)
            console.print("removed", highlight=False)
        return 0, {"status": "cleaned" if has_removed else "nothing removed", "exit_code": 0, **plan.to_json()}

    run_and_report(work, is_json=is_json, is_debug=is_debug)


def repair(output: OutputPath, is_json: AsJson = False, is_debug: Debug = False) -> None:
    def work(console: Console) -> tuple[int, Answer]:
        folder = parse_output_folder(output, "moebeam repair OUTPUT")
        from moebeam.jobs.output.repair import describe_repair, print_repair
        from moebeam.jobs.output.repair import repair as mend
        from moebeam.schemas.store.run_layout import RunLayout

        layout = RunLayout(folder)
        try:
            found = mend(layout)
        except OSError as error:
            raise OutputError(f"{folder}: could not be repaired to the end: {error}") from error
        print_repair(console, layout, found)
        return 0, {"status": "repaired" if found else "whole", "exit_code": 0, **describe_repair(found)}

    run_and_report(work, is_json=is_json, is_debug=is_debug)


def _has_agreed(console: Console) -> bool:
    if not sys.stdin.isatty():
        raise JobFileError("nobody is here to be asked; add --yes to remove these files, or --dry-run only to see them")
    return console.input("remove them? [y/N] ").strip().lower() in ("y", "yes")


def parse_output_folder(output: str, usage: str) -> str:
    """An output folder as the job file names it: absolute, without a slash at its end."""
    # Unknown options pass through to Beam, so one in front of the folder is taken for it.
    if output.startswith("-") or not output.strip():
        raise JobFileError(f"{output}: found where an output folder belongs; write {usage}, then options")
    path = output.rstrip("/") or "/"
    return path if "://" in path else os.path.abspath(os.path.expanduser(path))


def _check_beam(args: Sequence[str]) -> None:
    if args:
        from moebeam.jobs.check.beam_options import parse_beam_options

        parse_beam_options(args)


_PASSES_BEAM_OPTIONS = {"allow_extra_args": True, "ignore_unknown_options": True}

COMMANDS: tuple[tuple[str, str, Callable[..., None], Mapping[str, Any]], ...] = (
    ("resume", _RESUME_HELP, resume, _PASSES_BEAM_OPTIONS),
    ("status", _STATUS_HELP, status, {}),
    ("retry-failed", _RETRY_HELP, retry_failed, _PASSES_BEAM_OPTIONS),
    ("clean", _CLEAN_HELP, clean, {}),
    ("repair", _REPAIR_HELP, repair, {}),
)
"""Name, help, function and settings of each command here, for `jobs/commands/cli.py`."""
