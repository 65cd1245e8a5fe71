"""Multi-head latent attention: a token keeps one latent and one rotated key, shared by all heads.

Source: the DeepSeek-V3 report (arXiv 2412.19437), section 2.1.1. There are two ways to read entries, and a step may mix
them, because both give partial results of the same attention:

    absorbed   queries are projected into latent space; cheaper when few queries read a key
    expanded   keys and values of each head are computed from latents; cheaper when many do
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moebeam.model_runner.torch_engine.layers.attention import Merged, Partials, attend, attend_by_head
from moebeam.model_runner.torch_engine.layers.linear import Linear, make_linear
from moebeam.model_runner.torch_engine.layers.norms import RmsNorm
from moebeam.model_runner.torch_engine.layers.rotary import rotate_halves, rotate_pairs
from moebeam.model_runner.torch_engine.layers.widening import multiply_batches
from moebeam.model_runner.torch_engine.memory.chosen_entries import EntryPlaces, read_chosen
from moebeam.model_runner.torch_engine.memory.read_plan import FreshRead, ReadPlan, WideRead
from moebeam.model_runner.torch_engine.memory.reading import read_shared_keys, write_entries
from moebeam.model_runner.torch_engine.memory.segments import Columns, NodeMemory
from moebeam.model_runner.torch_engine.models.architecture import StepBatch
from moebeam.model_runner.torch_engine.models.entry_choice import EntryChoice, LightningIndexer
from moebeam.model_runner.torch_engine.weights.checkpoint_weights import CheckpointWeights
from moebeam.model_runner.torch_engine.weights.devices import Placement

_LATENT_EPS = 1e-6
"""Of the norms inside attention, which do not take the configuration's."""


@dataclass(frozen=True, slots=True)
class LatentReads:
    """A step's reads, by the way they are done.

    Attributes:
        absorbed_rows: rows with absorbed reads; int64, shape (num_absorbed_rows,). None means all rows.
        absorbed: their reads; rows count among `absorbed_rows`.
        fresh: expanded from the step's own entries.
        choice: set if rows read only the entries that an indexer chooses.
    """

    expanded: list[WideRead]
    absorbed_rows: Tensor | None
    absorbed: ReadPlan
    fresh: list[FreshRead]
    choice: EntryChoice | None

    @property
    def has_absorbed(self) -> bool:
        return self.absorbed_rows is None or self.absorbed_rows.shape[0] > 0


def plan_latent_reads(
    plan: ReadPlan,
    num_rows: int,
    expanded: list[WideRead],
    absorbed: list[WideRead],
    device: torch.device,
    choice: EntryChoice | None = None,
) -> LatentReads:
    """Renumber the rows of absorbed reads among themselves."""
    is_absorbed = np.zeros(num_rows, dtype=bool)
    for read in absorbed:
        is_absorbed[read.first_row : read.end_row] = True
    batches = plan.batches
    for read in batches:
        is_absorbed[read.row_numbers] = True
    if is_absorbed.all():
        return LatentReads(expanded, None, ReadPlan([], absorbed, batches), plan.fresh, choice)
    compact = np.cumsum(is_absorbed) - 1
    rows = torch.from_numpy(np.flatnonzero(is_absorbed)).to(device)
    among = ReadPlan([], [read.renumber(compact) for read in absorbed], [read.renumber(compact) for read in batches])
    return LatentReads(expanded, rows, among, plan.fresh, choice)


class LatentAttention:
    def __init__(self, config: Any, weights: CheckpointWeights, placement: Placement, name: str) -> None:
        device = placement.device
        hidden_size = int(config.hidden_size)
        self.num_heads = int(config.num_attention_heads)
        self.nope = int(config.qk_nope_head_dim)
        self.rotated = int(config.qk_rope_head_dim)
        self.value_width = int(config.v_head_dim)
        self.rank = int(config.kv_lora_rank)
        self._rotate = rotate_pairs if getattr(config, "rope_interleave", True) else rotate_halves
        key_width = self.nope + self.rotated
        self._latent_columns = Columns("latent", 0, self.rank + self.rotated), Columns("latent", 0, self.rank)
        self._scale = key_width**-0.5 * _compute_yarn_scale(config.rope_parameters)
        self._query_rank = int(config.q_lora_rank) if config.q_lora_rank is not None else None
        latent_shape = (self.rank + self.rotated, hidden_size)
        latent = weights.get_matrix(f"{name}.kv_a_proj_with_mqa.weight", latent_shape)
        num_query = self.num_heads * key_width
        if self._query_rank is None:
            first = weights.get_matrix(f"{name}.q_proj.weight", (num_query, hidden_size))
            self._query_norm = None
            self._query = None
        else:
            first = weights.get_matrix(f"{name}.q_a_proj.weight", (self._query_rank, hidden_size))
            norm = weights.get(f"{name}.q_a_layernorm.weight", (self._query_rank,)).to(device)
            self._query_norm = RmsNorm(norm, _LATENT_EPS)
            second = weights.get_matrix(f"{name}.q_b_proj.weight", (num_query, self._query_rank))
            self._query = make_linear([second], placement)
        has_bias = bool(config.attention_bias)
        latent_bias = weights.get(f"{name}.kv_a_proj_with_mqa.bias", latent_shape[:1]) if has_bias else None
        # Queries of full rank have none, as in `transformers`.
        has_query_bias = has_bias and self._query_rank is not None
        first_bias = weights.get(f"{name}.q_a_proj.bias", first.shape[:1]) if has_query_bias else None
        parts, biases = [first, latent], [first_bias, latent_bias]
        self.indexer: LightningIndexer | None = None
        if config.model_type == "deepseek_v32":
            self.indexer = LightningIndexer(config, weights, placement, f"{name}.indexer")
            parts, biases = [*parts, self.indexer.key_weight], [*biases, None]
        self._part_widths = [part.shape[0] for part in parts]
        self._first = make_linear(parts, placement, biases)
        self._latent_norm = RmsNorm(weights.get(f"{name}.kv_a_layernorm.weight", (self.rank,)).to(device), _LATENT_EPS)
        up_shape = (self.num_heads * (self.nope + self.value_width), self.rank)
        up = weights.get(f"{name}.kv_b_proj.weight", up_shape).to(device)
        self._expand: Linear = make_linear([up], placement)
        per_head = up.view(self.num_heads, self.nope + self.value_width, self.rank)
        self._absorb_key = per_head[:, : self.nope]  # (num_heads, nope, rank)
        self._absorb_value = per_head[:, self.nope :].transpose(1, 2)  # (num_heads, rank, value_width)
        out_shape = (hidden_size, self.num_heads * self.value_width)
        out_bias = weights.get(f"{name}.o_proj.bias", (hidden_size,)) if has_bias else None
        self._out = make_linear([weights.get_matrix(f"{name}.o_proj.weight", out_shape)], placement, [out_bias])
        num_weights = sum(part.numel() for part in parts) + up.numel() + math.prod(out_shape)
        num_weights += num_query * self._query_rank if self._query_rank is not None else 0
        self.flops_per_row = 2.0 * num_weights + (self.indexer.flops_per_row if self.indexer is not None else 0.0)
        self.input_flops_per_row = 2.0 * sum(part.numel() for part in parts)

    def __call__(
        self,
        rows: Tensor,
        cos: Tensor,
        sin: Tensor,
        batch: StepBatch,
        reads: LatentReads,
        layer: int,
        chosen: Tensor | None,
    ) -> Tensor:
        first, latent, *index = self._first(rows).split(self._part_widths, dim=-1)
        entries = torch.empty_like(latent, memory_format=torch.contiguous_format)  # (num_rows, rank + rotated)
        entries[:, : self.rank] = self._latent_norm(latent[:, : self.rank])
        entries[:, self.rank :] = self._rotate(latent[:, self.rank :], cos, sin)
        write_entries(batch.reads[0], layer, "latent", entries)
        if self.indexer is not None:
            write_entries(batch.reads[0], layer, "index", self.indexer.make_keys(index[0], cos, sin))
        if chosen is not None:
            rows, first, cos, sin = rows[chosen], first[chosen], cos[chosen], sin[chosen]
        num_rows = first.shape[0]
        if not num_rows:
            return rows[:0]
        selection = None
        if self._query is not None and self._query_norm is not None:
            residual = self._query_norm(first)
            if self.indexer is not None and reads.choice is not None:
                selection = self.indexer.select(rows, residual, cos, sin, reads.choice, layer)
            first = self._query(residual)
        query = first.reshape(num_rows, self.num_heads, -1) * self._scale  # (num_rows, num_heads, nope + rotated)
        query[..., self.nope :] = self._rotate(query[..., self.nope :], cos, sin)
        merged = Merged(num_rows, self.num_heads, self.value_width, rows.device)
        if selection is not None and reads.choice is not None and reads.choice.places is not None:
            self._read_chosen(reads.choice.places, layer, query, merged, selection)
        else:
            self._read_expanded(reads.expanded, layer, query, merged, selection)
            for read in reads.fresh:
                self._read_fresh(read, entries, query, merged)
            if reads.has_absorbed:
                self._read_absorbed(reads, layer, query, merged, selection)
        attended = merged.result().to(rows.dtype).reshape(num_rows, -1)
        return self._out(attended)

    def _read_expanded(
        self, wide: list[WideRead], layer: int, query: Tensor, merged: Merged, selection: Tensor | None
    ) -> None:
        for read in wide:
            assert read.extent.block is not None
            latent = read.extent.block.fields["latent"][layer, read.extent.slot]  # (capacity, rank + rotated)
            kept = self._complete_copy(read, layer, latent) if read.has_copy else None
            for first, end, first_row in read.tiles(self.num_heads):
                if kept is not None:
                    key, value = kept[0][:, first:end], kept[1][:, first:end]
                else:
                    key, value = self._expand_entries(latent[first:end])
                bias = read.bias(first, end, first_row, query.device)
                if selection is not None:
                    offset = read.extent.first_entry
                    bias = selection[first_row : read.end_row, offset + first : offset + end]
                merged.merge(first_row, read.end_row, attend_by_head(query[first_row : read.end_row], key, value, bias))

    def _complete_copy(self, read: WideRead, layer: int, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Expand what a node's copies still lack, and return the copies."""
        memory: NodeMemory = read.node.memory
        key, value = memory.expanded[layer]
        num_before = memory.num_expanded[layer]
        if num_before < read.num_keys:
            new = slice(num_before, read.num_keys)
            key[:, new], value[:, new] = self._expand_entries(latent[new])
            memory.num_expanded[layer] = read.num_keys
        return key, value

    def _expand_entries(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Expand entries (num_keys, rank + rotated) into keys and values of each head, (num_heads, num_keys, width)."""
        made = self._expand(latent[:, : self.rank].contiguous())
        made = made.view(-1, self.num_heads, self.nope + self.value_width).transpose(0, 1)
        key = latent.new_empty((self.num_heads, latent.shape[0], self.nope + self.rotated))
        key[..., : self.nope] = made[..., : self.nope]
        key[..., self.nope :] = latent[:, self.rank :]
        return key, made[..., self.nope :]

    def _read_fresh(self, read: FreshRead, entries: Tensor, query: Tensor, merged: Merged) -> None:
        """Attend to the step's own entries of nodes that begin in it, expanded without a copy."""
        num_nodes, num_rows = read.rows.shape
        latent = entries[read.rows.flatten()]  # (num_nodes * num_rows, rank + rotated)
        made = self._expand(latent[:, : self.rank].contiguous()).view(num_nodes, num_rows, self.num_heads, -1)
        shared = latent[:, self.rank :].view(num_nodes, num_rows, 1, -1).expand(-1, -1, self.num_heads, -1)
        key = torch.cat((made[..., : self.nope], shared), dim=-1).transpose(1, 2).flatten(0, 1)
        value = made[..., self.nope :].transpose(1, 2).flatten(0, 1)  # (num_nodes * num_heads, num_rows, value_width)
        picked = query[read.rows].transpose(1, 2).flatten(0, 1).unsqueeze(2)
        bias = read.bias.repeat_interleave(self.num_heads, dim=0)
        found = attend(picked, key, value, bias).by_head(num_nodes, self.num_heads)
        merged.merge_at(read.merged_rows, found, read.places)

    def _read_absorbed(
        self, reads: LatentReads, layer: int, query: Tensor, merged: Merged, selection: Tensor | None
    ) -> None:
        chosen = reads.absorbed_rows
        if chosen is not None:
            query, selection = query[chosen], None if selection is None else selection[chosen]
        latent = Merged(query.shape[0], self.num_heads, self.rank, query.device)
        key, value = self._latent_columns
        read_shared_keys(reads.absorbed, layer, self._absorb(query), latent, key=key, value=value, selection=selection)
        found = self._release(latent)
        if chosen is None:
            merged.merge(0, query.shape[0], found)
        else:
            merged.merge_at(chosen, found)

    def _read_chosen(self, places: EntryPlaces, layer: int, query: Tensor, merged: Merged, selection: Tensor) -> None:
        """Attend to the chosen entries alone, gathered for each row."""
        assert self.indexer is not None
        num_chosen = min(self.indexer.num_chosen, selection.shape[1])
        latent = Merged(query.shape[0], self.num_heads, self.rank, query.device)
        key, value = self._latent_columns
        read_chosen(places, layer, self._absorb(query), latent, selection, num_chosen, key, value.width)
        merged.merge(0, query.shape[0], self._release(latent))

    def _absorb(self, query: Tensor) -> Tensor:
        """Queries in latent space: shape (num_rows, num_heads, rank + rotated)."""
        nope = multiply_batches(query[..., : self.nope].transpose(0, 1), self._absorb_key).transpose(0, 1)
        return torch.cat((nope.to(query.dtype), query[..., self.nope :]), dim=-1)

    def _release(self, latent: Merged) -> Partials:
        """From attention to latents to that of the heads' values."""
        found = latent.partials()
        made = multiply_batches(found.out.to(self._absorb_value.dtype).transpose(0, 1), self._absorb_value)
        return Partials(made.transpose(0, 1), found.peak, found.total)


def _compute_yarn_scale(parameters: Mapping[str, Any]) -> float:
    """Compute YaRN's factor of the score scale (arXiv 2309.00071, section 3.4; DeepSeek squares it)."""
    if parameters.get("rope_type", "default") == "default" or not parameters.get("mscale_all_dim"):
        return 1.0
    factor = float(parameters["factor"])
    scale = 1.0 if factor <= 1 else 0.1 * float(parameters["mscale_all_dim"]) * math.log(factor) + 1.0
    return scale * scale
