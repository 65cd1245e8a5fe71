"""What stages tell while they run, on any runner: Beam metrics, and log events that name run, shard and request.

Metrics are Beam counters in a namespace a stage (`read`, `render`, `plan`, `answer`, `publish`, and `engine` for its
time by phase). A runner that repeats a bundle may count it again; the exact sums stand in the manifest. Events are
records of the logger `moebeam` at level INFO, one line of `key=value` each; the same fields are in the record's
attribute `moebeam`, for handlers that write JSON. Neither holds prompts, answers or keys.
"""

import json
import logging
from collections.abc import Mapping, Sequence

import apache_beam as beam

from moebeam.transforms.durable.commit import ShardCommit

MAX_REQUEST_EVENTS = 20
"""Rejected requests of a shard that are told one by one; the others by their number."""

_LOGGER = logging.getLogger("moebeam")


def count(stage: str, amounts: Mapping[str, float]) -> None:
    """Add to a stage's counters; parts of a unit are cut off."""
    for name, amount in amounts.items():
        if int(amount):
            beam.metrics.Metrics.counter(stage, name).inc(int(amount))


def tell(event: str, **fields: str | float | None) -> None:
    """Log an event; fields that are None are left out."""
    if _LOGGER.isEnabledFor(logging.INFO):
        told = {name: value for name, value in fields.items() if value is not None}
        text = " ".join(f"{name}={_spelled(value)}" for name, value in told.items())
        _LOGGER.info("%s %s", event, text, extra={"moebeam": {"event": event, **told}})


def tell_committed(commit: ShardCommit, seconds: float, rejected: Sequence[tuple[str | None, str | None]]) -> None:
    """Count a shard that was answered, and log it with its rejected requests.

    Args:
        seconds: from its first request to its commit.
        rejected: id and error type of each rejected row.
    """
    totals, engine = commit.totals, commit.engine or {}
    count(
        "answer",
        {
            "num_results": totals.num_results,
            "num_rejects": totals.num_rejects,
            "num_attempts": totals.num_attempts,
            "prompt_tokens": totals.prompt_tokens,
            "cached_tokens": totals.cached_tokens or 0,
            "completion_tokens": totals.completion_tokens,
            "shard_ms": seconds * 1000,
            **{
                f"engine_{name.removesuffix('_s')}_ms": value * 1000 for name, value in engine.items() if _is_time(name)
            },
        },
    )
    where = {"run": commit.run_id, "shard": commit.shard}
    for custom_id, error_type in rejected[:MAX_REQUEST_EVENTS]:
        tell("request_rejected", **where, request=custom_id, error_type=error_type)
    if len(rejected) > MAX_REQUEST_EVENTS:
        tell("requests_rejected", **where, num_more=len(rejected) - MAX_REQUEST_EVENTS)
    tell(
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


def _spelled(value: str | float) -> str:
    """A value as one word of a line: texts that would not be one are quoted as in JSON."""
    if not isinstance(value, str):
        return str(value)
    is_plain = value.isprintable() and not any(letter in value for letter in ' ="') and value
    return value if is_plain else json.dumps(value)
