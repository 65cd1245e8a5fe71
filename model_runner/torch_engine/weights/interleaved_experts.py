"""The experts of gpt-oss: stacks with biases, gate and up row by row in turn, in MXFP4 as released.

gate_up_proj           (num_experts, hidden_size, 2 * width), inputs first, as `transformers` saves them
gate_up_proj_blocks    (num_experts, 2 * width, hidden_size / 32, 16), outputs first: two values to a byte
gate_up_proj_scales    (num_experts, 2 * width, hidden_size / 32): the exponent of two, plus 127
"""

from collections.abc import Iterator

from torch import Tensor

from moebeam.model_runner.torch_engine.weights.checkpoint_weights import CheckpointWeights, Expert
from moebeam.model_runner.torch_engine.weights.quantized import FP4_BLOCK, dequantize


def read_interleaved_experts(
    weights: CheckpointWeights, prefix: str, num_experts: int, hidden_size: int, width: int
) -> list[Expert]:
    """Get the routed experts of one layer, in order.

    Args:
        prefix: such as `model.layers.1.mlp.experts`.
    Raises:
        EngineLoadError: a tensor is missing or misshapen.
    """
    gate_up_biases = weights.get(f"{prefix}.gate_up_proj_bias", (num_experts, 2 * width))
    down_biases = weights.get(f"{prefix}.down_proj_bias", (num_experts, hidden_size))
    gate_ups = _read_matrices(weights, f"{prefix}.gate_up_proj", num_experts, 2 * width, hidden_size)
    downs = _read_matrices(weights, f"{prefix}.down_proj", num_experts, hidden_size, width)
    return [
        Expert(gate_up[::2], gate_up[1::2], down, gate_up_bias[::2], gate_up_bias[1::2], down_bias)
        for gate_up, gate_up_bias, down, down_bias in zip(gate_ups, gate_up_biases, downs, down_biases, strict=True)
    ]


def _read_matrices(
    weights: CheckpointWeights, name: str, num_experts: int, num_out: int, num_in: int
) -> Iterator[Tensor]:
    """Yield the matrices of a stack by expert, each of shape (num_out, num_in)."""
    if not weights.has(f"{name}_blocks"):
        for matrix in weights.get(name, (num_experts, num_in, num_out)):
            yield matrix.t()
        return
    size = FP4_BLOCK[1]
    num_blocks = -(-num_in // size)
    blocks = weights.get(f"{name}_blocks", (num_experts, num_out, num_blocks, size // 2))
    scales = weights.get(f"{name}_scales", (num_experts, num_out, num_blocks))
    for block, scale in zip(blocks, scales, strict=True):
        yield dequantize(block.flatten(1), scale, FP4_BLOCK, weights.dtype)[:, :num_in]
