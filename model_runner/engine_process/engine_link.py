"""One end of the talk with an engine in another process; `engine_process.py` is the other end and says what is said.

Stands between `isolated_runner.py` and `host_runner.py`, which ask, and the process that answers. Several calls may be
open at a time, each on a thread of its own.
"""

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any, TypeAlias

from moebeam.model_runner.protocol import EngineConfig
from moebeam.schemas.records import Completion, Request


@dataclass(frozen=True, slots=True, eq=False)
class EngineExit:
    """The end of a process: what is known of its cause, and how many calls it had open."""

    cause: str
    is_silence: bool
    num_calls: int


Messages: TypeAlias = "SimpleQueue[tuple[Any, ...] | EngineExit]"


@dataclass(slots=True)
class Calling:
    """What one call of the engine has taken and not answered."""

    in_flight: dict[str, Request] = field(default_factory=dict[str, Request])
    has_answered: bool = False
    is_exhausted: bool = False


class EngineLink:
    """A connection to a process that holds an engine. Safe for several threads.

    Args:
        connection: the socket; it belongs to the link from here on.
        cause_of_death: called once when the other side has ended: why, and whether it was ended for its silence.
    """

    def __init__(self, connection: "Connection[Any, Any]", cause_of_death: Callable[[], tuple[str, bool]]) -> None:
        self._link = connection
        self._cause_of_death = cause_of_death
        self._lock = threading.Lock()  # over calls, death and the time of the last sign
        self._send_lock = threading.Lock()
        self._owner_pid = os.getpid()
        self._calls: dict[int, Messages] = {}
        self._call_ids = count()
        self._death: EngineExit | None = None
        self._counters: Mapping[str, float] = {}
        self._last_sign = time.monotonic()

    def load(self, config: EngineConfig) -> None:
        """Say which engine, and wait until it is loaded.

        Raises:
            MoebeamError: as the other side raised it.
            EOFError, OSError: the other side ended.
        """
        self._link.send(config)
        kind, content = self._link.recv()
        if kind == "failed":
            raise content
        self._counters = content
        threading.Thread(target=self._read, daemon=True).start()

    @property
    def is_alive(self) -> bool:
        with self._lock:
            return self._death is None

    @property
    def counters(self) -> Mapping[str, float]:
        """As of the last message that brought any."""
        return self._counters

    @property
    def silence_s(self) -> float:
        """For how long the engine has neither answered nor counted anything while it had calls."""
        with self._lock:
            return time.monotonic() - self._last_sign if self._calls else 0.0

    def open(self, messages: Messages) -> int:
        """Begin a call; what the process says of it, or its death, comes to `messages`."""
        call = next(self._call_ids)
        with self._lock:
            if self._death is not None:
                messages.put(self._death)
                return call
            if not self._calls:
                self._last_sign = time.monotonic()
            self._calls[call] = messages
        self._send(("open", call))
        return call

    def answers(
        self,
        source: Iterator[Request],
        calling: Calling,
        next_of: Callable[[Messages], tuple[Any, ...] | EngineExit] = lambda messages: messages.get(),
    ) -> Generator[Completion, None, EngineExit | None]:
        """One call of the engine, as long as it and the requests last; how it died, if it did.

        Args:
            calling: kept up to date with what the engine has taken.
            next_of: waits for the next message.
        """
        messages: Messages = SimpleQueue()
        call = self.open(messages)
        is_over = False
        try:
            while True:
                message = next_of(messages)
                if isinstance(message, EngineExit):
                    is_over = True
                    return message
                match message[0]:
                    case "pull":
                        request = next(source, None)
                        if request is None:
                            calling.is_exhausted = True
                        else:
                            calling.in_flight[request.request_id] = request
                        self._send(("request", call, request))
                    case "completion":
                        completion: Completion = message[2]
                        calling.in_flight.pop(completion.request_id, None)
                        calling.has_answered = True
                        yield completion
                    case "broken":
                        is_over = True
                        raise message[2]
                    case _:
                        is_over = True
                        calling.is_exhausted = (
                            True  # an engine that ends early leaves the rest to `moebeam.transforms.answer.run`
                        )
                        return None
        finally:
            with self._lock:
                self._calls.pop(call, None)
            if not is_over:  # nobody wants more answers; the engine ends with those that it has begun
                self._send(("request", call, None))

    def close(self) -> bool:
        """End the talk, which the other side takes for its own end; False in a fork of the owner, which may not."""
        if os.getpid() != self._owner_pid:
            return False
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(self._link.fileno())) as link:
            link.shutdown(socket.SHUT_RDWR)
        return True

    def _send(self, message: tuple[object, ...]) -> None:
        # Where the process is dead, `_read` tells everyone who waits.
        with self._send_lock, contextlib.suppress(OSError):
            self._link.send(message)

    def _read(self) -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                self._take(self._link.recv())
        cause, is_silence = self._cause_of_death()
        with self._lock:
            self._death = EngineExit(cause, is_silence, len(self._calls))
            waiting = list(self._calls.values())
            self._calls.clear()
        self._link.close()
        for messages in waiting:
            messages.put(self._death)

    def _take(self, message: tuple[Any, ...]) -> None:
        kind = message[0]
        counters = message[-1] if kind in ("beat", "done") else None
        with self._lock:
            if kind != "beat" or counters != self._counters:
                self._last_sign = time.monotonic()
            if counters is not None:
                self._counters = counters
            messages = None if kind == "beat" else self._calls.get(message[1])
        if messages is not None:
            messages.put(message)
