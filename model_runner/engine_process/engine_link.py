"""The connection to one of our engines in another process; `child.py` is the other end and lists the messages.

`isolated_runner.py` and `host_runner.py` use it. Several calls may be open at a time, each on its own thread.
"""

import contextlib
import os
import socket
import subprocess
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any, TypeAlias

from moebeam.model_runner.engine_process.process_link import LOADING, EngineExit, ProcessLink
from moebeam.model_runner.protocol import EngineConfig, add_counters
from moebeam.schemas.determinism import Determinism
from moebeam.schemas.records import Completion, Request

Messages: TypeAlias = "SimpleQueue[tuple[Any, ...] | EngineExit]"


GIVEN_BACK = EngineExit("its calls were given back")
"""Ends the calls of a process that lives on."""


@dataclass(slots=True)
class CallState:
    """Requests that one engine call has taken and not answered."""

    in_flight: dict[str, Request] = field(default_factory=dict[str, Request])
    has_answered: bool = False
    is_exhausted: bool = False


class EngineLink(ProcessLink):
    """A loaded engine in another process.

    Args:
        connection: the socket; the link takes ownership.
        popen: see `ProcessLink`.
        counted_before: counters of the processes that this one replaces.
    Raises:
        MoebeamError: the engine cannot be loaded; the error of the other side.
        EOFError: the process ended; says why.
    """

    def __init__(
        self,
        connection: "Connection[Any, Any]",
        config: EngineConfig,
        popen: "subprocess.Popen[bytes] | None" = None,
        counted_before: Mapping[str, float] | None = None,
    ) -> None:
        self._connection = connection
        self._call_ids = count()
        self._counted_before = counted_before or {}
        self._counters: Mapping[str, float] = {}
        self._last_sign = time.monotonic()
        super().__init__(connection, popen)
        kind, content, *_ = self._load(config)
        if kind == "failed":
            self.close()
            raise content
        self.determinism: Determinism = content

    @property
    def counters(self) -> Mapping[str, float]:
        """As of the last message with counters; work just before an exit may be missing."""
        return add_counters(self._counted_before, self._counters)

    def kill_if_silent(self, max_silence_s: float) -> None:
        """Kill the process if it had open calls and neither answered nor counted work for `max_silence_s`."""
        with self._lock:
            silence_s = time.monotonic() - self._last_sign if self._calls else 0.0
        if silence_s > max_silence_s:
            self._is_silence = True
            self._fail("it was ended because it had been silent for too long")

    def answers(
        self,
        source: Iterator[Request],
        call_state: CallState,
        next_message: Callable[[Messages], tuple[Any, ...] | EngineExit] = lambda messages: messages.get(),
    ) -> Generator[Completion, None, EngineExit | None]:
        """Run one engine call over `source`; returns the exit if the process ended during it.

        Args:
            call_state: updated with what the engine has taken.
            next_message: waits for the next message.
        """
        messages: Messages = SimpleQueue()
        call = self._open(messages)
        is_over = False
        try:
            while True:
                message = next_message(messages)
                if isinstance(message, EngineExit):
                    is_over = message is not GIVEN_BACK
                    return message
                match message[0]:
                    case "pull":
                        request = next(source, None)
                        if request is None:
                            call_state.is_exhausted = True
                        else:
                            call_state.in_flight[request.request_id] = request
                        self._send(("request", call, request))
                    case "completion":
                        completion: Completion = message[2]
                        call_state.in_flight.pop(completion.request_id, None)
                        call_state.has_answered = True
                        yield completion
                    case "broken":
                        is_over = True
                        raise message[2]
                    case _:
                        is_over = True
                        # If an engine ends early, `transforms/answer/run.py` handles the rest.
                        call_state.is_exhausted = True
                        return None
        finally:
            self._forget([call])
            if not is_over:  # the caller stopped; the engine finishes only what it has begun
                self._send(("request", call, None))

    def give_back(self) -> None:
        """End all open calls with `GIVEN_BACK`; the engine still finishes what it has begun, for nobody."""
        with self._lock:
            calls = [messages for call, messages in self._calls.items() if call != LOADING]
        for messages in calls:
            messages.put(GIVEN_BACK)

    def _open(self, messages: Messages) -> int:
        """Open a call; its messages, and the exit, go to `messages`."""
        call = next(self._call_ids)
        with self._lock:
            if not self._calls:
                self._last_sign = time.monotonic()
        if self._register(call, messages):
            self._send(("open", call))
        return call

    def _route(self, message: tuple[Any, ...]) -> None:
        kind = message[0]
        counters = message[-1] if kind in ("ready", "beat", "done") else None
        with self._lock:
            if kind != "beat" or counters != self._counters:
                self._last_sign = time.monotonic()
            if counters is not None:
                self._counters = counters
        if kind in ("ready", "failed"):
            self._deliver(LOADING, message, is_last=True)
        elif kind != "beat":
            self._deliver(message[1], message)

    def _hang_up(self) -> None:
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(self._connection.fileno())) as link:
            link.shutdown(socket.SHUT_RDWR)
