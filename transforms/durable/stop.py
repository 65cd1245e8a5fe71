"""Stop: a note on the store that ends a run early; every worker looks for it before each shard and within shards.

Left by the launcher (a signal) or by a worker (a limit, a row that must not fail). No request leaves any more; shards
at work end (`transforms/answer/watch.py`) and no other one starts; *publish* then writes an incomplete manifest with
the reason. A run that plans ends with an error. The note stays where a launcher ends before its run is published, so
that `moebeam status` can tell why; the next launch removes it.

Threads of the launcher's own process hear of its stop at once (`announce_stop`), not by looking at the store.
"""

import contextlib
import threading
import time
from collections.abc import Generator
from dataclasses import dataclass
from typing import Literal, TypeAlias

from moebeam.schemas.store import storage
from moebeam.schemas.store.record_json import decode_record, write_note
from moebeam.schemas.store.run_layout import RunLayout

StopKind: TypeAlias = Literal[
    "signal", "on_error", "max_cost", "max_input_tokens", "max_output_tokens", "max_requests", "deadline", "lost_lease"
]

SIGNAL = "signal"
ON_ERROR = "on_error"
LOST_LEASE = "lost_lease"
"""Ends one attempt at a shard, whose lease another holder has; never written to the store, since the run goes on."""

LOOK_S = 1.0
"""Least seconds between two looks of a process at the store for a run's note."""


@dataclass(frozen=True, slots=True)
class StopReason:
    """The key or event that stops the run, and a sentence for people."""

    kind: StopKind
    message: str


BY_SIGNAL = StopReason(SIGNAL, "stopped by a signal")


class PlanningStopped(Exception):
    """The run was asked to stop while it planned. The step ends, and with it the pipeline, wherever it runs: a part of
    the rows must never become a plan."""


class _Stops:
    """What the threads of a process know of stops, by output folder."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.announced: dict[str, StopReason] = {}
        self.looked_at: dict[str, float] = {}
        self.listeners: dict[str, list[threading.Event]] = {}


_stops = _Stops()


def request_stop(layout: RunLayout, reason: StopReason) -> None:
    """Ask all workers to stop; the first reason wins.

    Raises:
        OSError: the store failed.
    """
    if not storage.exists(layout.stop):
        write_note(layout.stop, reason)


def read_stop(layout: RunLayout) -> StopReason | None:
    """Why the run was asked to stop; None if it was not.

    Raises:
        OSError: the store failed.
    """
    with contextlib.suppress(FileNotFoundError):
        content = storage.read_bytes(layout.stop)
        try:
            return decode_record(content, StopReason)
        except ValueError:
            # From another version, or damaged: its presence is what counts.
            return StopReason(SIGNAL, f"stopped; why is not known, because {layout.stop} is damaged")
    return None


def announce_stop(layout: RunLayout, reason: StopReason) -> None:
    """Tell the threads of this process, without the store, which may be slow; for the launcher of the run."""
    with _stops.lock:
        _stops.announced.setdefault(layout.output, reason)
        for event in _stops.listeners.get(layout.output, ()):
            event.set()


def forget_stop(layout: RunLayout) -> None:
    """Take an announcement back, before and after an attempt."""
    with _stops.lock:
        _stops.announced.pop(layout.output, None)
        _stops.looked_at.pop(layout.output, None)


def find_stop(layout: RunLayout) -> StopReason | None:
    """As `read_stop`, with this process's announcements, and at most one look at the store in `LOOK_S`.

    None therefore means that nothing was found lately. A store that fails counts as silent.
    """
    with _stops.lock:
        if (announced := _stops.announced.get(layout.output)) is not None:
            return announced
        if time.monotonic() - _stops.looked_at.get(layout.output, -LOOK_S) < LOOK_S:
            return None
        _stops.looked_at[layout.output] = time.monotonic()
    with contextlib.suppress(OSError):
        return read_stop(layout)
    return None


def check_planning(layout: RunLayout) -> None:
    """Called between batches by the steps that plan.

    Raises:
        PlanningStopped: the run was asked to stop.
    """
    if (reason := find_stop(layout)) is not None:
        raise PlanningStopped(reason.message)


@contextlib.contextmanager
def hear_stop(layout: RunLayout, event: threading.Event) -> Generator[None]:
    """Set an event as soon as a stop is announced in this process, while the block lasts."""
    with _stops.lock:
        listeners = _stops.listeners.setdefault(layout.output, [])
        listeners.append(event)
        if layout.output in _stops.announced:
            event.set()
    try:
        yield
    finally:
        with _stops.lock:
            listeners.remove(event)
            if not listeners:
                _stops.listeners.pop(layout.output, None)


def wait_unless_stopped(layout: RunLayout, seconds: float) -> None:
    """Wait, but no longer than until a stop is announced in this process."""
    event = threading.Event()
    with hear_stop(layout, event):
        event.wait(seconds)
