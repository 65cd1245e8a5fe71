"""Root-mean-square normalisation, in float32 inside."""

import torch
from torch import Tensor


class RmsNorm:
    """Scale rows to a mean square of 1, then by a weight.

    With a float32 weight and rows of another dtype the product is taken in float32 and cast once, as DeepSeek-V4
    does; with a weight of the rows' dtype the normalised rows are cast first, as Llama and DeepSeek-V3 do.
    """

    def __init__(self, weight: Tensor, eps: float) -> None:
        self._weight = weight
        self._eps = eps

    def __call__(self, rows: Tensor) -> Tensor:
        """Shape (..., width) to the same."""
        if rows.dtype == torch.float32:
            return unit_rows(rows, self._eps).mul_(self._weight)
        return (self._weight * unit_rows(rows.float(), self._eps).to(self._weight.dtype)).to(rows.dtype)


def unit_rows(rows: Tensor, eps: float) -> Tensor:
    """Rows of mean square 1; float32, shape (..., width). Fewer passes than `torch.nn.functional.rms_norm`'s."""
    norm = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    return rows * norm.square_().div_(rows.shape[-1]).add_(eps).rsqrt_()
