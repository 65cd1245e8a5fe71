"""Checkpoints that do not fit their configuration, and configurations that the engine does not run: each is named."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from moebeam.schemas.errors import EngineLoadError
from tests.support.models.checkpoint_layouts import LAYOUTS, Layout, OpenLayout, greedy, load_engine, with_tensors


def reconfigured(layout: Layout, folder: Path, **values: Any) -> Path:
    """A copy of a checkpoint with other settings in its config.json."""
    path = Path(shutil.copytree(layout.path, folder / "reconfigured"))
    config = json.loads((path / "config.json").read_text()) | values
    (path / "config.json").write_text(json.dumps(config))
    return path


def _beside(name: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda weights: weights.update({name: torch.zeros(3)})


@pytest.mark.parametrize("name", ["v3", "v4", "mixtral", "qwen3_moe", "gpt_oss"])
def test_any_missing_or_misshapen_tensor_is_named(open_layout: OpenLayout, name: str, tmp_path: Path) -> None:
    layout = open_layout(name)
    tensors = load_file(layout.path / "model.safetensors")
    path = with_tensors(layout, tmp_path, lambda weights: None)
    # One tensor of each sort: numbers of layers and experts aside.
    sorts = {"".join("#" if letter.isdigit() else letter for letter in tensor): tensor for tensor in tensors}
    if name == "qwen3_moe":
        sorts = {sort: tensor for sort, tensor in sorts.items() if "q_norm" not in sort}
    assert len(sorts) > 10
    missing: set[str] = set()
    for tensor in sorts.values():
        rest = {other: value for other, value in tensors.items() if other != tensor}
        save_file(rest, path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(EngineLoadError, match="expected a tensor") as error:
            load_engine(path)
        missing.add(str(error.value).split("'")[1])
        save_file(rest | {tensor: tensors[tensor][:-1].clone()}, path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(EngineLoadError, match=f"{tensor}'.*expected shape"):
            load_engine(path)
    # What is missing has no name in the files, only the one of transformers' modules: each time another.
    assert len(missing) == len(sorts)


@pytest.mark.parametrize("name", ["v3", "v4", "mixtral"])
def test_tensor_that_the_model_does_not_have_is_named(open_layout: OpenLayout, name: str, tmp_path: Path) -> None:
    with pytest.raises(EngineLoadError, match=r"1 more: .*surplus\.weight"):
        load_engine(with_tensors(open_layout(name), tmp_path, _beside("model.layers.0.surplus.weight")))


def test_layers_of_multi_token_prediction_are_no_surplus(open_layout: OpenLayout, tmp_path: Path) -> None:
    path = with_tensors(open_layout("v3"), tmp_path, _beside("model.layers.3.eh_proj.weight"))
    assert len(greedy(load_engine(path), [[5]], 1)) == 1


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("v3", {"attention_bias": True}, r"expected a tensor .*kv_a_proj_with_mqa\.bias"),
        ("v3", {"hidden_act": "gelu"}, 'hidden_act: expected "silu", found "gelu"'),
        ("v4", {"scoring_func": "sigmoid"}, "scoring_func"),
        ("mixtral", {"sliding_window": 16}, "sliding_window: expected null or at least the context .* found 16"),
        ("mixtral", {"model_type": "llama"}, 'found "llama"'),
        ("mixtral", {"model_type": "nonsense"}, "nonsense"),
    ],
)
def test_model_that_is_not_built_is_refused(
    open_layout: OpenLayout, name: str, values: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(EngineLoadError, match=message):
        load_engine(reconfigured(open_layout(name), tmp_path, **values))


def test_folder_without_a_readable_checkpoint_is_refused(open_layout: OpenLayout, tmp_path: Path) -> None:
    layout = open_layout("v3")
    with pytest.raises(EngineLoadError, match=r"config\.json: expected a file of"):
        load_engine(tmp_path / "missing")
    without_weights = tmp_path / "copy"
    shutil.copytree(layout.path, without_weights, ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(EngineLoadError, match="found neither"):
        load_engine(without_weights)
    for options, message in (({"dtype": "float8"}, "float8"), ({"device": "nonsense"}, "nonsense")):
        with pytest.raises(EngineLoadError, match=message):
            load_engine(layout.path, **options)


def test_every_architecture_loads_in_the_dtype_of_its_configuration(open_layout: OpenLayout) -> None:
    for name in {model_type: name for name, (model_type, _) in LAYOUTS.items()}.values():
        assert load_engine(open_layout(name).path, dtype="auto").placement.dtype == torch.float32


def test_qwen3_without_the_norms_of_queries_and_keys_is_refused(open_layout: OpenLayout, tmp_path: Path) -> None:
    def drop(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(("q_norm.weight", "k_norm.weight"))]:
            del tensors[name]

    with pytest.raises(EngineLoadError, match="q_norm"):
        load_engine(with_tensors(open_layout("qwen3_moe"), tmp_path, drop))
