"""A store and an engine that fail once, where they are told to: every file operation and every engine call in turn.

Operations are named by function, path and occurrence, so that a clean run lists them and a later run can spoil exactly
one of them, whatever the order in which threads come.
"""

import contextlib
import errno
import io
import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal
from unittest.mock import patch

from moebeam.jobs.run.launch import launch
from moebeam.model_runner.fake_engine.runner import FakeRunner
from moebeam.schemas.errors import EngineFailed, JobError
from moebeam.schemas.records import Completion, Request
from moebeam.schemas.store import storage
from tests.support.disturbances.disturbed_runs import Tables, Work, problems_of

READS = ("open_input", "exists", "is_folder", "list_names", "list_files")
WRITES = ("write_whole", "write_note", "create_exclusive", "copy_whole", "sync_folder", "remove_tree", "remove_files")

BY_CLOCK = ("/_moebeam/stop", "/_moebeam/progress", "/_moebeam/leases")

Kind = Literal[
    "error",
    "time-out",
    "reset",
    "breaks halfway",
    "truncated",
    "disk full",
    "error after",
    "time-out after",
    "raises",
    "reset by endpoint",
    "out of memory",
    "error completion",
    "answers twice",
    "never answers",
]
"""What an operation does once: fail before or `after` it was carried out, or hand out a file that ends too early."""

READ_KINDS: tuple[Kind, ...] = ("error", "time-out", "reset")
OPEN_KINDS: tuple[Kind, ...] = ("error", "time-out", "reset", "breaks halfway")
WRITE_KINDS: tuple[Kind, ...] = ("disk full", "error", "error after", "time-out after")
ENGINE_KINDS: tuple[Kind, ...] = (
    "raises",
    "reset by endpoint",
    "time-out",
    "out of memory",
    "error completion",
    "answers twice",
    "never answers",
)


@dataclass(frozen=True, slots=True)
class Operation:
    """One file operation of a run, or the answer to one request (`generate`)."""

    name: str
    path: str
    occurrence: int

    @property
    def is_engine(self) -> bool:
        return self.name == "generate"

    @property
    def kinds(self) -> tuple[Kind, ...]:
        """In which ways it can fail."""
        if self.is_engine:
            return ENGINE_KINDS
        if self.name == "open_input":
            # Of a file of ours a lost end must be found out; of input there is nothing to hold it against.
            return (*OPEN_KINDS, "truncated") if "_moebeam/" in self.path else OPEN_KINDS
        return READ_KINDS if self.name in READS else WRITE_KINDS


@dataclass(frozen=True, slots=True)
class Fault:
    operation: Operation
    kind: Kind


class BrokenFile(io.RawIOBase):
    """A file whose second half cannot be read."""

    def __init__(self, content: bytes) -> None:
        super().__init__()
        self._inner = io.BytesIO(content)
        self._end = len(content) // 2

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        return self._inner.seek(offset, whence)

    def tell(self) -> int:
        return self._inner.tell()

    def readinto(self, buffer: Any, /) -> int:
        if self._inner.tell() + len(buffer) > self._end:
            raise OSError(errno.EIO, "injected: short read")
        return self._inner.readinto(buffer)

    def readall(self) -> bytes:
        raise OSError(errno.EIO, "injected: short read")


class Faults:
    """Counts all operations below some folders, and lets one of them fail."""

    def __init__(self, roots: Iterable[Path], fault: Fault | None = None) -> None:
        self._roots = [str(root) for root in roots]
        self._fault = fault
        self._seen: Counter[tuple[str, str]] = Counter()
        self._lock = threading.Lock()
        self.operations: list[Operation] = []
        self.has_struck = False

    @contextlib.contextmanager
    def installed(self) -> Generator["Faults"]:
        """Stand in front of `moebeam.schemas.store.storage` and of the fake engine while inside."""
        with contextlib.ExitStack() as stack:
            for name in (*READS, *WRITES):
                real = getattr(storage, name)
                stack.enter_context(patch.object(storage, name, self._wrapped(name, real)))
            stack.enter_context(patch.object(FakeRunner, "generate", self._generate(FakeRunner.generate)))
            yield self

    def _strikes(self, name: str, path: str) -> Kind | None:
        """Count an operation; how it is to fail, if it is its turn."""
        for root in self._roots:
            path = path.replace(root, "")
        path = re.sub(r"[0-9a-f]{32}", "*", path)
        with self._lock:
            self._seen[name, path] += 1
            operation = Operation(name, path, self._seen[name, path])
            self.operations.append(operation)
            if self._fault is None or self._fault.operation != operation or self.has_struck:
                return None
            self.has_struck = True
            return self._fault.kind

    def _wrapped(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def operate(path: Any, *args: Any) -> Any:
            where = path if isinstance(path, str) else ",".join(path)
            kind = self._strikes(name, where)
            if kind is None:
                return real(path, *args)
            if kind in ("breaks halfway", "truncated"):
                return _broken(kind, real(path, *args))
            if kind.endswith(" after"):
                real(path, *args)
            raise _store_error(kind, where)

        return operate

    def _generate(self, real: Callable[..., Iterator[Completion]]) -> Callable[..., Iterator[Completion]]:
        def generate(runner: FakeRunner, requests: Iterable[Request]) -> Iterator[Completion]:
            for completion in real(runner, requests):
                kind = self._strikes("generate", "")
                if kind is None:
                    yield completion
                elif kind == "error completion":
                    yield replace(completion, text="", finish_reason="error", error=EngineFailed("injected"))
                elif kind == "answers twice":
                    yield completion
                    yield completion
                elif kind != "never answers":
                    raise _engine_error(kind)

        return generate


def _broken(kind: Kind, source: BinaryIO) -> Any:
    with source:
        content = source.read()
    return io.BytesIO(content[: len(content) // 2]) if kind == "truncated" else io.BufferedReader(BrokenFile(content))


def _store_error(kind: Kind, path: str) -> OSError:
    if kind.startswith("time-out"):
        return TimeoutError("injected: timed out")
    if kind == "reset":
        return ConnectionResetError(errno.ECONNRESET, "injected: connection reset by peer")
    code = errno.ENOSPC if kind == "disk full" else errno.EIO
    return OSError(code, f"injected: {os.strerror(code)}", path)


def _engine_error(kind: Kind) -> Exception:
    match kind:
        case "reset by endpoint":
            return ConnectionResetError(errno.ECONNRESET, "injected: connection reset by peer")
        case "time-out":
            return TimeoutError("injected: timed out")
        case "out of memory":
            return MemoryError("injected")
        case _:
            return RuntimeError("injected")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a fault led to.

    Attributes:
        first: `succeeded`, or the error that ended the run.
        problems: what was wrong at the end of the second run; empty if nothing was.
    """

    fault: Fault
    first: str
    problems: tuple[str, ...]


def operations_of(work: Work) -> list[Operation]:
    """Every operation of an undisturbed run that its next one has too, in a fixed order.

    How often a run looks for a stop and notes its progress is up to the clock; of these only the first time counts.
    """
    output = work.folder / "out-clean"
    with Faults([output, work.folder, work.checkpoint]).installed() as faults:
        launch(work.job(output))
    certain = {one for one in faults.operations if one.occurrence == 1 or not one.path.startswith(BY_CLOCK)}
    return sorted(certain, key=lambda operation: (operation.name, operation.path, operation.occurrence))


def faults_of(operations: Iterable[Operation]) -> list[Fault]:
    return [Fault(operation, kind) for operation in operations for kind in operation.kinds]


def outcome_of(work: Work, undisturbed: Tables, fault: Fault, output: Path) -> Outcome:
    """Run with one fault, then run again without any, and look at what came out."""
    problems: list[str] = []
    job = work.job(output)
    with Faults([output, work.folder, work.checkpoint], fault).installed() as faults:
        try:
            first = launch(job).status
        except JobError as error:
            first = type(error).__name__
            if "\n" in str(error) and "injected" not in str(error):
                problems.append(f"a message of many lines: {error}")
        except Exception as error:
            first = f"untyped {type(error).__name__}"
            problems.append(f"expected a JobError, found {type(error).__name__}: {error}")
    if not faults.has_struck:
        problems.append("the operation did not come up")
    try:
        launch(job)
        # A request that the engine gave up on is a reject: still one row, one ledger line, and the same sums.
        has_lost_answer = fault.kind in ("error completion", "never answers")
        problems += problems_of(output, work, None if has_lost_answer else undisturbed)
    except Exception as error:
        problems.append(f"second run: {type(error).__name__}: {error}")
    return Outcome(fault, first, tuple(problems))
