"""How moebeam starts Python: no module of the working directory stands in place of one that the process imports.

Python puts the working directory in front of all else for `-m` and `-c`, so that a `json.py` beside a user's job would
be imported by each of our processes. Used for engines, fenced programs, Beam's worker processes and the watchdog.
"""

import os
import sys
from pathlib import Path

SAFE_PATH = "PYTHONSAFEPATH"
"""Set for our processes, it holds for those that they start, too; Python before 3.11 does not know it."""

_OWN_ROOT = str(Path(__file__).absolute().parents[2])
"""The folder that `moebeam` is imported from."""


def python_command(module: str, *args: str) -> list[str]:
    """The command that runs one of our modules in a process of its own, with `python_environment`."""
    return [sys.executable, "-P", "-m", module, *args]


def python_environment() -> dict[str, str]:
    """This process's environment for another one of the same interpreter, which imports what this one can."""
    return {**os.environ, SAFE_PATH: "1", "PYTHONPATH": import_path()}


def foreign_environment() -> dict[str, str]:
    """This process's environment for an interpreter with packages of its own."""
    environment = {**os.environ, SAFE_PATH: "1"}
    if (named := environment.pop("PYTHONPATH", None)) is not None:
        environment["PYTHONPATH"] = os.pathsep.join(_leave_out_working_directory(named.split(os.pathsep)))
    return environment


def import_path() -> str:
    """This process's import path as a `PYTHONPATH`, without the working directory.

    A checkout that is the working directory itself comes last, behind all that Python and its packages bring.
    """
    paths = _leave_out_working_directory(sys.path)
    return os.pathsep.join([*paths, *([] if _OWN_ROOT in paths else [_OWN_ROOT])])


def _leave_out_working_directory(paths: list[str]) -> list[str]:
    try:
        here = os.path.realpath(os.getcwd())
    except FileNotFoundError:  # somebody removed it
        return [path for path in paths if os.path.isabs(path)]
    return [os.path.abspath(path) for path in paths if path and os.path.realpath(path) != here]
