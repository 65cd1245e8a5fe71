"""Summarizes a run's manifest at the end of an attempt, and says what a failed attempt has paid."""

import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from moebeam.jobs.console.summary import RunStatus, RunSummary, choose_exit_code
from moebeam.jobs.output.current_run import read_current_run
from moebeam.schemas.answers import Totals
from moebeam.schemas.errors import CommitError, EngineUnavailable, JobInterrupted, OutputError, PipelineFailed
from moebeam.schemas.job.sections import Job
from moebeam.schemas.store import storage
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.transforms.publish.lakehouse.commit_run import TableReceipt
from moebeam.transforms.publish.manifest import find_cost, find_sole_amount
from moebeam.transforms.publish.manifest_file import count_answers
from moebeam.transforms.publish.reject_messages import parse_commonest
from moebeam.transforms.publish.run_account import RunAccount

NUM_SHOWN_MESSAGES = 3


def summarize_run(
    manifest: Mapping[str, Any], job: Job, status: RunStatus, started: float, receipt: TableReceipt | None = None
) -> RunSummary:
    """Summarize a manifest at the end of an attempt.

    Args:
        started: start of this attempt, on the monotonic clock.
        receipt: of the run's commit to a lakehouse; None without one.
    """
    account = RunAccount.from_manifest(manifest)
    committed, wasted = account.committed, account.wasted
    totals = committed + account.journaled
    cost, currency = find_cost(totals)
    cached = totals.cached_tokens
    has_tokens = totals.num_unknown_usage < totals.num_attempts or not totals.num_attempts
    is_complete = manifest["status"] == "complete"
    message = None
    if not is_complete:
        left = manifest["num_shards"] - manifest["num_committed_shards"]
        why = manifest.get("reason_message") or "stopped"
        message = f"{why}; {left} of {manifest['num_shards']} shards left; moebeam resume {job.output.path} goes on"
    answers_in = count_answers(manifest)
    counts = parse_commonest(manifest.get("rejects_by_message") or ())
    return RunSummary(
        status=status,
        exit_code=choose_exit_code(
            is_complete=is_complete,
            answers_in=answers_in,
            num_rejects=committed.num_rejects,
            num_unreadable=committed.num_unreadable,
            max_reject_share=job.output.max_reject_share,
        ),
        run_id=manifest["run_id"],
        output=job.output.path,
        rows_in=manifest["rows_in"],
        answers_in=answers_in,
        num_further_samples=committed.num_further_samples,
        num_results=committed.num_results,
        num_reused=committed.num_reused,
        num_rejects=committed.num_rejects,
        num_unreadable=committed.num_unreadable,
        rejects_by_type=committed.rejects_by_type or {},
        rejects_by_message={count.message: count.num_rows for count in counts[:NUM_SHOWN_MESSAGES]},
        num_answered=account.num_answered_rows,
        num_journaled=account.num_journaled_rows,
        prompt_tokens=totals.prompt_tokens if has_tokens else None,
        cached_tokens=cached,
        computed_tokens=None if cached is None else totals.prompt_tokens - cached,
        completion_tokens=totals.completion_tokens if has_tokens else None,
        reasoning_tokens=totals.reasoning_tokens if has_tokens else None,
        num_unknown_usage=totals.num_unknown_usage,
        estimated_prompt_tokens=totals.estimated_prompt_tokens,
        estimated_completion_tokens=totals.estimated_completion_tokens,
        max_hit_rate=manifest["max_hit_rate"],
        cost=cost,
        cost_allocated=cost,
        cost_basis=None if cost is None else find_basis(totals),
        currency=currency or find_cost(wasted)[1],
        price_book=manifest["price_book"],
        elapsed_s=time.monotonic() - started,
        message=message,
        reason=manifest.get("reason"),
        cost_journaled=find_cost(account.journaled)[0],
        cost_wasted=find_cost(wasted)[0],
        cost_paid=find_cost(account.paid)[0],
        account=account.by_state(),
        num_lost_calls=account.paid.num_lost_calls,
        lost_cost_at_most=find_sole_amount(account.paid.lost_costs_at_most)[0],
        table=receipt and receipt.url,
        table_commits=receipt.commits if receipt is not None else {},
    )


def find_basis(totals: Totals) -> str:
    """How certain the sum of costs is: `partial` if some attempt's cost is unknown."""
    if totals.num_unpriced:
        return "partial"
    return "upper_bound" if totals.num_upper_bound else "exact"


@contextmanager
def telling_what_was_paid(output: str) -> Generator[None]:
    """Add what the run has paid so far to an error that ends an attempt after its first request, and publish it.

    No *publish* stage runs after a failure, and DuckDB's readers start no command that would make up for it.
    """
    try:
        yield
    except (PipelineFailed, EngineUnavailable, JobInterrupted) as error:
        layout = RunLayout(output)
        with suppress(OSError, CommitError, OutputError):
            if storage.exists(layout.plan_record):
                error.account = read_current_run(layout).account.by_state()
        raise
