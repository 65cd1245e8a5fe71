"""Manifold-constrained hyper-connections: several residual streams, mixed before and after each block.

Source: Xie et al. 2026 (mHC), and section 2.2 of the DeepSeek-V4 report. All weights of the mixing are float32.
"""

from typing import Any

import torch
from torch import Tensor

from moebeam.model_runner.torch_engine.layers.linear import make_linear
from moebeam.model_runner.torch_engine.weights.checkpoint_weights import CheckpointWeights
from moebeam.model_runner.torch_engine.weights.devices import Placement


class HyperConnection:
    """The mixing around one block: `collapse` makes its input from the streams, `expand` adds its output to them."""

    def __init__(self, config: Any, weights: CheckpointWeights, placement: Placement, name: str) -> None:
        self._num_streams = num = int(config.hc_mult)
        self._num_iterations = int(config.hc_sinkhorn_iters)
        self._eps = float(config.hc_eps)
        self._norm_eps = float(config.rms_norm_eps)
        num_mixed = (2 + num) * num
        mixer = weights.get(f"{name}.fn", (num_mixed, num * int(config.hidden_size)), torch.float32)
        self._mixer = make_linear([mixer], placement)
        scale = weights.get(f"{name}.scale", (3,), torch.float32)
        repeats = torch.tensor([num, num, num * num])
        self._scale = scale.repeat_interleave(repeats).to(placement.device)  # (num_mixed,)
        self._base = weights.get(f"{name}.base", (num_mixed,), torch.float32).to(placement.device)
        self.flops_per_row = 2.0 * mixer.numel()

    def collapse(self, streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mix the streams into the block's input, and compute the weights that `expand` needs.

        Args:
            streams: shape (num_rows, num_streams, hidden_size).
        Returns:
            The input (num_rows, hidden_size); the output's weight in each stream (num_rows, num_streams, 1); each old
            stream's weight in each new one (num_rows, num_streams to, num_streams from). All in the dtype of `streams`.
        """
        num = self._num_streams
        mixed = mix_streams(streams, self._mixer, self._norm_eps) * self._scale + self._base  # (num_rows, num_mixed)
        before = torch.sigmoid(mixed[:, :num]) + self._eps
        after = torch.sigmoid(mixed[:, num : 2 * num]) * 2
        dtype = streams.dtype
        collapsed = _sum_streams(before, streams)
        # Rows last, so that sums over 4 elements run along long contiguous rows.
        comb = mixed[:, 2 * num :].t().reshape(num, num, -1)  # (from, to, num_rows)
        comb = torch.softmax(comb, dim=1).add_(self._eps)
        comb.div_(comb.sum(dim=0, keepdim=True).add_(self._eps))
        for _ in range(self._num_iterations - 1):
            comb.div_(comb.sum(dim=1, keepdim=True).add_(self._eps))
            comb.div_(comb.sum(dim=0, keepdim=True).add_(self._eps))
        return collapsed, after.to(dtype).unsqueeze(-1), comb.permute(2, 1, 0).to(dtype)


def expand(streams: Tensor, output: Tensor, after: Tensor, comb: Tensor) -> Tensor:
    """Make new streams from the old ones and a block's output, shape (num_rows, hidden_size)."""
    # Sums of scaled rows: on a CPU, batched products of (4, 4) with (4, hidden_size) take 4 times as long.
    made = after * output.unsqueeze(1)
    for i in range(streams.shape[1]):
        made.addcmul_(comb[:, :, i : i + 1], streams[:, i : i + 1])
    return made


class HyperHead:
    """The last collapse, before the final norm."""

    def __init__(self, config: Any, weights: CheckpointWeights, placement: Placement, name: str) -> None:
        num = int(config.hc_mult)
        mixer = weights.get(f"{name}.hc_fn", (num, num * int(config.hidden_size)), torch.float32)
        self._mixer = make_linear([mixer], placement)
        self._base = weights.get(f"{name}.hc_base", (num,), torch.float32).to(placement.device)
        self._scale = weights.get(f"{name}.hc_scale", (1,), torch.float32).to(placement.device)
        self._eps = float(config.hc_eps)
        self._norm_eps = float(config.rms_norm_eps)

    def __call__(self, streams: Tensor) -> Tensor:
        """Collapse shape (num_rows, num_streams, hidden_size) to (num_rows, hidden_size)."""
        mixed = mix_streams(streams, self._mixer, self._norm_eps)
        return _sum_streams(torch.sigmoid(mixed * self._scale + self._base) + self._eps, streams)


def mix_streams(streams: Tensor, mixer: Any, eps: float) -> Tensor:
    """Project each row's normalised streams; the norm is a factor, so it is applied to the few results instead.

    Returns:
        float32, shape (num_rows, num_mixed).
    """
    flat = streams.flatten(1).float()
    # One pass; `vecdot` writes the squares first.
    norm = torch.linalg.vector_norm(flat, dim=1).square_().div_(flat.shape[1]).add_(eps).rsqrt_()
    return mixer(flat) * norm.unsqueeze(-1)


def _sum_streams(weights: Tensor, streams: Tensor) -> Tensor:
    """Sum streams by float32 weights, shape (num_rows, num_streams), to (num_rows, hidden_size) in their dtype."""
    total = weights[:, :1] * streams[:, 0]
    for i in range(1, weights.shape[1]):
        total.addcmul_(weights[:, i : i + 1], streams[:, i].float())
    return total.to(streams.dtype)
