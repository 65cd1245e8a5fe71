"""What is counted and logged of a shard that was answered. Knows nothing of Beam: `step.py` adds the counters."""

from collections.abc import Sequence

from moebeam.schemas.answers import ShardCommit
from moebeam.transforms.log_events import log_event

MAX_REJECT_EVENTS = 20
"""Rejected requests of a shard that are logged one by one; the others are only counted."""


def shard_counters(commit: ShardCommit, seconds: float) -> dict[str, float]:
    """A shard's counters in the namespace `answer`.

    Args:
        seconds: from its first request to its commit.
    """
    totals, engine = commit.totals, commit.engine or {}
    return {
        "num_results": totals.num_results,
        "num_rejects": totals.num_rejects,
        "num_attempts": totals.num_attempts,
        "prompt_tokens": totals.prompt_tokens,
        "cached_tokens": totals.cached_tokens or 0,
        "completion_tokens": totals.completion_tokens,
        "shard_ms": seconds * 1000,
        **{f"engine_{name.removesuffix('_s')}_ms": value * 1000 for name, value in engine.items() if _is_time(name)},
    }


def log_commit(commit: ShardCommit, seconds: float, rejected: Sequence[tuple[str | None, str | None]]) -> None:
    """Log a shard that was answered, with its rejected requests.

    Args:
        seconds: from its first request to its commit.
        rejected: id and error type of each rejected row.
    """
    totals = commit.totals
    where = {"run": commit.run_id, "shard": commit.shard}
    for custom_id, error_type in rejected[:MAX_REJECT_EVENTS]:
        log_event("request_rejected", **where, request=custom_id, error_type=error_type)
    if len(rejected) > MAX_REJECT_EVENTS:
        log_event("requests_rejected", **where, num_more=len(rejected) - MAX_REJECT_EVENTS)
    log_event(
        "shard_committed",
        **where,
        attempt=commit.attempt,
        num_results=totals.num_results,
        num_rejects=totals.num_rejects,
        prompt_tokens=totals.prompt_tokens,
        cached_tokens=totals.cached_tokens,
        completion_tokens=totals.completion_tokens,
        seconds=round(seconds, 3),
    )


def _is_time(name: str) -> bool:
    return name.endswith("_s") and not name.startswith("peak_")
