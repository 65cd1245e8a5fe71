"""Block-scaled weights, and how to turn them back into numbers.

FP8, as DeepSeek-V3 was released (technical report, arXiv 2412.19437, section 3.3) and as transformers' fine-grained FP8
keeps it: a matrix in `float8_e4m3fn`, and one scale for each block of it, of 128 x 128 unless `config.json` says
otherwise. Blocks are counted from the first row and column; the last of each may be partial. Other tools scale a whole
matrix, or each of its rows.

FP4, as DeepSeek-V4's experts: `e2m1`, two values to a byte, and one scale for each 32 values of a row. transformers'
`Fp8Dequantize._unpack_fp4` is the source of the order: of two neighbours the first is in the byte's low half.

Stored values are multiplied by their scale, although transformers calls it `scale_inv`.
"""

import torch
from torch import Tensor

FP8_BLOCK = (128, 128)
FP4_BLOCK = (1, 32)
FP4_DTYPES = (torch.int8, torch.uint8)
"""Bytes of two values each; the byte's sign has no meaning."""

QUANTIZED_DTYPES = (torch.float8_e4m3fn, *FP4_DTYPES)
SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu, torch.uint8)

_MIN_BAND_ROWS = 128


def _build_byte_values() -> dict[torch.dtype, Tensor]:
    """Tabulate for each quantised dtype what a byte stands for: shape (256,), float32 or two of them as an int64.

    Table look-up is 7 times as fast as torch's conversion of `float8_e4m3fn` on a CPU (1.2 against 0.18 GB of stored
    bytes a second on one thread, torch 2.13).
    """
    codes = torch.arange(256, dtype=torch.uint8, device="cpu")
    e2m1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], dtype=torch.float32, device="cpu")
    e2m1 = torch.cat((e2m1, -e2m1))
    pairs = torch.stack((e2m1[(codes & 0xF).long()], e2m1[(codes >> 4).long()]), dim=-1).view(torch.int64).flatten()
    return {torch.float8_e4m3fn: codes.view(torch.float8_e4m3fn).to(torch.float32), **dict.fromkeys(FP4_DTYPES, pairs)}


_BYTE_VALUES = _build_byte_values()


def scale_grid(shape: tuple[int, int], block: tuple[int, int]) -> tuple[int, int]:
    """Count the scales of a matrix, down and across."""
    return -(-shape[0] // block[0]), -(-shape[1] // block[1])


def infer_unpacked_shape(stored: Tensor) -> tuple[int, ...]:
    """Infer the shape that a quantised tensor stands for: packed FP4 is twice as wide as stored."""
    shape = tuple(stored.shape)
    return (*shape[:-1], 2 * shape[-1]) if stored.dtype in FP4_DTYPES else shape


def fit_scales(
    scales: Tensor, shape: tuple[int, int], block: tuple[int, int], *, is_fp8: bool
) -> tuple[Tensor, tuple[int, int]] | None:
    """Bring the scales of a matrix into the form of `dequantize`: by block, of FP8 also by row or one for all.

    Args:
        shape: of the matrix, unpacked.
        block: rows and columns that share a scale, if scales are by block.
    Returns:
        Scales and the block of each; None if they have no shape that fits.
    """
    if tuple(scales.shape) == scale_grid(shape, block):
        return scales, block
    if is_fp8 and scales.numel() == 1:
        block = (_MIN_BAND_ROWS, shape[1])
        return scales.reshape(1, 1).expand(scale_grid(shape, block)), block
    if is_fp8 and tuple(scales.shape) in ((shape[0], 1), (shape[0],)):
        return scales.reshape(-1, 1), (1, shape[1])
    return None


def split_stack_scales(scales: Tensor, num_experts: int) -> list[Tensor] | None:
    """The scales of each matrix of a stack, of two dimensions each; None if they are not by expert."""
    if scales.numel() == 1:
        return [scales.reshape(1, 1)] * num_experts
    if scales.ndim not in (1, 2, 3) or scales.shape[0] != num_experts:
        return None
    return list(scales.reshape(num_experts, -1, scales.shape[2] if scales.ndim == 3 else 1))


def dequantize(stored: Tensor, scales: Tensor, block: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """Dequantise a block-scaled matrix.

    Computes in float32, some rows at a time, so that no second whole matrix is in memory.

    Args:
        stored: shape (num_rows, num_columns) in `float8_e4m3fn`, or (num_rows, num_columns / 2) in `FP4_DTYPES`.
        scales: shape `scale_grid((num_rows, num_columns), block)`, of `SCALE_DTYPES`. Bytes (`uint8`) are the bits of
            `float8_e8m0fnu`: the exponent of two, plus 127.
        block: rows and columns that share a scale.
        dtype: floating dtype of the result.
    Returns:
        A new tensor of shape (num_rows, num_columns), on the device of the arguments.
    """
    num_rows, num_columns = infer_unpacked_shape(stored)
    assert tuple(scales.shape) == scale_grid((num_rows, num_columns), block), (scales.shape, block)
    if stored.device.type == "meta":
        return torch.empty(num_rows, num_columns, dtype=dtype, device="meta")
    if scales.dtype == torch.uint8:
        scales = scales.view(torch.float8_e8m0fnu)
    scales = scales.to(torch.float32)
    matrix = torch.empty(num_rows, num_columns, dtype=dtype, device=stored.device)
    num_band_blocks = -(-_MIN_BAND_ROWS // block[0])
    for first_block in range(0, scales.shape[0], num_band_blocks):
        first_row = first_block * block[0]
        rows = stored[first_row : first_row + num_band_blocks * block[0]]
        codes = rows.view(torch.uint8).flatten().to(torch.int32)
        values = _BYTE_VALUES[rows.dtype].to(stored.device).index_select(0, codes)
        values = values.view(torch.float32).view(rows.shape[0], num_columns)
        band_scales = scales[first_block : first_block + num_band_blocks]
        band_scales = band_scales.repeat_interleave(block[1], dim=1)[:, :num_columns]
        if num_band_blocks > 1:
            band_scales = band_scales.repeat_interleave(block[0], dim=0)[: rows.shape[0]]  # (band_rows, num_columns)
        matrix[first_row : first_row + rows.shape[0]] = values.mul_(band_scales)
    return matrix
