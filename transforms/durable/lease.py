"""Leases: one worker answers a shard while others wait for its commit, so that nothing is paid twice while it lives.

Part of *answer*, around *commit*. A lease only saves money; correctness rests on the exclusive commit record. The worst
that a race here costs is doing a shard's work twice.

A shard's leases form a chain, `<shard>.0.json`, `<shard>.1.json`, ...: the last one counts. A worker that finds it dead
creates the next one exclusively, so that of any number of successors one wins, on every store that can hold a commit.
The holder renews its lease by overwriting it; nobody else writes it.

A holder may be stopped for longer than its lease lasts, and wake beside its successor. So it asks its lease before each
request leaves (`HeldLease.confirm`): that is a look at the clock as long as the last renewal is recent, and else a look
at the store. One that has lost its shard sends nothing more. What it was still answered is journaled under its own
generation, the fencing token in the names of journals, and never mixed with what its successor journals.
"""

import asyncio
import contextlib
import os
import socket
import threading
import time
import uuid
from collections.abc import Generator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import psutil

from moebeam.schemas.store import storage
from moebeam.schemas.store.record_json import decode_record, encode_record, write_note
from moebeam.schemas.store.run_layout import RunLayout

LEASE_S = 60.0
"""Seconds that a lease holds after its last renewal."""

RENEWAL_S = 15.0
CERTAIN_S = 20.0
"""Seconds after a renewal during which the holder need not look whether it holds its shard; well below `LEASE_S`."""

POLL_S = 0.5
"""Seconds between two looks for a commit while waiting."""

MAX_CLOCK_SKEW_S = 30.0
"""Most that two hosts' clocks may differ before one takes over from the other too early."""

_START_TOLERANCE_S = 2.0
"""A process's start time is relative to the boot time, which moves with the clock."""

_STEADY_CLOCK: int = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)

_held: set[str] = set()
"""Attempts whose leases threads of this process hold."""


@dataclass(frozen=True, slots=True)
class Lease:
    """The holder of a shard.

    Attributes:
        attempt: unique to this claim.
        host: machine and process namespace, see `host_identity`; `pid` and `process_started` (seconds since the epoch)
            are valid there.
        num_renewals: makes the content of every renewal differ.
        expires_at: seconds since the epoch by the holder's clock; 0 once released.
    """

    attempt: str
    host: str
    pid: int
    process_started: float
    num_renewals: int
    expires_at: float

    @property
    def is_at_work(self) -> bool:
        """Whether the holder's time is not up and its process, as far as can be seen, is not gone."""
        return time.time() <= self.expires_at and not self.is_held_by_a_dead_process

    @property
    def is_held_by_a_dead_process(self) -> bool:
        """Whether the holder ran on this host and is gone; False for holders elsewhere."""
        if self.host != host_identity():
            return False
        if self.pid == os.getpid():
            return self.attempt not in _held
        try:
            process = psutil.Process(self.pid)
            is_same = abs(process.create_time() - self.process_started) <= _START_TOLERANCE_S
            return not is_same or process.status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True
        except psutil.Error:
            return False


@cache
def _boot_identity() -> str:
    """Identity of this boot of the machine and of the process namespace, as far as the system tells."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + "/" + os.readlink("/proc/self/ns/pid")
    return f"{psutil.boot_time():.0f}"


def host_identity() -> str:
    """Equal in two processes only if a process id means the same in both."""
    return f"{socket.gethostname()}/{_boot_identity()}"


class ShardLease:
    """One worker's view of a shard's leases: claims, waits, takes over."""

    def __init__(self, layout: RunLayout, shard: str) -> None:
        self._layout = layout
        self._shard = shard
        self._generation = 0
        self._seen: bytes = b""
        self._seen_since = time.monotonic()

    @contextlib.contextmanager
    def hold(self) -> Generator["HeldLease | None"]:
        """Yield the lease if the shard is ours to answer, and renew it until the block ends; None if it is not.

        At the end the lease is removed where a commit stands in its place, and else released; one that was lost is left
        as it is.

        Raises:
            OSError: the store failed.
        """
        lease = self._claim()
        if lease is None:
            yield None
            return
        held = HeldLease(self._layout, self._shard, self._generation, lease)
        try:
            yield held
        finally:
            held.end()
            _held.discard(lease.attempt)

    def _claim(self) -> Lease | None:
        """Claim the shard; None while another holder lives."""
        while (content := _read(self._layout.lease(self._shard, self._generation))) is not None:
            following = _read(self._layout.lease(self._shard, self._generation + 1))
            if following is None and self._is_living(content):
                return None
            self._generation += 1
        lease = Lease(
            attempt=uuid.uuid4().hex,
            host=host_identity(),
            pid=os.getpid(),
            process_started=process_started(os.getpid()),
            num_renewals=0,
            expires_at=time.time() + LEASE_S,
        )
        _held.add(lease.attempt)
        try:
            if storage.create_exclusive(self._layout.lease(self._shard, self._generation), encode_record(lease)):
                return lease
        except BaseException:
            _held.discard(lease.attempt)
            raise
        _held.discard(lease.attempt)
        return None

    def _is_living(self, content: bytes) -> bool:
        """Whether the holder may still be at work, judged by its process, its clock and how long it has been silent."""
        if content != self._seen:
            self._seen, self._seen_since = content, time.monotonic()
        if time.monotonic() - self._seen_since > LEASE_S:
            return False
        try:
            lease = decode_record(content, Lease)
        except ValueError:
            # Written by a later version, or damaged: only silence tells.
            return True
        return time.time() <= lease.expires_at + MAX_CLOCK_SKEW_S and not lease.is_held_by_a_dead_process


class HeldLease:
    """A lease at work: renewed by a thread of its own, and asked before each request leaves. Thread-safe.

    Attributes:
        generation: its place in the shard's chain, higher than that of all earlier holders.
    """

    def __init__(self, layout: RunLayout, shard: str, generation: int, lease: Lease) -> None:
        self.generation = generation
        self._layout = layout
        self._shard = shard
        self._lease = lease
        self._path = layout.lease(shard, generation)
        self._renewed_at = _read_clocks()
        self._is_lost = False
        self._is_over = False
        self._asking: list[Future[bool]] = []
        self._state = threading.Condition()
        self._keeper = threading.Thread(target=self._keep, name=f"lease-{shard}", daemon=True)
        self._keeper.start()

    @property
    def is_lost(self) -> bool:
        """Whether somebody else answers the shard, or has; False as long as nobody has looked."""
        return self._is_lost

    async def confirm(self) -> bool:
        """Whether the shard is still ours, for certain; looks at the store if the last renewal was not recent.

        Raises:
            OSError: the store failed, and the lease may have ended meanwhile.
        """
        if not self._is_lost and _seconds_since(self._renewed_at) < CERTAIN_S:
            return True
        return await asyncio.wrap_future(self.ask())

    def ask(self) -> Future[bool]:
        """Renew the lease now; the future says whether it is still ours, or raises OSError as `confirm` does."""
        future: Future[bool] = Future()
        future.set_running_or_notify_cancel()
        with self._state:
            self._asking.append(future)
            if self._is_over:
                self._answer()
            self._state.notify()
        return future

    def end(self) -> None:
        """Renew it no more, and let it go."""
        with self._state:
            self._is_over = True
            self._state.notify()
        self._keeper.join()
        with contextlib.suppress(OSError):
            if self._is_lost:
                return
            if storage.exists(self._layout.shard_commit(self._shard)):
                storage.remove_files([self._path])
            else:
                write_note(self._path, replace(self._lease, num_renewals=-1, expires_at=0.0))

    def _keep(self) -> None:
        """Renew the lease until it ends or is lost; a failed renewal is retried at the next interval."""
        while True:
            with self._state:
                self._state.wait_for(lambda: self._is_over or self._asking, timeout=RENEWAL_S)
                if self._is_over or self._is_lost:
                    self._answer()
                    if self._is_over:
                        return
                    continue
            error: OSError | None = None
            try:
                self._renew()
            except OSError as found:
                error = found
            with self._state:
                # Nobody takes over before the lease ends: until then the store need not answer.
                self._answer(error if _seconds_since(self._renewed_at) >= LEASE_S else None)

    def _renew(self) -> None:
        """Renew the lease, unless another holder has followed or the shard is committed.

        Raises:
            OSError: the store failed.
        """
        at = _read_clocks()
        if _read(self._path) is None or self._is_succeeded():
            self._is_lost = True
            return
        self._lease = replace(self._lease, num_renewals=self._lease.num_renewals + 1, expires_at=time.time() + LEASE_S)
        write_note(self._path, self._lease)
        # Looked at again: a successor may have come in between, and whoever comes later has seen the renewal.
        self._is_lost = self._is_succeeded()
        self._renewed_at = at

    def _is_succeeded(self) -> bool:
        layout, shard = self._layout, self._shard
        return storage.exists(layout.lease(shard, self.generation + 1)) or storage.exists(layout.shard_commit(shard))

    def _answer(self, error: OSError | None = None) -> None:
        """Answer those who ask; inside of the lock."""
        asking, self._asking = self._asking, []
        for future in asking:
            if error is not None and not self._is_lost:
                future.set_exception(error)
            else:
                future.set_result(not self._is_lost)


def has_lost_a_holder(layout: RunLayout) -> bool:
    """Whether a process died while answering a shard, in this attempt of the run or an earlier one.

    Raises:
        OSError: the store failed.
    """
    now = time.time()
    return any(
        lease.is_held_by_a_dead_process or lease.expires_at < now - MAX_CLOCK_SKEW_S
        for lease in _read_all(layout).values()
        if lease.expires_at  # else it was released
    )


def read_leases(layout: RunLayout) -> dict[str, Lease]:
    """The last lease of every shard that has one, whether or not its holder lives."""
    leases: dict[str, Lease] = {}
    for (shard, _), lease in sorted(_read_all(layout).items()):
        leases[shard] = lease
    return leases


def _read_all(layout: RunLayout) -> dict[tuple[str, int], Lease]:
    """All readable leases, by shard and place in its chain."""
    leases: dict[tuple[str, int], Lease] = {}
    for name in storage.list_names(layout.leases, ".json"):
        shard, _, generation = name.removesuffix(".json").rpartition(".")
        if not generation.isdecimal():
            continue  # no lease: somebody else's file
        content = _read(layout.lease(shard, int(generation)))
        with contextlib.suppress(ValueError):
            if content is not None:
                leases[shard, int(generation)] = decode_record(content, Lease)
    return leases


def _read_clocks() -> tuple[float, float]:
    """Two clocks, in seconds: one that goes on while the machine sleeps, and the wall's, which a paused guest sets."""
    return time.clock_gettime(_STEADY_CLOCK), time.time()


def _seconds_since(clocks: tuple[float, float]) -> float:
    """Seconds that have passed at most, whichever clock stood still."""
    return max(now - then for now, then in zip(_read_clocks(), clocks, strict=True))


@cache
def process_started(pid: int) -> float:
    """Start time of a process, in seconds since the epoch; with the process id it identifies the process."""
    return psutil.Process(pid).create_time()


def _read(path: str) -> bytes | None:
    with contextlib.suppress(FileNotFoundError):
        return storage.read_bytes(path)
    return None
