"""The committed checkpoint, loaded once."""

import pytest
from transformers import DeepseekV4ForCausalLM, PreTrainedTokenizerFast

from moebeam.jobs.check.default_checkpoint import CHECKPOINT_PATH
from training.evaluate import load_checkpoint


@pytest.fixture(scope="session")
def checkpoint() -> tuple[DeepseekV4ForCausalLM, PreTrainedTokenizerFast]:
    return load_checkpoint(CHECKPOINT_PATH)


@pytest.fixture(scope="session")
def tokenizer(checkpoint: tuple[DeepseekV4ForCausalLM, PreTrainedTokenizerFast]) -> PreTrainedTokenizerFast:
    return checkpoint[1]
