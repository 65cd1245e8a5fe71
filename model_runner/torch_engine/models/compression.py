"""DeepSeek-V4's compressed entries: how a window of tokens becomes one key, and which keys a query reads.

Source: sections 2.3.1 (CSA, compressed sparse attention) and 2.3.2 (HCA, heavily compressed attention) of the
DeepSeek-V4 report. A CSA entry also weighs the window before its own, and an indexer ranks entries for each query:

    tokens    0 1 2 3 | 4 5 6 7 | 8 9 . .     rate 4
    entry 0  [-------]                        written once token 3 closes the window
    entry 1  [-----------------]              weighs windows 0 and 1
"""

import math
from typing import Any

import torch
from torch import Tensor

from moebeam.model_runner.torch_engine.layers.linear import make_linear
from moebeam.model_runner.torch_engine.layers.norms import RmsNorm
from moebeam.model_runner.torch_engine.layers.rotary import rotate_pairs
from moebeam.model_runner.torch_engine.memory.read_plan import ReadPlan
from moebeam.model_runner.torch_engine.models.entry_choice import score_entries, select_best
from moebeam.model_runner.torch_engine.weights.checkpoint_weights import CheckpointWeights
from moebeam.model_runner.torch_engine.weights.devices import Placement


class Compressor:
    """Compresses closed windows into entries of `width` elements each."""

    def __init__(
        self,
        config: Any,
        weights: CheckpointWeights,
        placement: Placement,
        name: str,
        *,
        rate: int,
        width: int,
        has_overlap: bool,
    ) -> None:
        self.width = width
        self.has_overlap = has_overlap
        self._rate = rate
        self.num_features = 2 * width if has_overlap else width
        shape = (self.num_features, int(config.hidden_size))
        self.value_weight = weights.get(f"{name}.kv_proj.weight", shape)
        self.gate_weight = weights.get(f"{name}.gate_proj.weight", shape)
        bias = weights.get(f"{name}.position_bias", (rate, self.num_features), torch.float32)
        self._bias = bias.to(placement.device)
        norm = weights.get(f"{name}.kv_norm.weight", (width,), torch.float32)
        self._norm = RmsNorm(norm.to(placement.device), float(config.rms_norm_eps))

    def __call__(self, values: Tensor, gates: Tensor, is_first: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Compress windows.

        Args:
            values, gates: shape (num_windows, num_window_rows, num_features); with overlap, rows of the window before
                come first.
            is_first: whether it is its path's first window; bool, shape (num_windows,).
            cos, sin: of each window's first position; shape (num_windows, num_pairs).
        Returns:
            Shape (num_windows, width).
        """
        if self.has_overlap:
            rate, width = self._rate, self.width
            values = torch.cat((values[:, :rate, :width], values[:, rate:, width:]), dim=1)
            before = gates[:, :rate, :width].float() + self._bias[:, :width]
            before.masked_fill_(is_first[:, None, None], -math.inf)
            scores = torch.cat((before, gates[:, rate:, width:].float() + self._bias[:, width:]), dim=1)
            # The window before the first holds stale rows: their weight is 0, but 0 times NaN is NaN.
            values = torch.where(is_first[:, None, None] & self._is_before(values), 0.0, values)
        else:
            scores = gates.float() + self._bias
        weights = scores.softmax(dim=1).to(values.dtype)
        entries = self._norm((values * weights).sum(dim=1))
        num_rotated = 2 * cos.shape[-1]
        entries[:, -num_rotated:] = rotate_pairs(entries[:, -num_rotated:], cos, sin).to(entries.dtype)
        return entries

    def _is_before(self, values: Tensor) -> Tensor:
        return (torch.arange(values.shape[1], device=values.device) < self._rate).view(1, -1, 1)


class Indexer:
    """Ranks compressed entries for each query: sum over heads of weight * relu(query . key)."""

    def __init__(self, config: Any, weights: CheckpointWeights, placement: Placement, name: str, *, rate: int) -> None:
        self.num_heads = int(config.index_n_heads)
        self.width = int(config.index_head_dim)
        self.num_chosen = int(config.index_topk)
        self.compressor = Compressor(config, weights, placement, name, rate=rate, width=self.width, has_overlap=True)
        query_shape = (self.num_heads * self.width, int(config.q_lora_rank))
        query = weights.get(f"{name}.q_b_proj.weight", query_shape)
        self._query = make_linear([query], placement)
        self.head_weight = weights.get(f"{name}.scorer.weights_proj.weight", (self.num_heads, int(config.hidden_size)))
        self.flops_per_row = 2.0 * query.numel()

    def select(
        self,
        residual: Tensor,
        head_weights: Tensor,
        cos: Tensor,
        sin: Tensor,
        plan: ReadPlan,
        layer: int,
        num_visible: Tensor,
    ) -> Tensor:
        """Choose the entries that each row reads: the bias of its scores, 0 for chosen entries and `MASKED` for others.

        Args:
            residual: normed low-rank queries; shape (num_rows, q_lora_rank).
            head_weights: shape (num_rows, num_heads).
            num_visible: entries that each row may see; int64, shape (num_rows,).
        Returns:
            float32, shape (num_rows, most visible entries).
        """
        num_rows = residual.shape[0]
        query = self._query(residual).view(num_rows, self.num_heads, self.width)
        num_rotated = 2 * cos.shape[-1]
        query[..., -num_rotated:] = rotate_pairs(query[..., -num_rotated:], cos, sin).to(query.dtype)
        scale = self.num_heads**-0.5 * self.width**-0.5
        most_visible = int(num_visible.max())
        scores = score_entries(query.float(), head_weights.float() * scale, plan, layer, most_visible)
        return select_best(scores, self.num_chosen)
