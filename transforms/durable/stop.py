"""Stop: a note on the store that ends a run early; every worker looks for it before each shard.

Left by the launcher (a signal) or by a worker (a limit, a row that must not fail). Shards at work end and no other one
starts; *publish* then writes an incomplete manifest with the reason.
"""

import contextlib
from dataclasses import dataclass
from typing import Literal, TypeAlias

from moebeam.schemas.store import storage
from moebeam.schemas.store.record_json import RecordJson, write_note
from moebeam.schemas.store.run_layout import RunLayout

StopKind: TypeAlias = Literal[
    "signal", "on_error", "max_cost", "max_input_tokens", "max_output_tokens", "max_requests", "deadline"
]

SIGNAL = "signal"
ON_ERROR = "on_error"


@dataclass(frozen=True, slots=True)
class StopReason:
    """The key or event that stops the run, and a sentence for people."""

    kind: StopKind
    message: str


BY_SIGNAL = StopReason(SIGNAL, "stopped by a signal")


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
            return RecordJson(StopReason).decode(content)
        except ValueError:
            # From another version, or torn by a machine failure: its presence is what counts.
            return BY_SIGNAL
    return None
