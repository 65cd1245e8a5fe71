"""Snapshots of a run that answers, as the launcher hands them to what shows progress."""

from dataclasses import replace
from typing import Any

from moebeam.jobs.console.summary import ProgressSnapshot

_ANSWERING = ProgressSnapshot(
    stage="answer",
    rows_done=0,
    rows_total=None,
    shards_done=0,
    shards_total=1,
    prompt_tokens=0,
    cached_tokens=0,
    completion_tokens=0,
    num_rejects=0,
    cost=None,
    currency=None,
    elapsed_s=0.0,
)


def answering_snapshot(**changes: Any) -> ProgressSnapshot:
    """A snapshot of the stage *answer* without tokens, cost or rejects, but for `changes`."""
    return replace(_ANSWERING, **changes)
