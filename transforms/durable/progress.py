"""Progress of workers: small files that say how far each shard is, rewritten about once a second.

They pass through the store so that every runner shows progress in the same way. The progress bar reads them, and so do
budgets (`transforms/answer/spending.py`), which count by them what other workers spend. No answer depends on them: one
that is lost or stale costs a budget some precision.
"""

import contextlib
import time
from dataclasses import dataclass

from moebeam.schemas.store import storage
from moebeam.schemas.store.record_json import read_note, write_note
from moebeam.schemas.store.run_layout import RunLayout

INTERVAL_S = 1.0


@dataclass(frozen=True, slots=True)
class ShardProgress:
    """Progress of one shard (or of one sorted run, while planning)."""

    rows_done: int = 0
    num_requests: int = 0
    num_rejects: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    cost: str = "0"


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
