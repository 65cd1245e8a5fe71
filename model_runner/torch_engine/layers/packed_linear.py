"""The product with oneDNN's packed weights: private torch operators, tried before they are used."""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

_NUM_PACK_ROWS = 256
"""The number of rows that oneDNN optimises the layout for; it serves any other number too."""


class PackedLinear:
    """A weight of shape (num_out, num_in), packed at once."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight = _pack(weight)
        self._bias = bias
        self._num_out = weight.shape[0]

    def __call__(self, rows: Tensor) -> Tensor:
        """Rows, shape (num_rows, num_in), to rows, shape (num_rows, num_out)."""
        if rows.shape[0] == 0:
            return rows.new_empty((0, self._num_out))
        return _apply(rows, self._weight, self._bias)


@cache
def has_packed_linear(dtype: torch.dtype) -> bool:
    """Whether the operators exist, and this CPU multiplies the dtype by instructions of its own, giving the same."""
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
