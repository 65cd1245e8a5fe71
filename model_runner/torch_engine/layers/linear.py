"""Matrix products with weights: picks the fastest form that this machine and the weights allow.

integer_linear   a CPU, weights of 4 or 8 bits
packed_linear    a CPU, faster than `torch.nn.functional.linear` (measured in `docs/adr/0003`)
widening         a CPU without instructions for the weights' 16 bits
plain            everything else
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from moebeam.model_runner.torch_engine.layers.integer_linear import make_integer_linear
from moebeam.model_runner.torch_engine.layers.packed_linear import PackedLinear, has_packed_linear
from moebeam.model_runner.torch_engine.layers.widening import WidenedLinear, needs_widening
from moebeam.model_runner.torch_engine.weights.devices import Placement
from moebeam.model_runner.torch_engine.weights.packed_matrices import Matrix, to_tensor

Linear = Callable[[Tensor], Tensor]
"""Rows, shape (num_rows, num_in), to rows, shape (num_rows, num_out)."""


def make_linear(
    weights: Sequence[Matrix], placement: Placement, biases: Sequence[Tensor | None] | None = None
) -> Linear:
    """Make the product with one or several weights, whose results are concatenated.

    Args:
        weights: each of shape (num_out, num_in), of one dtype; whole numbers stay packed where that is faster.
        biases: one for each weight, shape (num_out,); None where it has none.
    """
    device = placement.device
    bias: Tensor | None = None
    if biases is not None and any(found is not None for found in biases):
        pairs = zip(weights, biases, strict=True)
        whole = [
            torch.zeros(weight.shape[0], dtype=placement.dtype, device=device) if found is None else found.to(device)
            for weight, found in pairs
        ]
        bias = torch.cat(whole)
    packed = make_integer_linear(weights, placement, bias)
    if packed is not None:
        return packed
    weights = [to_tensor(weight, placement.dtype) for weight in weights]
    if placement.is_packed and device.type == "cpu" and has_packed_linear(weights[0].dtype):
        return PackedLinear(weights[0] if len(weights) == 1 else torch.cat(list(weights)), bias)
    joined = weights[0].to(device) if len(weights) == 1 else torch.cat([weight.to(device) for weight in weights])
    return (WidenedLinear if needs_widening(joined.dtype, device) else _PlainLinear)(joined, bias)


class _PlainLinear:
    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight = weight
        self._bias = bias

    def __call__(self, rows: Tensor) -> Tensor:
        return functional.linear(rows, self._weight, self._bias)
