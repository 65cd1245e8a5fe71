"""Any engine in a process of its own, so that a row that kills it, or makes it hang, costs that row alone.

Stands inside the *answer* stage, between `transforms/answer/run.py` and an engine that would else live in the worker's
process. `model_runner/engine_process/child.py` is the other side. As long as nothing goes wrong the engine sees the
same requests in the same order as in process, and gives the same answers. When it dies, by a crash, for want of memory,
or killed for its silence, another one is started and what was in flight is asked again in halves, until the request is
found that it dies over alone.
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

from moebeam.model_runner.engine_process.child import engine_command, engine_environment
from moebeam.model_runner.engine_process.engine_link import Calling, EngineLink, Messages
from moebeam.model_runner.engine_process.process_link import EngineExit, start_process
from moebeam.model_runner.engine_process.supervisor import Supervisor
from moebeam.model_runner.protocol import EngineConfig
from moebeam.schemas.errors import EngineCrashed, EngineLoadError, EngineTimeout, RowError
from moebeam.schemas.records import Completion, Request

MAX_EXITS_ALONE = 2
"""Exits over a request that was alone, after which it fails: one may have been somebody else's doing."""

MAX_FRUITLESS_RESTARTS = 24
"""Exits in a row without an answer: halving the largest window down to one request takes fewer."""

_POLL_S = 1.0

_LOGGER = logging.getLogger(__name__)


@dataclass(slots=True)
class _Group:
    """Requests that are asked in one call of the engine, and how often it died over them when they were one."""

    requests: Sequence[Request]
    num_exits: int = 0


class _Turns:
    """Lets any number of calls run side by side, or one alone that is suspected of killing the engine."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._num_open = 0
        self._num_searches = 0

    @contextlib.contextmanager
    def search(self) -> Generator[None]:
        """Hold back calls that have not begun, until it is found over what the engine died."""
        self._add(searches=1)
        try:
            yield
        finally:
            self._add(searches=-1)

    @contextlib.contextmanager
    def taken(self, *, is_suspect: bool) -> Generator[None]:
        """Wait for a turn, and hold it."""
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
        self._lock = threading.Lock()
        self._num_fruitless_restarts = 0
        self._turns = _Turns()
        self._supervisor: Supervisor[EngineLink] = Supervisor(lambda last: _start(config, last))

    def close(self) -> None:
        """End the engine now; nothing can be answered afterwards."""
        self._supervisor.close()

    def counters(self) -> Mapping[str, float]:
        """As `CountingRunner.counters`, over all processes so far."""
        return self._supervisor.last.counters

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Answer requests as the engine does; those that it dies over, alone and twice, fail.

        Raises:
            EngineLoadError: it died `MAX_FRUITLESS_RESTARTS` times without an answer in between, or cannot be started
            again.
        """
        source = iter(requests)
        calling = Calling()
        while not calling.is_exhausted:
            calling = Calling()
            engine_exit = yield from self._call(source, calling, is_suspect=False)
            if engine_exit is not None:
                self._record_exit(engine_exit, calling.has_answered)
                with self._turns.search():
                    yield from self._searched(list(calling.in_flight.values()))

    def _searched(self, requests: Sequence[Request]) -> Iterator[Completion]:
        """Answers to requests over one of which the engine died, that one's failure among them."""
        groups = _halves(requests)
        while groups:
            group = groups.pop()
            taken = Calling()
            answered: set[str] = set()
            engine_exit = yield from _noting(self._call(iter(group.requests), taken, is_suspect=True), answered)
            if engine_exit is None:
                continue
            self._record_exit(engine_exit, taken.has_answered)
            left = [request for request in group.requests if request.request_id not in answered]
            if len(group.requests) > 1:
                groups += _halves(left)
            elif group.num_exits + 1 >= MAX_EXITS_ALONE:
                yield self._failed(group.requests[0], engine_exit)
            else:
                groups.append(_Group(group.requests, group.num_exits + 1))

    def _call(
        self, source: Iterator[Request], calling: Calling, *, is_suspect: bool
    ) -> Generator[Completion, None, EngineExit | None]:
        """One call of the engine; how it died, if it did. That of a suspect has the engine for itself."""
        with self._turns.taken(is_suspect=is_suspect):
            link = self._supervisor.running()
            return (yield from link.answers(source, calling, lambda messages: self._next_message(link, messages)))

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

    def _failed(self, request: Request, engine_exit: EngineExit) -> Completion:
        error: RowError = (
            EngineTimeout(f"the engine was silent for more than {self._max_silence_s:g} s over this request alone")
            if engine_exit.is_silence
            else EngineCrashed(f"the engine dies over this request: {engine_exit.cause}")
        )
        return Completion.failed(
            request.request_id,
            error,
            provider="local",
            model=self.config.name,
            model_revision=self.config.revision,
        )


def _noting(
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
    """Two groups, the first one last, which is the next to be taken."""
    middle = (len(requests) + 1) // 2
    return [_Group(half) for half in (requests[middle:], requests[:middle]) if half]


def _start(config: EngineConfig, last: EngineLink | None) -> EngineLink:
    """Start a process and wait until its engine is loaded.

    Raises:
        EngineLoadError: the engine cannot be loaded, or its process ended while it was.
    """
    ours, theirs = socket.socketpair()
    with theirs:
        popen = start_process(
            engine_command("moebeam.model_runner.engine_process.child", str(theirs.fileno())),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=(theirs.fileno(),),
            env=engine_environment(),
        )
    try:
        return EngineLink(Connection(ours.detach()), config, popen, last.counters if last is not None else None)
    except EOFError as error:
        raise EngineLoadError(f"the engine's process died while it loaded: {error}") from None
