"""The watchdog of a process that runs a job: ends it by force where a signal does not.

Main program of a process started by `signals.py`, by its path and without site packages. It reads the numbers of
signals from standard input, as the interpreter's C code writes them, and zeros, which the process sends every second
from its first signal on. It kills the process and its workers

- `SECOND_S` after the second signal, if the process still lives,
- `drain_s` + `SILENCE_S` after the last sign of a process that got a signal, if its interpreter is not free,

and leaves the reason as the run's stop note. Workers of a process that ended after a signal get `LEFTOVER_S`. It ends
when the other end of the pipe closes.
"""

import os
import select
import signal
import subprocess
import sys
import time
from typing import Any

SECOND_S = 0.7
SILENCE_S = 5.0
LEFTOVER_S = 3.0

_TICK_S = 0.2
_IDLE_TICK_S = 5.0
_LOOK_S = 1.0
_STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_NOTE_TIMEOUT_S = 60.0
_NOTE = """
import sys
from moebeam.schemas.store import storage
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.transforms.durable.stop import SIGNAL, StopReason, request_stop
layout = RunLayout(sys.argv[1])
if storage.exists(layout.job):
    request_stop(layout, StopReason(SIGNAL, sys.argv[2]))
"""


class Watchdog:
    """Watches the parent process."""

    def __init__(self, psutil_folder: str, pid: int, drain_s: float, output: str) -> None:
        self._psutil_folder = psutil_folder
        self._pid = pid
        self._drain_s = drain_s
        self._output = output
        self._first = 0
        self._second_at: float | None = None
        self._silence_s = 0.0
        self._next_look = 0.0
        self._workers: list[Any] = []

    def watch(self) -> None:
        """Return once the parent has ended, by itself or by force."""
        while os.getppid() == self._pid:
            timeout_s = _TICK_S if self._first else _IDLE_TICK_S
            if select.select([0], [], [], timeout_s)[0]:
                content = os.read(0, 4096)
                if not content:
                    break
                self._take(content)
            elif self._first:
                # Counted in waits, not by the clock: a machine that slept was not silent.
                self._silence_s += timeout_s
            if self._first and time.monotonic() >= self._next_look:
                self._next_look = time.monotonic() + _LOOK_S
                self._find_workers()
            if self._second_at is not None and time.monotonic() - self._second_at >= SECOND_S:
                self._kill("a second signal ended it at once")
                return
            if self._silence_s >= self._drain_s + SILENCE_S:
                self._kill(f"it did not react and was ended by force after {self._silence_s:.0f} s")
                return
        if self._first:
            self._end_workers(LEFTOVER_S)

    def _take(self, content: bytes) -> None:
        for number in content:
            if number == 0:
                self._silence_s = 0.0
            elif number in _STOPS:
                if not self._first:
                    self._first = number
                elif self._second_at is None and number != signal.SIGHUP:
                    self._second_at = time.monotonic()

    def _find_workers(self) -> None:
        """Note the parent's descendants of its session; engines in sessions of their own end with their pipes."""
        try:
            if self._psutil_folder not in sys.path:
                sys.path.append(self._psutil_folder)
            import psutil

            session, own = os.getsid(self._pid), os.getpid()
            for process in psutil.Process(self._pid).children(recursive=True):
                if process.pid != own and process not in self._workers and os.getsid(process.pid) == session:
                    self._workers.append(process)
        except Exception:  # whatever cannot be seen of a process that ends: its own end comes first
            return

    def _kill(self, why: str) -> None:
        if os.getppid() == self._pid:
            os.kill(self._pid, signal.SIGKILL)
        self._end_workers(0.0)
        if self._output:
            name = signal.Signals(self._first).name
            command = [sys.executable, "-P", "-c", _NOTE, self._output, f"stopped by {name}; {why}"]
            subprocess.run(command, timeout=_NOTE_TIMEOUT_S, check=False, stderr=subprocess.DEVNULL)

    def _end_workers(self, grace_s: float) -> None:
        end_at = time.monotonic() + grace_s
        while time.monotonic() < end_at and any(_is_running(worker) for worker in self._workers):
            time.sleep(_TICK_S)
        for worker in self._workers:
            if _is_running(worker):
                worker.kill()


def _is_running(worker: Any) -> bool:
    try:
        return worker.is_running() and worker.status() != "zombie"
    except Exception:  # psutil's own errors: it has just ended
        return False


def main() -> None:
    """Watch the process that the arguments name, which must be the parent."""
    for number in _STOPS:
        signal.signal(number, signal.SIG_IGN)
    psutil_folder, pid, drain_s, output = sys.argv[1:]
    Watchdog(psutil_folder, int(pid), float(drain_s), output).watch()


if __name__ == "__main__":
    main()
