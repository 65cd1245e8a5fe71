"""Displays a run: a progress bar on a terminal, plain lines in a log, and the final summary.

Everything goes to standard error; standard output is reserved for `--json`.
"""

import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from moebeam.jobs.console.facts_table import facts_table
from moebeam.jobs.console.formats import (
    escape_control_characters,
    format_duckdb_command,
    format_duration,
    format_money,
    format_outage,
    format_outage_end,
)
from moebeam.jobs.console.paid_line import format_paid
from moebeam.jobs.console.summary import EXIT_DONE, EXIT_STOPPED, LIMITS, CheckReport, ProgressSnapshot, RunSummary

ShowSnapshot = Callable[[ProgressSnapshot], None]

_RATE_WINDOW_S = 30.0
_NUM_SHOWN_COLUMNS = 12


@dataclass(slots=True)
class StageRates:
    """Rates over the last 30 s of a stage, so that the ETA follows the current speed."""

    _seen: deque[ProgressSnapshot] = field(default_factory=deque[ProgressSnapshot])

    def add(self, snapshot: ProgressSnapshot) -> None:
        if self._seen and self._seen[-1].stage != snapshot.stage:
            self._seen.clear()
        self._seen.append(snapshot)
        while len(self._seen) > 2 and snapshot.elapsed_s - self._seen[1].elapsed_s >= _RATE_WINDOW_S:
            self._seen.popleft()

    @property
    def tokens_per_s(self) -> float | None:
        return self._per_s(lambda snapshot: snapshot.prompt_tokens + snapshot.completion_tokens)

    @property
    def eta_s(self) -> float | None:
        """Seconds left in this stage; None until rate and total are known."""
        rows_per_s = self._per_s(lambda snapshot: snapshot.rows_done)
        if not self._seen or not rows_per_s or self._seen[-1].rows_total is None:
            return None
        return max(0, self._seen[-1].rows_total - self._seen[-1].rows_done) / rows_per_s

    def _per_s(self, count: Callable[[ProgressSnapshot], int]) -> float | None:
        if len(self._seen) < 2:
            return None
        first, last = self._seen[0], self._seen[-1]
        elapsed_s = last.elapsed_s - first.elapsed_s
        # Replayed answers may count less at first than what was journaled.
        return max(0, count(last) - count(first)) / elapsed_s if elapsed_s > 0 else None


@contextmanager
def show_progress(
    console: Console, *, interval_s: float = 5.0, clock: Callable[[], float] = time.monotonic
) -> Generator[ShowSnapshot]:
    """Show snapshots during the block: a bar on a terminal, else a line at each new stage and at most every
    `interval_s`. The last snapshot is always shown."""
    with _show_bar(console) if console.is_terminal else _show_lines(console, interval_s, clock) as show:
        yield show


@contextmanager
def _show_bar(console: Console) -> Generator[ShowSnapshot]:
    rates = StageRates()
    bar = Progress(
        TextColumn("[bold]{task.description:<8}"),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[rows]}"),
        console=console,
        expand=True,
    )
    task = bar.add_task("start", total=None, rows="")
    details = Text()
    last: ProgressSnapshot | None = None
    with Live(Group(bar, details), console=console, refresh_per_second=4, transient=True):

        def show(snapshot: ProgressSnapshot) -> None:
            nonlocal last
            rates.add(snapshot)
            bar.update(
                task,
                description=snapshot.stage,
                completed=snapshot.rows_done,
                total=snapshot.rows_total,
                rows=_format_rows(snapshot),
            )
            details.plain = "  ".join(_list_details(snapshot, rates))
            _print_outage_end(console, last, snapshot)
            last = snapshot

        yield show


@contextmanager
def _show_lines(console: Console, interval_s: float, clock: Callable[[], float]) -> Generator[ShowSnapshot]:
    rates = StageRates()
    last: ProgressSnapshot | None = None
    shown: ProgressSnapshot | None = None
    shown_at = 0.0

    def write(snapshot: ProgressSnapshot) -> None:
        console.print(format_progress(snapshot, rates), soft_wrap=True, markup=False, highlight=False)

    def show(snapshot: ProgressSnapshot) -> None:
        nonlocal last, shown, shown_at
        rates.add(snapshot)
        _print_outage_end(console, last, snapshot)
        last = snapshot
        now = clock()
        is_new = shown is None or shown.stage != snapshot.stage or (snapshot.outage and shown.outage is None)
        if is_new or now - shown_at >= interval_s:
            write(snapshot)
            shown, shown_at = snapshot, now

    try:
        yield show
    finally:
        if last is not None and last is not shown:
            write(last)


def _print_outage_end(console: Console, last: ProgressSnapshot | None, snapshot: ProgressSnapshot) -> None:
    if last is not None and last.outage is not None and snapshot.outage is None:
        console.print(format_outage_end(last.outage), soft_wrap=True, markup=False, highlight=False)


def format_progress(snapshot: ProgressSnapshot, rates: StageRates) -> str:
    """A snapshot as one line."""
    return ", ".join([f"{snapshot.stage}: {_format_rows(snapshot)}", *_list_details(snapshot, rates)])


def _format_rows(snapshot: ProgressSnapshot) -> str:
    total = "" if snapshot.rows_total is None else f"/{snapshot.rows_total:,}"
    return f"{snapshot.rows_done:,}{total} {snapshot.unit}"


def _list_details(snapshot: ProgressSnapshot, rates: StageRates) -> Iterator[str]:
    """The parts of a progress line, most important first; unknown parts are left out."""
    if snapshot.stop is not None:
        yield snapshot.stop
    if snapshot.outage is not None:
        yield format_outage(snapshot.outage)
    if snapshot.num_rejects:
        yield f"{snapshot.num_rejects:,} rejects"
    if snapshot.shards_total is not None:
        yield f"{snapshot.shards_done:,}/{snapshot.shards_total:,} shards"
    if rates.tokens_per_s:
        yield f"{rates.tokens_per_s:,.0f} tokens/s"
    if snapshot.prompt_tokens:
        yield f"{snapshot.cached_tokens / snapshot.prompt_tokens:.1%} cache hits"
    if snapshot.cost is not None:
        yield f"{format_money(snapshot.cost, snapshot.currency)} so far"
    if rates.eta_s:
        yield f"ETA {format_duration(rates.eta_s)}"


def print_summary(console: Console, summary: RunSummary) -> None:
    """Print the outcome of a run: rows, tokens, cost, paths of the tables, and the next command."""
    style = "bold green" if summary.exit_code == EXIT_DONE else "bold yellow"
    console.print(Text(format_headline(summary), style=style), soft_wrap=True)
    if summary.status == "staged":
        console.print(Text(summary.message or ""), soft_wrap=True)
        return
    console.print(facts_table(_list_facts(summary)))
    for line in _list_next_steps(summary):
        console.print(line, soft_wrap=True, markup=False, highlight=False)


def format_headline(summary: RunSummary) -> str:
    """How a run ended, in one line."""
    if summary.status == "already_done":
        return "already done: nothing was run, nothing was paid"
    if summary.status == "staged":
        return "a job template is written; nothing was run, nothing was paid"
    if summary.exit_code == EXIT_STOPPED:
        return "stopped before the end; nothing is lost"
    done = f"done in {format_duration(summary.elapsed_s)}"
    if summary.exit_code == EXIT_DONE:
        return done
    excess = "unreadable input" if summary.num_unreadable else "more rejects than the job allows"
    return f"{done}, with {excess} (exit code {summary.exit_code})"


def _list_facts(summary: RunSummary) -> Iterator[tuple[str, str]]:
    yield "rows", _format_answered(summary)
    yield "results", f"{summary.num_results:,}"
    by_type = ", ".join(f"{count:,} {name}" for name, count in sorted(summary.rejects_by_type.items()))
    yield "rejects", f"{summary.num_rejects:,}{f' ({by_type})' if by_type else ''}"
    for message, count in summary.rejects_by_message.items():
        yield "", f"{count:,} x {escape_control_characters(message)}"
    if summary.num_unreadable:
        yield "unreadable", f"{summary.num_unreadable:,} files or row groups"
    yield "tokens", _format_tokens(summary)
    yield "cache hits", _format_hits(summary)
    if summary.exit_code == EXIT_STOPPED and summary.account is not None:
        yield "cost", format_paid(summary.account)
    else:
        yield "cost", _format_cost(summary)
    if summary.num_unknown_usage:
        yield "not counted", _format_unknown_usage(summary)
    if summary.num_reused:
        yield "reused", f"{summary.num_reused:,} of the results, answered by an earlier run"
    if summary.cost_wasted and summary.exit_code != EXIT_STOPPED:
        yield "wasted", f"{format_money(summary.cost_wasted, summary.currency)} beside it, for answers not used"
    if summary.num_lost_calls:
        yield "lost calls", _format_lost_calls(summary)
    if summary.message:
        yield "note", summary.message


def _format_answered(summary: RunSummary) -> str:
    """How many rows there are and, of a run that was stopped, how many are answered."""
    if summary.rows_in is None:
        return "unknown"
    answers_in = summary.rows_in if summary.answers_in is None else summary.answers_in
    told = f"{summary.rows_in:,}" if answers_in == summary.rows_in else f"{summary.rows_in:,}, {answers_in:,} answers"
    if summary.exit_code != EXIT_STOPPED:
        return told
    journaled = f" ({summary.num_journaled:,} of them in the journal)" if summary.num_journaled else ""
    left = max(0, answers_in - summary.num_answered)
    return f"{told}: {summary.num_answered:,} answered{journaled}, {left:,} left"


def _format_lost_calls(summary: RunSummary) -> str:
    most = summary.lost_cost_at_most
    billed = "" if most is None else f", at most {format_money(most, summary.currency)}"
    return f"{summary.num_lost_calls:,} ended without a usage; the provider may bill them beside it{billed}"


def _format_unknown_usage(summary: RunSummary) -> str:
    tokens = f"{summary.estimated_prompt_tokens:,} prompt and {summary.estimated_completion_tokens:,} output tokens"
    return f"{summary.num_unknown_usage:,} answers without a usage: their cost is unknown; by an estimate {tokens}"


def _format_tokens(summary: RunSummary) -> str:
    if summary.prompt_tokens is None or summary.completion_tokens is None:
        return "unknown: no answer has a usage"
    reasoning = f", of which {summary.reasoning_tokens:,} reasoning" if summary.reasoning_tokens else ""
    output = f"{summary.completion_tokens:,} output{reasoning}"
    if summary.cached_tokens is None:
        return f"{summary.prompt_tokens:,} prompt (cache hits unknown), {output}"
    missed = summary.prompt_tokens - summary.cached_tokens
    return f"{summary.cached_tokens:,} cache hit, {missed:,} cache miss, {output}"


def _format_hits(summary: RunSummary) -> str:
    if summary.cached_tokens is None or summary.prompt_tokens is None:
        share = "unknown"
    elif summary.prompt_tokens == 0:
        share = "none, no prompt was run"
    else:
        share = f"{summary.cached_tokens / summary.prompt_tokens:.1%} of prompt tokens"
    return share if summary.max_hit_rate is None else f"{share}; the plan allows {summary.max_hit_rate:.1%}"


def _format_cost(summary: RunSummary) -> str:
    if summary.cost is None:
        if summary.prompt_tokens is None:
            return "unknown: no answer has a usage"
        if summary.num_reused and not summary.prompt_tokens + (summary.completion_tokens or 0):
            return "none, nothing was asked"
        return "unknown: the job names no price book" if summary.price_book is None else "unknown: no price applies"
    bound = "at most " if summary.cost_basis == "upper_bound" else ""
    cost = f"{bound}{format_money(summary.cost, summary.currency)}"
    num_rows = summary.num_results + summary.num_rejects - summary.num_further_samples
    if num_rows == 0:
        return cost
    return f"{cost}, {format_money(summary.cost * 1000 / num_rows, summary.currency)} per 1,000 rows"


def _list_next_steps(summary: RunSummary) -> Iterator[str]:
    if summary.exit_code == EXIT_STOPPED:
        if summary.reason in LIMITS:
            yield f"To go on: moebeam resume {summary.output} --set limits.{summary.reason}=… with a larger one"
        else:
            yield f"To go on: moebeam resume {summary.output}, or the same command again; finished shards are kept."
        return
    yield f"Tables: {summary.output}/results, rejects, ledger"
    results = "SELECT custom_id, output_json, cost FROM '{}' LIMIT 5"
    rejects = "SELECT error_type, count(*) FROM '{}' GROUP BY ALL"
    query, name = (results, "results") if summary.num_results or not summary.num_rejects else (rejects, "rejects")
    yield f"Try:    {format_duckdb_command(query, f'{summary.output}/{name}/*.parquet')}"


def print_report(console: Console, report: CheckReport) -> None:
    """Print the report of `validate`."""
    console.print(Text("the job is valid; nothing was run", style="bold green"))
    console.print(facts_table(_list_report_facts(report)))
    for warning in report.warnings:
        console.print(Text(f"warning: {warning}", style="yellow"), soft_wrap=True)


def _list_report_facts(report: CheckReport) -> Iterator[tuple[str, str]]:
    limit = "" if report.limit is None else f", of which at most {report.limit:,} will run"
    yield "input", f"{report.num_rows:,} rows in {report.num_files:,} file{'' if report.num_files == 1 else 's'}{limit}"
    more = len(report.columns) - _NUM_SHOWN_COLUMNS
    yield "columns", ", ".join(report.columns[:_NUM_SHOWN_COLUMNS]) + (f" and {more} more" if more > 0 else "")
    yield "engine", f"{report.engine}, {report.model}"
    yield "schema", report.schema or "none: answers are kept as text"
    if report.output_type is not None:
        yield "output", report.output_type
    yield "price", report.price or "none: costs will be null"
    yield "tables", report.output
