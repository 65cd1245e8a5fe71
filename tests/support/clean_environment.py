"""Environments in which moebeam is the wheel: with the images' lock, as on a worker, or with this one's packages."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from tests.support.paths import ROOT

CONTAINERS = ROOT / "jobs" / "containers"
TIMEOUT_S = 1200


def build_wheel(folder: Path) -> Path:
    """The wheel, built as the Dockerfile builds it: from what it copies of the checkout, and nothing else."""
    source = folder / "source"
    source.mkdir()
    for names in re.findall(r"^COPY ((?!--).*) \S+$", stage_of("wheel"), re.MULTILINE):
        for name in names.split():
            if (ROOT / name).is_dir():
                ignore = shutil.ignore_patterns("__pycache__")
                shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=ignore)
            else:
                shutil.copyfile(ROOT / name, source / name)
    _run(sys.executable, "-m", "build", "--wheel", "--outdir", str(folder), str(source), cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


def clean_environment(folder: Path) -> Path:
    """Install the lock and the wheel into a new virtual environment; its folder of programs.

    pip is in it, as in Python's images: Beam's boot program asks pip whether Beam is there. uv, which `make setup`
    brings, only links what it has installed before.
    """
    wheel = build_wheel(folder)
    programs = _new_environment(folder)
    _install(programs, "--requirement", str(CONTAINERS / "requirements.lock"))
    _install(programs, str(wheel))
    return programs


def wheel_environment(folder: Path, wheel: Path) -> Path:
    """A virtual environment in which only the wheel is installed; its folder of programs.

    It sees the packages of this environment through, but not its editable install of moebeam, which is done by a
    `.pth` file: Python reads those of an environment's own folder only.
    """
    programs = _new_environment(folder)
    _install(programs, str(wheel))
    (site,) = programs.parent.glob("lib/*/site-packages")
    (site / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    return programs


def _new_environment(folder: Path) -> Path:
    _run(sys.executable, "-m", "venv", str(folder / "venv"), cwd=folder)
    return folder / "venv" / "bin"


def _install(programs: Path, *wanted: str) -> None:
    """Install without dependencies, by uv if it is at hand."""
    beside = Path(sys.executable).with_name("uv")
    uv = str(beside) if beside.exists() else shutil.which("uv")
    python = str(programs / "python")
    install = [uv, "pip", "install", "--quiet", "--python", python] if uv else [python, "-m", "pip", "install", "-q"]
    _run(*install, "--no-deps", *wanted, cwd=programs)


def image_variables(target: str) -> dict[str, str]:
    """What the Dockerfile's target sets in the environment of its image."""
    return dict(re.findall(r"^ENV (\w+)=(.*)$", stage_of(target), re.MULTILINE))


def image_entry_point(target: str) -> list[str]:
    """The program that an image of the Dockerfile's target starts."""
    found = re.search(r"^ENTRYPOINT \[(.*)\]$", stage_of(target), re.MULTILINE)
    assert found is not None, f"target {target} has no entry point of its own"
    return re.findall(r'"([^"]*)"', found[1])


def stage_of(target: str) -> str:
    """The lines of the Dockerfile's target."""
    stages = re.split(r"^(?=FROM )", (CONTAINERS / "Dockerfile").read_text(), flags=re.MULTILINE)
    (found,) = (stage for stage in stages if stage.splitlines()[0].endswith(f" AS {target}"))
    return found


def _run(*command: str, cwd: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    ended = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert ended.returncode == 0, f"{' '.join(command)}: {(ended.stderr or ended.stdout)[-2000:]}"
