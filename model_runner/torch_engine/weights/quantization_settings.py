"""`quantization_config` of a checkpoint: the kinds of quantised weights that the engine reads, and how they are cut.

FP8 has one scale a block, a row or a tensor; the layouts of whole numbers and of FP4, which their tensors tell, are
listed in `packed_matrices.py`. How inputs were quantised has no meaning here, where they are not.
"""

from typing import Literal, cast

from pydantic import BaseModel, PositiveInt, ValidationError

from moebeam.model_runner.checkpoint.files import read_json_object
from moebeam.model_runner.checkpoint.model_config import CONFIG_NAME, refuse_value
from moebeam.model_runner.torch_engine.weights.quantized import FP8_BLOCK
from moebeam.schemas.store import storage


class _Fp8(BaseModel):
    """DeepSeek's, `transformers`' and vLLM's own; blocks are null where a whole tensor has one scale."""

    weight_block_size: tuple[PositiveInt, PositiveInt] | None = FP8_BLOCK


class _ModelOpt(BaseModel):
    """NVIDIA's Model Optimizer."""

    quant_algo: Literal["FP8", "NVFP4"]


class _Weights(BaseModel):
    num_bits: Literal[4, 8]
    type: Literal["float", "int"]
    block_structure: tuple[PositiveInt, PositiveInt] | None = None


_Format = Literal["float-quantized", "int-quantized", "pack-quantized", "mxfp4-pack-quantized", "nvfp4-pack-quantized"]


class _Group(BaseModel):
    weights: _Weights
    format: _Format | None = None


class _CompressedTensors(BaseModel):
    """LLM Compressor's; of several formats each group names its own."""

    format: Literal[_Format, "mixed-precision"]
    config_groups: dict[str, _Group]


class _Mxfp4(BaseModel):
    """OpenAI's: experts alone, in blocks of a form of their own."""


_METHODS: dict[str, type[BaseModel]] = {
    "mxfp4": _Mxfp4,
    "fp8": _Fp8,
    "modelopt": _ModelOpt,
    "compressed-tensors": _CompressedTensors,
}


def read_fp8_block(path: str) -> tuple[int, int]:
    """How many rows and columns share a scale in a checkpoint's FP8 matrices, where scales are by block.

    Raises:
        EngineLoadError: the weights are quantised in another way; names the key, what was expected and what was found.
    """
    found: object = read_json_object(path, CONFIG_NAME).get("quantization_config")
    if found is None:
        return FP8_BLOCK
    file, key = storage.join(path, CONFIG_NAME), "quantization_config"
    if not isinstance(found, dict):
        raise refuse_value(file, key, "an object or null", found)
    method: object = cast("dict[str, object]", found).get("quant_method")
    kind = _METHODS.get(method) if isinstance(method, str) else None
    if kind is None:
        raise refuse_value(file, f"{key}.quant_method", " or ".join(f'"{name}"' for name in _METHODS), method)
    try:
        settings = kind.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, (key, *first["loc"])))
        raise refuse_value(file, place, f"another value ({first['msg']})", first["input"]) from error
    blocks: list[tuple[int, int] | None] = []
    if isinstance(settings, _Fp8):
        blocks = [settings.weight_block_size]
    elif isinstance(settings, _CompressedTensors):
        blocks = [group.weights.block_structure for group in settings.config_groups.values()]
    return next((block for block in blocks if block is not None), FP8_BLOCK)
