"""What a script's server wrote: read while it writes, for the instants of stops, and as a whole, for the checks."""

import json
import subprocess
import sys
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.endpoint_chaos.server import LOG
from tests.support.paths import ROOT

_START_TIMEOUT_S = 60.0


@dataclass(slots=True)
class ServedCall:
    """One request as the server saw it; instants are of the machine's monotonic clock, in seconds.

    Attributes:
        how: `answered`, `canary` for an answer to a request for one token, `refused` for what it holds, `cut` in the
            middle, `gone` as the client did not wait, or the status of a failure; empty while it is open.
    """

    number: int
    row: int
    arrived_at: float
    ended_at: float | None = None
    how: str = ""


@dataclass(slots=True)
class ServerLog:
    """Calls and phases so far; `read_on` takes what was written since."""

    path: Path
    calls: dict[int, ServedCall] = field(default_factory=dict[int, ServedCall])
    begun: dict[int, float] = field(default_factory=dict[int, float])
    ended: dict[int, float] = field(default_factory=dict[int, float])
    kinds: dict[int, str] = field(default_factory=dict[int, str])
    is_ready: bool = False
    num_answers: int = 0
    _at: int = 0

    def read_on(self) -> None:
        """Take what the server wrote since the last look."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self._at)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._at += len(line)
                self._take(json.loads(line))

    def _take(self, event: Mapping[str, Any]) -> None:
        what, at = event["what"], event["at"]
        if what == "ready":
            self.is_ready = True
        elif what == "call":
            self.calls[event["number"]] = ServedCall(event["number"], event["row"], at)
        elif what == "end":
            call = self.calls[event["number"]]
            call.ended_at, call.how = at, event["how"]
            self.num_answers += call.how == "answered"
        elif event["is_on"]:
            self.begun[event["index"]], self.kinds[event["index"]] = at, event["kind"]
        else:
            self.ended[event["index"]] = at

    @property
    def phase(self) -> int | None:
        """The phase that is on."""
        return next((index for index in self.begun if index not in self.ended), None)

    def phase_at(self, at: float) -> str:
        """The kind of the phase that was on at an instant; `none` between phases."""
        for index, begun_at in self.begun.items():
            if begun_at <= at <= self.ended.get(index, at):
                return self.kinds[index]
        return "none"


@contextmanager
def served(folder: Path, port: int) -> Generator[ServerLog]:
    """Serve the script in `folder` from a process of its own.

    Raises:
        TimeoutError: the server does not come up.
    """
    log = ServerLog(folder / LOG)
    command = [sys.executable, "-m", "benchmarks.endpoint_chaos.server", str(folder), str(port)]
    with (folder / "server.log").open("ab") as output:
        process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=output, stderr=output)
    try:
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not log.is_ready:
            if process.poll() is not None or time.monotonic() > deadline:
                raise TimeoutError(f"the server did not come up: {(folder / 'server.log').read_text()[-2000:]}")
            time.sleep(0.02)
            log.read_on()
        yield log
    finally:
        process.terminate()
        process.communicate()
        log.read_on()
