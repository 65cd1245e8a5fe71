"""Reads a run's progress, liveness and manifest from its files alone.

The launcher watches its run this way, `moebeam status` shows any run, and `moebeam clean` checks that none is active.
"""

import contextlib
import os
import socket
import time
import uuid
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any

import psutil

from moebeam.jobs.console.summary import ProgressSnapshot
from moebeam.schemas.answers import ShardCommit, Totals
from moebeam.schemas.errors import CommitError, FileDamaged, OutputError
from moebeam.schemas.store import storage
from moebeam.schemas.store.record_json import read_note, write_note
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.transforms.answer.waste import read_waste, waste_names
from moebeam.transforms.durable.commit import list_committed_shards, read_commit
from moebeam.transforms.durable.lease import LEASE_S, host_identity, read_leases
from moebeam.transforms.durable.progress import read_outage, read_progress
from moebeam.transforms.plan.plan_record import PlanRecord, read_plan
from moebeam.transforms.publish.manifest import find_cost
from moebeam.transforms.publish.manifest_file import read_manifest_file
from moebeam.transforms.publish.publish_spec import read_spec
from moebeam.transforms.publish.run_account import RunAccount, sum_totals

LAUNCHER_BEAT_S = 5.0
"""How often a launcher renews its presence file."""

SILENCE_S = 60.0
"""A launcher or worker without a sign for this long counts as gone."""


class RunWatch:
    """Polls a run's progress; each commit is read once."""

    def __init__(self, layout: RunLayout, *, rows_total: int | None, currency: str | None) -> None:
        self._layout = layout
        self._rows_total = rows_total
        self._currency = currency
        self._started = time.monotonic()
        self._plan: PlanRecord | None = None
        self._commits: dict[str, ShardCommit] = {}
        self._wasted: dict[str, Totals] = {}

    @property
    def plan(self) -> PlanRecord | None:
        """The complete plan, as of the last snapshot; None while the run is planning."""
        return self._plan

    @property
    def committed(self) -> Totals:
        """Totals of the committed shards, as of the last snapshot."""
        return sum_totals(commit.totals for commit in self._commits.values())

    @property
    def wasted(self) -> Totals:
        """Totals of abandoned attempts, as of the last snapshot."""
        return sum_totals(self._wasted.values())

    def snapshot(self, account: RunAccount | None = None) -> ProgressSnapshot:
        """Read the plan, the commits and the workers' progress.

        Args:
            account: of a run at which nobody is at work; what progress files say is then only a moment of its past.
        Raises:
            OSError: the store failed, or files vanished during the read.
        """
        layout = self._layout
        self._plan = self._plan or read_plan(layout)
        if self._plan is None:
            rows_done = sum(beat.rows_done for beat in read_progress(layout, "plan").values())
            cost = None if self._currency is None else Decimal(0)
            return self._snapshot("plan", rows_done, self._rows_total, Totals(cached_tokens=0), cost)
        for shard in list_committed_shards(layout):
            if shard not in self._commits and (commit := read_commit(layout, shard)) is not None:
                self._commits[shard] = commit
        for name in waste_names(layout):
            if name not in self._wasted and (waste := read_waste(layout, name)) is not None:
                self._wasted[name] = waste.totals
        if account is not None:
            return self._snapshot_at_rest(account, self._plan)
        totals = self.committed
        beats = [beat for shard, beat in read_progress(layout, "answer").items() if shard not in self._commits]
        rows_done = totals.num_results + totals.num_rejects + totals.num_unreadable
        answering = Totals(
            num_rejects=sum(beat.num_rejects for beat in beats),
            prompt_tokens=sum(beat.prompt_tokens for beat in beats),
            cached_tokens=sum(beat.cached_tokens for beat in beats),
            completion_tokens=sum(beat.completion_tokens for beat in beats),
        )
        cost = None
        if self._currency is not None:
            known = (find_cost(totals)[0] or Decimal(0), find_cost(self.wasted)[0] or Decimal(0))
            cost = sum((*known, *(Decimal(beat.cost) for beat in beats)), Decimal(0))
        done = rows_done + sum(beat.rows_done for beat in beats)
        return self._snapshot(self._find_stage(self._plan), done, self._plan.num_rows, totals + answering, cost)

    def _snapshot_at_rest(self, account: RunAccount, plan: PlanRecord) -> ProgressSnapshot:
        cost = None
        if self._currency is not None:
            cost = find_cost(account.paid)[0] if account.paid.costs else Decimal(0)
        rows_done = account.num_answered_rows + account.committed.num_unreadable
        totals = account.committed + account.journaled
        return self._snapshot(self._find_stage(plan), rows_done, plan.num_rows, totals, cost)

    def _find_stage(self, plan: PlanRecord) -> str:
        return "publish" if len(self._commits) == len(plan.shards) else "answer"

    def _snapshot(
        self, stage: str, rows_done: int, rows_total: int | None, totals: Totals, cost: Decimal | None
    ) -> ProgressSnapshot:
        return ProgressSnapshot(
            stage=stage,
            rows_done=rows_done,
            rows_total=rows_total,
            shards_done=len(self._commits),
            shards_total=len(self._plan.shards) if self._plan is not None else None,
            prompt_tokens=totals.prompt_tokens,
            cached_tokens=totals.cached_tokens or 0,
            completion_tokens=totals.completion_tokens,
            num_rejects=totals.num_rejects,
            cost=cost,
            currency=self._currency,
            elapsed_s=time.monotonic() - self._started,
            outage=read_outage(self._layout) if stage == "answer" else None,
            unit="answers" if self._plan is not None and self._plan.num_further_samples else "rows",
        )


def read_manifest(layout: RunLayout) -> dict[str, Any] | None:
    """Read the manifest, complete or not; None if there is none.

    Raises:
        OutputError: the manifest is damaged.
    """
    try:
        return read_manifest_file(layout)
    except FileDamaged as error:
        raise OutputError(
            f"{layout.manifest}: expected the manifest of a run, found a damaged file; remove it and resume the run, "
            "which writes it again"
        ) from error


def find_run_id(layout: RunLayout) -> str | None:
    """The id of the run in a folder by its other records, where `job.json` is damaged; None if none is left.

    Raises:
        OSError: the store failed.
    """
    with contextlib.suppress(CommitError):
        if (manifest := read_manifest_file(layout)) is not None:
            return str(manifest["run_id"])
    with contextlib.suppress(CommitError):
        if (spec := read_spec(layout)) is not None:
            return spec.run_id
    return None


@dataclass(frozen=True, slots=True)
class LauncherPresence:
    """A launcher active at `at` (seconds since the epoch, by its own clock)."""

    host: str
    host_name: str
    pid: int
    at: float

    @property
    def is_alive(self) -> bool:
        """Whether it may be active: recently renewed, and not a dead process of this host."""
        return time.time() - self.at <= SILENCE_S and not (self.host == host_identity() and not _is_running(self.pid))


def _is_running(pid: int) -> bool:
    with contextlib.suppress(psutil.Error):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


class Presence:
    """A launcher's own presence file; `renew` may be called at any rate."""

    def __init__(self, layout: RunLayout) -> None:
        self._path = storage.join(launchers_folder(layout), f"{uuid.uuid4().hex}.json")
        self._next = 0.0

    def renew(self) -> None:
        """Write the file if due; the next renewal makes up for a failed write."""
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + LAUNCHER_BEAT_S
            beat = LauncherPresence(host_identity(), socket.gethostname(), os.getpid(), time.time())
            with contextlib.suppress(OSError):
                write_note(self._path, beat)

    def end(self) -> None:
        with contextlib.suppress(OSError):
            storage.remove_files([self._path])


@contextmanager
def announce_presence(layout: RunLayout) -> Generator[Presence]:
    """Keep a presence file during the block; on exit, remove it and those of dead launchers."""
    presence = Presence(layout)
    presence.renew()
    try:
        yield presence
    finally:
        presence.end()
        remove_dead_launchers(layout)


def remove_dead_launchers(layout: RunLayout) -> None:
    """Remove the presence files of killed launchers; if the store fails, the next launcher retries."""
    folder = launchers_folder(layout)
    with contextlib.suppress(OSError):
        gone = [name for name, beat in read_launchers(layout).items() if not beat.is_alive]
        storage.remove_files([storage.join(folder, name) for name in gone])
        if not storage.list_names(folder):
            storage.remove_tree(folder)


def launchers_folder(layout: RunLayout) -> str:
    return storage.join(layout.state, "launchers")


def read_launchers(layout: RunLayout) -> dict[str, LauncherPresence]:
    """Read the presence records by file name, killed launchers included."""
    beats: dict[str, LauncherPresence] = {}
    for name in storage.list_names(launchers_folder(layout), ".json"):
        presence = read_note(storage.join(launchers_folder(layout), name), LauncherPresence)
        if presence is not None:
            beats[name] = presence
    return beats


@dataclass(frozen=True, slots=True)
class SignsOfLife:
    """Launchers and workers that may be active on a run.

    Attributes:
        who: launchers and workers, in words; empty if there are none.
        last_sign_s: seconds since the last sign of any, by this host's clock; None without one.
        was_killed: a launcher is gone but left its presence file.
    """

    who: tuple[str, ...]
    last_sign_s: float | None
    was_killed: bool

    @property
    def is_alive(self) -> bool:
        return bool(self.who)


def find_signs_of_life(layout: RunLayout) -> SignsOfLife:
    """Look for launchers, leases and workers' progress.

    A dead launcher may leave workers on a cluster: they hold leases, or while planning only write progress.

    Raises:
        OSError: the store failed.
    """
    now = time.time()
    launchers = read_launchers(layout).values()
    leases = read_leases(layout)
    beats = [read_modified_at(info) for _, info in storage.list_files(layout.progress)]
    who = [f"a launcher on {beat.host_name} (process {beat.pid})" for beat in launchers if beat.is_alive]
    who += [f"a worker at shard {shard}" for shard, lease in leases.items() if lease.is_at_work]
    instants = [beat.at for beat in launchers]
    instants += [lease.expires_at - LEASE_S for lease in leases.values() if lease.expires_at]
    instants += [instant for instant in beats if instant is not None]
    last_sign_s = max(0.0, now - max(instants)) if instants else None
    has_ended = any(map(storage.exists, (layout.plan_record, layout.failure, layout.stop)))
    if beats and not who and not launchers and not has_ended and last_sign_s is not None and last_sign_s <= SILENCE_S:
        who.append("a worker that is planning")
    was_killed = any(not beat.is_alive for beat in launchers)
    return SignsOfLife(tuple(who), last_sign_s, was_killed)


def read_modified_at(info: Mapping[str, Any]) -> float | None:
    """Read the modification time from fsspec's info, in seconds since the epoch; None if the store gives none."""
    for key in ("mtime", "LastModified", "updated", "last_modified"):
        value = info.get(key)
        if isinstance(value, (int, float)):
            return float(value)
        if isinstance(value, datetime):
            return value.timestamp()
        if isinstance(value, str):
            with contextlib.suppress(ValueError):
                return datetime.fromisoformat(value).timestamp()
    return None
