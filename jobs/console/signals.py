"""Signals: the first SIGINT, SIGTERM or SIGHUP asks a run to stop, the second one ends the process.

Part of every command that runs a job, around `jobs/run/launch.py`. Python's own handlers wait for whatever C code holds
the interpreter, a template's filter for example; `stop_watchdog.py`, in a small process of its own, does not.
"""

import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from importlib.util import find_spec
from pathlib import Path
from queue import Empty, SimpleQueue
from types import FrameType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from moebeam.model_runner.python_process import python_environment
from moebeam.schemas.errors import JobInterrupted

if TYPE_CHECKING:
    from moebeam.schemas.job.sections import Job

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
BEAT_S = 1.0
"""How often a stopping process tells its watchdog that its interpreter is free."""

_BEAT = b"\0"
_LOGGER = logging.getLogger(__name__)


class StopSignal(threading.Event):
    """Set by the first signal.

    Attributes:
        name: of that signal, such as SIGTERM; empty until then.
        is_awaited: whether somebody looks for it; until then the first signal interrupts the main thread.
    """

    def __init__(self) -> None:
        super().__init__()
        self.name = ""
        self.is_awaited = False


class _StoppedEarly(BaseException):
    """Raised in the main thread by the first signal while nothing runs that could end by itself."""


@contextmanager
def draining_signals(
    tell: Callable[[str], None] | None = None,
    *,
    drain_s: float = 5.0,
    output: str | None = None,
    is_process_ours: bool = False,
) -> Generator[StopSignal]:
    """Turn the first signal into a set event, the second into a KeyboardInterrupt.

    SIGHUP counts only as the first: a terminal that goes away may send it twice. In other threads than the main one
    nothing is handled.

    Args:
        tell: shows the line for people; called on another thread, so that it may take locks that the main one holds.
        drain_s: `[failures] drain_s` of the job.
        output: of the run; an end by force is noted there.
        is_process_ours: whether the process may be killed, where the second signal or the first one does not end it
            otherwise; False in a notebook.
    Raises:
        JobInterrupted: the first signal came before the run looked for it.
    """
    stop = StopSignal()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    said: SimpleQueue[str | None] = SimpleQueue()

    def drain(signum: int, frame: FrameType | None) -> None:
        if stop.is_set():
            if signum == signal.SIGHUP:
                return
            raise KeyboardInterrupt
        stop.name = signal.Signals(signum).name
        stop.set()
        said.put(
            f"stopping ({stop.name}): no new request leaves; answers on their way are awaited for {drain_s:g} s; "
            "a second signal ends at once"
        )
        if not stop.is_awaited:
            raise _StoppedEarly

    with _watched(drain_s, output) if is_process_ours else nullcontext() as pipe:
        speaker = threading.Thread(target=_speak, args=(said, tell, pipe), name="stop-signal", daemon=True)
        speaker.start()
        # A process under nohup keeps ignoring what it was told to ignore.
        wanted = [number for number in STOPS if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]
        before = {number: signal.signal(number, drain) for number in wanted}
        try:
            yield stop
        except _StoppedEarly:
            raise JobInterrupted(f"stopped by {stop.name} before anything was run") from None
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            said.put(None)
            speaker.join(BEAT_S)


def draining_command(console: Console, job: "Job") -> AbstractContextManager[StopSignal]:
    """`draining_signals` for a command that runs a job in a process of its own, and says so on its console."""

    def tell(line: str) -> None:
        try:
            console.print(Text(line, style="bold yellow"), soft_wrap=True)
        except OSError:
            # The terminal went away with its hang-up.
            console.on_broken_pipe()

    return draining_signals(tell, drain_s=job.failures.drain_s, output=job.output.path, is_process_ours=True)


def _speak(said: "SimpleQueue[str | None]", tell: Callable[[str], None] | None, pipe: int | None) -> None:
    """Say what the handler may not: it may have interrupted a print. Then beat for the watchdog."""
    line = said.get()
    if line is None:
        return
    if tell is not None:
        with suppress(OSError):
            tell(line)
    while line is not None:
        if pipe is not None:
            with suppress(OSError):
                os.write(pipe, _BEAT)
        with suppress(Empty):
            line = said.get(timeout=BEAT_S)


@contextmanager
def _watched(drain_s: float, output: str | None) -> Generator[int | None]:
    """Start the watchdog and yield the pipe to it, to which the interpreter's C code writes each signal's number.

    It ends with the pipe. None where no process can be started: signals then wait for the interpreter.
    """
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    try:
        watchdog = subprocess.Popen(
            [*_watchdog_command(), str(os.getpid()), str(drain_s), output or ""],
            stdin=read_end,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env=python_environment(),
        )
    except OSError as error:
        _LOGGER.debug("no watchdog: %s", error)
        os.close(write_end)
        yield None
        return
    finally:
        os.close(read_end)
    before = signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    try:
        yield write_end
    finally:
        signal.set_wakeup_fd(before)
        os.close(write_end)
        with suppress(subprocess.TimeoutExpired):
            watchdog.wait(timeout=BEAT_S)


def _watchdog_command() -> Iterator[str]:
    """Without site packages, a start takes 10 ms; psutil's folder is named for when it is needed."""
    yield from (sys.executable, "-I", "-S", str(Path(__file__).with_name("stop_watchdog.py")))
    found = find_spec("psutil")
    yield str(Path(found.origin).parent.parent) if found is not None and found.origin else ""
