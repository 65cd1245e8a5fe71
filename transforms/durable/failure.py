"""The reason why a worker failed, kept where the launcher can read it.

Runners pass a worker's exception to the launcher as text, if at all. A failing step therefore writes a small record to
the store before it re-raises; the launcher shows it instead of a traceback. A worker process that dies leaves no
record, and Beam's local runner may wait for it forever: `WorkerWatch` notices.
"""

import contextlib
import threading
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

from moebeam.schemas.errors import FileDamaged
from moebeam.schemas.redaction.hide import hide_in_exception, hide_in_message
from moebeam.schemas.store import storage
from moebeam.schemas.store.record_json import read_note, write_note
from moebeam.schemas.store.run_layout import RunLayout


@dataclass(frozen=True, slots=True)
class Failure:
    """Which step failed, the error's type and its message."""

    step: str
    error: str
    message: str


@contextlib.contextmanager
def record_failure(layout: RunLayout, step: str) -> Generator[None]:
    """Leave a record of any exception that passes, then let it pass."""
    try:
        yield
    except Exception as error:
        hide_in_exception(error)
        with contextlib.suppress(OSError):
            write_note(layout.failure, Failure(step, type(error).__name__, hide_in_message(str(error))))
        raise


def read_failure(layout: RunLayout) -> Failure | None:
    """The record that a failing step left, if any; one that cannot be read still says that a step failed.

    Raises:
        OSError: the store failed.
    """
    failure = read_note(layout.failure, Failure)
    if failure is None and storage.exists(layout.failure):
        return Failure("unknown", FileDamaged.__name__, f"{layout.failure} is damaged, which said what failed")
    return failure


_WORKER_THREAD = "run_worker"
"""The thread in which Beam's local runner waits for a worker process; it raises when that one ends badly."""


class WorkerWatch:
    """Notices when a worker process of Beam's local runner dies, while it is entered; made for the launcher.

    A run cannot go on without the worker, but the runner does not always end it: the launcher has to, once it has had
    its time.
    """

    def __init__(self) -> None:
        self._lost_at: float | None = None
        self._reason = ""
        self._before: Callable[[Any], object] = threading.excepthook

    def __enter__(self) -> "WorkerWatch":
        self._before = threading.excepthook
        threading.excepthook = self._notice
        return self

    def __exit__(self, *unused: object) -> None:
        threading.excepthook = self._before

    @property
    def reason(self) -> str:
        """What became of the first worker that died, in the runner's words; empty while none has."""
        return self._reason

    def has_lost_a_worker_for(self, seconds: float) -> bool:
        """Whether a worker died at least so long ago."""
        return self._lost_at is not None and time.monotonic() - self._lost_at >= seconds

    def _notice(self, args: threading.ExceptHookArgs) -> None:
        if args.thread is None or args.thread.name != _WORKER_THREAD or not isinstance(args.exc_value, RuntimeError):
            self._before(args)
        elif self._lost_at is None:
            self._reason = str(args.exc_value)
            self._lost_at = time.monotonic()
