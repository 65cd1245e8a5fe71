"""Progress where the caller of `run_job` looks: a bar below a notebook's cell, or as the command line shows it.

The bar is HTML of our own, because rich draws in a notebook only where ipywidgets is installed.
"""

import html
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from rich.console import Console

from moebeam.jobs.console.console import stderr_console
from moebeam.jobs.console.summary import ProgressSnapshot, RunSummary
from moebeam.jobs.run.progress import ShowSnapshot, StageRates, format_headline, format_progress, show_progress


@dataclass(frozen=True, slots=True)
class ProgressView:
    """Shows a run while it is at work, and how it ended."""

    show: ShowSnapshot
    show_end: Callable[[str], None]


@contextmanager
def show_run(progress: bool | None) -> Generator[ProgressView | None]:
    """Show a run during the block.

    Args:
        progress: whether to show it; None shows it in a notebook and on a terminal.
    """
    console = stderr_console()
    if progress is False:
        yield None
    elif Console().is_jupyter:
        view = _notebook_view()
        try:
            yield view
        except BaseException as error:
            view.show_end(f"not finished: {str(error).partition(chr(10))[0] or type(error).__name__}")
            raise
    elif progress or console.is_terminal:
        with show_progress(console) as show:
            yield ProgressView(show, lambda line: console.print(line, soft_wrap=True, markup=False, highlight=False))
    else:
        yield None


def describe_end(summary: RunSummary) -> str:
    """How a run ended, in one line."""
    return f"{format_headline(summary)}; {summary.num_results:,} results, {summary.num_rejects:,} rejects"


def _notebook_view() -> ProgressView:
    display: Any = import_module("IPython.display")
    rates = StageRates()
    handle = display.display(display.HTML(_draw(None, None, "start")), display_id=True)

    def show(snapshot: ProgressSnapshot) -> None:
        rates.add(snapshot)
        line = format_progress(snapshot, rates)
        handle.update(display.HTML(_draw(snapshot.rows_done, snapshot.rows_total, line)))

    def show_end(line: str) -> None:
        handle.update(display.HTML(f"<div>{html.escape(line)}</div>"))

    return ProgressView(show, show_end)


def _draw(done: int | None, total: int | None, line: str) -> str:
    """A bar with its line; without a total it only moves."""
    place = f' value="{done}" max="{total}"' if total and done is not None else ""
    return f'<div><progress{place} style="width: 40%"></progress> {html.escape(line)}</div>'
