"""One engine for all worker processes of a host: one copy of the weights, asked over a socket.

*answer* uses it if `[failures] engine_process` is `host`. The first worker that needs the engine starts
`model_runner/engine_process/host_engine.py`, and the others connect to it; it exits some seconds after the last one
leaves. It runs the engine in another process (`isolated_runner.py`), so a row that kills the engine costs only itself.

Beam's `MultiProcessShared` does not fit: its server dies with the worker that started it, obeys anybody on the host who
knows its fixed password, and cannot return iterators.
"""

import contextlib
import hashlib
import logging
import os
import secrets
import subprocess
import threading
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import Any

from filelock import FileLock

from moebeam.model_runner.engine_process.engine_link import CallState, EngineLink
from moebeam.model_runner.engine_process.host_engine import KEY_BYTES
from moebeam.model_runner.engine_process.supervisor import Supervisor
from moebeam.model_runner.host_folder import check_own_socket, host_folder, make_private_folder
from moebeam.model_runner.protocol import EngineConfig
from moebeam.model_runner.python_process import python_command, python_environment
from moebeam.schemas.determinism import Determinism
from moebeam.schemas.errors import EngineLoadError
from moebeam.schemas.records import Completion, Request

MAX_EXITS = 3
"""Exits of the host's process after which a call fails; rows that kill the engine do not cause them."""

_MAX_TRIES = 5

_LOGGER = logging.getLogger(__name__)


class HostRunner:
    """The engine of this host, shared by all processes with the same configuration."""

    def __init__(self, config: EngineConfig, *, max_silence_s: float | None = None) -> None:
        """
        Args:
            config: the job's engine configuration.
            max_silence_s: see `IsolatedRunner`.
        Raises:
            EngineLoadError: the engine cannot be loaded.
        """
        self.config = config
        self._is_given_back = threading.Event()
        self._supervisor: Supervisor[EngineLink] = Supervisor(lambda _: _connect(config, max_silence_s))

    def give_back(self) -> None:
        """See `StoppableRunner`; other processes' requests go on."""
        self._is_given_back.set()
        self._supervisor.last.give_back()

    def close(self) -> None:
        """Release the engine; it exits when no worker uses it."""
        self._supervisor.close()

    def counters(self) -> Mapping[str, float]:
        """Like `CountingRunner.counters`, for all processes that share the engine."""
        return self._supervisor.last.counters

    def determinism(self) -> Determinism:
        """See `PromisingRunner`: what the engine in the other process promises."""
        return self._supervisor.last.determinism

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Answer requests as the engine does.

        Raises:
            EngineLoadError: its process ended `MAX_EXITS` times.
        """
        source = iter(requests)
        for _ in range(MAX_EXITS):
            if self._is_given_back.is_set():
                return
            call_state = CallState()
            engine_exit = yield from self._supervisor.running().answers(source, call_state)
            if engine_exit is None or self._is_given_back.is_set():
                return
            _LOGGER.warning("the engine that this host shares ended; it is started again")
            source = chain(list(call_state.in_flight.values()), source)
        raise EngineLoadError(f"the process that holds engine {self.config.engine!r} for this host ended {MAX_EXITS}x")


def _connect(config: EngineConfig, max_silence_s: float | None) -> EngineLink:
    """Connect to the host's engine; starts it if there is none.

    Raises:
        EngineLoadError: its folder or socket is not this user's alone, or its process does not live.
    """
    try:
        folder = make_private_folder(host_folder() / "engines")
    except OSError as error:
        raise EngineLoadError(f"no folder for the socket of the engine that this host shares: {error}") from error
    address = folder / f"{hashlib.sha256(repr((config, max_silence_s)).encode()).hexdigest()[:24]}.socket"
    for _ in range(_MAX_TRIES):
        try:
            return EngineLink(_open_socket(address, max_silence_s), config)
        except PermissionError as error:
            raise EngineLoadError(f"the engine that this host shares cannot be reached: {error}") from error
        except (OSError, EOFError, AuthenticationError) as error:
            # The process was already exiting, unused.
            _LOGGER.debug("%s: %s", address, error)
    raise EngineLoadError(
        f"the process that is to hold engine {config.engine!r} for this host does not live: {address}"
    )


def _open_socket(address: Path, max_silence_s: float | None) -> "Connection[Any, Any]":
    with FileLock(f"{address}.lock"):
        try:
            return _open_client(address)
        except (FileNotFoundError, ConnectionRefusedError, AuthenticationError):
            _start(address, max_silence_s)
            return _open_client(address)


def _open_client(address: Path) -> "Connection[Any, Any]":
    """Connect, with proof of the key on both sides before anything is unpickled."""
    check_own_socket(address)
    connection: Any = Client(str(address), family="AF_UNIX", authkey=_key_file(address).read_bytes())
    return connection


def _key_file(address: Path) -> Path:
    return address.with_suffix(".key")


def _start(address: Path, max_silence_s: float | None) -> None:
    """Start the engine's process and wait until it listens."""
    address.unlink(missing_ok=True)
    key_file = _key_file(address)
    key_file.unlink(missing_ok=True)
    key = secrets.token_bytes(KEY_BYTES)
    with open(os.open(key_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as sink:
        sink.write(key)
    silence = [] if max_silence_s is None else [str(max_silence_s)]
    process = subprocess.Popen(
        python_command("moebeam.model_runner.engine_process.host_engine", str(address), *silence),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=python_environment(),
        start_new_session=True,
    )
    assert process.stdin is not None and process.stdout is not None
    with process.stdout:
        with contextlib.suppress(BrokenPipeError), process.stdin:
            process.stdin.write(key)
        if not process.stdout.readline():
            raise ConnectionRefusedError(f"the host's process ended with status {process.wait()} before it listened")
    # Reaps the process; the worker that started it may also exit first.
    threading.Thread(target=process.wait, daemon=True).start()
