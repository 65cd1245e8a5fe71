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
import weakref
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from queue import Empty
from typing import Any

from moebeam.model_runner.engine_process.child import engine_command, engine_environment
from moebeam.model_runner.engine_process.engine_link import Calling, EngineExit, EngineLink, Messages
from moebeam.model_runner.engine_process.process_log import ProcessLog
from moebeam.model_runner.protocol import EngineConfig, add_counters
from moebeam.schemas.errors import EngineCrashed, EngineLoadError, EngineTimeout, MoebeamError, RowError
from moebeam.schemas.records import Completion, Request

MAX_DEATHS_ALONE = 2
"""Deaths over a request that was alone, after which it fails: one may have been somebody else's doing."""

MAX_FRUITLESS_RESTARTS = 24
"""Deaths in a row without an answer: halving the largest window down to one request takes fewer."""

SHUTDOWN_TIMEOUT_S = 5.0
_NUM_LOG_LINES = 40
_LOOK_S = 1.0

_LOGGER = logging.getLogger(__name__)


class _EngineProcess:
    """One engine, loaded, in a process that ends with this object."""

    def __init__(self, config: EngineConfig) -> None:
        """Start the process and wait until its engine is loaded.

        Raises:
            EngineLoadError: the engine cannot be loaded, or died while it was.
        """
        self._is_silence = False
        ours, theirs = socket.socketpair()
        with theirs:
            self._popen = subprocess.Popen(
                engine_command("moebeam.model_runner.engine_process.child", str(theirs.fileno())),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                pass_fds=(theirs.fileno(),),
                env=engine_environment(),
                start_new_session=True,  # Ctrl-C is the launcher's to handle
            )
        assert self._popen.stderr is not None
        self._log = ProcessLog(self._popen.stderr, _LOGGER, max_lines=_NUM_LOG_LINES)
        self.link = EngineLink(Connection(ours.detach()), self._cause_of_death)
        try:
            self.link.load(config)
        except (OSError, EOFError):
            raise EngineLoadError(f"the engine's process died while it loaded: {self._cause_of_death()[0]}") from None
        except MoebeamError:
            self._popen.wait()
            raise

    def kill_if_silent(self, max_silence_s: float) -> None:
        """End the process if it has neither answered nor counted anything for so long while it had calls."""
        if self.link.silence_s > max_silence_s:
            self._is_silence = True
            self._popen.kill()

    def close(self) -> None:
        """End the process: by the end of its socket, then by force."""
        if not self.link.close():
            return
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(SHUTDOWN_TIMEOUT_S)
            return
        self._popen.kill()
        self._popen.wait()

    def _cause_of_death(self) -> tuple[str, bool]:
        code = self._popen.wait()
        self._log.wait(timeout_s=1.0)
        if self._is_silence:
            return "it was ended because it had been silent for too long", True
        how = f"signal {-code}" if code < 0 else f"exit status {code}"
        told = [line for line in self._log if "Error" in line or line.startswith("Fatal")]
        return "; ".join([f"its process ended with {how}", *told[-2:]]), False


@dataclass(slots=True)
class _Group:
    """Requests that are asked in one call of the engine, and how often it died over them when they were one."""

    requests: Sequence[Request]
    num_deaths: int = 0


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
        self._lock = threading.Lock()  # over the processes and what dead ones counted
        self._num_barren_deaths = 0
        self._counted: dict[str, float] = {}
        self._turns = _Turns()
        self._processes: list[_EngineProcess] = []
        self._finalizer = weakref.finalize(self, _close_all, self._processes)
        self._process()

    def close(self) -> None:
        """End the engine now; nothing can be answered afterwards."""
        self._finalizer()

    def counters(self) -> Mapping[str, float]:
        """As `CountingRunner.counters`, over all processes so far; what a dead one did last may be missing."""
        with self._lock:
            return add_counters(self._counted, self._processes[-1].link.counters)

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
            death = yield from self._call(source, calling, is_suspect=False)
            if death is not None:
                self._record_exit(death, calling.has_answered)
                with self._turns.search():
                    yield from self._searched(list(calling.in_flight.values()))

    def _searched(self, requests: Sequence[Request]) -> Iterator[Completion]:
        """Answers to requests over one of which the engine died, that one's failure among them."""
        groups = _halves(requests)
        while groups:
            group = groups.pop()
            taken = Calling()
            answered: set[str] = set()
            death = yield from _noting(self._call(iter(group.requests), taken, is_suspect=True), answered)
            if death is None:
                continue
            self._record_exit(death, taken.has_answered)
            left = [request for request in group.requests if request.request_id not in answered]
            if len(group.requests) > 1:
                groups += _halves(left)
            elif group.num_deaths + 1 >= MAX_DEATHS_ALONE:
                yield self._failed(group.requests[0], death)
            else:
                groups.append(_Group(group.requests, group.num_deaths + 1))

    def _call(
        self, source: Iterator[Request], calling: Calling, *, is_suspect: bool
    ) -> Generator[Completion, None, EngineExit | None]:
        """One call of the engine; how it died, if it did. That of a suspect has the engine for itself."""
        with self._turns.taken(is_suspect=is_suspect):
            process = self._process()
            return (yield from process.link.answers(source, calling, lambda messages: self._next(process, messages)))

    def _next(self, process: _EngineProcess, messages: Messages) -> tuple[Any, ...] | EngineExit:
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
            if not self._processes or not self._processes[-1].link.is_alive:
                if self._processes:
                    self._counted = add_counters(self._counted, self._processes[-1].link.counters)
                self._processes[:] = [_EngineProcess(self.config)]
            return self._processes[-1]

    def _record_exit(self, death: EngineExit, has_answered: bool) -> None:
        _LOGGER.warning("the engine %r died: %s; it is started again", self.config.engine, death.cause)
        with self._lock:
            self._num_barren_deaths = 0 if has_answered else self._num_barren_deaths + 1
            if self._num_barren_deaths >= MAX_FRUITLESS_RESTARTS:
                raise EngineLoadError(
                    f"engine {self.config.engine!r} died {self._num_barren_deaths} times without an answer: "
                    f"{death.cause}"
                )

    def _failed(self, request: Request, death: EngineExit) -> Completion:
        error: RowError = (
            EngineTimeout(f"the engine was silent for more than {self._max_silence_s:g} s over this request alone")
            if death.is_silence
            else EngineCrashed(f"the engine dies over this request: {death.cause}")
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


def _close_all(processes: Iterable[_EngineProcess]) -> None:
    for process in processes:
        process.close()
