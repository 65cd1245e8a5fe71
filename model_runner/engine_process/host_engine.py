"""Main program of the process that owns a host's shared engine, started by `host_runner.py`.

It listens on a socket in the user's folder, serves each worker like `child.py`, and exits `GRACE_S` after the last
worker has disconnected.
"""

import os
import sys
import threading
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, Listener, answer_challenge, deliver_challenge
from pathlib import Path
from typing import Any

from moebeam.model_runner.engine_process.child import serve
from moebeam.model_runner.engine_process.isolated_runner import IsolatedRunner
from moebeam.model_runner.protocol import EngineConfig, ModelRunner, load_runner

KEY_BYTES = 32
"""Length of the key that a worker must know; it comes by standard input, which no list of processes shows."""

GRACE_S = 5.0
"""How long an unused engine waits for the next worker."""

_PAUSE_S = 0.1


class HostEngine:
    """The engine, loaded for the first worker, and the number of workers that use it."""

    def __init__(self, address: Path, key: bytes, max_silence_s: float | None) -> None:
        self._address = address
        self._key = key
        self._max_silence_s = max_silence_s
        self._lock = threading.Lock()
        self._loaded: ModelRunner | None = None
        self._changed = threading.Condition()
        self._num_workers = 0
        self._is_wanted = False

    def serve_worker(self, connection: "Connection[Any, Any]") -> None:
        """Serve one worker until it disconnects, once it has shown that it knows the key; until then nothing is read
        as a pickle."""
        try:
            deliver_challenge(connection, self._key)
            answer_challenge(connection, self._key)
        except (AuthenticationError, EOFError, OSError):
            connection.close()
            return
        self._count(1)
        try:
            serve(connection, self._load)
        except (EOFError, OSError):
            pass
        finally:
            self._count(-1)

    def wait_until_left(self) -> None:
        """Return after `GRACE_S` without a worker, with the socket removed."""
        with self._changed:
            while True:
                self._changed.wait_for(lambda: self._num_workers == 0)
                self._is_wanted = False
                if not self._changed.wait_for(lambda: self._is_wanted, timeout=GRACE_S):
                    self._address.unlink(missing_ok=True)
                    return

    def close(self) -> None:
        if isinstance(self._loaded, IsolatedRunner):
            self._loaded.close()

    def _load(self, config: EngineConfig) -> ModelRunner:
        with self._lock:
            if self._loaded is None:
                is_healing = config.options.is_self_healing
                self._loaded = (
                    load_runner(config) if is_healing else IsolatedRunner(config, max_silence_s=self._max_silence_s)
                )
            return self._loaded

    def _count(self, change: int) -> None:
        with self._changed:
            self._num_workers += change
            self._is_wanted = self._is_wanted or change > 0
            self._changed.notify_all()


def main() -> None:
    """Serve the socket named by the first argument; the optional second one is `max_silence_s`."""
    address = Path(sys.argv[1])
    key = sys.stdin.buffer.read(KEY_BYTES)
    if len(key) != KEY_BYTES:
        sys.exit("the worker that started this process ended before it gave the key")
    engine = HostEngine(address, key, float(sys.argv[2]) if len(sys.argv) > 2 else None)
    listener = Listener(str(address), family="AF_UNIX", backlog=64)
    print("listening", flush=True)
    os.close(sys.stdout.fileno())

    def accept() -> None:
        while True:
            try:
                connection = listener.accept()
            except OSError:  # one that came and went, or no descriptor left for it
                threading.Event().wait(_PAUSE_S)
                continue
            threading.Thread(target=engine.serve_worker, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    engine.wait_until_left()
    engine.close()
    # Engine threads may still run; their results are not needed.
    os._exit(0)


if __name__ == "__main__":
    main()
