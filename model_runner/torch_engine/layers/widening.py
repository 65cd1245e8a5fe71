"""Products in float32 with numbers of 16 bits, for CPUs without instructions for these.

A tile of weights or keys at a time is widened into memory that stays in cache, then multiplied. Products of 12 rows
with 512 by 512 bfloat16 weights take 120 us so, with float32 weights 146, by torch's own bfloat16 441 (AVX2,
`docs/adr/0013`).
"""

import os

import torch
from torch import Tensor

from moebeam.model_runner.torch_engine.layers.packed_linear import has_packed_linear

_NUM_TILE_ELEMENTS = (os.cpu_count() or 1) << 19
"""Widened at a time: 2 MiB a core, whatever the number of threads at the moment, so that this changes no bits."""


def needs_widening(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether products of a dtype are faster in float32 on this device."""
    return device.type == "cpu" and dtype in (torch.bfloat16, torch.float16) and not has_packed_linear(dtype)


class WidenedLinear:
    """The product with a weight of 16 or 8 bits, shape (num_out, num_in).

    Args:
        scales: by which outputs are multiplied; float32, shape (num_out,). None: they are not.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, scales: Tensor | None = None) -> None:
        self._weight = weight.contiguous()
        self._bias = bias
        self._scales = scales

    def __call__(self, rows: Tensor) -> Tensor:
        """Rows, shape (num_rows, num_in), to rows, shape (num_rows, num_out), of their dtype."""
        made = torch.empty((rows.shape[0], self._weight.shape[0]), dtype=torch.float32)
        multiply_rows(rows.float(), self._weight, made)
        if self._scales is not None:
            made.mul_(self._scales)
        if self._bias is not None:
            made.add_(self._bias)
        return made.to(rows.dtype)


def multiply_rows(rows: Tensor, weight: Tensor, out: Tensor) -> None:
    """Multiply rows with a weight of any dtype.

    Args:
        rows: float32, shape (num_rows, num_in).
        weight: shape (num_out, num_in).
        out: takes the product; float32, shape (num_rows, num_out).
    """
    if weight.dtype == torch.float32:
        torch.mm(rows, weight.t(), out=out)
        return
    for first, end in _cut(*weight.shape):
        torch.mm(rows, weight[first:end].float().t(), out=out[:, first:end])


def multiply_batches(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """The batched product of (num, num_rows, num_in) and (num, num_in, num_out): float32.

    Numbers of 16 bits are multiplied as they are where the device does that fast, and then rounded before they are
    returned as float32.

    Args:
        out: takes the product of float32 `left`; shape (num, num_rows, num_out).
    """
    if left.dtype == right.dtype and not needs_widening(right.dtype, right.device):
        return torch.bmm(left, right).float() if out is None else torch.bmm(left, right, out=out)
    num, num_rows = left.shape[:2]
    if out is None:
        out = torch.empty((num, num_rows, right.shape[2]), dtype=torch.float32)
    for first, end in _cut(num, right.shape[1] * right.shape[2]):
        part = right[first:end]
        # A transposed view is widened as it lies; else torch would transpose it first.
        wide = part.float() if part.stride(2) == 1 else part.transpose(1, 2).float().transpose(1, 2)
        torch.bmm(left[first:end].float(), wide, out=out[first:end])
    return out


def _cut(num: int, num_elements: int) -> list[tuple[int, int]]:
    """Cut `num` pieces of so many elements into tiles: (first, end) of each."""
    num_at_once = max(1, _NUM_TILE_ELEMENTS // max(1, num_elements))
    return [(first, min(first + num_at_once, num)) for first in range(0, num, num_at_once)]
