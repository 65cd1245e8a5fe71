"""The reason why a worker failed, kept where the launcher can read it.

Runners hand a worker's exception to the launcher as text, if at all. A failing step therefore leaves a small record
on the store before it raises on; the launcher shows it in place of a traceback.
"""

import contextlib
import json
from collections.abc import Generator
from dataclasses import dataclass

from schemas import storage
from schemas.layout import RunLayout


@dataclass(frozen=True, slots=True)
class Failure:
    """Which step failed, the error's type and its message."""

    step: str
    error: str
    message: str


@contextlib.contextmanager
def recorded_failure(layout: RunLayout, step: str) -> Generator[None]:
    """Leave a record of any exception that passes, then let it pass."""
    try:
        yield
    except Exception as error:
        failure = {"step": step, "error": type(error).__name__, "message": str(error)}
        with contextlib.suppress(OSError):
            storage.write_note(layout.failure, json.dumps(failure).encode())
        raise


def read_failure(layout: RunLayout) -> Failure | None:
    """The record that a failing step left, if any."""
    try:
        return Failure(**json.loads(storage.read_bytes(layout.failure)))
    except (OSError, ValueError, TypeError):
        return None
