"""What several folders of tests share."""

import os
from pathlib import Path

import hypothesis
import pytest

# Before torch is loaded, here and in the processes that tests start: for matrices this small more threads only wait
# for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Machines are shared: how long one example takes says nothing.
hypothesis.settings.register_profile("moebeam", deadline=None)
hypothesis.settings.load_profile("moebeam")


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random `deepseek_v4` checkpoint of three layers, with a byte-level tokenizer and a chat template.

    torch runs on one thread from here on: for matrices this small more only wait for each other (30 times slower
    beside another busy process).
    """
    import torch

    from tests.support.checkpoints import save_tiny_checkpoint

    torch.set_num_threads(1)
    return save_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))
