"""Main program of an engine process, started by `isolated_runner.py`.

Both sides exchange pickled tuples over a private socket. The parent sends the configuration, then `("open", call)` and
`("request", call, Request | None)`; the child sends `("ready", Determinism, counters)` or `("failed", error)`, then
`("pull", call)`, `("completion", call, Completion)`, `("done", call, counters)`, `("broken", call, error)` and, every
`HEARTBEAT_S`, `("beat", counters)`. The process exits when the parent's end of the socket closes.
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

from moebeam.model_runner.protocol import CountingRunner, EngineConfig, ModelRunner, load_runner, read_determinism
from moebeam.schemas.errors import EngineContractError, MoebeamError
from moebeam.schemas.records import Request

HEARTBEAT_S = 1.0

_Requests: TypeAlias = "SimpleQueue[Request | None]"


class _Link:
    """The socket, shared by all threads."""

    def __init__(self, connection: "Connection[Any, Any]") -> None:
        self._connection = connection
        self._lock = threading.Lock()

    def send(self, *message: object) -> None:
        with self._lock:
            self._connection.send(message)

    def receive(self) -> Any:
        return self._connection.recv()


def serve(connection: "Connection[Any, Any]", load: Callable[[EngineConfig], ModelRunner] = load_runner) -> None:
    """Load the engine named in the first message, then serve calls until the connection closes.

    Raises:
        EOFError, OSError: the connection closed.
    """
    link = _Link(connection)
    config: EngineConfig = link.receive()
    try:
        runner = load(config)
    except MoebeamError as error:
        link.send("failed", error)
        return
    link.send("ready", read_determinism(runner), _counters(runner))
    threading.Thread(target=_send_heartbeats, args=(link, runner), daemon=True).start()
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
        # Abandoned calls must release their memory and their turn.
        for left in list(calls.values()):
            left.put(None)


def _answer(link: _Link, runner: ModelRunner, call: int, calls: dict[int, _Requests]) -> None:
    with contextlib.suppress(OSError):
        try:
            for completion in runner.generate(_pull_requests(link, call, calls[call])):
                link.send("completion", call, completion)
            link.send("done", call, _counters(runner))
        except MoebeamError as error:
            link.send("broken", call, error)
        except Exception as error:  # any engine failure is raised in the caller's process
            link.send("broken", call, EngineContractError(f"{type(error).__name__}: {error}"))
        finally:
            del calls[call]


def _pull_requests(link: _Link, call: int, requests: _Requests) -> Iterator[Request]:
    while True:
        link.send("pull", call)
        request = requests.get()
        if request is None:
            return
        yield request


def _send_heartbeats(link: _Link, runner: ModelRunner) -> None:
    with contextlib.suppress(OSError):
        while True:
            threading.Event().wait(HEARTBEAT_S)
            link.send("beat", _counters(runner))


def _counters(runner: ModelRunner) -> Mapping[str, float]:
    return dict(runner.counters()) if isinstance(runner, CountingRunner) else {}


def main() -> None:
    """Serve the socket whose file descriptor is the first argument."""
    faulthandler.enable()
    with contextlib.suppress(EOFError, OSError):
        serve(Connection(int(sys.argv[1])))
    # Engine threads may still run; their results are not needed.
    os._exit(0)


if __name__ == "__main__":
    main()
