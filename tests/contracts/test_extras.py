"""A package that few jobs need may be missing: other jobs run, and its own are told what to install."""

import json
import subprocess
import sys
import tomllib
from importlib import import_module
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest

from moebeam.jobs.check.job_file import read_job
from moebeam.model_runner.protocol import EngineConfig, load_runner
from moebeam.schemas import extras
from moebeam.schemas.errors import MissingExtra
from moebeam.schemas.extras import EXTRAS, require_extra
from moebeam.schemas.store import storage
from tests.support.jobs.jobs_for_tests import write_parquet
from tests.support.paths import ROOT
from tests.support.servers.fake_endpoint import FakeEndpoint, Reply, deepseek, with_usage

pytestmark = pytest.mark.integration

OPTIONAL = [module for modules in EXTRAS.values() for module in modules]
WITHOUT_EXTRAS = f"""
from importlib.machinery import PathFinder

find_spec = PathFinder.find_spec
PathFinder.find_spec = lambda name, *args: None if name.partition(".")[0] in {OPTIONAL!r} else find_spec(name, *args)

from moebeam.jobs.commands.cli import main
main()
"""
"""The command line where no extra is installed."""


def run_without_extras(*args: str) -> tuple[int, dict[str, Any], str]:
    """Exit code, JSON line and standard error of a command."""
    command = [sys.executable, "-c", WITHOUT_EXTRAS, *args, "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.returncode, json.loads(done.stdout or "{}"), done.stderr


def write_job(folder: Path, model: str) -> Path:
    write_parquet(folder / "in.parquet", {"text": ["one", "two"]})
    job = folder / "job.toml"
    job.write_text(
        f'[input]\npath = "in.parquet"\n[prompt]\ntemplate = "{{{{ text }}}}"\n[output]\npath = "out"\n'
        f"[sampling]\nmax_tokens = 8\n[model]\n{model}\n"
    )
    return job


def test_each_extra_of_pyproject_is_known_by_the_modules_it_brings() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    owners = packages_distributions()
    for extra, modules in EXTRAS.items():
        names = {requirement.partition(">=")[0] for requirement in declared[extra]}
        assert {owners[module][0].replace("_", "-") for module in modules} == names


def test_a_fake_job_runs_without_extras(tmp_path: Path, tiny_checkpoint: Path) -> None:
    job = write_job(tmp_path, f'engine = "fake"\npath = "{tiny_checkpoint}"')
    code, answer, errors = run_without_extras("run", str(job))
    assert (code, answer.get("num_results")) == (0, 2), errors


def test_a_job_against_an_api_runs_without_extras(tmp_path: Path) -> None:
    answer = with_usage(deepseek("fine"), {"prompt_tokens": 5, "completion_tokens": 1})
    with FakeEndpoint(lambda call: Reply(answer)) as served:
        model = f'engine = "openai"\nprovider = "vllm"\nname = "some-model"\nbase_url = "{served.base_url}"'
        code, told, errors = run_without_extras("run", str(write_job(tmp_path, model)))
    assert (code, told.get("num_results")) == (0, 2), errors


@pytest.mark.parametrize("command", ["run", "validate"])
@pytest.mark.parametrize("engine", ["torch", "transformers"])
def test_an_engine_without_its_packages_is_refused_before_anything_is_written(
    tmp_path: Path, tiny_checkpoint: Path, engine: str, command: str
) -> None:
    job = write_job(tmp_path, f'engine = "{engine}"\npath = "{tiny_checkpoint}"')
    code, told, errors = run_without_extras(command, str(job))
    assert code == 2, errors
    assert told["error"] == (
        f'[model] engine = "{engine}": expected torch, transformers, safetensors to be installed, found none; '
        "pip install 'moebeam[torch]'"
    )
    assert not (tmp_path / "out").exists()


def test_a_price_check_without_its_package_says_what_to_install() -> None:
    code, told, _ = run_without_extras("prices", "check", "--against", "genai-prices")
    assert code == 2
    assert "pip install 'moebeam[prices]'" in told["error"]


def test_run_job_takes_what_needs_no_pandas(tmp_path: Path, tiny_checkpoint: Path) -> None:
    code = (
        "import sys, importlib.abc\n"
        "class NoPandas(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name == 'pandas': raise ModuleNotFoundError(name, name=name)\n"
        "sys.meta_path.insert(0, NoPandas())\n"
        "from moebeam import run_job\n"
        f"model = {{'engine': 'fake', 'path': {str(tiny_checkpoint)!r}}}; "
        "job = {'prompt': {'template': '{{ text }}'}, 'model': model, 'sampling': {'max_tokens': 8}}; "
        "print([row['status'] for row in run_job(job, [{'text': 'one'}])])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.stdout == "['ok']\n", done.stderr


def test_only_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    require_extra("torch", "this test")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(MissingExtra, match=r"^this test: expected safetensors to be installed"):
        require_extra("torch", "this test")


def test_a_worker_without_the_engines_packages_says_so_too(
    monkeypatch: pytest.MonkeyPatch, tiny_checkpoint: Path
) -> None:
    monkeypatch.setattr(extras, "find_spec", lambda module: None)
    job = read_job({"input": {"path": "x"}, "output": {"path": "y"}, "model": {"engine": "torch"}})
    with pytest.raises(MissingExtra, match=r"moebeam\[torch\]"):
        load_runner(EngineConfig(job.model, str(tiny_checkpoint), "tiny", ""))


def test_a_store_without_its_reader_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    # Readers that were used before are remembered there.
    monkeypatch.delitem(import_module("fsspec.registry")._registry, "s3", raising=False)
    with pytest.raises(OSError, match=r"pip install 'moebeam\[s3\]'"):
        storage.file_system("s3://bucket/job")
