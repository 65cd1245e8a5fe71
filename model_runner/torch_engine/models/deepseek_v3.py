"""DeepSeek-V3 and R1: multi-head latent attention and sigmoid-gated experts.

Source: the DeepSeek-V3 report (arXiv 2412.19437), sections 2.1.1 and 2.1.2; settings as in `transformers`'
`DeepseekV3Config`. A token keeps its latent and its rotated key, shared by all heads. They are read *absorbed*
(queries brought into latent space) where few queries read a key, and *expanded* (keys and values of each head) where
many do; both give partial results of the same attention.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from moebeam.model_runner.torch_engine.layers.attention import Merged, Partials, attend, attend_by_head
from moebeam.model_runner.torch_engine.layers.experts import Experts, GatedMlp
from moebeam.model_runner.torch_engine.layers.linear import Linear, make_linear
from moebeam.model_runner.torch_engine.layers.norms import RmsNorm
from moebeam.model_runner.torch_engine.layers.rotary import Rotary, rotate_halves, rotate_pairs
from moebeam.model_runner.torch_engine.memory.cache import Cache, RingKind
from moebeam.model_runner.torch_engine.memory.reading import (
    Columns,
    FreshRead,
    ReadPlan,
    WideRead,
    read_shared_keys,
    write_entries,
)
from moebeam.model_runner.torch_engine.memory.segments import NodeMemory, SegmentKind
from moebeam.model_runner.torch_engine.models.architecture import StepBatch, refuse_settings
from moebeam.model_runner.torch_engine.weights.checkpoint_weights import CheckpointWeights
from moebeam.model_runner.torch_engine.weights.devices import Placement

_LATENT_EPS = 1e-6
"""The norms inside attention do not take their epsilon from the configuration."""

_NUM_IDLE_STEPS = 4
"""Steps for which an expanded copy that no one reads is kept."""


class DeepseekV3:
    """The model; see `Architecture`."""

    rings: tuple[RingKind, ...] = ()

    def __init__(self, config: Any, weights: CheckpointWeights, placement: Placement) -> None:
        refuse_settings(config, {"attention_bias": False, "hidden_act": "silu"})
        self.vocab_size = int(config.vocab_size)
        self.context_length = int(config.max_position_embeddings)
        hidden_size = int(config.hidden_size)
        shape = (self.vocab_size, hidden_size)
        self._embedding = weights.get("model.embed_tokens.weight", shape).to(placement.device)
        self._layers = [_Layer(config, weights, placement, i) for i in range(int(config.num_hidden_layers))]
        self._norm = RmsNorm(weights.get("model.norm.weight", (hidden_size,)).to(placement.device), config.rms_norm_eps)
        is_tied = bool(config.tie_word_embeddings) and not weights.has("lm_head.weight")
        head = self._embedding if is_tied else weights.get("lm_head.weight", shape)
        self._head = make_linear([head], placement)
        rotated = int(config.qk_rope_head_dim)
        self._rotary = Rotary.of(config, config.rope_parameters, rotated, placement.device)
        latent_width = int(config.kv_lora_rank) + rotated
        self.kinds = (SegmentKind("latent", len(self._layers), 1, (("latent", latent_width),), True),)
        self._expansion = _Expansion(len(self._layers), self._layers[0].attention, placement)
        weights.check_all_used([rf"^model\.layers\.{len(self._layers)}\.", r"rotary_emb\.inv_freq$"])

    def extend(self, batch: StepBatch, cache: Cache) -> Tensor:
        """See `Architecture.extend`."""
        cos, sin = self._rotary(batch.positions)  # (num_rows, num_pairs)
        rows = functional.embedding(batch.token_ids, self._embedding)  # (num_rows, hidden_size)
        expanded, absorbed = self._expansion.choose(batch.reads[0].wide, cache)
        reads = _plan_reads(batch.reads[0], batch.num_rows, expanded, absorbed, rows.device)
        for layer in self._layers[:-1]:
            rows = layer(rows, cos, sin, batch, reads)
        if batch.last_rows is not None:
            drawn = batch.drawn_reads[0]
            split = self._expansion.split(drawn.wide)
            reads = _plan_reads(drawn, int(batch.last_rows.shape[0]), *split, rows.device)
        rows = self._layers[-1](rows, cos, sin, batch, reads, batch.last_rows)
        self._expansion.forget_idle(expanded, cache)
        return self._head(self._norm(rows)).float()

    def flops(self, num_rows: int, num_logit_rows: int) -> float:
        """See `Architecture.flops`."""
        last = self._layers[-1]
        before = sum(layer.flops_per_row for layer in self._layers[:-1]) + last.attention.input_flops_per_row
        return num_rows * before + num_logit_rows * (last.flops_per_row - last.attention.input_flops_per_row)


@dataclass(frozen=True, slots=True)
class _Reads:
    """How a step's reads are done.

    Attributes:
        absorbed_rows: rows that read latents; int64, shape (num_absorbed_rows,). None stands for all rows.
        absorbed: their reads, rows being numbered among them.
    """

    expanded: list[WideRead]
    absorbed_rows: Tensor | None
    absorbed: ReadPlan
    fresh: list[FreshRead]

    @property
    def has_absorbed(self) -> bool:
        return self.absorbed_rows is None or self.absorbed_rows.shape[0] > 0


def _plan_reads(
    plan: ReadPlan, num_rows: int, expanded: list[WideRead], absorbed: list[WideRead], device: torch.device
) -> _Reads:
    """Number the rows that read latents among themselves."""
    is_absorbed = np.zeros(num_rows, dtype=bool)
    for read in absorbed:
        is_absorbed[read.first_row : read.end_row] = True
    batches = plan.batches
    for read in batches:
        is_absorbed[read.row_numbers] = True
    if is_absorbed.all():
        return _Reads(expanded, None, ReadPlan([], absorbed, batches), plan.fresh)
    compact = np.cumsum(is_absorbed) - 1
    rows = torch.from_numpy(np.flatnonzero(is_absorbed)).to(device)
    among = ReadPlan([], [read.among(compact) for read in absorbed], [read.among(compact) for read in batches])
    return _Reads(expanded, rows, among, plan.fresh)


class _Layer:
    def __init__(self, config: Any, weights: CheckpointWeights, placement: Placement, index: int) -> None:
        name = f"model.layers.{index}"
        device = placement.device
        hidden_size = int(config.hidden_size)
        eps = float(config.rms_norm_eps)
        self._index = index
        self._input_norm = RmsNorm(weights.get(f"{name}.input_layernorm.weight", (hidden_size,)).to(device), eps)
        after = weights.get(f"{name}.post_attention_layernorm.weight", (hidden_size,))
        self._after_norm = RmsNorm(after.to(device), eps)
        self.attention = _LatentAttention(config, weights, placement, f"{name}.self_attn")
        self._mlp: GatedMlp | _MoE
        if index < int(config.first_k_dense_replace):
            self._mlp = GatedMlp(
                weights, placement, f"{name}.mlp", hidden_size=hidden_size, width=int(config.intermediate_size)
            )
        else:
            self._mlp = _MoE(config, weights, placement, f"{name}.mlp")
        self.flops_per_row = self.attention.flops_per_row + self._mlp.flops_per_row

    def __call__(
        self, rows: Tensor, cos: Tensor, sin: Tensor, batch: StepBatch, reads: _Reads, chosen: Tensor | None = None
    ) -> Tensor:
        """Rows to rows; all are kept, but only the `chosen` ones, if any are named, are gone on with."""
        normed = self._input_norm(rows)
        rows = rows if chosen is None else rows[chosen]
        attended = self.attention(normed, cos, sin, batch, reads, self._index, chosen)
        if not rows.shape[0]:
            return rows
        rows = rows + attended
        return rows + self._mlp(self._after_norm(rows))


class _LatentAttention:
    def __init__(self, config: Any, weights: CheckpointWeights, placement: Placement, name: str) -> None:
        device = placement.device
        hidden_size = int(config.hidden_size)
        self.num_heads = int(config.num_attention_heads)
        self.nope = int(config.qk_nope_head_dim)
        self.rotated = int(config.qk_rope_head_dim)
        self.value_width = int(config.v_head_dim)
        self.rank = int(config.kv_lora_rank)
        self._rotate = rotate_pairs if config.rope_interleave else rotate_halves
        key_width = self.nope + self.rotated
        self._scale = key_width**-0.5 * _yarn_scale(config.rope_parameters)
        self._query_rank = int(config.q_lora_rank) if config.q_lora_rank is not None else None
        latent_shape = (self.rank + self.rotated, hidden_size)
        latent = weights.get(f"{name}.kv_a_proj_with_mqa.weight", latent_shape)
        num_query = self.num_heads * key_width
        if self._query_rank is None:
            first = weights.get(f"{name}.q_proj.weight", (num_query, hidden_size))
            self._query_norm = None
            self._query = None
        else:
            first = weights.get(f"{name}.q_a_proj.weight", (self._query_rank, hidden_size))
            norm = weights.get(f"{name}.q_a_layernorm.weight", (self._query_rank,)).to(device)
            self._query_norm = RmsNorm(norm, _LATENT_EPS)
            second = weights.get(f"{name}.q_b_proj.weight", (num_query, self._query_rank))
            self._query = make_linear([second], placement)
        self._num_first = first.shape[0]
        self._first = make_linear([first, latent], placement)
        self._latent_norm = RmsNorm(weights.get(f"{name}.kv_a_layernorm.weight", (self.rank,)).to(device), _LATENT_EPS)
        up_shape = (self.num_heads * (self.nope + self.value_width), self.rank)
        up = weights.get(f"{name}.kv_b_proj.weight", up_shape).to(device)
        self._expand: Linear = make_linear([up], placement)
        per_head = up.view(self.num_heads, self.nope + self.value_width, self.rank)
        self._absorb_key = per_head[:, : self.nope]  # (num_heads, nope, rank)
        self._absorb_value = per_head[:, self.nope :].transpose(1, 2)  # (num_heads, rank, value_width)
        out_shape = (hidden_size, self.num_heads * self.value_width)
        self._out = make_linear([weights.get(f"{name}.o_proj.weight", out_shape)], placement)
        num_weights = first.numel() + latent.numel() + up.numel() + math.prod(out_shape)
        num_weights += num_query * self._query_rank if self._query_rank is not None else 0
        self.flops_per_row = 2.0 * num_weights
        self.input_flops_per_row = 2.0 * (first.numel() + latent.numel())

    def __call__(
        self,
        rows: Tensor,
        cos: Tensor,
        sin: Tensor,
        batch: StepBatch,
        reads: _Reads,
        layer: int,
        chosen: Tensor | None,
    ) -> Tensor:
        first, latent = self._first(rows).split([self._num_first, self.rank + self.rotated], dim=-1)
        entries = torch.empty_like(latent, memory_format=torch.contiguous_format)  # (num_rows, rank + rotated)
        entries[:, : self.rank] = self._latent_norm(latent[:, : self.rank])
        entries[:, self.rank :] = self._rotate(latent[:, self.rank :], cos, sin)
        write_entries(batch.reads[0], layer, "latent", entries)
        if chosen is not None:
            first, cos, sin = first[chosen], cos[chosen], sin[chosen]
        num_rows = first.shape[0]
        if not num_rows:
            return rows[:0]
        if self._query is not None and self._query_norm is not None:
            first = self._query(self._query_norm(first))
        query = first.reshape(num_rows, self.num_heads, -1) * self._scale  # (num_rows, num_heads, nope + rotated)
        query[..., self.nope :] = self._rotate(query[..., self.nope :], cos, sin)
        merged = Merged(num_rows, self.num_heads, self.value_width, rows.device)
        self._read_expanded(reads.expanded, layer, query, merged)
        for read in reads.fresh:
            self._read_fresh(read, entries, query, merged)
        if reads.has_absorbed:
            self._read_absorbed(reads, layer, query, merged)
        attended = merged.result().to(rows.dtype).reshape(num_rows, -1)
        return self._out(attended)

    def _read_expanded(self, wide: list[WideRead], layer: int, query: Tensor, merged: Merged) -> None:
        for read in wide:
            assert read.extent.block is not None
            latent = read.extent.block.fields["latent"][layer, read.extent.slot]  # (capacity, rank + rotated)
            kept = self._kept(read, layer, latent) if _has_copy(read) else None
            for first, end, first_row in read.tiles(self.num_heads):
                if kept is not None:
                    key, value = kept[0][:, first:end], kept[1][:, first:end]
                else:
                    key, value = self._expanded(latent[first:end])
                bias = read.bias(first, end, first_row, query.device)
                merged.merge(first_row, read.end_row, attend_by_head(query[first_row : read.end_row], key, value, bias))

    def _kept(self, read: WideRead, layer: int, latent: Tensor) -> tuple[Tensor, Tensor]:
        """The copies of a node's entries, completed where they are missing."""
        memory: NodeMemory = read.node.memory
        key, value = memory.expanded[layer]
        num_before = memory.num_expanded[layer]
        if num_before < read.num_keys:
            new = slice(num_before, read.num_keys)
            key[:, new], value[:, new] = self._expanded(latent[new])
            memory.num_expanded[layer] = read.num_keys
        return key, value

    def _expanded(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Entries, shape (num_keys, rank + rotated), as keys and values of each head, (num_heads, num_keys, width)."""
        made = self._expand(latent[:, : self.rank].contiguous())
        made = made.view(-1, self.num_heads, self.nope + self.value_width).transpose(0, 1)
        key = latent.new_empty((self.num_heads, latent.shape[0], self.nope + self.rotated))
        key[..., : self.nope] = made[..., : self.nope]
        key[..., self.nope :] = latent[:, self.rank :]
        return key, made[..., self.nope :]

    def _read_fresh(self, read: FreshRead, entries: Tensor, query: Tensor, merged: Merged) -> None:
        """Read the step's own entries of nodes that begin with it, expanded and forgotten."""
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

    def _read_absorbed(self, reads: _Reads, layer: int, query: Tensor, merged: Merged) -> None:
        chosen = reads.absorbed_rows
        picked = query if chosen is None else query[chosen]
        nope = torch.bmm(picked[..., : self.nope].transpose(0, 1), self._absorb_key).transpose(0, 1)
        absorbed = torch.cat((nope, picked[..., self.nope :]), dim=-1)  # (num_absorbed_rows, num_heads, rank + rotated)
        latent = Merged(picked.shape[0], self.num_heads, self.rank, query.device)
        key, value = Columns("latent", 0, self.rank + self.rotated), Columns("latent", 0, self.rank)
        read_shared_keys(reads.absorbed, layer, absorbed, latent, key=key, value=value)
        found = latent.partials()
        made = torch.bmm(found.out.to(self._absorb_value.dtype).transpose(0, 1), self._absorb_value).transpose(0, 1)
        found = Partials(made.float(), found.peak, found.total)
        if chosen is None:
            merged.merge(0, query.shape[0], found)
        else:
            merged.merge_at(chosen, found)


class _Expansion:
    """Decides which segments are read expanded, and keeps their copies under a limit.

    By operations alone, expanding pays from `num_worth` queries a key on; the copies cost memory and bandwidth. What a
    step alone reads that often is expanded tile by tile and forgotten where there is no room for a copy.
    """

    def __init__(self, num_layers: int, attention: _LatentAttention, placement: Placement) -> None:
        self._num_layers = num_layers
        self._attention = attention
        self._placement = placement
        widths = attention.nope + attention.rotated, attention.value_width
        absorbed, expanded = 2 * attention.rank + attention.rotated, sum(widths)
        per_key = attention.rank * (attention.nope + attention.value_width)
        self._num_worth = per_key / max(1, absorbed - expanded) if absorbed > expanded else math.inf
        self._key_bytes = attention.num_heads * sum(widths) * num_layers * placement.dtype.itemsize

    def choose(self, wide: list[WideRead], cache: Cache) -> tuple[list[WideRead], list[WideRead]]:
        """Split wide reads into those done expanded, with a copy or without, and those done absorbed; makes copies."""
        for read in wide:
            if read.node in cache.num_idle_steps:
                cache.num_idle_steps[read.node] = 0
        expanded: list[WideRead] = []
        absorbed: list[WideRead] = []
        for read in wide:
            is_expanded = self._has_room(read, cache) or read.num_pairs >= self._num_worth * read.num_keys
            (expanded if is_expanded else absorbed).append(read)
        return expanded, absorbed

    def split(self, wide: list[WideRead]) -> tuple[list[WideRead], list[WideRead]]:
        """Split wide reads by whether there is a copy already."""
        expanded = [read for read in wide if _has_copy(read)]
        return expanded, [read for read in wide if not _has_copy(read)]

    def _has_room(self, read: WideRead, cache: Cache) -> bool:
        node = read.node
        memory: NodeMemory = node.memory
        if _has_copy(read):
            return True
        if memory.expanded:
            cache.drop_expanded(memory)
        num_reads = read.end_row - read.first_row + 32 * node.num_prompts * (not node.is_private)
        num_keys = max(node.num_tokens, read.num_keys)
        num_bytes = num_keys * self._key_bytes
        if num_reads < self._num_worth:
            return False
        self._make_room(num_bytes, cache)
        if cache.expanded_bytes + num_bytes > cache.max_expanded_bytes:
            return False
        attention = self._attention
        options: Mapping[str, Any] = {"dtype": self._placement.dtype, "device": self._placement.device}
        for layer in range(self._num_layers):
            memory.expanded[layer] = (
                torch.empty((attention.num_heads, num_keys, attention.nope + attention.rotated), **options),
                torch.empty((attention.num_heads, num_keys, attention.value_width), **options),
            )
            memory.num_expanded[layer] = 0
        cache.expanded_bytes += num_bytes
        cache.peak_expanded_bytes = max(cache.peak_expanded_bytes, cache.expanded_bytes)
        return True

    def _make_room(self, num_bytes: int, cache: Cache) -> None:
        """Drop copies that this step does not read, the longest unread first, until there is room or none is left."""
        idle = cache.num_idle_steps
        for node in sorted(idle, key=idle.__getitem__, reverse=True):
            if idle[node] == 0 or cache.expanded_bytes + num_bytes <= cache.max_expanded_bytes:
                return
            cache.forget_expanded(node)

    def forget_idle(self, used: list[WideRead], cache: Cache) -> None:
        """Drop copies that have not been read for some steps, or that only one answer would read."""
        idle = cache.num_idle_steps
        for read in filter(_has_copy, used):
            idle[read.node] = 0
        for node, num_steps in list(idle.items()):
            if num_steps >= (1 if node.is_private else _NUM_IDLE_STEPS):
                cache.forget_expanded(node)
            else:
                idle[node] = num_steps + 1


def _has_copy(read: WideRead) -> bool:
    """Whether a node has expanded copies with room for what is read."""
    memory: NodeMemory = read.node.memory
    return any(key.shape[1] >= read.num_keys for key, _ in memory.expanded.values())


class _MoE:
    def __init__(self, config: Any, weights: CheckpointWeights, placement: Placement, name: str) -> None:
        hidden_size, width = int(config.hidden_size), int(config.moe_intermediate_size)
        self._num_experts = int(config.n_routed_experts)
        self._num_chosen = int(config.num_experts_per_tok)
        self._num_groups = int(config.n_group)
        self._num_chosen_groups = int(config.topk_group)
        self._is_normed = bool(config.norm_topk_prob)
        self._scale = float(config.routed_scaling_factor)
        gate_shape = (self._num_experts, hidden_size)
        self._router = weights.get(f"{name}.gate.weight", gate_shape, torch.float32).to(placement.device)
        bias = weights.get(f"{name}.gate.e_score_correction_bias", (self._num_experts,), torch.float32)
        self._bias = bias.to(placement.device)
        experts = weights.experts(f"{name}.experts", self._num_experts, hidden_size, width)
        self._experts = Experts(experts, placement)
        num_shared = int(config.n_shared_experts)
        self._shared = GatedMlp(
            weights, placement, f"{name}.shared_experts", hidden_size=hidden_size, width=width * num_shared
        )
        self.flops_per_row = 6.0 * hidden_size * width * self._num_chosen + 2.0 * math.prod(gate_shape)
        self.flops_per_row += self._shared.flops_per_row

    def __call__(self, rows: Tensor) -> Tensor:
        chosen, weights = self._route(rows)
        return self._experts(rows, chosen, weights) + self._shared(rows)

    def _route(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Experts of each row and their weights: the bias counts for the choice only."""
        scores = functional.linear(rows.float(), self._router).sigmoid()  # (num_rows, num_experts)
        ranked = scores + self._bias
        if self._num_groups > 1:
            grouped = ranked.view(rows.shape[0], self._num_groups, -1)
            best = grouped.topk(2, dim=-1).values.sum(-1).topk(self._num_chosen_groups, dim=-1, sorted=False).indices
            is_in = torch.zeros(grouped.shape[:2], dtype=torch.bool, device=rows.device).scatter_(1, best, True)
            ranked = grouped.masked_fill(~is_in.unsqueeze(-1), -math.inf).flatten(1)
        chosen = ranked.topk(self._num_chosen, dim=-1, sorted=False).indices
        weights = scores.gather(1, chosen)
        if self._is_normed:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return chosen, weights * self._scale


def _yarn_scale(parameters: Mapping[str, Any]) -> float:
    """What YaRN adds to the scale of scores (arXiv 2309.00071, section 3.4, as DeepSeek applies it: squared)."""
    if parameters.get("rope_type", "default") == "default" or not parameters.get("mscale_all_dim"):
        return 1.0
    factor = float(parameters["factor"])
    scale = 1.0 if factor <= 1 else 0.1 * float(parameters["mscale_all_dim"]) * math.log(factor) + 1.0
    return scale * scale
