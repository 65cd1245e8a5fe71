"""How far a run is, whether anybody is at work on it, and how it ended: all read from its files.

The launcher watches its own run this way, `moebeam status` anybody's, and `moebeam clean` asks before it removes.
"""

import contextlib
import json
import os
import socket
import time
import uuid
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime
from decimal import Decimal
from typing import Any

import psutil

from moebeam.jobs.console.summary import ProgressSnapshot
from moebeam.schemas.answers import ShardCommit, Totals
from moebeam.schemas.errors import OutputError
from moebeam.schemas.store import storage
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.transforms.answer.waste import read_waste, waste_names
from moebeam.transforms.durable.commit import read_commit
from moebeam.transforms.durable.heartbeat import read_progress
from moebeam.transforms.durable.lease import LEASE_S, host_identity, read_leases
from moebeam.transforms.plan.plan_record import PlanRecord, read_plan
from moebeam.transforms.publish.manifest import cost_of

LAUNCHER_BEAT_S = 5.0
"""How often a launcher says that it lives."""

SILENCE_S = 60.0
"""After so long without a sign a launcher or worker counts as gone."""


class Watch:
    """How far a run is, look by look; each commit is read once."""

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
        """The complete plan, as of the last look."""
        return self._plan

    @property
    def committed(self) -> Totals:
        """What is committed, as of the last look."""
        return _sum(commit.totals for commit in self._commits.values())

    @property
    def wasted(self) -> Totals:
        """What was paid for attempts that were given up, as of the last look."""
        return _sum(self._wasted.values())

    def snapshot(self) -> ProgressSnapshot:
        """One look at the plan, the commits and the heartbeats.

        Raises:
            OSError: the store failed, or files went while they were looked at.
        """
        layout = self._layout
        self._plan = self._plan or read_plan(layout)
        if self._plan is None:
            rows_done = sum(beat.rows_done for beat in read_progress(layout, "plan").values())
            cost = None if self._currency is None else Decimal(0)
            return self._snapshot("plan", rows_done, self._rows_total, Totals(cached_tokens=0), cost)
        for name in storage.list_names(layout.commits, ".json"):
            shard = name.removesuffix(".json")
            if shard not in self._commits and (commit := read_commit(layout, shard)) is not None:
                self._commits[shard] = commit
        for name in waste_names(layout):
            if name not in self._wasted:
                self._wasted[name] = read_waste(layout, name).totals
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
            known = (cost_of(totals)[0] or Decimal(0), cost_of(self.wasted)[0] or Decimal(0))
            cost = sum((*known, *(Decimal(beat.cost) for beat in beats)), Decimal(0))
        stage = "publish" if len(self._commits) == len(self._plan.shards) else "answer"
        done = rows_done + sum(beat.rows_done for beat in beats)
        return self._snapshot(stage, done, self._plan.num_rows, totals + answering, cost)

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
        )


def _sum(totals: Any) -> Totals:
    return sum(totals, Totals(costs={}, rejects_by_type={}))


def read_manifest(layout: RunLayout) -> dict[str, Any] | None:
    """The manifest, complete or not; None if there is none.

    Raises:
        OutputError: it is there but damaged.
    """
    with contextlib.suppress(FileNotFoundError):
        content = storage.read_bytes(layout.manifest)
        try:
            found: object = json.loads(content)
            if isinstance(found, dict) and found.get("status") in ("complete", "incomplete"):
                return found
        except ValueError:
            pass
        raise OutputError(
            f"{layout.manifest}: expected the manifest of a run, found a damaged file; remove it and resume the run, "
            "which writes it again"
        )
    return None


@dataclass(frozen=True, slots=True)
class LauncherPresence:
    """A launcher that is at work on a run, as of `at` (seconds since the epoch, by its own clock)."""

    host: str
    host_name: str
    pid: int
    at: float

    @property
    def is_alive(self) -> bool:
        """Whether it may be at work: heard of lately, and not known to have ended on this host."""
        return time.time() - self.at <= SILENCE_S and not (self.host == host_identity() and not _is_running(self.pid))


def _is_running(pid: int) -> bool:
    with contextlib.suppress(psutil.Error):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


class Presence:
    """A launcher's own beat; `renew` may be called as often as one likes."""

    def __init__(self, layout: RunLayout) -> None:
        self._path = storage.join(launchers_folder(layout), f"{uuid.uuid4().hex}.json")
        self._next = 0.0

    def renew(self) -> None:
        """Write the beat, if it is due; a store that fails now and then does not matter."""
        if time.monotonic() >= self._next:
            self._next = time.monotonic() + LAUNCHER_BEAT_S
            beat = LauncherPresence(host_identity(), socket.gethostname(), os.getpid(), time.time())
            with contextlib.suppress(OSError):
                storage.write_note(self._path, json.dumps(asdict(beat)).encode())

    def end(self) -> None:
        with contextlib.suppress(OSError):
            storage.remove_files([self._path])


@contextmanager
def present(layout: RunLayout) -> Generator[Presence]:
    """Show that a launcher is at work while inside; what launchers left that are gone is removed at the end."""
    presence = Presence(layout)
    presence.renew()
    try:
        yield presence
    finally:
        presence.end()
        forget_gone_launchers(layout)


def forget_gone_launchers(layout: RunLayout) -> None:
    """Remove what launchers left that were killed; a store that fails here leaves it to the next one."""
    folder = launchers_folder(layout)
    with contextlib.suppress(OSError):
        gone = [name for name, beat in read_launchers(layout).items() if not beat.is_alive]
        storage.remove_files([storage.join(folder, name) for name in gone])
        if not storage.list_names(folder):
            storage.remove_tree(folder)


def launchers_folder(layout: RunLayout) -> str:
    return storage.join(layout.state, "launchers")


def read_launchers(layout: RunLayout) -> dict[str, LauncherPresence]:
    """The beats of launchers, also of those that were killed, by name."""
    beats: dict[str, LauncherPresence] = {}
    for name in storage.list_names(launchers_folder(layout), ".json"):
        with contextlib.suppress(OSError, ValueError, TypeError):
            beats[name] = LauncherPresence(
                **json.loads(storage.read_bytes(storage.join(launchers_folder(layout), name)))
            )
    return beats


@dataclass(frozen=True, slots=True)
class SignsOfLife:
    """Who may be at work on a run.

    Attributes:
        who: launchers and workers, in words; empty if nobody is.
        last_sign_s: seconds since the last sign of anybody, by this host's clock; None if there is none.
        was_killed: a launcher left its beat behind and is gone.
    """

    who: tuple[str, ...]
    last_sign_s: float | None
    was_killed: bool

    @property
    def is_alive(self) -> bool:
        return bool(self.who)


def signs_of_life(layout: RunLayout) -> SignsOfLife:
    """Look for launchers, leases and heartbeats.

    A launcher that is gone may have left workers on a cluster: those hold leases, or are planning and then only beat.

    Raises:
        OSError: the store failed.
    """
    now = time.time()
    launchers = read_launchers(layout).values()
    leases = read_leases(layout)
    beats = [modified_at(info) for _, info in storage.list_files(layout.progress)]
    who = [f"a launcher on {beat.host_name} (process {beat.pid})" for beat in launchers if beat.is_alive]
    who += [
        f"a worker at shard {shard}"
        for shard, lease in leases.items()
        if now <= lease.expires_at and not lease.is_held_by_a_dead_process
    ]
    instants = [beat.at for beat in launchers]
    instants += [lease.expires_at - LEASE_S for lease in leases.values() if lease.expires_at]
    instants += [instant for instant in beats if instant is not None]
    last_sign_s = max(0.0, now - max(instants)) if instants else None
    has_ended = any(map(storage.exists, (layout.plan_record, layout.failure, layout.stop)))
    if beats and not who and not launchers and not has_ended and last_sign_s is not None and last_sign_s <= SILENCE_S:
        who.append("a worker that is planning")
    was_killed = any(not beat.is_alive for beat in launchers)
    return SignsOfLife(tuple(who), last_sign_s, was_killed)


def modified_at(info: Mapping[str, Any]) -> float | None:
    """When a file was last written, in seconds since the epoch, as fsspec's info tells it; None if it does not."""
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
