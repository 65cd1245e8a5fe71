"""The engine benchmark's checkpoint and work at tiny size."""

import pytest

from benchmarks.engine import work as engine_work
from benchmarks.engine.vllm_contender import Work
from tests.support.models.engine_models import PROMPTS, v4_config


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("v4")
    engine_work.save_checkpoint(v4_config(), folder)
    return str(folder)


@pytest.fixture
def work(checkpoint: str) -> Work:
    return Work(checkpoint=checkpoint, prompts=PROMPTS, warm_up=[[30, 31]], max_tokens=5, num_threads=1)
