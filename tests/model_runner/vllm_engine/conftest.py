"""The engine over a worker that is not vLLM."""

import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from moebeam.model_runner.vllm_engine import process as vllm_process
from moebeam.model_runner.vllm_engine.engine_arguments import ARGUMENTS_VARIABLE
from moebeam.model_runner.vllm_engine.process import PYTHON_VARIABLE
from moebeam.model_runner.vllm_engine.runner import VllmRunner, load_vllm_runner
from tests.support.engines.fake_vllm import FAKE_WORKER, Fake, config_of


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    """Lets `load_vllm_runner` start the scripted worker."""
    (script := tmp_path / "worker.py").write_text(textwrap.dedent(FAKE_WORKER))
    (folder := tmp_path / "records").mkdir()
    monkeypatch.setattr(vllm_process, "WORKER_SCRIPT", script)
    monkeypatch.setenv(PYTHON_VARIABLE, sys.executable)
    monkeypatch.delenv(ARGUMENTS_VARIABLE, raising=False)
    monkeypatch.setenv("FAKE_FOLDER", str(folder))
    return Fake(folder)


@pytest.fixture
def runner(fake: Fake, tiny_checkpoint: Path) -> Iterator[VllmRunner]:
    loaded = load_vllm_runner(config_of(tiny_checkpoint))
    yield loaded
    loaded.close()
