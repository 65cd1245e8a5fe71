"""The wheel, installed outside of the checkout, is all a user needs, whatever the user's own folders are called."""

import json
import subprocess
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.support.clean_environment import build_wheel, wheel_environment
from tests.support.disturbances.killed_runs import WORKERS
from tests.support.jobs.user_project import NUM_ROWS, project_environment, write_project
from tests.support.paths import ROOT

pytestmark = pytest.mark.integration

PACKAGES = ("schemas", "model_runner", "transforms", "pipelines", "jobs")
SCRIPT = """
import pandas as pd
import schemas.review
import moebeam
from moebeam import run_job

assert moebeam.__file__.startswith({site!r}), moebeam.__file__
answers = run_job("job.toml", data=pd.DataFrame({{"text": ["one", "two"]}}))
print(list(answers["status"]), [answer["echo"] for answer in answers["output"]])
"""


def _run(*command: str, cwd: Path, env: Mapping[str, str] | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def programs(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment in which moebeam is the wheel."""
    return wheel_environment(tmp_path_factory.mktemp("installed"), wheel)


@pytest.fixture
def project(tmp_path: Path, tiny_checkpoint: Path) -> Path:
    """A project whose folders are named like ours."""
    return write_project(tmp_path / "project", tiny_checkpoint).parent


def assert_answered(project: Path) -> None:
    rows = pq.read_table(project / "out" / "results").to_pylist()
    assert [row["status"] for row in rows] == ["ok"] * NUM_ROWS
    assert all(row["output"]["num_prompt_tokens"] >= 1 for row in rows)


def test_the_wheel_holds_moebeam_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.partition("/")[0] for name in names} == {"moebeam", f"moebeam-{_version(wheel)}.dist-info"}
    data = ("jobs/demo/checkpoint/model.safetensors", "jobs/demo/job.toml", "jobs/demo/prices.csv", "py.typed")
    assert {f"moebeam/{name}" for name in data} <= names
    modules = {f"moebeam/{path.relative_to(ROOT)}" for package in PACKAGES for path in (ROOT / package).rglob("*.py")}
    assert modules | {"moebeam/__init__.py"} == {name for name in names if name.endswith(".py")}


def _version(wheel: Path) -> str:
    return wheel.name.split("-")[1]


def test_the_installed_wheel_runs_the_demo_outside_the_checkout(programs: Path, tmp_path: Path) -> None:
    python = str(programs / "python")
    where = _run(python, "-c", "import moebeam.jobs; print(moebeam.jobs.__file__)", cwd=tmp_path).strip()
    assert Path(where).is_relative_to(programs.parent)
    shown = _run(python, "-m", "moebeam.jobs.demo.run_demo", "--rows", "6", "--folder", "demo", cwd=tmp_path)
    assert "of 6 answers are exactly right" in shown
    assert (tmp_path / "demo" / "output" / "manifest.json").exists()


@pytest.mark.parametrize("options", [(), WORKERS], ids=["one process", "several processes"])
def test_a_project_with_folders_named_like_ours_runs(programs: Path, project: Path, options: tuple[str, ...]) -> None:
    command = (str(programs / "moebeam"), "run", "job.toml", "--json", *options)
    told = json.loads(_run(*command, cwd=project, env=project_environment(project)))
    assert (told["status"], told["num_results"]) == ("succeeded", NUM_ROWS)
    assert_answered(project)


def test_the_projects_own_program_runs_a_job_beside_its_packages(programs: Path, project: Path) -> None:
    (project / "analyse.py").write_text(SCRIPT.format(site=str(programs.parent)))
    shown = _run(str(programs / "python"), "analyse.py", cwd=project, env=project_environment(project))
    assert shown.startswith("['ok', 'ok'] [")
