"""What `transformers` would load without a word is refused, and its ropes forget the prompts before."""

import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moebeam.model_runner.torch_engine.runner import load_torch_runner
from moebeam.model_runner.transformers_engine.runner import load_transformers_runner
from moebeam.schemas.errors import EngineLoadError
from tests.support.engines.engine_configs import engine_config
from tests.support.engines.tiny_requests import request_of, run_all, texts
from tests.support.models.checkpoint_layouts import save_layout
from tests.support.models.checkpoints import save_tiny_tokenizer


def test_a_tensor_that_transformers_would_make_up_is_named(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))
    tensors = load_file(folder / "model.safetensors")
    lost = next(name for name in tensors if name.endswith("embed.weight") or "embed_tokens" in name)
    del tensors[lost]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EngineLoadError, match=r"found 1 missing: model\.embed_tokens\.weight"):
        load_transformers_runner(engine_config("transformers", str(folder)))


def test_a_router_of_nan_is_refused_at_load(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path / "copy"))
    tensors = load_file(folder / "model.safetensors")
    tensors[next(name for name in tensors if name.endswith("gate.weight"))][0, 0] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EngineLoadError, match=r"gate\.weight': expected finite numbers"):
        load_transformers_runner(engine_config("transformers", str(folder)))


def test_prompts_of_a_rope_by_length_are_answered_as_if_each_were_alone(tmp_path: Path) -> None:
    tokenizer = save_tiny_tokenizer(tmp_path)
    rope = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 4.0}
    save_layout(tmp_path, "qwen3_moe", rope_parameters=rope, max_position_embeddings=16, vocab_size=len(tokenizer))
    rng = random.Random(0)
    asked = [
        request_of(str(length), [rng.randrange(5, len(tokenizer)) for _ in range(length)], max_tokens=6)
        for length in (40, 20, 17, 10)
    ]
    together = texts(run_all(load_transformers_runner(engine_config("transformers", str(tmp_path))), asked))
    assert together == texts(run_all(load_torch_runner(engine_config("torch", str(tmp_path))), asked))
