"""Processes of ours import nothing from the working directory, whatever lies there and however it is named."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moebeam.model_runner import python_process
from moebeam.model_runner.python_process import foreign_environment, import_path, python_command, python_environment

NAMES = ("json", "random", "torch", "numpy", "sitecustomize", "schemas/__init__", "moebeam/__init__")
TIMEOUT_S = 60


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, in which everything that is imported leaves a file."""
    for name in NAMES:
        module = tmp_path / f"{name}.py"
        module.parent.mkdir(exist_ok=True)
        module.write_text(f"open({str(tmp_path / 'imported')!r}, 'a').write(__name__)")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("entries", [(), ("",), (".",), ("here",), ("link",)])
def test_a_process_of_ours_imports_nothing_from_the_working_directory(
    folder: Path, monkeypatch: pytest.MonkeyPatch, entries: tuple[str, ...]
) -> None:
    (folder / "link").symlink_to(folder)
    named = {"here": str(folder), "link": str(folder / "link")}
    monkeypatch.setattr(sys, "path", [*(named.get(entry, entry) for entry in entries), *sys.path])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(("", ".", str(folder))))
    command = [*python_command("of.ours")[:-2], "-c", "import json, random, moebeam.schemas.errors"]
    done = subprocess.run(
        command, env=python_environment(), capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not (folder / "imported").exists()


def test_what_the_process_itself_can_import_keeps_its_order() -> None:
    kept = import_path().split(os.pathsep)
    assert kept == [path for path in sys.path if path in kept] or kept[-1] == str(
        Path(python_process.__file__).parents[2]
    )
    assert json.__file__.rpartition("/json/")[0] in kept


def test_a_checkout_that_is_the_working_directory_comes_last(monkeypatch: pytest.MonkeyPatch) -> None:
    root = str(Path(python_process.__file__).absolute().parents[2])
    monkeypatch.chdir(root)
    assert import_path().split(os.pathsep).index(root) == len(import_path().split(os.pathsep)) - 1


def test_a_working_directory_that_is_gone_hides_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert set(import_path().split(os.pathsep)) >= {path for path in sys.path if path and os.path.isabs(path)}


def test_another_interpreter_gets_the_users_path_without_the_working_directory(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(("/opt/own", "", ".", str(folder))))
    environment = foreign_environment()
    assert environment["PYTHONPATH"] == "/opt/own"
    assert environment[python_process.SAFE_PATH] == "1"
