"""The wheel, installed outside of the checkout, is all a user needs."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.support.paths import ROOT


def _run(*command: str, cwd: Path) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    _run(sys.executable, "-m", "build", "--wheel", "--outdir", str(folder), str(ROOT), cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.mark.integration
def test_the_wheel_holds_the_five_packages_and_the_checkpoint(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names if not name.startswith("moebeam-")}
    assert tops == {"schemas", "model_runner", "transforms", "pipelines", "jobs"}
    assert {"jobs/demo/checkpoint/model.safetensors", "jobs/demo/job.toml", "jobs/demo/prices.csv"} <= set(names)


@pytest.mark.integration
def test_the_installed_wheel_runs_the_demo_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    # The environment's own packages are seen through; only moebeam itself is installed anew.
    _run(sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv"), cwd=tmp_path)
    python = tmp_path / "venv" / "bin" / "python"
    site = Path(_run(str(python), "-c", "import site; print(site.getsitepackages()[0])", cwd=tmp_path).strip())
    ours = Path(_run(sys.executable, "-c", "import torch; print(torch.__path__[0])", cwd=tmp_path).strip()).parent
    zipfile.ZipFile(wheel).extractall(site)
    (site / "dependencies.pth").write_text(f"{ours}\n")
    where = _run(str(python), "-c", "import jobs; print(jobs.__file__)", cwd=tmp_path).strip()
    assert Path(where).is_relative_to(site)
    shown = _run(str(python), "-m", "moebeam.jobs.demo.run_demo", "--rows", "6", "--folder", "demo", cwd=tmp_path)
    assert "of 6 answers are exactly right" in shown
    assert (tmp_path / "demo" / "output" / "manifest.json").exists()
