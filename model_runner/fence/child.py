"""Main program of a fenced process, started by `fenced_process.py`; runs programs item by item under limits.

A request is a pickled `(entry, source, max_cpu_s, max_memory, items)`. `entry` names one of our functions, which makes
a function of one item from the source; those made last are kept. The reply is pickled lists of outcomes, in order:
text, a list of texts, or an error as `(name, message)`. The process is replaced after an item that took too much, so
nothing here needs to survive one.

Imports no numpy and no pydantic: it starts with 0.3 s of processor time and has 26 MB.
"""

import contextlib
import fcntl
import importlib
import mmap
import os
import pickle
import resource
import signal
import struct
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any, TypeAlias

from moebeam.schemas.errors import MoebeamError

Outcome: TypeAlias = "str | list[str] | tuple[str, str]"
Function: TypeAlias = "Callable[[Any], str | list[str]]"

WAITING, COMPILING, FIRST_ITEM = 0, 1, 2
"""What `progress` holds: nothing was begun, the source is being compiled, or `FIRST_ITEM` + the item's number."""

OUT_OF_MEMORY = "OutOfMemory"
"""Stands for the name of an error where there was not enough memory."""

_MAX_MESSAGE_CHARACTERS = 2_000
_FLUSH_CHARACTERS = 1 << 20
_FLUSH_S = 1.0
_MAX_FUNCTIONS = 16
_MAX_KEPT_BYTES = 512 << 20
"""A process that holds more, in what it keeps for later items, ends after its request; a new one takes its place."""

_MEMORY_OF_PROCESS = "/proc/self/statm"


class _OutOfMemoryError(Exception):
    """An item met the limit of memory; the process is to be replaced."""


def serve(connection: "Connection[Any, Any]", progress: mmap.mmap) -> None:
    """Answer requests until the connection closes.

    Raises:
        EOFError, OSError: the connection closed.
    """
    functions: dict[tuple[str, bytes], Function] = {}
    while True:
        entry, source, max_cpu_s, max_memory, items = pickle.loads(connection.recv_bytes())
        make_function = _find_entry(entry)
        try:
            num_resident = _limit_memory(max_memory)
            key = entry, source
            if key not in functions:
                _begin(progress, COMPILING, max_cpu_s)
                function = make_function(pickle.loads(source))
                if len(functions) == _MAX_FUNCTIONS:
                    del functions[next(iter(functions))]
                functions[key] = function
            _run(functions[key], items, connection, progress, max_cpu_s)
            if num_resident > _MAX_KEPT_BYTES:
                return
        except _OutOfMemoryError:
            return
        except MoebeamError as error:
            _send(connection, [_describe(error)] * len(items))
        except MemoryError:
            _send(connection, [(OUT_OF_MEMORY, "")] * len(items))
            return
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)


def _find_entry(entry: str) -> Callable[[Any], Function]:
    """Imports its module, which is ours: before there are limits, since the first import takes a while."""
    module, _, name = entry.partition(":")
    return getattr(importlib.import_module(module), name)


def _run(
    function: Function,
    items: Sequence[object],
    connection: "Connection[Any, Any]",
    progress: mmap.mmap,
    max_cpu_s: float,
) -> None:
    outcomes: list[Outcome] = []
    num_characters = 0
    sent_at = time.monotonic()
    for index, item in enumerate(items):
        _begin(progress, FIRST_ITEM + index, max_cpu_s)
        try:
            outcome = function(item)
        except MoebeamError as error:
            outcome = _describe(error)
        except MemoryError:
            _send(connection, [*outcomes, (OUT_OF_MEMORY, "")])
            raise _OutOfMemoryError from None
        outcomes.append(outcome)
        num_characters += len(outcome) if isinstance(outcome, str) else sum(map(len, outcome))
        if num_characters > _FLUSH_CHARACTERS or time.monotonic() - sent_at > _FLUSH_S:
            _send(connection, outcomes)
            outcomes, num_characters, sent_at = [], 0, time.monotonic()
    if outcomes:
        _send(connection, outcomes)


def _begin(progress: mmap.mmap, step: int, max_cpu_s: float) -> None:
    """Note what is begun and give it its time: SIGPROF then ends the process, even within C code."""
    struct.pack_into("<q", progress, 0, step)
    signal.setitimer(signal.ITIMER_PROF, max_cpu_s)


def _describe(error: MoebeamError) -> tuple[str, str]:
    return type(error).__name__, str(error)[:_MAX_MESSAGE_CHARACTERS]


def _send(connection: "Connection[Any, Any]", outcomes: list[Outcome]) -> None:
    # What was rendered within the limit must not be lost for want of memory to send it.
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
    connection.send_bytes(pickle.dumps(outcomes, pickle.HIGHEST_PROTOCOL))
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _limit_memory(max_memory: int) -> int:
    """Allow so many bytes of address space beyond what the process and the items have; where the system can tell.

    Returns:
        Bytes of memory that the process has; 0 where the system does not tell.
    """
    with contextlib.suppress(OSError), open(_MEMORY_OF_PROCESS) as file:
        size, resident = (int(number) * resource.getpagesize() for number in file.read().split()[:2])
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        soft = size + max_memory
        resource.setrlimit(resource.RLIMIT_AS, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))
        return resident
    return 0


def _give_up_rights() -> None:
    """No files are written and no core is dumped; when the machine runs out of memory, this process goes first."""
    for limit in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE):
        resource.setrlimit(limit, (0, 0))
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")


def _end_with_parent(pipe: int) -> None:
    """Have the kernel end this process, within C code too, when the other end of the pipe closes."""
    signal.signal(signal.SIGIO, signal.SIG_DFL)
    fcntl.fcntl(pipe, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(pipe, fcntl.F_SETFL, fcntl.fcntl(pipe, fcntl.F_GETFL) | os.O_ASYNC)


def main() -> None:
    """Serve the socket; the arguments are its descriptor, the shared progress file's and that of our parent's pipe."""
    socket, progress_file, pipe = map(int, sys.argv[1:])
    progress = mmap.mmap(progress_file, 8)
    os.close(progress_file)
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    _give_up_rights()
    _end_with_parent(pipe)
    with contextlib.suppress(EOFError, OSError):
        serve(Connection(socket), progress)
    os._exit(0)


if __name__ == "__main__":
    main()
