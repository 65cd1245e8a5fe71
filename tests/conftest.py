"""What several folders of tests share."""

import gc
import os
import sys
from pathlib import Path

import hypothesis
import pytest

# Before torch is loaded, here and in the processes that tests start: for matrices this small more threads only wait
# for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Machines are shared: how long one example takes says nothing. MOEBEAM_TEST_EXAMPLES searches longer.
hypothesis.settings.register_profile(
    "moebeam", deadline=None, max_examples=int(os.environ.get("MOEBEAM_TEST_EXAMPLES", "30"))
)
hypothesis.settings.load_profile("moebeam")


def pytest_collection_finish() -> None:
    """Leave out of the garbage collection what the tests import: torch and Beam are millions of objects."""
    if "apache_beam" in sys.modules:
        from tests.support.quick_beam import remember_what_beam_inspects

        remember_what_beam_inspects()
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """Let the process end in order: libraries tell of objects that are left."""
    gc.unfreeze()


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random `deepseek_v4` checkpoint of three layers, with a byte-level tokenizer and a chat template.

    torch runs on one thread from here on: for matrices this small more only wait for each other (30 times slower
    beside another busy process).
    """
    import torch

    from tests.support.models.checkpoints import save_tiny_checkpoint

    torch.set_num_threads(1)
    return save_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))
