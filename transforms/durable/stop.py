"""Why a run is to stop before its end: a note on the store that every worker looks for before each shard.

Left by the launcher (a signal) or by a worker (a limit, a row that must not fail). Shards at work end; no other one
starts; *publish* then writes an incomplete manifest with this reason.
"""

import contextlib
import json
from dataclasses import asdict, dataclass
from typing import Literal, TypeAlias

from moebeam.schemas.store import storage
from moebeam.schemas.store.run_layout import RunLayout

StopKind: TypeAlias = Literal[
    "signal", "on_error", "max_cost", "max_input_tokens", "max_output_tokens", "max_requests", "deadline"
]

SIGNAL = "signal"
ON_ERROR = "on_error"


@dataclass(frozen=True, slots=True)
class StopReason:
    """Which key or event stops the run, and the sentence that a person reads."""

    kind: StopKind
    message: str


BY_SIGNAL = StopReason(SIGNAL, "stopped by a signal")


def request_stop(layout: RunLayout, reason: StopReason) -> None:
    """Ask all workers to stop; the first reason stays.

    Raises:
        OSError: the store failed.
    """
    if not storage.exists(layout.stop):
        storage.write_note(layout.stop, json.dumps(asdict(reason)).encode())


def read_stop(layout: RunLayout) -> StopReason | None:
    """Why the run was asked to stop; None if it was not.

    Raises:
        OSError: the store failed.
    """
    with contextlib.suppress(FileNotFoundError):
        content = storage.read_bytes(layout.stop)
        try:
            return StopReason(**json.loads(content))
        except (ValueError, TypeError):
            # Left by another version, or torn with the machine: that it is there is what counts.
            return BY_SIGNAL
    return None
