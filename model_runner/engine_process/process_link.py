"""Our end of an engine's process: sends messages, routes replies to waiting calls, and reports its exit to all.

Base of `engine_link.py`, for our own engines, and of `vllm_engine/process.py`; `supervisor.py` replaces a process that
has ended.
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
"""Key of the pseudo-call that waits for the engine to load."""

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class EngineExit:
    """The end of a process: its cause, and whether it was killed for silence."""

    cause: str
    is_silence: bool = False


class MessageStream(Protocol):
    """A message channel; `recv` raises EOFError or OSError at the end."""

    def send(self, obj: Any, /) -> None: ...
    def recv(self) -> Any: ...
    def close(self) -> None: ...


def start_process(command: Sequence[str], **options: Any) -> "subprocess.Popen[bytes]":
    """Start a process for a `ProcessLink`, with its log piped and in its own process group.

    The group shields it from Ctrl-C, and lets it be killed together with its children.

    Raises:
        OSError: the command cannot be run.
    """
    popen: Any = subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True, **options)
    return popen


class ProcessLink(ABC):
    """The connection to a process. Safe for several threads.

    Args:
        stream: the link takes ownership and reads it on its own thread until it ends.
        popen: from `start_process`; None if another process owns it.
        shutdown_timeout_s: how long it and its children may take to exit before they are killed.
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
        self._lock = threading.Lock()  # guards calls and exit
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
        """Hang up, which tells the process to exit, and kill it if it does not; no-op in a fork of the owner."""
        if os.getpid() == self._owner_pid:
            self._hang_up()
            if self.popen is not None:
                self._reader.join(self._shutdown_timeout_s)
                self._signal_group(SIGKILL)
                self._reader.join(self._shutdown_timeout_s)

    def _load(self, first: object) -> Any:
        """Send the first message and return the reply to the call `LOADING`.

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
        """Route a call's messages, and the exit, to a queue; False if the process has already ended."""
        with self._lock:
            if self.exit is None:
                self._calls[call] = messages
                return True
        messages.put(self.exit)
        return False

    def _forget(self, calls: Iterable[Hashable]) -> list[Hashable]:
        """Remove abandoned calls; returns those that were registered."""
        with self._lock:
            return [call for call in calls if self._calls.pop(call, None) is not None]

    def _deliver(self, call: Hashable, message: object, *, is_last: bool = False) -> None:
        with self._lock:
            messages = self._calls.pop(call, None) if is_last else self._calls.get(call)
        if messages is not None:
            messages.put(message)

    def _send(self, message: object) -> None:
        # If the process has ended, `_read` notifies all waiting calls.
        with self._send_lock, contextlib.suppress(OSError, ValueError):
            self._stream.send(message)

    def _fail(self, cause: str) -> None:
        """Kill the process; `cause` is reported instead of its exit status."""
        self._failure = cause
        self._signal_group(SIGKILL)

    @abstractmethod
    def _route(self, message: Any) -> None:
        """Deliver a message from the process; any exception ends the process."""

    @abstractmethod
    def _hang_up(self) -> None:
        """Close the process's input."""

    def _read(self) -> None:
        """Route messages until the process ends, then notify all waiting calls."""
        try:
            while True:
                self._route(self._stream.recv())
        except (EOFError, OSError):
            pass
        except Exception as error:  # whatever the error, the message is not one of ours
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
        """Wait for the process; returns why it ended: our `_fail`, or its exit status and the errors in its log."""
        if self.popen is None or self._log is None:
            return "the host's process ended"
        # Before `wait` reaps it: until then the group id cannot be reused.
        exited = os.waitid(os.P_PID, self.popen.pid, os.WEXITED | os.WNOWAIT)
        if exited is None or exited.si_status != 0:
            # SIGTERM lets its children release memory; the log ends when the last of them exits.
            self._signal_group(SIGTERM)
            self._log.wait(self._shutdown_timeout_s)
            self._signal_group(SIGKILL)
        code = self.popen.wait()
        self._log.wait(timeout_s=1.0)
        how = f"signal {-code} (exit status {code})" if code < 0 else f"exit status {code}"
        return "; ".join([self._failure or f"its process ended with {how}", *self._log.last_errors()])

    def _signal_group(self, number: int) -> None:
        if self.popen is not None and self.popen.returncode is None:  # else its pid may have been reused
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.popen.pid, number)
