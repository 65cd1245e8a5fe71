"""Matrix products with weights: the one place that uses private torch operators.

On a CPU, oneDNN with prepacked weights is faster than `torch.nn.functional.linear` (measured in `docs/adr/0003`), most
of all for the few rows that an expert gets. On other devices, and if the operators are missing or give other results,
the plain function is used.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from moebeam.model_runner.torch_engine.layers.integer_linear import make_integer_linear
from moebeam.model_runner.torch_engine.weights.devices import Placement
from moebeam.model_runner.torch_engine.weights.packed_matrices import Matrix, to_tensor

_NUM_PACK_ROWS = 256
"""The number of rows that oneDNN optimises the layout for; it serves any other number too."""

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
        return _PackedLinear(weights[0] if len(weights) == 1 else torch.cat(list(weights)), bias)
    if len(weights) == 1:
        return _PlainLinear(weights[0].to(device), bias)
    return _PlainLinear(torch.cat([weight.to(device) for weight in weights]), bias)


class _PlainLinear:
    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight = weight
        self._bias = bias

    def __call__(self, rows: Tensor) -> Tensor:
        return functional.linear(rows, self._weight, self._bias)


class _PackedLinear:
    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight = _pack(weight)
        self._bias = bias
        self._num_out = weight.shape[0]

    def __call__(self, rows: Tensor) -> Tensor:
        if rows.shape[0] == 0:
            return rows.new_empty((0, self._num_out))
        return _apply(rows, self._weight, self._bias)


@cache
def has_packed_linear(dtype: torch.dtype) -> bool:
    """Whether the private operators exist here and give the same as the public one."""
    try:
        weight = torch.arange(48.0).view(6, 8).sin().to(dtype)
        rows = torch.arange(24.0).view(3, 8).cos().to(dtype)
        found = _apply(rows, _pack(weight), None)
    except (RuntimeError, AttributeError):
        return False
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    return torch.allclose(
        found.float(), functional.linear(rows.float(), weight.float()), atol=tolerance, rtol=tolerance
    )


def _pack(weight: Tensor) -> Tensor:
    operators: Any = torch.ops.mkldnn
    return operators._reorder_linear_weight(weight.contiguous(), _NUM_PACK_ROWS)


def _apply(rows: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    operators: Any = torch.ops.mkldnn
    return operators._linear_pointwise(rows, packed, bias, "none", [], "")
