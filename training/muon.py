"""Muon: momentum whose update is made orthogonal, for the weight matrices of `train`.

`torch.optim.Muon` takes matrices only; an MoE layer keeps its experts' matrices stacked in one tensor, so this one
treats all leading dimensions as a batch. After Jordan et al., 2024, with the coefficients of their quintic iteration.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch

_QUINTIC = (3.4445, -4.7750, 2.0315)


def orthogonalize(update: torch.Tensor, num_iterations: int = 5) -> torch.Tensor:
    """Bring every matrix's singular values near 1 by a Newton-Schulz iteration.

    Args:
        update: shape (..., num_rows, num_columns), any float dtype.
        num_iterations: five leave the singular values between about 0.7 and 1.2.
    Returns:
        bfloat16, the shape of `update`; the iteration corrects its own rounding, and float32 takes three times as long.
    """
    a, b, c = _QUINTIC
    is_tall = update.size(-2) > update.size(-1)
    matrix = (update / (update.norm(dim=(-2, -1), keepdim=True) + 1e-7)).bfloat16()
    if is_tall:
        matrix = matrix.mT.contiguous()
    for _ in range(num_iterations):
        gram = matrix @ matrix.mT  # (..., short_side, short_side)
        matrix = a * matrix + (b * gram + c * gram @ gram) @ matrix
    return matrix.mT if is_tall else matrix


def orthogonalize_all(updates: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """`orthogonalize` for many tensors, stacking the matrices that have one shape; results in order."""
    by_shape: defaultdict[tuple[int, int], list[int]] = defaultdict(list)
    for index, update in enumerate(updates):
        by_shape[update.size(-2), update.size(-1)].append(index)
    results: dict[int, torch.Tensor] = {}
    for shape, indices in by_shape.items():
        stack = torch.cat([updates[index].reshape(-1, *shape) for index in indices])  # (num_matrices, rows, columns)
        sizes = [updates[index].numel() // (shape[0] * shape[1]) for index in indices]
        for index, part in zip(indices, orthogonalize(stack).split(sizes), strict=True):
            results[index] = part.reshape(updates[index].shape)
    return [results[index] for index in range(len(updates))]


class Muon(torch.optim.Optimizer):
    """SGD with Nesterov momentum and orthogonal updates; weight decay is decoupled."""

    def __init__(
        self, params: Iterable[torch.Tensor], lr: float, *, momentum: float = 0.95, weight_decay: float = 0.01
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every parameter that has a gradient; `closure` is not supported.

        Matrices of one shape are made orthogonal together: on two busy cores, many small products cost a third of a
        training step, each of them waiting for its second thread.
        """
        for group in self.param_groups:
            params: list[torch.Tensor] = [param for param in group["params"] if param.grad is not None]
            updates = orthogonalize_all([self._momentum_update(param, group["momentum"]) for param in params])
            for param, update in zip(params, updates, strict=True):
                # A tall matrix's orthogonal update has smaller elements: bring them to those of a square one.
                scale = max(1.0, param.size(-2) / param.size(-1)) ** 0.5
                param.mul_(1 - group["lr"] * group["weight_decay"])
                param.add_(update.to(param.dtype), alpha=-group["lr"] * scale)

    def _momentum_update(self, param: torch.Tensor, decay: float) -> torch.Tensor:
        """Fold the gradient into the momentum and look one step ahead of it (Nesterov)."""
        assert param.grad is not None
        state = self.state[param]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(param)
        momentum: torch.Tensor = state["momentum"]
        momentum.lerp_(param.grad, 1 - decay)
        return param.grad.lerp(momentum, decay)
