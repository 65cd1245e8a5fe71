"""An environment as a worker's image has it: a virtual environment of the images' lock and the wheel, nothing else."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.support.paths import ROOT

CONTAINERS = ROOT / "jobs" / "containers"
TIMEOUT_S = 1200


def build_wheel(folder: Path) -> Path:
    """The wheel of this checkout."""
    _run(sys.executable, "-m", "build", "--wheel", "--outdir", str(folder), str(ROOT), cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


def clean_environment(folder: Path) -> Path:
    """Install the lock and the wheel into a new virtual environment; its folder of programs.

    pip is in it, as in Python's images: Beam's boot program asks pip whether Beam is there. uv, which `make setup`
    brings, only links what it has installed before.
    """
    wheel = build_wheel(folder)
    beside = Path(sys.executable).with_name("uv")
    uv = str(beside) if beside.exists() else shutil.which("uv")
    venv = folder / "venv"
    programs = venv / "bin"
    _run(sys.executable, "-m", "venv", str(venv), cwd=folder)
    install = [uv, "pip", "install", "--quiet", "--python", str(programs / "python")] if uv else []
    install = install or [str(programs / "python"), "-m", "pip", "install", "--quiet"]
    _run(*install, "--no-deps", "--requirement", str(CONTAINERS / "requirements.lock"), cwd=folder)
    _run(*install, "--no-deps", str(wheel), cwd=folder)
    return programs


def image_variables(target: str) -> dict[str, str]:
    """What the Dockerfile's target sets in the environment of its image."""
    return dict(re.findall(r"^ENV (\w+)=(.*)$", _stage(target), re.MULTILINE))


def image_entry_point(target: str) -> list[str]:
    """The program that an image of the Dockerfile's target starts."""
    found = re.search(r"^ENTRYPOINT \[(.*)\]$", _stage(target), re.MULTILINE)
    assert found is not None, f"target {target} has no entry point of its own"
    return re.findall(r'"([^"]*)"', found[1])


def _stage(target: str) -> str:
    stages = re.split(r"^(?=FROM )", (CONTAINERS / "Dockerfile").read_text(), flags=re.MULTILINE)
    (found,) = (stage for stage in stages if stage.splitlines()[0].endswith(f" AS {target}"))
    return found


def _run(*command: str, cwd: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    ended = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert ended.returncode == 0, f"{' '.join(command)}: {(ended.stderr or ended.stdout)[-2000:]}"
