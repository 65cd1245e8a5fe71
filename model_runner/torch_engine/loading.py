"""From a checkpoint's folder to a model: for an engine that answers, and for a check that reads no weights.

The check builds the same model from the headers of the weight files, on torch's device `meta`, so that what it passes
is what loading passes, but for what weights hold.
"""

from typing import Any

import torch

from moebeam.model_runner.checkpoint.model_config import (
    ModelConfig,
    check_limits,
    load_transformers_config,
    read_model_config,
)
from moebeam.model_runner.protocol import EngineConfig
from moebeam.model_runner.torch_engine.models.architecture import Architecture, build_architecture
from moebeam.model_runner.torch_engine.options import TorchOptions
from moebeam.model_runner.torch_engine.streaming.layer_weights import count_converted_bytes
from moebeam.model_runner.torch_engine.streaming.layers import StreamedLayers
from moebeam.model_runner.torch_engine.weights.checkpoint_weights import CheckpointWeights
from moebeam.model_runner.torch_engine.weights.devices import Placement
from moebeam.schemas.errors import EngineLoadError

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def read_our_config(path: str, max_model_len: int) -> ModelConfig:
    """The configuration of a model that this engine runs.

    Raises:
        EngineLoadError: a value cannot be, or the model is of another architecture.
    """
    config = read_model_config(path, max_model_len)
    check_limits(config)
    return config


def build_model(config: Any, weights: CheckpointWeights, placement: Placement, path: str) -> Architecture:
    """Build the model of a configuration and its weights.

    Raises:
        EngineLoadError: they do not go together, or the device cannot hold the model.
    """
    try:
        with torch.inference_mode():
            model = build_architecture(config, weights, placement)
    except RuntimeError as error:  # out of memory is one, too
        raise EngineLoadError(
            f"{path}: expected a checkpoint that fits into the memory of {placement.device}, "
            f"found: {type(error).__name__}: {error}"
        ) from error
    if isinstance(model.layers, StreamedLayers):
        model.layers.divide_memory()
    return model


def place_weights(
    weights: CheckpointWeights, device: torch.device, max_weight_bytes: int, *, is_packed: bool = True
) -> Placement:
    """Decide whether all weights stay in memory.

    Args:
        max_weight_bytes: most memory for them; 0 sets no limit.
    """
    if max_weight_bytes:
        num_bytes = sum(count_converted_bytes(stored.header, weights.dtype) for stored in weights.tensors.values())
        if num_bytes > max_weight_bytes:
            return Placement(device, weights.dtype, is_packed=False, max_weight_bytes=max_weight_bytes)
    return Placement(device, weights.dtype, is_packed=is_packed)


def check_torch_checkpoint(config: EngineConfig) -> None:
    """Check that a checkpoint can be loaded, as far as that can be known without its weights.

    Raises:
        EngineLoadError: names the file and what is wrong with it.
    """
    options = config.options_as(TorchOptions)
    found = read_our_config(config.path, options.max_model_len)
    loaded = load_transformers_config(found)
    dtype = parse_dtype(options.dtype, loaded.dtype)
    weights = CheckpointWeights.open_headers(config.path, found.model_type, dtype)
    placement = place_weights(weights, torch.device("meta"), options.max_weight_bytes, is_packed=False)
    build_model(loaded, weights, placement, config.path)


def parse_dtype(name: str, configured: object) -> torch.dtype:
    """The dtype of a name; `auto` is the configured one, float32 where there is none.

    Raises:
        EngineLoadError: the name is unknown.
    """
    if name == "auto":
        return configured if isinstance(configured, torch.dtype) else torch.float32
    if name not in _DTYPES:
        raise EngineLoadError(f"expected a dtype of auto, {', '.join(sorted(_DTYPES))}, found {name!r}")
    return _DTYPES[name]
