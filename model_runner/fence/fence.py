"""The fence: runs a program that came with a job or a checkpoint, item by item, where it can harm nothing but itself.

Templates are programs of other people. No list of what they must not do is ever complete, and C code cannot be
interrupted, so they run in a small process beside ours, under limits that the kernel keeps: processor time for each
item, and address space. An item that takes too much is an error value; the process is replaced, and goes on with the
next one. A few processes are kept warm for all threads. Items travel in batches: one costs some microseconds.
"""

import atexit
import os
import threading
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

from moebeam.model_runner.fence.child import COMPILING, FIRST_ITEM, OUT_OF_MEMORY, WAITING, Outcome
from moebeam.model_runner.fence.fenced_process import FencedProcess
from moebeam.model_runner.fence.limits import MAX_CPU_S, MAX_MEMORY_BYTES
from moebeam.schemas import errors
from moebeam.schemas.errors import (
    EngineLoadError,
    JobError,
    JobFileError,
    PipelineFailed,
    RowError,
    TemplateBudgetExceeded,
)

_MAX_SILENCE_S = 60.0
"""For a process that takes no processor time either, because it was stopped or the machine swaps."""

_BATCH_ITEMS = 128
_MAX_PROCESSES = 8

Result: TypeAlias = "str | list[str] | RowError"

_ERRORS: Mapping[str, type[RowError] | type[JobError]] = {
    name: error
    for name, error in vars(errors).items()
    if isinstance(error, type) and (issubclass(error, RowError) or error in (JobFileError, EngineLoadError))
}
"""What a program may end with. A process that runs code of others names none of ours but these."""


@dataclass(frozen=True, slots=True)
class Program:
    """What runs behind the fence.

    Attributes:
        entry: `module:function`, one of ours; given `source` it returns a function of one item, whose result is text or
            a list of texts. A `RowError` of either is the item's result; a `JobError` is raised.
        source: pickled; a bytes value.
        what: names the program in messages.
        max_cpu_s: processor time for one item, and for compiling the source.
        limit_key: the key of the job file that sets it; None where none does.
        max_memory: bytes of address space for one item, beyond what the process has.
    """

    entry: str
    source: bytes
    what: str
    max_cpu_s: float = MAX_CPU_S
    limit_key: str | None = None
    max_memory: int = MAX_MEMORY_BYTES

    def run(self, items: Sequence[object]) -> list[Result]:
        """One result for each item, in order.

        Raises:
            JobError: raised by the program, `PipelineFailed` where no process can be started.
        """
        results: list[Result] = []
        for start in range(0, len(items), _BATCH_ITEMS):
            results += self._run_batch(items[start : start + _BATCH_ITEMS])
        return results

    def _run_batch(self, items: Sequence[object]) -> list[Result]:
        if not items:
            return []
        with _pool().borrow() as process:
            request = self.entry, self.source, self.max_cpu_s, self.max_memory
            outcomes = list(process.run(request, items, max_silence_s=_MAX_SILENCE_S))
        results = [self._read(outcome) for outcome in outcomes]
        if (num_left := len(items) - len(results)) == 0:
            return results
        step = process.step
        if step == WAITING:
            if process.is_fresh:
                raise PipelineFailed(f"the process that renders templates ended at its start: {process.exit_cause}")
            return results + self._run_batch(items[len(results) :])
        if step == COMPILING:
            return results + [self._explain_excess(process.exit_cause)] * num_left
        # Items before the one it died over may have been rendered, but not sent yet.
        culprit = step - FIRST_ITEM
        if culprit < len(results):
            return results + self._run_batch(items[len(results) :])
        again = process.was_silent and len(items) > 1
        return [
            *results,
            *self._run_batch(items[len(results) : culprit]),
            *(self._run_batch([items[culprit]]) if again else [self._explain_excess(process.exit_cause)]),
            *self._run_batch(items[culprit + 1 :]),
        ]

    def _read(self, outcome: Outcome) -> Result:
        if not isinstance(outcome, tuple):
            return outcome
        name, message = outcome
        if name == OUT_OF_MEMORY:
            return self._explain_memory()
        error = _ERRORS.get(name)
        if error is None:
            return TemplateBudgetExceeded(f"{self.what}: expected an error that rows may have, found {name[:100]!r}")
        if issubclass(error, RowError):
            return error(message)
        raise error(message)

    def _explain_excess(self, exit_cause: str) -> RowError:
        if exit_cause.startswith("SIGPROF"):
            key = f" ({self.limit_key})" if self.limit_key is not None else ""
            return TemplateBudgetExceeded(
                f"{self.what}: expected at most {self.max_cpu_s:g} s of processor time for one row{key}, found more"
            )
        if exit_cause.startswith("SIGABRT"):  # Rust and C++ abort where they get no memory.
            return self._explain_memory()
        return TemplateBudgetExceeded(f"{self.what}: ended the process in which it ran with {exit_cause}")

    def _explain_memory(self) -> TemplateBudgetExceeded:
        return TemplateBudgetExceeded(
            f"{self.what}: expected at most {self.max_memory >> 20} MiB of memory for one row, found more"
        )


class _Pool:
    """The warm processes of this process."""

    def __init__(self) -> None:
        self._turns = threading.BoundedSemaphore(min(os.cpu_count() or 1, _MAX_PROCESSES))
        self._idle: list[FencedProcess] = []

    @contextmanager
    def borrow(self) -> Generator[FencedProcess]:
        """A process for this thread alone; waits for one."""
        with self._turns:
            try:
                process = self._idle.pop()
            except IndexError:
                process = FencedProcess()
            yield process
            if process.is_open:
                self._idle.append(process)

    def close(self) -> None:
        """End all that are idle."""
        while self._idle:
            self._idle.pop().close(grace_s=1.0)


_pools: dict[int, _Pool] = {}
"""By the process's id: a fork must not speak with its parent's."""


def _pool() -> _Pool:
    pid = os.getpid()
    return _pools.get(pid) or _pools.setdefault(pid, _Pool())


@atexit.register
def _close_pool() -> None:
    if (pool := _pools.get(os.getpid())) is not None:
        pool.close()
