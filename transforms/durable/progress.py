"""Progress of workers: small files that say how far each shard is, rewritten about once a second.

They pass through the store so that every runner shows progress in the same way. The progress bar reads them, and so do
budgets (`transforms/answer/spending.py`), which count by them what other workers spend. No answer depends on them: one
that is lost or stale costs a budget some precision.

A worker whose provider answers nobody leaves a note of that beside them, so that people see what a run waits for.
"""

import contextlib
import time
from dataclasses import dataclass
from datetime import datetime, timedelta

from moebeam.schemas.store import storage
from moebeam.schemas.store.record_json import read_note, write_note
from moebeam.schemas.store.run_layout import RunLayout

INTERVAL_S = 1.0

OUTAGE_BEAT_S = 10.0
"""How often a note of an outage is renewed while nothing changes in it."""

_OUTAGE_SILENCE_S = 60.0
"""A note that is older was left by a worker that died."""

_OUTAGE = "outage"
_SAME_INSTANT = timedelta(seconds=0.5)


@dataclass(frozen=True, slots=True)
class ShardProgress:
    """Progress of one shard (or of one sorted run, while planning).

    Attributes:
        num_unknown_usage: answers whose tokens their provider did not count; only the estimates have them.
    """

    rows_done: int = 0
    num_requests: int = 0
    num_rejects: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    cost: str = "0"
    num_unknown_usage: int = 0
    estimated_prompt_tokens: int = 0
    estimated_completion_tokens: int = 0


class ProgressWriter:
    """Writes the progress of one stage; `is_due` keeps the writes of a name `INTERVAL_S` apart."""

    def __init__(self, layout: RunLayout, stage: str) -> None:
        self._layout = layout
        self._stage = stage
        self._last: dict[str, float] = {}

    def is_due(self, name: str) -> bool:
        return time.monotonic() - self._last.get(name, 0.0) >= INTERVAL_S

    def write(self, name: str, progress: ShardProgress) -> None:
        """Replace what was written under a name; a store that fails is ignored."""
        self._last[name] = time.monotonic()
        with contextlib.suppress(OSError):
            write_note(self._layout.progress_file(self._stage, name), progress)


def read_progress(layout: RunLayout, stage: str) -> dict[str, ShardProgress]:
    """The latest progress under every name of a stage; files that cannot be read are skipped."""
    found: dict[str, ShardProgress] = {}
    for file in storage.list_names(layout.progress, ".json"):
        if file.startswith(f"{stage}-"):
            progress = read_note(storage.join(layout.progress, file), ShardProgress)
            if progress is not None:
                found[file.removeprefix(f"{stage}-").removesuffix(".json")] = progress
    return found


@dataclass(frozen=True, slots=True)
class OutageNote:
    """A provider that a worker waits for, as `model_runner.protocol.Outage` says it.

    Attributes:
        written_at: seconds since the epoch, by the worker's clock.
    """

    provider: str
    since: datetime
    next_try_at: datetime
    message: str
    written_at: float

    def tells_the_same(self, other: "OutageNote") -> bool:
        """Whether people would read the same of both; instants that are worked out anew differ by microseconds."""
        gaps = (self.since - other.since, self.next_try_at - other.next_try_at)
        return (self.provider, self.message) == (other.provider, other.message) and all(
            abs(gap) < _SAME_INSTANT for gap in gaps
        )


class OutageWriter:
    """Keeps the note of one shard: writes what changed, renews it, and removes it once the provider answers."""

    def __init__(self, layout: RunLayout, shard: str) -> None:
        self._path = layout.progress_file(_OUTAGE, shard)
        self._last: OutageNote | None = None

    def show(self, note: OutageNote | None) -> None:
        """Leave a note, or none; a store that fails is ignored, and asked again by the next call that changes it."""
        last = self._last
        if note is None:
            if last is not None:
                with contextlib.suppress(OSError):
                    storage.remove_files([self._path])
            self._last = None
            return
        is_new = last is None or not note.tells_the_same(last)
        if is_new or (last is not None and note.written_at - last.written_at >= OUTAGE_BEAT_S):
            with contextlib.suppress(OSError):
                write_note(self._path, note)
                self._last = note


def read_outage(layout: RunLayout) -> OutageNote | None:
    """The outage that workers have waited for longest; None if there is none, or nobody waits any more."""
    found: list[OutageNote] = []
    for file in storage.list_names(layout.progress, ".json"):
        if file.startswith(f"{_OUTAGE}-"):
            note = read_note(storage.join(layout.progress, file), OutageNote)
            if note is not None and abs(time.time() - note.written_at) <= _OUTAGE_SILENCE_S:
                found.append(note)
    return min(found, key=lambda note: note.since, default=None)
