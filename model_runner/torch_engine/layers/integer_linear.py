"""Products with weights of 4 or 8 bits: a CPU reads a quarter or half of bfloat16's bytes and unpacks them on the way.

Uses torch's private operators for weight-only quantisation. They multiply bfloat16 alone as fast as they should: in
float32, for other devices, and where an operator is missing or gives other results, weights are unpacked at load.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from moebeam.model_runner.torch_engine.layers.widening import WidenedLinear, needs_widening
from moebeam.model_runner.torch_engine.weights.devices import Placement
from moebeam.model_runner.torch_engine.weights.packed_matrices import GroupedIntegers, Matrix, join_rows

_GROUP_WIDTHS = (32, 64, 128, 256)
_NUM_ROWS_MULTIPLE = 64
_MIN_WIDENED_ROWS = 64
"""From so many rows on, 8-bit weights are widened where bfloat16 is: the operator's time grows with each row."""


class IntegerLinear:
    """The product with whole numbers; see `make_integer_linear`."""

    def __init__(self, matrix: GroupedIntegers, bias: Tensor | None, dtype: torch.dtype) -> None:
        operators: Any = torch.ops.aten
        self._bias = bias
        self._num_out = matrix.shape[0]
        self._widened: WidenedLinear | None = None
        if matrix.num_bits == 8:
            self._multiply = operators._weight_int8pack_mm
            values = matrix.values.contiguous()
            self._arguments = (values, matrix.scales.flatten().to(dtype))
            if needs_widening(dtype, values.device):
                self._widened = WidenedLinear(values, bias, matrix.scales.flatten().float())
            return
        scales = matrix.scales.float()
        zeros = torch.zeros_like(scales) if matrix.zeros is None else -matrix.zeros.float() * scales
        packed = operators._convert_weight_to_int4pack_for_cpu(matrix.values.to(torch.int32) + 8, 1)
        pairs = torch.stack((scales, zeros), dim=-1).transpose(0, 1).to(dtype).contiguous()  # (num_groups, num_out, 2)
        self._multiply = operators._weight_int4pack_mm_for_cpu
        self._arguments = (packed, matrix.group_width, pairs)

    def __call__(self, rows: Tensor) -> Tensor:
        """Rows, shape (num_rows, num_in), to rows, shape (num_rows, num_out)."""
        if rows.shape[0] == 0:
            return rows.new_empty((0, self._num_out))
        if rows.shape[0] >= _MIN_WIDENED_ROWS and self._widened is not None:
            return self._widened(rows)
        made: Tensor = self._multiply(rows.contiguous(), *self._arguments)
        return made if self._bias is None else made.add_(self._bias)


def make_integer_linear(weights: Sequence[Matrix], placement: Placement, bias: Tensor | None) -> IntegerLinear | None:
    """Make the product with whole numbers that stay packed; None if the operators cannot do that."""
    if not can_keep_integers(weights, placement):
        return None
    joined = join_rows([weight for weight in weights if isinstance(weight, GroupedIntegers)])
    return None if joined is None or not _fits(joined) else IntegerLinear(joined, bias, placement.dtype)


def can_keep_integers(weights: Sequence[Matrix], placement: Placement) -> bool:
    """Whether weights are whole numbers of one kind, each of which can stay packed."""
    if placement.device.type != "cpu" or not placement.is_packed or placement.dtype != torch.bfloat16:
        return False
    return all(
        isinstance(weight, GroupedIntegers) and _fits(weight) and has_integer_product(weight.num_bits)
        for weight in weights
    )


def _fits(matrix: GroupedIntegers) -> bool:
    if matrix.num_bits == 8:
        return matrix.zeros is None and matrix.scales.shape[1] == 1
    return matrix.group_width in _GROUP_WIDTHS and matrix.shape[0] % _NUM_ROWS_MULTIPLE == 0


@cache
def has_integer_product(num_bits: int) -> bool:
    """Whether the private operator exists here and gives the same as the product with unpacked weights."""
    num_groups = 1 if num_bits == 8 else 2
    values = (torch.arange(64 * 64).view(64, 64) * 7 % (1 << num_bits) - (1 << (num_bits - 1))).to(torch.int8)
    scales = torch.linspace(0.01, 0.02, 64 * num_groups).view(64, num_groups)
    zeros = None if num_bits == 8 else (torch.arange(64 * num_groups) % 5 - 2).to(torch.int8).view(64, num_groups)
    matrix = GroupedIntegers(values, scales, num_bits, zeros)
    rows = torch.arange(3.0 * 64).view(3, 64).cos().bfloat16()
    try:
        found = IntegerLinear(matrix, None, torch.bfloat16)(rows)
    except (RuntimeError, AttributeError):
        return False
    expected = rows.float() @ matrix.dequantize(torch.float32).t()
    return torch.allclose(found.float(), expected, atol=0.02 * float(expected.abs().max()), rtol=0.02)
