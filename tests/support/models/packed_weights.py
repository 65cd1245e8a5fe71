"""Weights in the layouts of whole numbers and FP4 that tools write, and the numbers that they stand for."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
Packed = tuple[Tensors, Tensor]
"""Parts of a matrix, by what is added to its name, and the numbers that they stand for: float32."""

_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def pack_integers(
    matrix: Tensor, *, num_bits: int = 4, width: int = 16, has_zeros: bool = False, is_shuffled: bool = False
) -> Packed:
    """`pack-quantized`: int32 words, a scale for `width` columns of a row."""
    num_rows, num_columns = matrix.shape
    groups = torch.arange(num_columns) // width
    if is_shuffled:
        groups = groups.flip(0)
    least, most = -(1 << (num_bits - 1)), (1 << (num_bits - 1)) - 1
    scales = matrix.new_zeros((num_rows, num_columns // width))
    for group in range(scales.shape[1]):
        scales[:, group] = matrix[:, groups == group].abs().amax(dim=1) / most
    zeros = torch.zeros_like(scales)
    if has_zeros:
        zeros = (torch.arange(zeros.numel()).view_as(zeros) % 3 - 1.0) * (most // 4)
    numbers = (matrix / scales[:, groups] + zeros[:, groups]).round().clamp(least, most)
    plain = (numbers - zeros[:, groups]) * scales[:, groups]
    parts = {
        "_packed": _to_words(numbers.to(torch.int64) - least, num_bits),
        "_scale": scales,
        "_shape": torch.tensor([num_rows, num_columns]),
    }
    if has_zeros:
        parts["_zero_point"] = _to_words((zeros.to(torch.int64) - least).t(), num_bits).t().contiguous()
    if is_shuffled:
        parts["_g_idx"] = groups.to(torch.int32)
    return parts, plain


def store_integers(matrix: Tensor) -> Packed:
    """`int-quantized`: int8, a scale for each row."""
    scales = matrix.abs().amax(dim=1, keepdim=True) / 127
    numbers = (matrix / scales).round()
    return {"": numbers.to(torch.int8), "_scale": scales}, numbers * scales


def pack_mxfp4(matrix: Tensor) -> Packed:
    """`mxfp4-pack-quantized`: a power of two for 32 columns."""
    exponents = (matrix.view(matrix.shape[0], -1, 32).abs().amax(dim=-1) / 6).log2().ceil()
    stored, plain = _to_fp4(matrix, exponents.exp2())
    return {"_packed": stored, "_scale": (exponents + 127).to(torch.uint8)}, plain


def pack_nvfp4(matrix: Tensor, *, is_modelopt: bool = False) -> Packed:
    """NVFP4: an FP8 scale for 16 columns, and one for all."""
    whole = torch.tensor([4.0])
    scales = (matrix.view(matrix.shape[0], -1, 16).abs().amax(dim=-1) / 6 * whole).to(torch.float8_e4m3fn)
    stored, plain = _to_fp4(matrix, scales.float() / whole)
    if is_modelopt:
        return {"": stored, "_scale": scales, "_scale_2": 1 / whole}, plain
    return {"_packed": stored, "_scale": scales, "_global_scale": whole}, plain


LAYOUTS: Mapping[str, Callable[[Tensor], Packed]] = {
    "int4": pack_integers,
    "int4 with zero points": lambda matrix: pack_integers(matrix, has_zeros=True),
    "int4 with shuffled groups": lambda matrix: pack_integers(matrix, is_shuffled=True),
    "int8 by group": lambda matrix: pack_integers(matrix, num_bits=8),
    "int8 by row": store_integers,
    "mxfp4": pack_mxfp4,
    "nvfp4": pack_nvfp4,
    "nvfp4 of modelopt": lambda matrix: pack_nvfp4(matrix, is_modelopt=True),
}


def _to_words(numbers: Tensor, num_bits: int) -> Tensor:
    """Numbers from 0 on, int64 (num_rows, num_columns), in int32 words along a row."""
    per_word = 32 // num_bits
    padded = torch.nn.functional.pad(numbers, (0, -numbers.shape[1] % per_word))
    shifts = torch.arange(per_word) * num_bits
    words = (padded.unflatten(1, (-1, per_word)) << shifts).sum(dim=-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def _to_fp4(matrix: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Two values to a byte, the first in its low half; scales are by equal groups of a row's columns."""
    spread = scales.repeat_interleave(matrix.shape[1] // scales.shape[1], dim=1)
    codes = ((matrix / spread).abs().unsqueeze(-1) - _E2M1).abs().argmin(dim=-1)
    plain = _E2M1[codes] * matrix.sign() * spread
    codes = codes + 8 * (matrix < 0)
    return (codes[:, ::2] | codes[:, 1::2] << 4).to(torch.uint8), plain
