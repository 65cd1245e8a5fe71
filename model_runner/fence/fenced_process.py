"""Our end of one fenced process: starts it, hands it items, and says which of them it died over.

Used by `fence.py`; the process runs `child.py`.
"""

import io
import mmap
import os
import pickle
import signal
import socket
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

from moebeam.model_runner.fence.child import WAITING, Outcome
from moebeam.model_runner.python_process import import_path, python_command
from moebeam.schemas.errors import PipelineFailed

_LOOK_S = 0.5
"""How often a thread that waits looks whether its own process ends."""

_EXIT_S = 1.0

_KEPT_VARIABLES = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "PYTHONHOME", "TZ", "TZDIR")
"""What a fenced process gets of the environment: keys of providers and stores stay out of its reach."""


class FencedProcess:
    """One process; for one thread at a time.

    Attributes:
        is_fresh: whether it has answered nothing yet.
        was_silent: whether it was ended because it said nothing for too long.
        exit_cause: how it ended, once it is closed, with the last line that it wrote.
    Raises:
        PipelineFailed: it cannot be started.
    """

    def __init__(self) -> None:
        self.is_fresh = True
        self.was_silent = False
        self.exit_cause = ""
        ours, theirs = socket.socketpair()
        pipe, self._pipe = os.pipe()
        with tempfile.TemporaryFile() as shared, theirs, open(pipe, "rb"):
            shared.truncate(8)
            self._progress = mmap.mmap(shared.fileno(), 8)
            descriptors = theirs.fileno(), shared.fileno(), pipe
            try:
                self._popen = subprocess.Popen(
                    python_command("moebeam.model_runner.fence.child", *map(str, descriptors)),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    pass_fds=descriptors,
                    env=_build_environment(),
                    # Ctrl-C is for us; it ends with our ends of the socket and the pipe.
                    start_new_session=True,
                )
            except OSError as error:
                ours.close()
                os.close(self._pipe)
                raise PipelineFailed(f"the process that renders templates cannot be started: {error}") from error
        self._connection: Connection[Any, Any] = Connection(ours.detach())

    @property
    def is_open(self) -> bool:
        """Whether it can be asked; it may have ended nevertheless."""
        return not self._connection.closed

    @property
    def step(self) -> int:
        """What it does, or did when it ended: `WAITING`, `COMPILING`, or `FIRST_ITEM` + the number of an item."""
        (step,) = struct.unpack_from("<q", self._progress, 0)
        return step

    def run(self, request: tuple[Any, ...], items: Sequence[object], *, max_silence_s: float) -> Iterator[Outcome]:
        """Outcomes of the items, in order; fewer, and closed, if the process ended.

        Args:
            request: what `child.py` expects, but for the items.
            max_silence_s: without a word for so long, it is ended.
        Raises:
            PipelineFailed: our own process ends.
        """
        struct.pack_into("<q", self._progress, 0, WAITING)
        num_missing = len(items)
        try:
            self._connection.send_bytes(pickle.dumps((*request, items), pickle.HIGHEST_PROTOCOL))
            while num_missing:
                self._wait(max_silence_s)
                outcomes = _read_outcomes(self._connection.recv_bytes())
                self.is_fresh = False
                num_missing -= len(outcomes)
                yield from outcomes
        except (EOFError, OSError):
            self.close(_EXIT_S)
        except BaseException:
            # What it still sends would be taken for the answer to the next request.
            self.close()
            raise

    def close(self, grace_s: float = 0.0) -> None:
        """End the process; it ends by itself when it sees the closed socket, and is killed after `grace_s`."""
        self._connection.close()
        try:
            code = self._popen.wait(grace_s)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            code = self._popen.wait()
        os.close(self._pipe)
        how = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        assert self._popen.stderr is not None, "a pipe was asked for"
        with self._popen.stderr as stderr:
            os.set_blocking(stderr.fileno(), False)
            lines = (stderr.read() or b"").decode(errors="replace").splitlines()
        self.exit_cause = ": ".join([how, *lines[-1:]])

    def _wait(self, max_silence_s: float) -> None:
        end_at = time.monotonic() + max_silence_s
        while not self._connection.poll(_LOOK_S):
            if not threading.main_thread().is_alive():
                raise PipelineFailed("our process ended while templates were rendered")
            if time.monotonic() > end_at:
                self.was_silent = True
                self._popen.kill()
                raise EOFError


class _PlainUnpickler(pickle.Unpickler):
    """Reads texts and lists; whatever has run in the process, it cannot make ours call anything."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        raise pickle.UnpicklingError(f"expected plain data of a fenced process, found {module_name}.{global_name}")


def _read_outcomes(content: bytes) -> list[Outcome]:
    try:
        return _PlainUnpickler(io.BytesIO(content)).load()
    except Exception as error:  # bytes that are no pickle of ours may raise anything
        raise EOFError from error


def _build_environment() -> dict[str, str]:
    kept = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    return {**kept, "PYTHONPATH": import_path()}
