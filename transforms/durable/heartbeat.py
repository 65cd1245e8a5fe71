"""Heartbeats: small files that say how far a worker is, for the progress bar.

They pass through the store so that every runner shows progress in the same way. Nothing depends on them: a lost or
stale heartbeat changes no result.
"""

import contextlib
import json
import time
from dataclasses import asdict, dataclass, fields

from moebeam.schemas.store import storage
from moebeam.schemas.store.run_layout import RunLayout

INTERVAL_S = 1.0


@dataclass(frozen=True, slots=True)
class ShardProgress:
    """Progress of one shard (or one run, while planning)."""

    rows_done: int = 0
    num_requests: int = 0
    num_rejects: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    cost: str = "0"


class Heartbeat:
    """Writes the beats of one stage; `is_due` keeps them `INTERVAL_S` apart."""

    def __init__(self, layout: RunLayout, stage: str) -> None:
        self._layout = layout
        self._stage = stage
        self._last: dict[str, float] = {}

    def is_due(self, name: str) -> bool:
        return time.monotonic() - self._last.get(name, 0.0) >= INTERVAL_S

    def beat(self, name: str, beat: ShardProgress) -> None:
        self._last[name] = time.monotonic()
        content = json.dumps(asdict(beat)).encode()
        with contextlib.suppress(OSError):
            storage.write_note(self._layout.heartbeat(self._stage, name), content)


def read_progress(layout: RunLayout, stage: str) -> dict[str, ShardProgress]:
    """The latest beat of every name of a stage."""
    beats: dict[str, ShardProgress] = {}
    known = {field.name for field in fields(ShardProgress)}
    for name in storage.list_names(layout.progress, ".json"):
        if not name.startswith(f"{stage}-"):
            continue
        try:
            values = json.loads(storage.read_bytes(storage.join(layout.progress, name)))
        except (OSError, ValueError):
            continue
        beats[name.removeprefix(f"{stage}-").removesuffix(".json")] = ShardProgress(
            **{k: v for k, v in values.items() if k in known}
        )
    return beats
