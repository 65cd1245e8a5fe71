"""Root-mean-square normalisation, in float32 inside."""

import torch
from torch import Tensor
from torch.nn import functional


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
            return functional.rms_norm(rows, (rows.shape[-1],), self._weight.float(), self._eps)
        normed = functional.rms_norm(rows.float(), (rows.shape[-1],), None, self._eps)
        return (self._weight * normed.to(self._weight.dtype)).to(rows.dtype)
