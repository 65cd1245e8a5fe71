"""`moebeam status`: the state of a running or ended run, from its files alone, on disk or in an object store."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from decimal import Decimal
from typing import Any, Literal, TypeAlias

from rich.console import Console
from rich.text import Text

from moebeam.jobs.console.facts_table import facts_table
from moebeam.jobs.console.formats import format_duration, format_money, format_outage
from moebeam.jobs.console.summary import CountedUnit, json_value
from moebeam.jobs.output.current_run import read_current_run
from moebeam.jobs.output.run_record import RunRecord, read_input_record
from moebeam.jobs.output.run_state import RunWatch, SignsOfLife, find_signs_of_life, read_manifest
from moebeam.schemas.errors import OutputError
from moebeam.transforms.durable.failure import Failure, read_failure
from moebeam.transforms.durable.progress import OutageNote
from moebeam.transforms.durable.stop import ON_ERROR, StopReason, read_stop
from moebeam.transforms.publish.manifest import find_cost, find_sole_amount
from moebeam.transforms.publish.run_account import RunAccount

RunState: TypeAlias = Literal[
    "planning", "answering", "publishing", "complete", "incomplete", "failed", "stopped", "not started"
]
"""The first three require a live launcher or worker. `stopped` means that no launcher ended the run in order: it was
stopped while it planned, or was killed."""

_STAGES: dict[str, RunState] = {"plan": "planning", "answer": "answering", "publish": "publishing"}

_SILENT = "nobody is at work on it, and it did not say why"


@dataclass(frozen=True, slots=True, kw_only=True)
class StatusReport:
    """A run as its files show it.

    Attributes:
        stage: the furthest stage reached: `plan`, `answer` or `publish`.
        last_sign_s: seconds since the last sign of a launcher or worker; None without one.
        workers: live launchers and workers, in words.
        reason: for an incomplete or stopped run, a key of `[limits]` or `signal`; for a failed one, the step.
        rows_total: None while unknown.
        rows_done: answered or rejected; of shards that are not committed those whose answers arrived.
        unit: what `rows_done` and `rows_total` count.
        cost: all that was paid so far, for wasted work and unfinished shards too; None without prices.
        account: what was paid by state, as in `RunSummary.account`; None while somebody is at work, when `cost` and the
            tokens follow the workers' progress.
    """

    state: RunState
    stage: str
    is_alive: bool
    last_sign_s: float | None
    workers: tuple[str, ...]
    reason: str | None
    message: str | None
    run_id: str
    output: str
    retry_note: str | None
    rows_done: int
    rows_total: int | None
    num_results: int
    num_rejects: int
    rejects_by_type: Mapping[str, int]
    shards_done: int
    shards_total: int | None
    num_requests: int
    prompt_tokens: int
    cached_tokens: int | None
    completion_tokens: int
    cost: Decimal | None
    cost_wasted: Decimal | None
    currency: str | None
    limits: Mapping[str, Any]
    num_unknown_usage: int = 0
    num_journaled: int = 0
    cost_journaled: Decimal | None = None
    num_lost_calls: int = 0
    lost_cost_at_most: Decimal | None = None
    account: Mapping[str, object] | None = None
    outage: OutageNote | None = None
    unit: CountedUnit = "rows"

    def to_json(self) -> dict[str, object]:
        """The record as JSON values, decimals as strings and times in ISO form."""
        values = {field.name: json_value(getattr(self, field.name)) for field in fields(self)}
        return {**values, "outage": self.outage and _describe_outage(self.outage)}


def read_status(record: RunRecord) -> StatusReport:
    """Read a run's state from its folder.

    Raises:
        OutputError: the store failed, or the manifest is damaged.
    """
    layout = record.layout
    try:
        life = find_signs_of_life(layout)
        current = None if life.is_alive else read_current_run(layout)
        manifest = read_manifest(layout)
        failure, stop = read_failure(layout), read_stop(layout)
        kept = read_input_record(layout)
        watch = RunWatch(layout, rows_total=kept.num_rows if kept is not None else None, currency=record.currency)
        account = current and current.account
        seen = watch.snapshot(account)
    except OSError as error:
        raise OutputError(f"{layout.output}: cannot be looked at: {error}") from error
    state, reason, message = _judge_state(manifest, life, failure, stop, seen.stage, is_planned=watch.plan is not None)
    told = account or RunAccount(watch.committed, wasted=watch.wasted)
    committed, wasted, paid = told.committed, told.wasted, told.paid
    retry = record.request.retry_of
    return StatusReport(
        state=state,
        stage=seen.stage,
        is_alive=life.is_alive,
        last_sign_s=life.last_sign_s,
        workers=life.who,
        reason=reason,
        message=message,
        run_id=record.run_id,
        output=layout.output,
        retry_note=retry and f"answers rejects of {retry.output} again: {', '.join(retry.kinds)}",
        rows_done=seen.rows_done,
        rows_total=seen.rows_total,
        num_results=committed.num_results,
        num_rejects=seen.num_rejects,
        rejects_by_type=committed.rejects_by_type or {},
        shards_done=seen.shards_done,
        shards_total=seen.shards_total,
        num_requests=paid.num_attempts,
        prompt_tokens=seen.prompt_tokens,
        cached_tokens=None if (committed + told.journaled).cached_tokens is None else seen.cached_tokens,
        completion_tokens=seen.completion_tokens,
        cost=seen.cost,
        cost_wasted=find_cost(wasted)[0],
        currency=record.currency,
        limits=record.request.job.limits.model_dump(mode="json", exclude_none=True),
        num_unknown_usage=paid.num_unknown_usage,
        num_journaled=told.num_journaled_rows,
        cost_journaled=find_cost(told.journaled)[0],
        num_lost_calls=paid.num_lost_calls,
        lost_cost_at_most=find_sole_amount(paid.lost_costs_at_most)[0],
        account=account and account.by_state(),
        outage=seen.outage if life.is_alive else None,
        unit=seen.unit,
    )


def _judge_state(
    manifest: Mapping[str, Any] | None,
    life: SignsOfLife,
    failure: Failure | None,
    stop: StopReason | None,
    stage: str,
    *,
    is_planned: bool,
) -> tuple[RunState, str | None, str | None]:
    """Determine state, reason and message; live launchers and workers override records of earlier attempts."""
    if manifest is not None and manifest["status"] == "complete":
        return "complete", None, None
    if life.is_alive:
        return _STAGES[stage], None, None
    if failure is not None:
        return "failed", failure.step, f"{failure.error}: {failure.message}"
    if stop is not None:
        # A launcher that ends in order takes it away: this one ended while it planned, or was killed after a signal.
        return "stopped", stop.kind, stop.message
    if life.was_killed or (manifest is None and (is_planned or life.last_sign_s is not None)):
        return "stopped", None, _SILENT
    if manifest is None:
        return "not started", None, "the output was claimed, and nothing was planned yet"
    reason, message = manifest.get("reason"), manifest.get("reason_message")
    if reason is None:
        # Published by whoever looked first.
        return "stopped", None, _SILENT
    return ("failed" if reason == ON_ERROR else "incomplete"), reason, message


def _describe_outage(outage: OutageNote) -> dict[str, object]:
    return {
        "provider": outage.provider,
        "since": outage.since.isoformat(),
        "next_try_at": outage.next_try_at.isoformat(),
        "message": outage.message,
    }


def print_status(console: Console, report: StatusReport) -> None:
    """Print a run's state."""
    style = {"complete": "bold green", "failed": "bold red"}.get(report.state, "bold yellow")
    console.print(Text(_format_headline(report), style=style), soft_wrap=True)
    console.print(facts_table(_list_facts(report)))
    if report.state in ("incomplete", "failed", "stopped", "not started"):
        console.print(f"To go on: moebeam resume {report.output}", soft_wrap=True, markup=False, highlight=False)


def _format_headline(report: StatusReport) -> str:
    headline: str = report.state
    if report.state in ("incomplete", "failed", "stopped"):
        headline = f"{report.state} in stage {report.stage}"
    return f"{headline}: {report.message}" if report.message else headline


def _list_facts(report: StatusReport) -> Iterator[tuple[str, str]]:
    total = "" if report.rows_total is None else f" of {report.rows_total:,}"
    rejects = f", {report.num_rejects:,} of them rejected" if report.num_rejects else ""
    journaled = f", {report.num_journaled:,} of them in the journal" if report.num_journaled else ""
    yield report.unit, f"{report.rows_done:,}{total}{' planned' if report.stage == 'plan' else ''}{rejects}{journaled}"
    if report.rejects_by_type:
        yield "rejects", ", ".join(f"{count:,} {name}" for name, count in sorted(report.rejects_by_type.items()))
    if report.shards_total is not None:
        yield "shards", f"{report.shards_done:,} of {report.shards_total:,}"
    cached = "" if report.cached_tokens is None else f", {report.cached_tokens:,} of them cache hits"
    counted = report.num_requests - report.num_unknown_usage
    if report.num_unknown_usage and not counted:
        yield "tokens", "unknown: no answer has a usage"
    else:
        unknown = f"; {report.num_unknown_usage:,} answers without a usage" if report.num_unknown_usage else ""
        yield "tokens", f"{report.prompt_tokens:,} prompt{cached}; {report.completion_tokens:,} output{unknown}"
    yield "cost", "unknown: no price" if report.cost is None else f"{format_money(report.cost, report.currency)} so far"
    if report.cost_journaled:
        kept = format_money(report.cost_journaled, report.currency)
        yield "journaled", f"{kept} of it, for answers that the next launch takes over"
    if report.cost_wasted:
        yield "wasted", f"{format_money(report.cost_wasted, report.currency)} of it, for answers that were not used"
    if report.num_lost_calls:
        most = report.lost_cost_at_most
        billed = "" if most is None else f", at most {format_money(most, report.currency)}"
        yield "lost calls", f"{report.num_lost_calls:,} that the provider may bill beside it{billed}"
    if report.limits:
        yield "limits", ", ".join(f"{name} {value}" for name, value in report.limits.items())
    if report.workers:
        yield "at work", "; ".join(report.workers)
    if report.outage is not None:
        yield "waiting", format_outage(report.outage)
    if not report.workers and report.state != "complete" and report.last_sign_s is not None:
        yield "last sign", f"{format_duration(report.last_sign_s)} ago"
    if report.retry_note is not None:
        yield "retry", report.retry_note
    yield "output", report.output
