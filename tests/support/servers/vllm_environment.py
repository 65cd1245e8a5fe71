"""vLLM for CPU in an environment of its own.

`python -m tests.support.servers.vllm_environment` installs it ahead of the tests; else the first that needs it does.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

from filelock import FileLock

from tests.support.servers.local_servers import cache_folder

REQUIREMENTS = Path(__file__).with_name("vllm-requirements.txt")
INSTALL_TIMEOUT_S = 1200
_DONE = ".installed"


class VllmInstallError(Exception):
    """vLLM cannot be installed; the tests that need it fail, they are not skipped."""


def install() -> Path:
    """The interpreter that has vLLM, installed into the user's cache folder if it is not there yet.

    Raises:
        VllmInstallError: uv or a package is missing.
    """
    digest = hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()[:12]
    folder = cache_folder() / f"vllm-cpu-{digest}"
    python = folder / "bin" / "python"
    with FileLock(f"{folder}.lock"):
        if not (folder / _DONE).exists():
            shutil.rmtree(folder, ignore_errors=True)
            beside = Path(sys.executable).with_name("uv")
            uv = str(beside) if beside.exists() else "uv"
            _run([uv, "venv", "--quiet", "--python", sys.executable, str(folder)])
            _run([uv, "pip", "install", "--quiet", "--no-deps", "--python", str(python), "-r", str(REQUIREMENTS)])
            (folder / _DONE).touch()
    return python


def _run(command: list[str]) -> None:
    environment = {**os.environ, "UV_LINK_MODE": "copy"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S, env=environment)
    except FileNotFoundError as error:
        raise VllmInstallError(f"{command[0]}: expected uv beside this interpreter or on the PATH") from error
    if done.returncode:
        raise VllmInstallError(f"{' '.join(command)} failed:\n{done.stderr[-1000:]}")


if __name__ == "__main__":
    try:
        print(install())
    except VllmInstallError as error:
        sys.exit(f"error: {error}")
