"""Matrices of whole numbers with scales by group, and FP4 as LLM Compressor and NVIDIA's Model Optimizer write it.

    pack-quantized        weight_packed int32 (num_rows, num_words), the first of a word's numbers in its lowest bits,
                          each plus 2^(bits - 1); weight_scale (num_rows, num_groups); maybe weight_zero_point int32
                          (num_row_words, num_groups), packed along rows, and weight_g_idx, the group of each column
    int-quantized         weight int8, weight_scale (num_rows, num_groups), maybe weight_zero_point int8
    mxfp4-pack-quantized  weight_packed uint8, two values to a byte, weight_scale uint8: the exponent of two, plus 127
    nvfp4-pack-quantized  weight_packed uint8, weight_scale float8_e4m3fn by 16 columns, divided by weight_global_scale
    NVFP4 of modelopt     weight uint8, weight_scale float8_e4m3fn by 16 columns, multiplied by weight_scale_2

What a whole number stands for is (number - zero point) * scale.
"""

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moebeam.model_runner.torch_engine.weights.quantized import FP4_BLOCK, dequantize

_NVFP4_BLOCK = (1, 16)


@dataclass(frozen=True, slots=True)
class GroupedIntegers:
    """A matrix of whole numbers of 4 or 8 bits.

    Attributes:
        values: int8, shape (num_rows, num_columns).
        scales: shape (num_rows, num_groups); groups of columns are of equal width.
        zeros: numbers that stand for 0; int8, the shape of `scales`. None: 0 does.
        groups: of each column, where they are not in order; int64, shape (num_columns,).
    """

    values: Tensor
    scales: Tensor
    num_bits: int
    zeros: Tensor | None = None
    groups: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.values.shape[0], self.values.shape[1]

    def numel(self) -> int:
        """How many numbers there are."""
        return self.values.numel()

    @property
    def group_width(self) -> int:
        """Columns that share a scale."""
        return self.shape[1] // self.scales.shape[1]

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """What the numbers stand for, computed in float32."""
        scales = self._spread(self.scales).float()
        values = self.values.float()
        if self.zeros is not None:
            values -= self._spread(self.zeros).float()
        return values.mul_(scales).to(dtype)

    def _spread(self, of_groups: Tensor) -> Tensor:
        """One for each column."""
        if self.groups is not None:
            return of_groups.index_select(1, self.groups)
        return of_groups.repeat_interleave(self.group_width, dim=1)


@dataclass(frozen=True, slots=True)
class Fp4Matrix:
    """A matrix of `e2m1`, two to a byte, with scales by block."""

    stored: Tensor
    scales: Tensor
    block: tuple[int, int]

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """See `quantized.dequantize`."""
        return dequantize(self.stored, self.scales, self.block, dtype)


Matrix = Tensor | GroupedIntegers


def to_tensor(matrix: Matrix, dtype: torch.dtype) -> Tensor:
    """A matrix as numbers of a dtype; one of floating numbers as it is."""
    return matrix.dequantize(dtype) if isinstance(matrix, GroupedIntegers) else matrix


def join_rows(matrices: Sequence[GroupedIntegers]) -> GroupedIntegers | None:
    """Matrices of the same input as one; None if they are not cut alike."""
    first = matrices[0]
    if any(
        (one.num_bits, one.scales.shape[1], one.zeros is None)
        != (first.num_bits, first.scales.shape[1], first.zeros is None)
        or one.groups is not None
        for one in matrices
    ):
        return None
    zeros = [one.zeros for one in matrices if one.zeros is not None]
    return GroupedIntegers(
        torch.cat([one.values for one in matrices]),
        torch.cat([one.scales for one in matrices]),
        first.num_bits,
        torch.cat(zeros) if zeros else None,
    )


def unpack_matrix(
    name: str, shape: tuple[int, ...], names: Container[str], read: Callable[[str], Tensor]
) -> GroupedIntegers | Fp4Matrix | None:
    """Read a matrix in one of the layouts above; None if it is in none.

    Args:
        name: such as `model.layers.0.mlp.gate_proj.weight`.
        shape: that it must have.
        names: of all tensors.
        read: a tensor by its name, as stored.
    Raises:
        ValueError: parts are missing or misshapen; says what was expected and what was found.
    """
    if f"{name}_packed" in names:
        packed = read(f"{name}_packed")
        if packed.dtype == torch.uint8:
            return _read_fp4(name, shape, packed, names, read)
        return _unpack_integers(name, shape, packed, names, read)
    if f"{name}_scale_2" in names:
        return _read_fp4(name, shape, read(name), names, read)
    if name in names and f"{name}_scale" in names and len(shape) == 2:
        stored = read(name)
        # FP4 is stored as bytes too, half as many.
        if stored.dtype == torch.int8 and tuple(stored.shape) == shape:
            zeros = read(f"{name}_zero_point") if f"{name}_zero_point" in names else None
            return _check(shape, GroupedIntegers(stored, _read_scales(name, read), 8, zeros))
    return None


def _unpack_integers(
    name: str, shape: tuple[int, ...], packed: Tensor, names: Container[str], read: Callable[[str], Tensor]
) -> GroupedIntegers:
    if packed.dtype != torch.int32 or packed.ndim != 2 or len(shape) != 2:
        raise ValueError(
            f"expected int32 words of a matrix of shape {shape}, found {packed.dtype} {tuple(packed.shape)}"
        )
    num_bits = next((bits for bits in (4, 8) if packed.shape[1] == -(-shape[1] * bits // 32)), 0)
    if not num_bits or packed.shape[0] != shape[0]:
        raise ValueError(f"expected words of 4 or 8 bits for shape {shape}, found {tuple(packed.shape)}")
    if f"{name}_shape" in names:
        read(f"{name}_shape")  # is the shape that was asked for, or the words would not fit
    scales = _read_scales(name, read)
    zeros: Tensor | None = None
    if f"{name}_zero_point" in names:
        zeros = read(f"{name}_zero_point")
        if zeros.dtype == torch.int32:
            zeros = _unpack_words(zeros.t(), num_bits, scales.shape[0]).t()
    groups = read(f"{name}_g_idx").long() if f"{name}_g_idx" in names else None
    values = _unpack_words(packed, num_bits, shape[1])
    return _check(shape, GroupedIntegers(values, scales, num_bits, zeros, groups))


def _unpack_words(words: Tensor, num_bits: int, num_columns: int) -> Tensor:
    """Unpack int32 words (num_rows, num_words): int8, shape (num_rows, num_columns)."""
    num_rows = words.shape[0]
    if words.device.type == "meta":
        return torch.empty((num_rows, num_columns), dtype=torch.int8, device="meta")
    parts = words.contiguous().view(torch.uint8)  # (num_rows, num_words * 4), lowest bits first
    if num_bits == 4:
        parts = torch.stack((parts & 0xF, parts >> 4), dim=-1).flatten(1)
    return (parts[:, :num_columns].to(torch.int16) - (1 << (num_bits - 1))).to(torch.int8)


def _read_fp4(
    name: str, shape: tuple[int, ...], stored: Tensor, names: Container[str], read: Callable[[str], Tensor]
) -> Fp4Matrix:
    scales, block = read(f"{name}_scale"), FP4_BLOCK
    if scales.dtype == torch.float8_e4m3fn:
        block, whole = _NVFP4_BLOCK, None
        if f"{name}_scale_2" in names:
            whole = read(f"{name}_scale_2").float()
        elif f"{name}_global_scale" in names:
            whole = 1.0 / read(f"{name}_global_scale").float()
        if whole is None or whole.numel() != 1:
            raise ValueError("expected one weight_global_scale or weight_scale_2 for all blocks of NVFP4, found none")
        scales = scales.float() * whole.reshape(1, 1)
    expected = (shape[0], -(-shape[-1] // 2)), (shape[0], -(-shape[-1] // block[1]))
    found = tuple(stored.shape), tuple(scales.shape)
    if len(shape) != 2 or shape[1] % 2 or found != expected:
        raise ValueError(
            f"expected bytes and scales of shapes {expected[0]} and {expected[1]}, found {found[0]} and {found[1]}"
        )
    return Fp4Matrix(stored, scales, block)


def _read_scales(name: str, read: Callable[[str], Tensor]) -> Tensor:
    scales = read(f"{name}_scale")
    return scales.reshape(-1, 1) if scales.ndim < 2 else scales


def _check(shape: tuple[int, ...], found: GroupedIntegers) -> GroupedIntegers:
    num_groups = found.scales.shape[1] if found.scales.ndim == 2 else 0
    if not found.scales.dtype.is_floating_point or found.scales.ndim != 2:
        raise ValueError(f"expected floating scales by row and group, found {found.scales.dtype}")
    if found.scales.shape[0] == 1 and num_groups == 1 and shape[0] > 1:
        scales = found.scales.expand(shape[0], 1)
        zeros = None if found.zeros is None else found.zeros.reshape(1, 1).expand(shape[0], 1)
        found = GroupedIntegers(found.values, scales, found.num_bits, zeros)
    if found.scales.shape[0] != shape[0] or not 1 <= num_groups <= shape[1]:
        raise ValueError(f"expected scales for {shape[0]} rows, found shape {tuple(found.scales.shape)}")
    if found.groups is None and shape[1] % num_groups:
        raise ValueError(f"expected groups of equal width in {shape[1]} columns, found {num_groups} groups")
    if found.zeros is not None and found.zeros.shape != found.scales.shape:
        raise ValueError(f"expected a zero point for each scale, found shape {tuple(found.zeros.shape)}")
    if found.groups is not None and tuple(found.groups.shape) != (shape[1],):
        raise ValueError(f"expected the group of each of {shape[1]} columns, found {tuple(found.groups.shape)}")
    return found
