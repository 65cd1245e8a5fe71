"""Attention over the segments of a prefix tree: partial results for each segment, merged by log-sum-exp in float32.

`memory/read_plan.py` decides which rows read which segments, and in which products.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from moebeam.model_runner.torch_engine.layers.widening import multiply_batches, needs_widening

MASKED = -1.0e30
"""Added to the score of a key that a row must not see; finite, so that a row without keys gives no NaN."""

_LEAST_EXPONENT = -80.0

MAX_SCORES = 4 * 1024 * 1024
"""Most scores held at a time; longer segments are read in tiles, which bounds memory at any context length."""


@dataclass(slots=True)
class Partials:
    """Attention over some of the keys, before the division by its total.

    Attributes:
        out: sum of exp(score - peak) * value; float32, shape (num_rows, num_heads, value_width).
        peak: largest score; float32, shape (num_rows, num_heads).
        total: sum of exp(score - peak); float32, shape (num_rows, num_heads).
    """

    out: Tensor
    peak: Tensor
    total: Tensor

    def merge(self, other: "Partials") -> None:
        """Add, in place, what the same rows got from other keys."""
        peak = torch.maximum(self.peak, other.peak)
        kept = torch.exp_(self.peak - peak)
        added = torch.exp_(other.peak - peak)
        self.total.mul_(kept).addcmul_(other.total, added)
        self.out.mul_(kept.unsqueeze(-1)).addcmul_(other.out, added.unsqueeze(-1))
        self.peak.copy_(peak)

    def by_head(self, num_segments: int, num_heads: int) -> "Partials":
        """Regroup rows (segment, head, row) of one head each into rows (segment, row) of all heads."""

        def to_rows(tensor: Tensor) -> Tensor:
            return tensor.view(num_segments, num_heads, -1, *tensor.shape[2:]).transpose(1, 2).flatten(0, 1)

        return Partials(to_rows(self.out), to_rows(self.peak), to_rows(self.total))

    def pick(self, rows: "slice | Tensor") -> "Partials":
        """Some rows: a view for a slice, a copy for indices."""
        return Partials(self.out[rows], self.peak[rows], self.total[rows])


class Merged:
    """Attention of a step's rows, accumulated segment by segment."""

    def __init__(self, num_rows: int, num_heads: int, value_width: int, device: torch.device) -> None:
        self._num_rows = num_rows
        self._shape = (num_rows, num_heads, value_width)
        self._device = device
        self._partials: Partials | None = None

    @classmethod
    def from_sinks(cls, sinks: Tensor, num_rows: int, value_width: int) -> "Merged":
        """Begin with attention sinks: one key of score `sinks`, shape (num_heads,), without a value."""
        merged = cls(num_rows, sinks.shape[0], value_width, sinks.device)
        partials = merged.partials()
        partials.peak.copy_(sinks)
        partials.total.fill_(1.0)
        return merged

    def partials(self) -> Partials:
        """The sums so far; zeros before the first merge."""
        if self._partials is None:
            self._partials = Partials(
                torch.zeros(self._shape, device=self._device),
                torch.full(self._shape[:2], MASKED, device=self._device),
                torch.zeros(self._shape[:2], device=self._device),
            )
        return self._partials

    def merge(self, first_row: int, end_row: int, found: Partials) -> None:
        """Add what the rows `[first_row, end_row)` got from other keys; may keep and overwrite `found`."""
        if self._partials is None and end_row - first_row == self._num_rows:
            self._partials = found
        else:
            self.partials().pick(slice(first_row, end_row)).merge(found)

    def merge_at(self, rows: Tensor, found: Partials, places: Tensor | None = None) -> None:
        """Add what the distinct rows `rows` got: the rows `places` of `found`, all of them in order by default."""
        mine = self.partials()
        picked = mine.pick(rows)
        picked.merge(found if places is None else found.pick(places))
        mine.out[rows], mine.peak[rows], mine.total[rows] = picked.out, picked.peak, picked.total

    def result(self) -> Tensor:
        """The attention: float32, shape (num_rows, num_heads, value_width)."""
        partials = self.partials()
        return partials.out / partials.total.unsqueeze(-1)


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Partials:
    """Attend to keys that all heads share.

    Args:
        query: scaled; shape (num_segments, num_rows, num_heads, key_width).
        key: shape (num_segments, num_keys, key_width).
        value: shape (num_segments, num_keys, value_width).
        bias: added to scores; float32, shape (num_segments, num_rows, num_keys), or None.
    Returns:
        Partials of shape (num_segments * num_rows, num_heads, ...).
    """
    num_segments, num_rows, num_heads, key_width = query.shape
    flat = query.reshape(num_segments, num_rows * num_heads, key_width)
    scores = _scores(flat, key)  # (num_segments, num_rows * num_heads, num_keys)
    if bias is not None:
        scores.view(num_segments, num_rows, num_heads, -1).add_(bias.unsqueeze(2))
    out, peak, total = _weigh(scores, value)
    shape = (num_segments * num_rows, num_heads)
    return Partials(out.view(*shape, -1), peak.view(shape), total.view(shape))


def attend_by_head(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Partials:
    """Attend to one segment with separate keys for each head.

    Args:
        query: scaled; shape (num_rows, num_heads, key_width).
        key: shape (num_heads, num_keys, key_width).
        value: shape (num_heads, num_keys, value_width).
        bias: added to scores; float32, shape (num_rows, num_keys), or None.
    Returns:
        Partials of shape (num_rows, num_heads, ...).
    """
    scores = _scores(query.transpose(0, 1), key)  # (num_heads, num_rows, num_keys)
    if bias is not None:
        scores.add_(bias)
    out, peak, total = _weigh(scores, value)
    return Partials(out.transpose(0, 1), peak.squeeze(-1).t(), total.squeeze(-1).t())


def _scores(query: Tensor, key: Tensor) -> Tensor:
    """Products of queries (num, num_rows, key_width) and keys (num, num_keys, key_width): float32."""
    if key.dtype != torch.float32 and key.device.type == "cpu" and not needs_widening(key.dtype, key.device):
        # oneDNN copies a transposed view with gaps, slowly: 32 x 751 keys take 8.1 ms, without gaps 2.8.
        key = key.contiguous()
    return multiply_batches(query, key.transpose(1, 2))


def _weigh(scores: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """exp(scores - peak) @ value, peak and total; destroys `scores`."""
    peak = scores.amax(dim=-1, keepdim=True)
    # Masked keys get e**-80, which vanishes in any sum; exponentials below that are many times slower on a CPU.
    weights = scores.sub_(peak).clamp_(min=_LEAST_EXPONENT).exp_()
    total = weights.sum(dim=-1, keepdim=True)
    if not needs_widening(value.dtype, value.device):
        weights = weights.to(value.dtype)
    return multiply_batches(weights, value), peak, total
