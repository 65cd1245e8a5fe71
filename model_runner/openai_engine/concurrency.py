"""How many requests one endpoint gets at a time: as many as it bears, found by trying.

Shared by all threads of a process (`AdaptiveLimit`, on the engine's event loop), and between the processes of a machine
(`MachineShare`). Growth is fast until the first refusals that are more than chance, small steps from there on.
"""

import asyncio
import contextlib
import fcntl
import hashlib
import os
import secrets
import time
from collections import deque
from pathlib import Path
from typing import IO

from moebeam.model_runner.host_folder import host_folder

START = 16
"""Requests in flight before anything is known of an endpoint."""

_BEARABLE = 0.07
"""Share of refused calls that stops no growth: a shared account sees some at any size, and a refusal costs little."""
_TOO_MANY = 0.15
"""Share of refused calls that shrinks the limit."""
_SHRINK = 0.75
_GROWTH = 0.02
_MIN_OUTCOMES = 16
"""Fewer outcomes say nothing about a share."""


class AdaptiveLimit:
    """Admits requests to an endpoint, first come first served; lives on one event loop and is not locked.

    A refused request keeps its slot while it waits for its next try, so that others do not flood a full endpoint.
    """

    def __init__(self, most: int, *, start: int = START) -> None:
        if most < 1:
            raise ValueError(f"most: expected at least 1, found {most}")
        self._most = most
        self._limit = float(min(start, most))
        self._is_starting = True
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._num_in_flight = 0
        self._num_outcomes = 0
        self._num_refused = 0
        self._num_to_ignore = 0
        self.peak_in_flight = 0

    @property
    def limit(self) -> int:
        """Most requests in flight now."""
        return int(self._limit)

    @property
    def num_in_flight(self) -> int:
        return self._num_in_flight

    def cap(self, most: int) -> None:
        """Set the most that the limit may grow to, as other processes come and go."""
        self._most = max(1, most)
        self._limit = min(self._limit, float(self._most))
        self._admit()

    async def acquire(self) -> None:
        """Wait for a slot."""
        if self._num_in_flight < self.limit and not self._waiting:
            self._enter()
            return
        slot: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(slot)
        try:
            await slot
        except asyncio.CancelledError:
            if slot.done() and not slot.cancelled():
                self.release()
            raise

    def release(self) -> None:
        """Give a slot back."""
        self._num_in_flight -= 1
        self._admit()

    def record_outcome(self, *, is_refused: bool) -> None:
        """Take one outcome of a call into account: the endpoint bore it, or refused it as too many."""
        if self._num_to_ignore > 0:
            # Sent before the limit was lowered: its outcome tells about the old limit.
            self._num_to_ignore -= 1
            return
        self._num_outcomes += 1
        self._num_refused += is_refused
        if self._num_outcomes >= max(_MIN_OUTCOMES, self.limit):
            self._decide(self._num_refused / self._num_outcomes)
            self._num_outcomes = self._num_refused = 0

    def _decide(self, share_refused: float) -> None:
        if share_refused > _TOO_MANY:
            self._is_starting = False
            self._limit = max(1.0, self._limit * _SHRINK)
            self._num_to_ignore = self._num_in_flight
        elif share_refused <= _BEARABLE and self._num_in_flight >= self.limit - 1:
            # A limit that is not reached was not tested either.
            self._limit = min(
                float(self._most),
                self._limit * 2 if self._is_starting else self._limit + max(1.0, self._limit * _GROWTH),
            )
        self._admit()

    def _enter(self) -> None:
        self._num_in_flight += 1
        self.peak_in_flight = max(self.peak_in_flight, self._num_in_flight)

    def _admit(self) -> None:
        while self._waiting and self._num_in_flight < self.limit:
            slot = self._waiting.popleft()
            if not slot.done():
                self._enter()
                slot.set_result(None)


class MachineShare:
    """Divides an endpoint's limit among the processes of this machine that use it, without a process in charge.

    Each process locks a file of its own in a folder for the endpoint and counts the locked files of the others. The
    kernel drops the lock of a process that dies in any way.
    """

    _MAX_AGE_S = 2.0

    def __init__(self, endpoint: str, folder: Path | None = None) -> None:
        digest = hashlib.sha256(endpoint.encode()).hexdigest()[:16]
        self._folder = (folder if folder is not None else host_folder()) / "endpoints" / digest
        self._name = f"{os.getpid()}-{secrets.token_hex(4)}"
        self._held: IO[bytes] | None = None
        self._counted_at = -self._MAX_AGE_S
        self._num_processes = 1

    def num_processes(self) -> int:
        """How many processes use the endpoint, this one included; counted anew every few seconds.

        Where no file can be locked, such as on a read-only machine, each process counts itself alone.
        """
        now = time.monotonic()
        if now - self._counted_at >= self._MAX_AGE_S:
            self._counted_at = now
            with contextlib.suppress(OSError):
                self._hold()
                self._num_processes = 1 + sum(_has_holder(path) for path in self._others())
        return self._num_processes

    def divide(self, most: int) -> int:
        """This process's part of a limit, at least 1."""
        return max(1, most // self.num_processes())

    def close(self) -> None:
        """Leave the whole limit to the others."""
        if self._held is not None:
            with contextlib.suppress(OSError):
                (self._folder / self._name).unlink()
            self._held.close()
            self._held = None

    def _hold(self) -> None:
        path = self._folder / self._name
        while self._held is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            held = path.open("wb")
            fcntl.flock(held, fcntl.LOCK_EX)
            # Another process may have taken the file, not locked yet, for one left over.
            if path.exists() and os.path.samestat(path.stat(), os.fstat(held.fileno())):
                self._held = held
            else:
                held.close()

    def _others(self) -> list[Path]:
        return [path for path in self._folder.iterdir() if path.name != self._name]


def _has_holder(path: Path) -> bool:
    """Whether a process holds the file; a file that none holds is left over and is removed."""
    try:
        with path.open("rb") as file:
            try:
                # Shared, so that two processes that count at once do not take each other for holders.
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            path.unlink(missing_ok=True)
    except FileNotFoundError:
        pass
    return False
