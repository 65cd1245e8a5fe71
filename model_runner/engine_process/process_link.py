"""An engine's process, as seen from ours: messages to it, messages from it to the calls that wait, its exit to all.

Base of `engine_link.py`, which speaks with our own engines, and of `vllm_engine/process.py`; `supervisor.py` replaces
a process that has ended.
"""

import contextlib
import logging
import os
import subprocess
import threading
from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from signal import SIGKILL, SIGTERM
from typing import Any, Protocol

from moebeam.model_runner.engine_process.process_log import ProcessLog

LOADING = "loading"
"""The call that waits until the engine is loaded."""

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class EngineExit:
    """The end of a process, its cause, and whether it was killed for its silence."""

    cause: str
    is_silence: bool = False


class MessageStream(Protocol):
    """What messages travel through; `recv` raises EOFError or OSError at the end."""

    def send(self, obj: Any, /) -> None: ...
    def recv(self) -> Any: ...
    def close(self) -> None: ...


def start_process(command: Sequence[str], **options: Any) -> "subprocess.Popen[bytes]":
    """Start a process as `ProcessLink` wants it: its log is read, and Ctrl-C is ours to handle.

    A group of its own also lets it be killed together with what it starts.

    Raises:
        OSError: the command cannot be run.
    """
    return subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True, **options)


class ProcessLink(ABC):
    """The connection to a process. Safe for several threads.

    Args:
        stream: belongs to the link from here on; a thread of its own reads it until it ends.
        popen: from `start_process`; None where the process belongs to somebody else.
        shutdown_timeout_s: how long it, and what it has started, may take to end before they are killed.
    """

    def __init__(
        self, stream: MessageStream, popen: "subprocess.Popen[bytes] | None" = None, shutdown_timeout_s: float = 5.0
    ) -> None:
        self.popen = popen
        self.exit: EngineExit | None = None
        self._stream = stream
        self._shutdown_timeout_s = shutdown_timeout_s
        self._log = ProcessLog(popen.stderr, _LOGGER) if popen is not None and popen.stderr is not None else None
        self._failure = ""
        self._is_silence = False
        self._lock = threading.Lock()  # over calls and exit
        self._send_lock = threading.Lock()
        self._owner_pid = os.getpid()
        self._calls: dict[Hashable, SimpleQueue[Any]] = {}
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def is_alive(self) -> bool:
        with self._lock:
            return self.exit is None

    def close(self) -> None:
        """Hang up, which tells the process to end, and kill it where it does not; in a fork of the owner nothing."""
        if os.getpid() == self._owner_pid:
            self._hang_up()
            if self.popen is not None:
                self._reader.join(self._shutdown_timeout_s)
                self._signal_group(SIGKILL)
                self._reader.join(self._shutdown_timeout_s)

    def _load(self, first: object) -> Any:
        """Send the first message; returns what comes for the call `LOADING`.

        Raises:
            EOFError: the process ended instead; says why.
        """
        messages: SimpleQueue[Any] = SimpleQueue()
        try:
            if self._register(LOADING, messages):
                self._send(first)
            message = messages.get()
        except BaseException:
            self.close()
            raise
        if isinstance(message, EngineExit):
            raise EOFError(message.cause)
        return message

    def _register(self, call: Hashable, messages: SimpleQueue[Any]) -> bool:
        """Route a call's messages, and the exit, to a queue; False where the process has ended already."""
        with self._lock:
            if self.exit is None:
                self._calls[call] = messages
                return True
        messages.put(self.exit)
        return False

    def _forget(self, calls: Iterable[Hashable]) -> list[Hashable]:
        """Drop calls that nobody waits for any more; returns those that were waited for."""
        with self._lock:
            return [call for call in calls if self._calls.pop(call, None) is not None]

    def _deliver(self, call: Hashable, message: object, *, is_last: bool = False) -> None:
        with self._lock:
            messages = self._calls.pop(call, None) if is_last else self._calls.get(call)
        if messages is not None:
            messages.put(message)

    def _send(self, message: object) -> None:
        # Where the process has ended, `_read` tells everyone who waits.
        with self._send_lock, contextlib.suppress(OSError, ValueError):
            self._stream.send(message)

    def _fail(self, cause: str) -> None:
        """Kill the process, for a cause that is told in place of its exit status."""
        self._failure = cause
        self._signal_group(SIGKILL)

    @abstractmethod
    def _route(self, message: Any) -> None:
        """Deliver what the process sent; whatever this raises ends the process."""

    @abstractmethod
    def _hang_up(self) -> None:
        """Let the process read the end of its input."""

    def _read(self) -> None:
        """Route messages until the process ends; then tell all that still wait."""
        try:
            while True:
                self._route(self._stream.recv())
        except (EOFError, OSError):
            pass
        except Exception as error:  # whatever it is, what came is none of our messages
            self._fail(f"expected a message of the worker's protocol, found: {type(error).__name__}: {error}")
        cause = self._wait_for_exit()
        with self._lock:
            self.exit = EngineExit(cause, self._is_silence)
            waiting = set(self._calls.values())
            self._calls.clear()
        with contextlib.suppress(OSError):
            self._stream.close()
        for messages in waiting:
            messages.put(self.exit)

    def _wait_for_exit(self) -> str:
        """Wait for the process; returns why it ended: our own doing, or else its status, and the errors of its log."""
        if self.popen is None or self._log is None:
            return "the host's process ended"
        # Before `wait` reaps it: until then the group's number cannot become another's.
        exited = os.waitid(os.P_PID, self.popen.pid, os.WEXITED | os.WNOWAIT)
        if exited is None or exited.si_status != 0:
            # What it has started gives memory back; the log ends when the last of them has ended.
            self._signal_group(SIGTERM)
            self._log.wait(self._shutdown_timeout_s)
            self._signal_group(SIGKILL)
        code = self.popen.wait()
        self._log.wait(timeout_s=1.0)
        how = f"signal {-code} (exit status {code})" if code < 0 else f"exit status {code}"
        return "; ".join([self._failure or f"its process ended with {how}", *self._log.last_errors()])

    def _signal_group(self, number: int) -> None:
        if self.popen is not None and self.popen.returncode is None:  # else its number may be another's by now
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.popen.pid, number)
