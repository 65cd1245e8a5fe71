"""DeepSeek-V4 (Flash and Pro): sliding windows with compressed entries, hash routing, hyper-connections.

Source: the DeepSeek-V4 report, sections 2.1 to 2.3; settings as in `transformers`' `DeepseekV4Config`. A key is its
own value and serves all heads. For each path a layer keeps the last rows of a sliding window and of open compression
windows in rings, and compressed entries in segments. The attention sink of each head is counted once, when partial
results begin.
"""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from moebeam.model_runner.torch_engine.layers.attention import Merged
from moebeam.model_runner.torch_engine.layers.experts import GatedMlp
from moebeam.model_runner.torch_engine.layers.hyper_connections import HyperConnection, HyperHead, expand
from moebeam.model_runner.torch_engine.layers.linear import make_linear
from moebeam.model_runner.torch_engine.layers.norms import RmsNorm, unit_rows
from moebeam.model_runner.torch_engine.layers.rotary import Rotary, rotate_pairs
from moebeam.model_runner.torch_engine.layers.widening import multiply_batches
from moebeam.model_runner.torch_engine.memory.cache import Cache, Ring, RingKind
from moebeam.model_runner.torch_engine.memory.chosen_entries import (
    MIN_ENTRIES_A_CHOSEN,
    EntryPlaces,
    plan_entry_places,
    read_chosen,
)
from moebeam.model_runner.torch_engine.memory.reading import read_shared_keys, write_entries
from moebeam.model_runner.torch_engine.memory.segments import Columns, SegmentKind
from moebeam.model_runner.torch_engine.memory.windows import (
    CompressionPlan,
    HeadGroup,
    WindowPlan,
    plan_compression,
    plan_window,
)
from moebeam.model_runner.torch_engine.models.architecture import StepBatch
from moebeam.model_runner.torch_engine.models.compression import Compressor, Indexer
from moebeam.model_runner.torch_engine.streaming.experts import make_experts
from moebeam.model_runner.torch_engine.streaming.layers import make_layers
from moebeam.model_runner.torch_engine.weights.checkpoint_weights import CheckpointWeights
from moebeam.model_runner.torch_engine.weights.devices import Placement

LayerType = Literal["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"]
_SPARSE: LayerType = "compressed_sparse_attention"
_HEAVY: LayerType = "heavily_compressed_attention"


class DeepseekV4:
    """The model; see `Architecture`."""

    find_length_class: Callable[[int], int] | None = None

    def __init__(self, config: Any, weights: CheckpointWeights, placement: Placement) -> None:
        self.vocab_size = int(config.vocab_size)
        self._num_streams = int(config.hc_mult)
        hidden_size, device = int(config.hidden_size), placement.device
        self.row_width = self._num_streams * hidden_size
        shape = (self.vocab_size, hidden_size)
        self._embedding = weights.get("model.embed_tokens.weight", shape).to(device)
        layer_types: list[LayerType] = list(config.layer_types)
        # A layer's number among those of its type is its index in their segments and rings.
        numbers = [layer_types[:i].count(layer_type) for i, layer_type in enumerate(layer_types)]
        self.layers = make_layers(
            lambda found, place, index: _Layer(config, found, place, index, numbers[index]),
            len(numbers),
            weights,
            placement,
        )
        self._hyper_head = HyperHead(config, weights, placement, "model.hc_head")
        norm = weights.get("model.norm.weight", (hidden_size,), torch.float32).to(device)
        self._norm = RmsNorm(norm, float(config.rms_norm_eps))
        is_tied = bool(config.tie_word_embeddings) and not weights.has("lm_head.weight")
        head = self._embedding if is_tied else weights.get("lm_head.weight", shape)
        self._head = make_linear([head], placement)
        rotated = int(config.qk_rope_head_dim)
        self._rotaries = {
            label: Rotary.from_config(config, config.rope_parameters[label], rotated, device, label)
            for label in ("main", "compress")
        }
        self._rates: dict[LayerType, int] = {key: int(rate) for key, rate in config.compress_rates.items()}
        self._num_chosen = int(config.index_topk)
        self.kinds = _list_kinds(config, layer_types, self._rates)
        self.rings = _list_rings(config, layer_types, self._rates)
        weights.check_all_used()

    def extend(self, batch: StepBatch, cache: Cache) -> Generator[None, "_Layer", Tensor]:
        """See `Architecture.extend`."""
        plan = self._plan(batch, cache)
        streams = functional.embedding(batch.token_ids, self._embedding)
        # (num_rows, num_streams, hidden_size)
        streams = streams.unsqueeze(1).expand(-1, self._num_streams, -1).contiguous()
        for _ in self.layers.described[:-1]:
            layer = yield
            streams = layer(streams, plan)
        layer = yield
        return layer(streams, plan, batch.last_rows)

    def read_logits(self, rows: Tensor) -> Tensor:
        """See `Architecture.read_logits`; rows are streams, shape (num_rows, num_streams, hidden_size)."""
        return self._head(self._norm(self._hyper_head(rows))).float()

    def flops(self, num_rows: int, num_logit_rows: int) -> float:
        """See `Architecture.flops`."""
        *layers, last = self.layers.described
        before = sum(layer.flops_per_row for layer in layers) + last.input_flops_per_row
        return num_rows * before + num_logit_rows * (last.flops_per_row - last.input_flops_per_row)

    def _plan(self, batch: StepBatch, cache: Cache) -> "_StepPlan":
        device = batch.token_ids.device
        spans = batch.step.spans
        rings = {ring.kind.name: ring for ring in cache.rings}
        angles = {label: rotary(batch.positions) for label, rotary in self._rotaries.items()}
        kinds = {kind.name: index for index, kind in enumerate(self.kinds)}
        compressions: dict[LayerType, _Compression] = {}
        for layer_type in (_SPARSE, _HEAVY):
            if layer_type in kinds:
                rate = self._rates[layer_type]
                num_overlap = rate if layer_type == _SPARSE else 0
                windows = plan_compression(spans, rings[layer_type], rate, num_overlap, device)
                cos, sin = self._rotaries["compress"](windows.positions)
                num_visible = (batch.positions + 1) // rate
                most_visible = int(num_visible.max()) if layer_type == _SPARSE else 0
                places = None
                if most_visible >= MIN_ENTRIES_A_CHOSEN * self._num_chosen:
                    places = plan_entry_places(spans, kinds[layer_type], device)
                compressions[layer_type] = _Compression(
                    windows,
                    kinds[layer_type],
                    cos,
                    sin,
                    num_visible,
                    needs_selection=most_visible > self._num_chosen,
                    places=places,
                    ring=rings[layer_type],
                )
        logit_spans = [] if batch.last_rows is None else batch.step.logit_spans()
        window = plan_window(spans, logit_spans, rings["window"], device)
        return _StepPlan(batch, window, rings["window"], angles, compressions)


@dataclass(frozen=True, slots=True)
class _Compression:
    """A step's plan for one type of compressed layers.

    Attributes:
        cos, sin: of the first positions of the windows that close.
        num_visible: entries that each row may see; int64, shape (num_rows,).
        needs_selection: whether some row sees more entries than it may choose.
        places: where entries are, to gather the chosen ones; None if the others are masked instead.
    """

    windows: CompressionPlan
    kind_index: int
    cos: Tensor
    sin: Tensor
    num_visible: Tensor
    needs_selection: bool
    places: EntryPlaces | None
    ring: Ring


@dataclass(frozen=True, slots=True)
class _StepPlan:
    """What all layers of a step share; `angles` are cosines and sines by name of the rotary embedding."""

    batch: StepBatch
    window: WindowPlan
    window_ring: Ring
    angles: dict[str, tuple[Tensor, Tensor]]
    compressions: dict[LayerType, _Compression]


class _Layer:
    def __init__(self, config: Any, weights: CheckpointWeights, placement: Placement, index: int, number: int) -> None:
        name = f"model.layers.{index}"
        hidden_size, eps = int(config.hidden_size), float(config.rms_norm_eps)
        before = weights.get(f"{name}.input_layernorm.weight", (hidden_size,), torch.float32)
        after = weights.get(f"{name}.post_attention_layernorm.weight", (hidden_size,), torch.float32)
        self._before_norm = RmsNorm(before.to(placement.device), eps)
        self._after_norm = RmsNorm(after.to(placement.device), eps)
        self._attention_streams = HyperConnection(config, weights, placement, f"{name}.attn_hc")
        self._mlp_streams = HyperConnection(config, weights, placement, f"{name}.ffn_hc")
        self._attention = _Attention(config, weights, placement, index, number)
        self._mlp = _MoE(config, weights, placement, index)
        self.flops_per_row = sum(
            part.flops_per_row for part in (self._attention_streams, self._mlp_streams, self._attention, self._mlp)
        )
        self.input_flops_per_row = self._attention_streams.flops_per_row + self._attention.input_flops_per_row

    def __call__(self, streams: Tensor, plan: _StepPlan, chosen: Tensor | None = None) -> Tensor:
        """Write every row's entries to the cache; return the streams of the `chosen` rows (all by default)."""
        token_ids = plan.batch.token_ids
        rows, after, comb = self._attention_streams.collapse(streams)
        attended = self._attention(self._before_norm(rows), plan, chosen)
        if chosen is not None:
            streams, after, comb, token_ids = streams[chosen], after[chosen], comb[chosen], token_ids[chosen]
        if not streams.shape[0]:
            return streams
        streams = expand(streams, attended, after, comb)
        rows, after, comb = self._mlp_streams.collapse(streams)
        return expand(streams, self._mlp(self._after_norm(rows), token_ids), after, comb)


class _Attention:
    def __init__(self, config: Any, weights: CheckpointWeights, placement: Placement, index: int, number: int) -> None:
        name, device = f"model.layers.{index}.self_attn", placement.device
        hidden_size, eps = int(config.hidden_size), float(config.rms_norm_eps)
        self._index = index
        self._number = number
        self._layer_type: LayerType = config.layer_types[index]
        self._num_heads = int(config.num_attention_heads)
        self._width = int(config.head_dim)
        self._eps = eps
        self._num_groups = int(config.o_groups)
        query_rank = int(config.q_lora_rank)
        # One product computes everything that depends on the block's input.
        parts = [
            weights.get(f"{name}.q_a_proj.weight", (query_rank, hidden_size)),
            weights.get(f"{name}.kv_proj.weight", (self._width, hidden_size)),
        ]
        self._compressor: Compressor | None = None
        self._indexer: Indexer | None = None
        if self._layer_type != "sliding_attention":
            rate = int(config.compress_rates[self._layer_type])
            is_sparse = self._layer_type == _SPARSE
            self._compressor = Compressor(
                config,
                weights,
                placement,
                f"{name}.compressor",
                rate=rate,
                width=self._width,
                has_overlap=is_sparse,
            )
            parts += [self._compressor.value_weight, self._compressor.gate_weight]
            if is_sparse:
                self._indexer = Indexer(config, weights, placement, f"{name}.compressor.indexer", rate=rate)
                inner = self._indexer.compressor
                parts += [inner.value_weight, inner.gate_weight, self._indexer.head_weight]
        self._part_widths = [part.shape[0] for part in parts]
        self._parts = make_linear(parts, placement)
        self._query_norm = RmsNorm(weights.get(f"{name}.q_a_norm.weight", (query_rank,), torch.float32).to(device), eps)
        self._key_norm = RmsNorm(weights.get(f"{name}.kv_norm.weight", (self._width,), torch.float32).to(device), eps)
        query = weights.get(f"{name}.q_b_proj.weight", (self._num_heads * self._width, query_rank))
        self._query = make_linear([query], placement)
        group_width, out_rank = self._num_heads * self._width // self._num_groups, int(config.o_lora_rank)
        first_out = weights.get(f"{name}.o_a_proj.weight", (self._num_groups * out_rank, group_width))
        self._first_out = first_out.to(device).view(self._num_groups, out_rank, group_width).transpose(1, 2)
        last_out = weights.get(f"{name}.o_b_proj.weight", (hidden_size, self._num_groups * out_rank))
        self._last_out = make_linear([last_out], placement)
        self._sinks = weights.get(f"{name}.sinks", (self._num_heads,), torch.float32).to(device)
        self.input_flops_per_row = 2.0 * sum(part.numel() for part in parts)
        num_weights = sum(part.numel() for part in (*parts, query, first_out, last_out))
        self.flops_per_row = 2.0 * num_weights + (self._indexer.flops_per_row if self._indexer is not None else 0.0)

    def __call__(self, rows: Tensor, plan: _StepPlan, chosen: Tensor | None) -> Tensor:
        cos, sin = plan.angles["main" if self._layer_type == "sliding_attention" else "compress"]
        low, key, *compressed = self._parts(rows).split(self._part_widths, dim=-1)
        keys = self._rotate(self._key_norm(key.contiguous()), cos, sin)  # (num_rows, width)
        if chosen is not None:
            low, cos, sin = low[chosen], cos[chosen], sin[chosen]
        num_rows = low.shape[0]
        residual = self._query_norm(low.contiguous())
        query = self._query(residual).view(num_rows, self._num_heads, self._width)
        query = self._rotate(unit_rows(query.float(), self._eps).to(query.dtype), cos, sin) * self._width**-0.5
        merged = Merged.from_sinks(self._sinks, num_rows, self._width)
        read_window = plan.window.read if chosen is None else plan.window.read_last_rows
        read_window(plan.window_ring, self._index, keys, [HeadGroup(query, merged)])
        if self._compressor is not None:
            self._keep_compressed(compressed, plan)
        if not num_rows:
            return rows[:0]
        if self._compressor is not None:
            head_weights = compressed[-1] if chosen is None else compressed[-1][chosen]
            self._read_compressed(head_weights, residual, query, cos, sin, plan, merged, chosen)
        attended = self._rotate(merged.result(), cos, -sin).to(rows.dtype)  # (num_rows, num_heads, width)
        grouped = attended.reshape(num_rows, self._num_groups, -1).transpose(0, 1)
        made = multiply_batches(grouped, self._first_out).transpose(0, 1)  # (num_rows, num_groups, out_rank)
        return self._last_out(made.flatten(1).to(rows.dtype))

    def _keep_compressed(self, parts: Sequence[Tensor], plan: _StepPlan) -> None:
        step = plan.compressions[self._layer_type]
        kept = torch.cat(tuple(parts if self._indexer is None else parts[:-1]), dim=-1)
        windows = step.windows.gather(step.ring, self._number, kept)  # (num_windows, num_window_rows, ring width)
        if step.windows.num_windows:
            self._write_entries(windows, step, plan)

    def _read_compressed(
        self,
        head_weights: Tensor,
        residual: Tensor,
        query: Tensor,
        cos: Tensor,
        sin: Tensor,
        plan: _StepPlan,
        merged: Merged,
        chosen: Tensor | None,
    ) -> None:
        step = plan.compressions[self._layer_type]
        reads, num_visible, places = plan.batch.reads[step.kind_index], step.num_visible, step.places
        if chosen is not None:
            reads, num_visible = plan.batch.logit_reads[step.kind_index], num_visible[chosen]
            places = places and places.select_rows(chosen)
        columns = Columns("key", 0, self._width)
        selection = None
        if self._indexer is not None and step.needs_selection:
            selection = self._indexer.select(residual, head_weights, cos, sin, reads, self._number, num_visible)
            if places is not None:
                num_chosen = min(self._indexer.num_chosen, selection.shape[1])
                read_chosen(places, self._number, query, merged, selection, num_chosen, columns)
                return
        read_shared_keys(reads, self._number, query, merged, key=columns, value=columns, selection=selection)

    def _write_entries(self, windows: Tensor, step: _Compression, plan: _StepPlan) -> None:
        assert self._compressor is not None
        reads = plan.batch.reads[step.kind_index]
        num = self._compressor.num_features
        values, gates, *inner = windows.split([num, num, *_split_in_two(windows.shape[-1] - 2 * num)], dim=-1)
        entries = self._compressor(values, gates, step.windows.is_first, step.cos, step.sin)
        write_entries(reads, self._number, "key", entries)
        if self._indexer is not None:
            index = self._indexer.compressor(inner[0], inner[1], step.windows.is_first, step.cos, step.sin)
            write_entries(reads, self._number, "index", index)

    def _rotate(self, part: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotate the trailing elements, in place."""
        num_rotated = 2 * cos.shape[-1]
        part[..., -num_rotated:] = rotate_pairs(part[..., -num_rotated:], cos, sin).to(part.dtype)
        return part


class _MoE:
    def __init__(self, config: Any, weights: CheckpointWeights, placement: Placement, index: int) -> None:
        name, device = f"model.layers.{index}.mlp", placement.device
        hidden_size, width = int(config.hidden_size), int(config.moe_intermediate_size)
        num_experts, self._num_chosen = int(config.n_routed_experts), int(config.num_experts_per_tok)
        limit = float(config.swiglu_limit)
        self._scale = float(config.routed_scaling_factor)
        self._router = weights.get_routing(f"{name}.gate.weight", (num_experts, hidden_size)).to(device)
        self._table: Tensor | None = None
        self._bias = torch.zeros(num_experts, device=device)
        if config.mlp_layer_types[index] == "hash_moe":
            shape = (int(config.vocab_size), self._num_chosen)
            self._table = weights.get_choices(f"{name}.gate.tid2eid", shape, num_experts).to(device)
        else:
            bias = weights.get_routing(f"{name}.gate.e_score_correction_bias", (num_experts,), torch.float32)
            self._bias = bias.to(device)
        self._experts = make_experts(
            weights, placement, f"{name}.experts", num_experts, hidden_size, width, limit=limit
        )
        self._shared = GatedMlp(
            weights, placement, f"{name}.shared_experts", hidden_size=hidden_size, width=width, limit=limit
        )
        routed_flops = 6.0 * hidden_size * width * self._num_chosen + 2.0 * num_experts * hidden_size
        self.flops_per_row = routed_flops + self._shared.flops_per_row

    def __call__(self, rows: Tensor, token_ids: Tensor) -> Tensor:
        scores = functional.softplus(functional.linear(rows, self._router)).sqrt()  # (num_rows, num_experts)
        if self._table is not None:
            chosen = self._table[token_ids]
        else:
            chosen = (scores + self._bias).topk(self._num_chosen, dim=-1, sorted=False).indices
        weights = scores.gather(1, chosen)
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20) * self._scale
        return self._experts(rows, chosen, weights) + self._shared(rows)


def _split_in_two(width: int) -> list[int]:
    return [width // 2, width // 2] if width else []


def _list_kinds(config: Any, layer_types: Sequence[LayerType], rates: dict[LayerType, int]) -> tuple[SegmentKind, ...]:
    width, index_width = int(config.head_dim), int(config.index_head_dim)
    fields: dict[LayerType, tuple[tuple[str, int], ...]] = {
        _SPARSE: (("key", width), ("index", index_width)),
        _HEAVY: (("key", width),),
    }
    return tuple(
        SegmentKind(layer_type, layer_types.count(layer_type), rates[layer_type], fields[layer_type])
        for layer_type in fields
        if layer_type in layer_types
    )


def _list_rings(config: Any, layer_types: Sequence[LayerType], rates: dict[LayerType, int]) -> tuple[RingKind, ...]:
    width, index_width = int(config.head_dim), int(config.index_head_dim)
    rings = [RingKind("window", len(layer_types), int(config.sliding_window), width)]
    if _SPARSE in layer_types:
        num = layer_types.count(_SPARSE)
        rings.append(RingKind(_SPARSE, num, 2 * rates[_SPARSE], 4 * width + 4 * index_width))
    if _HEAVY in layer_types:
        rings.append(RingKind(_HEAVY, layer_types.count(_HEAVY), rates[_HEAVY], 2 * width))
    return tuple(rings)
