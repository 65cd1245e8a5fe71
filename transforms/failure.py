"""The reason why a worker failed, kept where the launcher can read it.

Runners hand a worker's exception to the launcher as text, if at all. A failing step therefore leaves a small record
on the store before it raises on; the launcher shows it in place of a traceback.
"""

import contextlib
import json
from collections.abc import Generator
from dataclasses import dataclass

from schemas import storage
from schemas.errors import JobError
from schemas.layout import RunLayout


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a step failed: the error's type, its message, and the exit code it asks for."""

    step: str
    error: str
    message: str
    exit_code: int


@contextlib.contextmanager
def recorded_failure(layout: RunLayout, step: str) -> Generator[None]:
    """Leave a record of any exception that passes, then let it pass."""
    try:
        yield
    except Exception as error:
        exit_code = error.exit_code if isinstance(error, JobError) else 1
        failure = {"step": step, "error": type(error).__name__, "message": str(error), "exit_code": exit_code}
        with contextlib.suppress(OSError):
            storage.write_note(layout.failure, json.dumps(failure).encode())
        raise


def read_failure(layout: RunLayout) -> Failure | None:
    """The record that a failing step left, if any."""
    try:
        return Failure(**json.loads(storage.read_bytes(layout.failure)))
    except (OSError, ValueError, TypeError):
        return None
