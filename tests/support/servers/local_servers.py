"""Servers that tests install and start on this machine: where they are kept, and how they live and end."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

_LAST_WORDS = 1000


def cache_folder() -> Path:
    """Where what was built or fetched once stays for the next tests."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "moebeam"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def is_open(port: int) -> bool:
    """Whether something listens on a port of this machine."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def guarded(command: Sequence[str]) -> list[str]:
    """A command that Linux ends with the process that started it, however that ends."""
    return [*(["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []), *command]


def wait_until(is_ready: Callable[[], bool], process: subprocess.Popen[bytes], timeout_s: float, log: Path) -> None:
    """Wait for a server.

    Raises:
        TimeoutError: it ended or was not ready in time; with the end of its log. It has been killed.
    """
    deadline = time.monotonic() + timeout_s
    while not is_ready():
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            process.wait()
            raise TimeoutError(log.read_text(errors="replace")[-_LAST_WORDS:])
        time.sleep(0.05)
