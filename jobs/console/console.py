"""A command's output and common options.

Errors, logs and progress go to standard error, one JSON line to standard output.
Every command of `jobs/commands/cli.py` and `jobs/commands/output_commands.py` does its work inside `run_and_report`.
"""

import json
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, redirect_stdout
from typing import Annotated, NoReturn, TextIO

import typer
from rich.console import Console
from rich.text import Text

from moebeam.jobs.console.paid_line import format_paid
from moebeam.jobs.console.summary import EXIT_FAILED, EXIT_STOPPED
from moebeam.schemas.errors import JobError
from moebeam.schemas.redaction.guard_logs import guard_logs
from moebeam.schemas.redaction.hide import hide_in_message

Answer = Mapping[str, object]

Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a key, such as sampling.max_tokens=64. Repeatable."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON line on standard output.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress and no summary; errors are still shown.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks and the logs of all libraries.")]


def run_and_report(work: Callable[[Console], tuple[int, Answer]], *, is_json: bool, is_debug: bool) -> NoReturn:
    """Run a command's work, report its errors, print its JSON line and exit with its code."""
    console = stderr_console()
    is_killed = False
    with _clean_stdout() as stdout, logging_to(console, is_debug=is_debug):
        try:
            exit_code, answer = work(console)
        except KeyboardInterrupt:
            is_killed = True
            exit_code, answer = EXIT_STOPPED, make_failure_answer(EXIT_STOPPED, "stopped at once by a signal")
            print_error(console, "stopped at once; what was answered is kept, run the same command again to go on")
        except JobError as error:
            exit_code, answer = error.exit_code, make_failure_answer(error.exit_code, str(error), error.account)
            print_error(console, str(error), error if is_debug else None)
            if error.account is not None:
                console.print(f"so far: {format_paid(error.account)}", soft_wrap=True, markup=False, highlight=False)
        except Exception as error:  # anything unexpected: one line, and with --debug the traceback
            message = f"{type(error).__name__}: {error}".splitlines()[0]
            exit_code, answer = EXIT_FAILED, make_failure_answer(EXIT_FAILED, message)
            hint = "" if is_debug else "\nThis is not expected; --debug shows where it happened."
            print_error(console, f"{message}{hint}", error if is_debug else None)
        if is_json:
            exit_code = _print_answer(console, stdout, answer, exit_code)
    if is_killed:
        # A normal exit would wait for Beam's worker threads to finish their bundles.
        sys.stderr.flush()
        os._exit(exit_code)
    raise typer.Exit(exit_code)


def _print_answer(console: Console, stdout: TextIO, answer: Answer, exit_code: int) -> int:
    """Print the JSON line; returns the exit code, which is a failure if the line is lost and somebody waits for it."""
    try:
        print(format_json_line(answer), file=stdout, flush=True)
    except BrokenPipeError:
        _drop(stdout)
    except OSError as error:
        _drop(stdout)
        print_error(console, f"standard output: the JSON line cannot be written: {error}")
        return exit_code or EXIT_FAILED
    return exit_code


def _drop(stream: TextIO) -> None:
    """Let what a stream still holds go nowhere, else it would be written, and fail, again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def open_closed_streams() -> None:
    """Open standard streams that were closed before the start, so that no file of the run takes their place."""
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            # The lowest that is free: this one.
            os.open(os.devnull, os.O_RDWR)
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(descriptor, "r" if name == "stdin" else "w", closefd=False))


def make_failure_answer(exit_code: int, message: str, account: Mapping[str, object] | None = None) -> Answer:
    """The JSON answer of a command that failed or was stopped; `account` is what its run has paid, if it is known."""
    status = "incomplete" if exit_code == EXIT_STOPPED else "failed"
    answer = {"status": status, "exit_code": exit_code, "error": hide_in_message(message)}
    return answer if account is None else {**answer, "account": account}


def format_json_line(answer: Answer) -> str:
    """An answer as the one line of `--json`."""
    return json.dumps(answer, ensure_ascii=False, separators=(",", ":"))


class _StderrConsole(Console):
    """Goes quiet when its reader closes the pipe; rich would exit with 1 and end the run."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def stderr_console() -> Console:
    """A console on standard error."""
    # Bound to what it is now: libraries that print to standard error may be sent elsewhere.
    return _StderrConsole(file=sys.stderr, stderr=True)


def print_error(console: Console, message: str, error: BaseException | None = None) -> None:
    """Print an error, with its traceback if `error` is given."""
    if error is not None:
        trace = hide_in_message("".join(traceback.format_exception(error)))
        console.print(trace, soft_wrap=True, markup=False, highlight=False)
    first, _, rest = hide_in_message(message).partition("\n")
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
def logging_to(console: Console, *, is_debug: bool) -> Generator[None]:
    """Show log records as lines above the progress bar: warnings, and with `is_debug` everything from INFO on."""
    guard_logs()
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


_STEP_ERROR = re.compile(r"\[while running '|Error processing instruction |Traceback \(most recent call last\)")
"""How Beam writes of an error that a step raised."""


class _ConsoleHandler(logging.Handler):
    def __init__(self, console: Console, *, is_debug: bool) -> None:
        super().__init__()
        self._console = console
        self._is_debug = is_debug

    def filter(self, record: logging.LogRecord) -> bool:
        # Beam warns on import about Google clients nobody asked for, and about runners it chose itself. It logs the
        # error of a step up to three times; the launcher says once why the run failed.
        is_beam = record.name.startswith("apache_beam") or f"{os.sep}apache_beam{os.sep}" in record.pathname
        if self._is_debug or not is_beam:
            return True
        return record.levelno >= logging.ERROR and not _STEP_ERROR.search(record.getMessage())

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = f"{record.levelname.lower()}: {record.getMessage()}"
            if record.exc_info and self._is_debug:
                text += "\n" + "".join(traceback.format_exception(*record.exc_info))
            self._console.print(text, soft_wrap=True, markup=False, highlight=False)
        except Exception:  # a broken log record must not end a run; logging says so on its own
            self.handleError(record)
