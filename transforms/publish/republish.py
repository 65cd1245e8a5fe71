"""Publishes a run again, without its pipeline, as far as it is committed.

After a kill nothing of what was committed since the last launch may be visible, and no manifest names it. Whoever looks
at the run then publishes it first, so that tables, manifest and all that reads them say the same. The run stays
incomplete, and its next launch goes on as if nothing had happened.
"""

from collections.abc import Mapping
from typing import Any

from moebeam.schemas.answers import ShardCommit
from moebeam.schemas.canonical import Json
from moebeam.schemas.store import storage
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.transforms.answer.waste import record_unused
from moebeam.transforms.durable.commit import read_commits
from moebeam.transforms.durable.journal_file import journal_sizes
from moebeam.transforms.plan.plan_record import read_plan
from moebeam.transforms.publish.invariants import RowSums, sum_shard
from moebeam.transforms.publish.manifest import RunAccounts, publish_shard, write_manifest
from moebeam.transforms.publish.publish_spec import PublishSpec, read_spec
from moebeam.transforms.publish.rollup import (
    DEFAULT_BY,
    MAX_GROUPS,
    Rollup,
    largest_groups,
    merge_groups,
    read_committed_ledger,
    roll_up,
)
from moebeam.transforms.publish.run_account import RunAccount, digest_of_state


def is_current(manifest: Mapping[str, Any] | None, layout: RunLayout) -> bool:
    """Whether a manifest tells of all that is committed, wasted and journaled.

    Raises:
        OSError: the store failed.
    """
    if manifest is None:
        return False
    if manifest["status"] != "complete":
        return manifest.get("state_digest") == digest_of_state(layout)
    # Runs of older versions have no such number. Cleaned ones have no journals any more.
    told = manifest.get("num_journal_bytes")
    return told is None or sum(journal_sizes(layout).values()) <= told


def republish(layout: RunLayout, *, is_complete: bool = False) -> bool:
    """Publish what is committed and journaled, and write the run's manifest; idempotent.

    Only for a run at which nobody is at work.

    Args:
        is_complete: whether its manifest says so already; one that does not stays incomplete until its next launch.
    Returns:
        False if the run has nothing to publish yet, or was begun by a version that kept no record for it.
    Raises:
        CommitError: a committed table is missing or damaged, or the accounts contradict each other.
        OSError: the store failed, or may only be read.
    """
    spec = read_spec(layout)
    if spec is None or read_plan(layout) is None:
        return False
    commits = [*read_commits(layout).values()]
    num_journal_bytes = 0
    for commit in commits:
        publish_shard(commit, layout)
        if spec.accounting is not None:
            num_journal_bytes += record_unused(layout, commit, spec.accounting)
    write_manifest(
        commits,
        spec,
        RunAccounts(_roll_up(commits, spec), _sum_rows(commits, spec)),
        can_complete=is_complete,
        num_journal_bytes=num_journal_bytes,
    )
    return True


def outline_manifest(layout: RunLayout, account: RunAccount) -> dict[str, Json] | None:
    """What the manifest of an unfinished run would say, but for its tables; None as `republish` returns False.

    Raises:
        OSError: the store failed.
    """
    spec, plan = read_spec(layout), read_plan(layout)
    if spec is None or plan is None:
        return None
    return {
        "status": "incomplete",
        "run_id": spec.run_id,
        **spec.described,
        "rows_in": spec.num_input_rows - account.committed.num_unreadable_rows,
        "answers_in": plan.num_rows - account.committed.num_unreadable,
        "num_shards": len(plan.shards),
        "num_committed_shards": len(storage.list_names(layout.commits, ".json")),
        "max_hit_rate": plan.max_hit_rate,
        **account.to_json(),
        "rejects_by_message": None,
        "checks": None,
    }


def _roll_up(commits: list[ShardCommit], spec: PublishSpec) -> Rollup:
    ledgers = (read_committed_ledger(spec.layout, commit) for commit in commits)
    groups = merge_groups(roll_up(ledger, DEFAULT_BY) for ledger in ledgers if ledger is not None)
    return largest_groups(groups.items(), DEFAULT_BY, MAX_GROUPS)


def _sum_rows(commits: list[ShardCommit], spec: PublishSpec) -> RowSums:
    return sum((sums for commit in commits for sums in sum_shard(commit, spec.layout)), RowSums())
