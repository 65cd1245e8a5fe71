"""The command line: `moebeam run | validate`.

Standard output carries one JSON line and only with `--json`; everything for people goes to standard error. Exit codes:
0 done, 1 failed, 2 job file or command wrong, 3 more rejects than allowed, 4 stopped and resumable.
Beam, torch and pyarrow are imported inside commands, so that `--help` answers at once.
"""

import importlib.metadata
import json
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from types import FrameType
from typing import Annotated, NoReturn, TextIO

import typer
from rich.console import Console
from rich.text import Text
from typer.exceptions import TyperException

from jobs.summary import EXIT_FAILED, EXIT_STOPPED, EXIT_WRONG_JOB
from schemas.errors import JobError, JobFileError

Answer = Mapping[str, object]

# Rich keeps the line breaks of all paragraphs but the first: one line a paragraph lets it wrap to any width.
_RUN_HELP = """Answer every row of a job.

Everything is checked before the first row. Running a finished job again does nothing; running an unfinished one again \
goes on where it stopped. Ctrl-C finishes the shards at work and stops; a second Ctrl-C stops at once.

Beam options follow in Beam's own spelling (--runner, --direct_num_workers, --region, ...). Unknown ones are refused, \
and so are options that carry secrets.

Examples:
  moebeam run job.toml
  moebeam run job.toml --limit 20 --set sampling.max_tokens=64
  moebeam run job.toml --json --runner=FlinkRunner --parallelism=4
"""
_VALIDATE_HELP = """Check a job and the files it names, as run does before its first row; run nothing.

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
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key, such as sampling.max_tokens=64. Repeatable."),
]
Limit = Annotated[int | None, typer.Option("--limit", min=1, metavar="N", help="Only the first N rows, as a trial.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON line on standard output.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress and no summary; errors are still shown.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks and the logs of all libraries.")]


def main() -> NoReturn:
    """Entry point of the `moebeam` command."""
    sys.exit(run_command(sys.argv[1:]))


def run_command(args: Sequence[str]) -> int:
    """Run one command line and return its exit code; nothing is raised but what ends the process."""
    try:
        exit_code: object = app(args=list(args), prog_name="moebeam", standalone_mode=False)
    except TyperException as error:
        message = error.format_message()
        if message:
            _print_error(_console(), f"{message}\nmoebeam --help shows the commands and their options.")
        if "--json" in args:
            print(_json_line(_failure(EXIT_WRONG_JOB, message)))
        return EXIT_WRONG_JOB
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
    is_json: AsJson = False,
    is_quiet: Quiet = False,
    is_debug: Debug = False,
) -> None:
    def work(console: Console) -> tuple[int, Answer]:
        from jobs.job_file import load_job
        from jobs.progress import print_summary, show_progress

        _check_job_comes_first(job)
        loaded = load_job(job, overrides or ())
        beam_args = list(context.args)
        with _draining_signals() as stop:
            if beam_args:
                from jobs.beam_options import beam_options

                beam_options(beam_args)
            from jobs.launch import launch

            with nullcontext() if is_quiet else show_progress(console) as progress:
                summary = launch(loaded, limit=limit, beam_args=beam_args, stop=stop, progress=progress)
        if not is_quiet:
            print_summary(console, summary)
        return summary.exit_code, summary.to_json()

    _speak(work, is_json=is_json, is_debug=is_debug)


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
        from jobs.job_file import load_job
        from jobs.progress import print_report

        _check_job_comes_first(job)
        loaded = load_job(job, overrides or ())
        from jobs.preflight import check_job

        report = check_job(loaded, limit=limit).report()
        if not is_quiet:
            print_report(console, report)
        return 0, {"status": "valid", "exit_code": 0, **report.to_json()}

    _speak(work, is_json=is_json, is_debug=is_debug)


def _check_job_comes_first(job: str) -> None:
    # Unknown options pass through to Beam, so one in front of the job file is taken for it.
    if job.startswith("-"):
        raise JobFileError(f"{job}: found where the job file belongs; write moebeam run JOB.toml, then options")


def _speak(work: Callable[[Console], tuple[int, Answer]], *, is_json: bool, is_debug: bool) -> NoReturn:
    """Run a command's work, tell its errors, print its JSON line, and leave with its exit code."""
    console = _console()
    is_killed = False
    with _clean_stdout() as stdout, _logging_to(console, is_debug=is_debug):
        try:
            exit_code, answer = work(console)
        except KeyboardInterrupt:
            is_killed = True
            exit_code, answer = EXIT_STOPPED, _failure(EXIT_STOPPED, "stopped at once by a signal")
            _print_error(console, "stopped at once; finished shards are kept, run the same command again to go on")
        except JobError as error:
            exit_code, answer = error.exit_code, _failure(error.exit_code, str(error))
            _print_error(console, str(error), error if is_debug else None)
        except Exception as error:  # the last door: a person gets a line, and --debug gets the traceback
            message = f"{type(error).__name__}: {error}".splitlines()[0]
            exit_code, answer = EXIT_FAILED, _failure(EXIT_FAILED, message)
            hint = "" if is_debug else "\nThis is not expected; --debug shows where it happened."
            _print_error(console, f"{message}{hint}", error if is_debug else None)
        if is_json:
            print(_json_line(answer), file=stdout, flush=True)
    if is_killed:
        # A normal exit would wait for Beam's worker threads to finish their bundles.
        sys.stderr.flush()
        os._exit(exit_code)
    raise typer.Exit(exit_code)


def _failure(exit_code: int, message: str) -> Answer:
    status = "incomplete" if exit_code == EXIT_STOPPED else "failed"
    return {"status": status, "exit_code": exit_code, "error": message}


def _json_line(answer: Answer) -> str:
    return json.dumps(answer, ensure_ascii=False, separators=(",", ":"))


class _StderrConsole(Console):
    """Standard error, until its reader is gone: a closed pipe ends the talk, not the run (rich would exit with 1)."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def _console() -> Console:
    return _StderrConsole(stderr=True)


def _print_error(console: Console, message: str, error: BaseException | None = None) -> None:
    if error is not None:
        console.print("".join(traceback.format_exception(error)), soft_wrap=True, markup=False, highlight=False)
    first, _, rest = message.partition("\n")
    console.print(Text.assemble(("error: ", "bold red"), (first, "red")), soft_wrap=True)
    if rest:
        console.print(Text(rest), soft_wrap=True)


@contextmanager
def _clean_stdout() -> Generator[TextIO]:
    """Send what libraries and worker processes print to standard error; yield the real standard output."""
    sys.stdout.flush()
    try:
        is_own = sys.stdout.fileno() == 1
    except (OSError, ValueError):
        is_own = False
    if not is_own:
        real = sys.stdout
        with redirect_stdout(sys.stderr):
            yield real
        return
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as real:
        os.dup2(2, 1)
        try:
            with redirect_stdout(sys.stderr):
                yield real
        finally:
            real.flush()
            os.dup2(real.fileno(), 1)


@contextmanager
def _logging_to(console: Console, *, is_debug: bool) -> Generator[None]:
    """Show log records as lines above the progress bar: warnings, and with `is_debug` everything from INFO on."""
    root = logging.getLogger()
    handler = _ConsoleHandler(console, is_debug=is_debug)
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.INFO if is_debug else logging.WARNING)
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(level)


class _ConsoleHandler(logging.Handler):
    def __init__(self, console: Console, *, is_debug: bool) -> None:
        super().__init__()
        self._console = console
        self._is_debug = is_debug

    def filter(self, record: logging.LogRecord) -> bool:
        # Beam warns on import about Google clients nobody asked for, and about runners it chose itself.
        is_beam = record.name.startswith("apache_beam") or f"{os.sep}apache_beam{os.sep}" in record.pathname
        return self._is_debug or not is_beam or record.levelno >= logging.ERROR

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = f"{record.levelname.lower()}: {record.getMessage()}"
            if record.exc_info and self._is_debug:
                text += "\n" + "".join(traceback.format_exception(*record.exc_info))
            self._console.print(text, soft_wrap=True, markup=False, highlight=False)
        except Exception:  # a broken log record must not end a run; logging says so on its own
            self.handleError(record)


@contextmanager
def _draining_signals() -> Generator[threading.Event]:
    """Turn the first SIGINT or SIGTERM into a set event, the second into a KeyboardInterrupt."""
    stop = threading.Event()

    def drain(signum: int, frame: FrameType | None) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()
        # The main thread may be in the middle of a print, so no buffered stream can be used here.
        with suppress(OSError):
            os.write(2, b"\nstopping: the shards at work are finished first; a second signal stops at once\n")

    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, drain) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
