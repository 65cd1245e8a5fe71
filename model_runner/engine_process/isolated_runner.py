"""Any engine in a separate process, so that a row that crashes or hangs it costs only that row.

`transforms/answer/run.py` calls it like an engine in the worker's process; `child.py` runs the engine. Without
failures the engine sees the same requests in the same order as in process, and gives the same answers. When it dies (a
crash, out of memory, or killed for silence), a new one is started and the requests in flight are retried in halves,
until the request that kills it is alone.
"""

import contextlib
import logging
import socket
import subprocess
import threading
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from queue import Empty
from typing import Any

from moebeam.model_runner.engine_process.engine_link import CallState, EngineLink, Messages
from moebeam.model_runner.engine_process.process_link import EngineExit, start_process
from moebeam.model_runner.engine_process.supervisor import Supervisor
from moebeam.model_runner.protocol import EngineConfig
from moebeam.model_runner.python_process import python_command, python_environment
from moebeam.schemas.determinism import Determinism
from moebeam.schemas.errors import EngineCrashed, EngineLoadError, EngineTimeout, RowError
from moebeam.schemas.records import Completion, Request

MAX_EXITS_ALONE = 2
"""Exits after which a request that ran alone fails; a single exit may have had another cause."""

MAX_FRUITLESS_RESTARTS = 24
"""Most consecutive exits without an answer; bisecting the largest window to one request takes fewer."""

_POLL_S = 1.0

_LOGGER = logging.getLogger(__name__)


@dataclass(slots=True)
class _Group:
    """Requests of one engine call; `num_exits` counts exits while the group was a single request."""

    requests: Sequence[Request]
    num_exits: int = 0


class _Turns:
    """Lets any number of calls run concurrently, or one suspected of killing the engine alone."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._num_open = 0
        self._num_searches = 0

    @contextlib.contextmanager
    def search(self) -> Generator[None]:
        """Hold back new calls until the request that killed the engine is found."""
        self._add(searches=1)
        try:
            yield
        finally:
            self._add(searches=-1)

    @contextlib.contextmanager
    def take(self, *, is_suspect: bool) -> Generator[None]:
        """Wait for a turn and hold it."""
        with self._changed:
            self._changed.wait_for(lambda: not (self._num_open if is_suspect else self._num_searches))
            self._add(calls=1)
        try:
            yield
        finally:
            self._add(calls=-1)

    def _add(self, *, calls: int = 0, searches: int = 0) -> None:
        with self._changed:
            self._num_open += calls
            self._num_searches += searches
            self._changed.notify_all()


class IsolatedRunner:
    """A loaded engine in a separate process, which ends with the runner or with this process."""

    def __init__(self, config: EngineConfig, *, max_silence_s: float | None = None) -> None:
        """
        Args:
            config: the job's engine configuration.
            max_silence_s: how long the engine may neither answer nor count work; None disables the check.
        Raises:
            EngineLoadError: the engine cannot be loaded.
        """
        self.config = config
        self._max_silence_s = max_silence_s
        self._lock = threading.Lock()
        self._num_fruitless_restarts = 0
        self._turns = _Turns()
        self._is_given_back = threading.Event()
        self._supervisor: Supervisor[EngineLink] = Supervisor(lambda last: _start(config, last))

    def give_back(self) -> None:
        """See `StoppableRunner`; the engine's process ends."""
        self._is_given_back.set()
        self._supervisor.close()

    def close(self) -> None:
        """End the engine now; `generate` cannot be called afterwards."""
        self._supervisor.close()

    def counters(self) -> Mapping[str, float]:
        """Like `CountingRunner.counters`, over all processes so far."""
        return self._supervisor.last.counters

    def determinism(self) -> Determinism:
        """See `PromisingRunner`: what the engine in the other process promises."""
        return self._supervisor.last.determinism

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Answer requests as the engine does; a request that kills it twice while alone fails.

        Raises:
            EngineLoadError: it died `MAX_FRUITLESS_RESTARTS` times without an answer in between, or cannot restart.
        """
        try:
            yield from self._generate(iter(requests))
        except EngineLoadError:
            # A call that was about to begin finds the process ended.
            if not self._is_given_back.is_set():
                raise

    def _generate(self, source: Iterator[Request]) -> Iterator[Completion]:
        call_state = CallState()
        while not call_state.is_exhausted and not self._is_given_back.is_set():
            call_state = CallState()
            engine_exit = yield from self._call(source, call_state, is_suspect=False)
            if engine_exit is not None and not self._is_given_back.is_set():
                self._record_exit(engine_exit, call_state.has_answered)
                with self._turns.search():
                    yield from self._bisect(list(call_state.in_flight.values()))

    def _bisect(self, requests: Sequence[Request]) -> Iterator[Completion]:
        """Bisect to the request that kills the engine; yields its failure and the others' answers."""
        groups = _halves(requests)
        while groups:
            group = groups.pop()
            call_state = CallState()
            answered: set[str] = set()
            call = self._call(iter(group.requests), call_state, is_suspect=True)
            engine_exit = yield from _record_answered(call, answered)
            if self._is_given_back.is_set():
                return
            if engine_exit is None:
                continue
            self._record_exit(engine_exit, call_state.has_answered)
            left = [request for request in group.requests if request.request_id not in answered]
            if len(group.requests) > 1:
                groups += _halves(left)
            elif group.num_exits + 1 >= MAX_EXITS_ALONE:
                yield self._fail(group.requests[0], engine_exit)
            else:
                groups.append(_Group(group.requests, group.num_exits + 1))

    def _call(
        self, source: Iterator[Request], call_state: CallState, *, is_suspect: bool
    ) -> Generator[Completion, None, EngineExit | None]:
        """Run one engine call; returns the exit if the engine died. A suspect has the engine to itself."""
        with self._turns.take(is_suspect=is_suspect):
            link = self._supervisor.running()
            return (yield from link.answers(source, call_state, lambda messages: self._next_message(link, messages)))

    def _next_message(self, link: EngineLink, messages: Messages) -> tuple[Any, ...] | EngineExit:
        if self._max_silence_s is None:
            return messages.get()
        while True:
            with contextlib.suppress(Empty):
                return messages.get(timeout=min(_POLL_S, self._max_silence_s / 4))
            link.kill_if_silent(self._max_silence_s)

    def _record_exit(self, engine_exit: EngineExit, has_answered: bool) -> None:
        _LOGGER.warning("the engine %r died: %s; it is started again", self.config.engine, engine_exit.cause)
        with self._lock:
            self._num_fruitless_restarts = 0 if has_answered else self._num_fruitless_restarts + 1
            if self._num_fruitless_restarts >= MAX_FRUITLESS_RESTARTS:
                raise EngineLoadError(
                    f"engine {self.config.engine!r} died {self._num_fruitless_restarts} times without an answer: "
                    f"{engine_exit.cause}"
                )

    def _fail(self, request: Request, engine_exit: EngineExit) -> Completion:
        error: RowError = (
            EngineTimeout(f"the engine was silent for more than {self._max_silence_s:g} s over this request alone")
            if engine_exit.is_silence
            else EngineCrashed(f"the engine dies over this request: {engine_exit.cause}")
        )
        return Completion.from_error(
            request.request_id,
            error,
            provider="local",
            model=self.config.name,
            model_revision=self.config.revision,
        )


def _record_answered(
    completions: Generator[Completion, None, EngineExit | None], answered: set[str]
) -> Generator[Completion, None, EngineExit | None]:
    while True:
        try:
            completion = next(completions)
        except StopIteration as end:
            return end.value
        answered.add(completion.request_id)
        yield completion


def _halves(requests: Sequence[Request]) -> list[_Group]:
    """Split into two groups, as a stack: the first half is last."""
    middle = (len(requests) + 1) // 2
    return [_Group(half) for half in (requests[middle:], requests[:middle]) if half]


def _start(config: EngineConfig, last: EngineLink | None) -> EngineLink:
    """Start a process and wait until its engine is loaded.

    Raises:
        EngineLoadError: the engine cannot be loaded, or its process ended meanwhile.
    """
    ours, theirs = socket.socketpair()
    with theirs:
        popen = start_process(
            python_command("moebeam.model_runner.engine_process.child", str(theirs.fileno())),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=(theirs.fileno(),),
            env=python_environment(),
        )
    try:
        return EngineLink(Connection(ours.detach()), config, popen, last.counters if last is not None else None)
    except EOFError as error:
        raise EngineLoadError(f"the engine's process died while it loaded: {error}") from None
