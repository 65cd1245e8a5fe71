"""The main program of an engine's own process, started by `isolated_runner.py`.

Both sides exchange pickled tuples over a socket that nobody else can reach. From the parent come the configuration,
then `("open", call)` and `("request", call, Request | None)`; to it go `("ready", counters)` or `("failed", error)`,
then `("pull", call)`, `("completion", call, Completion)`, `("done", call, counters)`, `("broken", call, error)` and,
every `BEAT_S`, `("beat", counters)`. The process ends with its parent's end of the socket.
"""

import contextlib
import faulthandler
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any, TypeAlias

from moebeam.model_runner.protocol import CountingRunner, EngineConfig, ModelRunner, load_runner
from moebeam.schemas.errors import EngineContractError, MoebeamError
from moebeam.schemas.records import Request

BEAT_S = 1.0

_Requests: TypeAlias = "SimpleQueue[Request | None]"


class _Link:
    """The socket, for all threads."""

    def __init__(self, connection: "Connection[Any, Any]") -> None:
        self._connection = connection
        self._lock = threading.Lock()

    def send(self, *message: object) -> None:
        with self._lock:
            self._connection.send(message)

    def receive(self) -> Any:
        return self._connection.recv()


def engine_command(module: str, *args: str) -> list[str]:
    """How a module of this package is run in a process of its own."""
    return [sys.executable, "-m", module, *args]


def engine_environment() -> dict[str, str]:
    """The environment of such a process: it imports from where this one does, which may be known to this one alone."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def serve(connection: "Connection[Any, Any]", load: Callable[[EngineConfig], ModelRunner] = load_runner) -> None:
    """Load the engine that comes first, then answer calls until the other side ends.

    Raises:
        EOFError, OSError: the other side ended.
    """
    link = _Link(connection)
    config: EngineConfig = link.receive()
    try:
        runner = load(config)
    except MoebeamError as error:
        link.send("failed", error)
        return
    link.send("ready", _counters(runner))
    threading.Thread(target=_beat, args=(link, runner), daemon=True).start()
    calls: dict[int, _Requests] = {}
    try:
        while True:
            kind, call, *rest = link.receive()
            if kind == "open":
                calls[call] = SimpleQueue()
                threading.Thread(target=_answer, args=(link, runner, call, calls), daemon=True).start()
            elif (requests := calls.get(call)) is not None:
                requests.put(rest[0])
    finally:
        # What nobody waits for any more holds neither memory nor its turn.
        for left in list(calls.values()):
            left.put(None)


def _answer(link: _Link, runner: ModelRunner, call: int, calls: dict[int, _Requests]) -> None:
    with contextlib.suppress(OSError):
        try:
            for completion in runner.generate(_pulled(link, call, calls[call])):
                link.send("completion", call, completion)
            link.send("done", call, _counters(runner))
        except MoebeamError as error:
            link.send("broken", call, error)
        except Exception as error:  # whatever an engine breaks with is told to the caller, whose error it is
            link.send("broken", call, EngineContractError(f"{type(error).__name__}: {error}"))
        finally:
            del calls[call]


def _pulled(link: _Link, call: int, requests: _Requests) -> Iterator[Request]:
    while True:
        link.send("pull", call)
        request = requests.get()
        if request is None:
            return
        yield request


def _beat(link: _Link, runner: ModelRunner) -> None:
    with contextlib.suppress(OSError):
        while True:
            threading.Event().wait(BEAT_S)
            link.send("beat", _counters(runner))


def _counters(runner: ModelRunner) -> Mapping[str, float]:
    return dict(runner.counters()) if isinstance(runner, CountingRunner) else {}


def main() -> None:
    """Serve the socket whose file descriptor is the first argument."""
    faulthandler.enable()
    with contextlib.suppress(EOFError, OSError):
        serve(Connection(int(sys.argv[1])))
    # Threads may stand inside the engine; nothing of theirs is wanted any more.
    os._exit(0)


if __name__ == "__main__":
    main()
