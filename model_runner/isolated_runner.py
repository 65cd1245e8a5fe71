"""Any engine in a process of its own, so that a row that kills it, or makes it hang, costs that row alone.

Stands inside the *answer* stage, between `transforms/run.py` and an engine that would else live in the worker's
process. `model_runner/engine_process.py` is the other side. As long as nothing goes wrong the engine sees the same
requests in the same order as in process, and gives the same answers. When it dies, by a crash, for want of memory, or
killed for its silence, another one is started and what was in flight is asked again in halves, until the request is
found that it dies over alone.
"""

import contextlib
import logging
import os
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from itertools import count
from multiprocessing.connection import Connection
from queue import Empty, SimpleQueue
from typing import IO, Any, TypeAlias

from model_runner.protocol import EngineConfig
from schemas.errors import EngineCrashed, EngineLoadError, EngineTimeout, RowError
from schemas.records import Completion, Request, Usage

MAX_DEATHS_ALONE = 2
"""Deaths over a request that was alone, after which it fails: one may have been somebody else's doing."""

MAX_BARREN_DEATHS = 24
"""Deaths in a row without an answer: halving the largest window down to one request takes fewer."""

SHUTDOWN_TIMEOUT_S = 5.0
_NUM_LOG_LINES = 40
_LOOK_S = 1.0

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class _Death:
    """The end of a process: what is known of its cause, and how many calls it had open."""

    cause: str
    is_silence: bool
    num_calls: int


_Messages: TypeAlias = "SimpleQueue[tuple[Any, ...] | _Death]"


class _EngineProcess:
    """One engine, loaded. Safe for several threads."""

    def __init__(self, config: EngineConfig) -> None:
        """Start the process and wait until its engine is loaded.

        Raises:
            EngineLoadError: the engine cannot be loaded, or died while it was.
        """
        self._lock = threading.Lock()  # over calls, death and the time of the last sign
        self._send_lock = threading.Lock()
        self._owner_pid = os.getpid()
        self._calls: dict[int, _Messages] = {}
        self._call_ids = count()
        self._death: _Death | None = None
        self._is_silence = False
        self._counters: Mapping[str, float] = {}
        self._last_sign = time.monotonic()
        self._log: deque[str] = deque(maxlen=_NUM_LOG_LINES)
        ours, theirs = socket.socketpair()
        with theirs:
            self._popen = subprocess.Popen(
                [sys.executable, "-m", "model_runner.engine_process", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                pass_fds=(theirs.fileno(),),
                # The folder from which this process imports may be known to it alone.
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
                start_new_session=True,  # Ctrl-C is the launcher's to handle
            )
        self._link: Connection[Any, Any] = Connection(ours.detach())
        assert self._popen.stderr is not None
        self._log_reader = threading.Thread(target=self._read_log, args=(self._popen.stderr,), daemon=True)
        self._log_reader.start()
        try:
            self._link.send(config)
            kind, content = self._link.recv()
        except (OSError, EOFError):
            raise EngineLoadError(f"the engine's process died while it loaded: {self._cause()}") from None
        if kind == "failed":
            self._popen.wait()
            raise content
        self._counters = content
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def is_alive(self) -> bool:
        with self._lock:
            return self._death is None

    @property
    def counters(self) -> Mapping[str, float]:
        """As of the last message that brought any."""
        return self._counters

    def open(self, messages: _Messages) -> int:
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

    def close_call(self, call: int) -> None:
        with self._lock:
            self._calls.pop(call, None)

    def send_request(self, call: int, request: Request | None) -> None:
        self._send(("request", call, request))

    def kill_if_silent(self, max_silence_s: float) -> None:
        """End the process if it has neither answered nor counted anything for so long while it had calls."""
        with self._lock:
            is_silent = bool(self._calls) and time.monotonic() - self._last_sign > max_silence_s
            self._is_silence = self._is_silence or is_silent
        if is_silent:
            self._popen.kill()

    def close(self) -> None:
        """End the process: by the end of its socket, then by force."""
        if os.getpid() != self._owner_pid:
            return  # a fork of the owner ends, not the owner
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(self._link.fileno())) as link:
            link.shutdown(socket.SHUT_RDWR)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(SHUTDOWN_TIMEOUT_S)
            return
        self._popen.kill()
        self._popen.wait()

    def _send(self, message: tuple[object, ...]) -> None:
        # Where the process is dead, `_read` tells everyone who waits.
        with self._send_lock, contextlib.suppress(OSError):
            self._link.send(message)

    def _read(self) -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                self._take(self._link.recv())
        cause = self._cause()
        with self._lock:
            self._death = _Death(cause, self._is_silence, len(self._calls))
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

    def _cause(self) -> str:
        code = self._popen.wait()
        self._log_reader.join(timeout=1.0)
        if self._is_silence:
            return "it was ended because it had been silent for too long"
        how = f"signal {-code}" if code < 0 else f"exit status {code}"
        told = [line for line in self._log if "Error" in line or line.startswith("Fatal")]
        return "; ".join([f"its process ended with {how}", *told[-2:]])

    def _read_log(self, stderr: IO[bytes]) -> None:
        with stderr:
            for line in stderr:
                text = line.decode(errors="replace").rstrip()
                self._log.append(text)
                _LOGGER.debug("%s", text)


@dataclass(slots=True)
class _Group:
    """Requests that are asked in one call of the engine, and how often it died over them when they were one."""

    requests: Sequence[Request]
    num_deaths: int = 0


@dataclass(slots=True)
class _Calling:
    """What one call of the engine has taken and not answered."""

    in_flight: dict[str, Request] = field(default_factory=dict[str, Request])
    has_answered: bool = False
    is_exhausted: bool = False


class IsolatedRunner:
    """A loaded engine in a process of its own, which ends with the runner or with this process."""

    def __init__(self, config: EngineConfig, *, max_silence_s: float | None = None) -> None:
        """
        Args:
            config: what the job says of the engine.
            max_silence_s: how long the engine may neither answer nor count any work; None watches nothing.
        Raises:
            EngineLoadError: the engine cannot be loaded.
        """
        self.config = config
        self._max_silence_s = max_silence_s
        self._lock = threading.Lock()  # over the processes and what dead ones counted
        self._num_barren_deaths = 0
        self._counted: dict[str, float] = {}
        self._processes: list[_EngineProcess] = []
        self._finalizer = weakref.finalize(self, _close_all, self._processes)
        self._process()

    def close(self) -> None:
        """End the engine now; nothing can be answered afterwards."""
        self._finalizer()

    def counters(self) -> Mapping[str, float]:
        """As `CountingRunner.counters`, over all processes so far; what a dead one did last may be missing."""
        with self._lock:
            return _added(self._counted, self._processes[-1].counters)

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Answer requests as the engine does; those that it dies over, alone and twice, fail.

        Raises:
            EngineLoadError: it died `MAX_BARREN_DEATHS` times without an answer in between, or cannot be started again.
        """
        source = iter(requests)
        groups: list[_Group] = []
        calling = _Calling()
        while not calling.is_exhausted or groups:
            if not groups:
                calling = _Calling()
                death = yield from self._call(source, calling)
                if death is not None:
                    self._note_death(death, calling.has_answered)
                    groups += _halves(list(calling.in_flight.values()))
                continue
            group = groups.pop()
            taken = _Calling()
            answered: set[str] = set()
            death = yield from _noting(self._call(iter(group.requests), taken), answered)
            if death is None:
                continue
            self._note_death(death, taken.has_answered)
            left = [request for request in group.requests if request.request_id not in answered]
            if len(group.requests) > 1:
                groups += _halves(left)
                continue
            # With other calls open nobody knows over which one it died.
            num_deaths = group.num_deaths + (death.num_calls <= 1)
            if num_deaths >= MAX_DEATHS_ALONE:
                yield self._failed(group.requests[0], death)
            else:
                groups.append(_Group(group.requests, num_deaths))

    def _call(self, source: Iterator[Request], calling: _Calling) -> Generator[Completion, None, _Death | None]:
        """One call of the engine, as long as it and the requests last; how it died, if it did."""
        messages: _Messages = SimpleQueue()
        process = self._process()
        call = process.open(messages)
        is_over = False
        try:
            while True:
                message = self._next(process, messages)
                if isinstance(message, _Death):
                    is_over = True
                    return message
                match message[0]:
                    case "pull":
                        request = next(source, None)
                        if request is None:
                            calling.is_exhausted = True
                        else:
                            calling.in_flight[request.request_id] = request
                        process.send_request(call, request)
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
                        calling.is_exhausted = True  # an engine that ends early leaves the rest to `transforms.run`
                        return None
        finally:
            process.close_call(call)
            if not is_over:  # nobody wants more answers; the engine ends with those that it has begun
                process.send_request(call, None)

    def _next(self, process: _EngineProcess, messages: _Messages) -> tuple[Any, ...] | _Death:
        if self._max_silence_s is None:
            return messages.get()
        while True:
            with contextlib.suppress(Empty):
                return messages.get(timeout=min(_LOOK_S, self._max_silence_s / 4))
            process.kill_if_silent(self._max_silence_s)

    def _process(self) -> _EngineProcess:
        """The living process; another is started if the last one died."""
        with self._lock:
            if not self._finalizer.alive:
                raise EngineLoadError("the engine was closed; load it again")
            if not self._processes or not self._processes[-1].is_alive:
                if self._processes:
                    self._counted = _added(self._counted, self._processes[-1].counters)
                self._processes[:] = [_EngineProcess(self.config)]
            return self._processes[-1]

    def _note_death(self, death: _Death, has_answered: bool) -> None:
        _LOGGER.warning("the engine %r died: %s; it is started again", self.config.engine, death.cause)
        with self._lock:
            self._num_barren_deaths = 0 if has_answered else self._num_barren_deaths + 1
            if self._num_barren_deaths >= MAX_BARREN_DEATHS:
                raise EngineLoadError(
                    f"engine {self.config.engine!r} died {self._num_barren_deaths} times without an answer: "
                    f"{death.cause}"
                )

    def _failed(self, request: Request, death: _Death) -> Completion:
        error: RowError = (
            EngineTimeout(f"the engine was silent for more than {self._max_silence_s:g} s over this request alone")
            if death.is_silence
            else EngineCrashed(f"the engine dies over this request: {death.cause}")
        )
        return Completion(
            request_id=request.request_id,
            text="",
            finish_reason="error",
            usage=Usage(prompt_tokens=0, completion_tokens=0, cached_tokens=0),
            started_at=datetime.now(UTC),
            latency_ms=0.0,
            provider="local",
            model=self.config.name,
            model_revision=self.config.revision,
            error=error,
        )


def _noting(
    completions: Generator[Completion, None, _Death | None], answered: set[str]
) -> Generator[Completion, None, _Death | None]:
    while True:
        try:
            completion = next(completions)
        except StopIteration as end:
            return end.value
        answered.add(completion.request_id)
        yield completion


def _halves(requests: Sequence[Request]) -> list[_Group]:
    """Two groups, the first one last, which is the next to be taken."""
    middle = (len(requests) + 1) // 2
    return [_Group(half) for half in (requests[middle:], requests[:middle]) if half]


def _added(one: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    return {
        name: (max if name.startswith("peak_") else sum)((one.get(name, 0), other.get(name, 0)))
        for name in {**one, **other}
    }


def _close_all(processes: Iterable[_EngineProcess]) -> None:
    for process in processes:
        process.close()
