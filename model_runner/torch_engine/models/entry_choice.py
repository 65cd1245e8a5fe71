"""Which entries of its path a query reads: ranked by an indexer, as DeepSeek-V4 and V3.2 do.

An entry has an index key beside its own; a query has several index heads. Their score is the sum over heads of
weight * relu(query . key). The best entries are marked by a bias of 0, which `read_shared_keys` adds to the scores.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from moebeam.model_runner.torch_engine.layers.attention import MASKED
from moebeam.model_runner.torch_engine.layers.linear import make_linear
from moebeam.model_runner.torch_engine.layers.rotary import rotate_leading_halves
from moebeam.model_runner.torch_engine.memory.chosen_entries import (
    MIN_ENTRIES_A_CHOSEN,
    EntryPlaces,
    plan_entry_places,
)
from moebeam.model_runner.torch_engine.memory.read_plan import ReadPlan
from moebeam.model_runner.torch_engine.models.architecture import StepBatch
from moebeam.model_runner.torch_engine.weights.checkpoint_weights import CheckpointWeights
from moebeam.model_runner.torch_engine.weights.devices import Placement

_KEY_EPS = 1e-6


@dataclass(frozen=True, slots=True)
class EntryChoice:
    """A step in which some row of a model with one entry a token sees more of them than it may choose.

    Attributes:
        num_entries: most entries that a row sees.
        places: where entries are, to gather the chosen ones; None if the others are masked instead.
    """

    plan: ReadPlan
    num_entries: int
    places: EntryPlaces | None

    def select_rows(self, plan: ReadPlan, rows: Tensor) -> "EntryChoice":
        """The same for some of the rows, and their own reads."""
        return replace(self, plan=plan, places=self.places and self.places.select_rows(rows))


def plan_choice(batch: StepBatch, num_chosen: int) -> EntryChoice | None:
    """Plan the choice among the entries of the first kind; None if every row reads all that it sees."""
    num_entries = int(batch.step.positions.max()) + 1 if batch.num_rows else 0
    if num_entries <= num_chosen:
        return None
    places = None
    if num_entries >= MIN_ENTRIES_A_CHOSEN * num_chosen:
        places = plan_entry_places(batch.step.spans, 0, batch.token_ids.device)
    return EntryChoice(batch.reads[0], num_entries, places)


class LightningIndexer:
    """DeepSeek-V3.2's indexer, whose index keys are computed from tokens.

    Source: `transformers`' `DeepseekV32Indexer`, which leaves out what only serves FP8: the Hadamard rotation.
    """

    def __init__(self, config: Any, weights: CheckpointWeights, placement: Placement, name: str) -> None:
        device, hidden_size = placement.device, int(config.hidden_size)
        self.num_heads = int(config.index_n_heads)
        self.width = int(config.index_head_dim)
        self.num_chosen = int(config.index_topk)
        self.key_weight = weights.get(f"{name}.wk.weight", (self.width, hidden_size))
        query_shape = (self.num_heads * self.width, int(config.q_lora_rank))
        self._query = make_linear([weights.get(f"{name}.wq_b.weight", query_shape)], placement)
        head_weight = weights.get(f"{name}.weights_proj.weight", (self.num_heads, hidden_size), torch.float32)
        self._head_weight = head_weight.to(device)
        self._norm_weight = weights.get(f"{name}.k_norm.weight", (self.width,)).to(device)
        self._norm_bias = weights.get(f"{name}.k_norm.bias", (self.width,)).to(device)
        self.flops_per_row = 2.0 * (math.prod(query_shape) + head_weight.numel())

    def make_keys(self, keys: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Index keys of tokens, from their products with `key_weight`: shape (num_rows, width)."""
        normed = functional.layer_norm(keys, (self.width,), self._norm_weight, self._norm_bias, _KEY_EPS)
        return rotate_leading_halves(normed, cos, sin).to(keys.dtype)

    def select(
        self, rows: Tensor, residual: Tensor, cos: Tensor, sin: Tensor, choice: EntryChoice, layer: int
    ) -> Tensor:
        """Choose the entries that each row reads: 0 for those, `MASKED` for others.

        Args:
            rows: the block's input; shape (num_rows, hidden_size).
            residual: normed low-rank queries; shape (num_rows, q_lora_rank).
        Returns:
            float32, shape (num_rows, num_entries).
        """
        query = self._query(residual).view(rows.shape[0], self.num_heads, self.width)
        query = rotate_leading_halves(query, cos, sin).to(query.dtype)
        head_weights = functional.linear(rows.float(), self._head_weight) * (self.num_heads * self.width) ** -0.5
        scores = score_entries(query.float(), head_weights, choice.plan, layer, choice.num_entries)
        return select_best(scores, self.num_chosen)


def score_entries(query: Tensor, head_weights: Tensor, plan: ReadPlan, layer: int, num_entries: int) -> Tensor:
    """Score the visible entries by their index keys, the field `index`.

    Args:
        query: float32, shape (num_rows, num_heads, width).
        head_weights: float32, shape (num_rows, num_heads).
    Returns:
        float32, shape (num_rows, num_entries), -inf for those that a row may not see.
    """
    num_heads = query.shape[1]
    scores = query.new_full((query.shape[0], num_entries), -math.inf)
    for read in plan.wide:
        assert read.extent.block is not None
        keys = read.extent.block.fields["index"][layer, read.extent.slot]
        for first, end, first_row in read.tiles(num_heads):
            rows = slice(first_row, read.end_row)
            found = _rank(query[None, rows], keys[None, first:end].float(), head_weights[None, rows])[0]
            bias = read.bias(first, end, first_row, query.device)
            if bias is not None:
                found = found.masked_fill(bias < 0, -math.inf)
            offset = read.extent.first_entry
            scores[rows, offset + first : offset + end] = found
    for batch in plan.batches:
        assert batch.block is not None
        keys = batch.pick(batch.block.fields["index"][layer]).float()
        found = _rank(batch.gather(query), keys, batch.gather(head_weights))  # (num_slots, num_rows, num_keys)
        if batch.bias is not None:
            found = found.masked_fill(batch.bias < 0, -math.inf)
        rows = batch.gather(torch.arange(query.shape[0], device=query.device))
        entries = batch.first_entries.unsqueeze(1) + torch.arange(batch.num_keys, device=query.device)
        _put(scores, rows, entries, found, batch.places)
    return scores


def select_best(scores: Tensor, num_chosen: int) -> Tensor:
    """Mark the best `num_chosen` of each row; of equal scores the lower entry wins, -inf never does.

    Returns:
        float32, the shape of `scores`: 0 for the marked, `MASKED` for others.
    """
    if scores.shape[1] <= num_chosen:
        return torch.where(scores.isneginf(), MASKED, 0.0)
    lowest = scores.topk(num_chosen, dim=-1).values[:, -1:]
    is_better = scores > lowest
    is_equal = (scores == lowest) & ~scores.isneginf()
    num_left = num_chosen - is_better.sum(dim=-1, keepdim=True)
    is_marked = is_better | (is_equal & (is_equal.cumsum(dim=-1) <= num_left))
    return torch.where(is_marked, 0.0, MASKED)


def _rank(query: Tensor, keys: Tensor, head_weights: Tensor) -> Tensor:
    """Score keys (segments, keys, width) for queries (segments, rows, heads, width): (segments, rows, keys)."""
    num_segments, num_rows, num_heads, width = query.shape
    flat = query.reshape(num_segments, num_rows * num_heads, width)
    products = torch.bmm(flat, keys.transpose(1, 2)).relu_().view(num_segments * num_rows, num_heads, -1)
    weights = head_weights.reshape(num_segments * num_rows, 1, num_heads)
    return torch.bmm(weights, products).view(num_segments, num_rows, -1)


def _put(scores: Tensor, rows: Tensor, entries: Tensor, found: Tensor, places: Tensor | None) -> None:
    """Write a batch's scores to their rows and entries, skipping padded rows and entries past the last."""
    num_slots, num_rows = rows.shape
    flat_rows = rows.reshape(-1)
    flat_entries = entries.unsqueeze(1).expand(num_slots, num_rows, -1).reshape(num_slots * num_rows, -1)
    values = found.reshape(num_slots * num_rows, -1)
    if places is not None:
        flat_rows, flat_entries, values = flat_rows[places], flat_entries[places], values[places]
    is_there = (flat_entries < scores.shape[1]) & ~values.isneginf()
    row_index = flat_rows.unsqueeze(1).expand_as(flat_entries)
    scores[row_index[is_there], flat_entries[is_there]] = values[is_there]
