"""Mixture-of-experts models with plain grouped-query attention: Mixtral and Qwen3-MoE.

Sources: arXiv 2401.04088 (Mixtral), arXiv 2505.09388 (Qwen3); settings as in `transformers`' `MixtralConfig` and
`Qwen3MoeConfig`. A token keeps a key and a value for each key-value head, each read by a group of query heads.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from moebeam.model_runner.torch_engine.layers.attention import Merged
from moebeam.model_runner.torch_engine.layers.experts import Experts, GatedMlp
from moebeam.model_runner.torch_engine.layers.linear import make_linear
from moebeam.model_runner.torch_engine.layers.norms import RmsNorm
from moebeam.model_runner.torch_engine.layers.rotary import Rotary, rotate_halves
from moebeam.model_runner.torch_engine.memory.cache import Cache, RingKind
from moebeam.model_runner.torch_engine.memory.reading import read_shared_keys, write_entries
from moebeam.model_runner.torch_engine.memory.segments import Columns, SegmentKind
from moebeam.model_runner.torch_engine.models.architecture import StepBatch
from moebeam.model_runner.torch_engine.weights.checkpoint_weights import CheckpointWeights
from moebeam.model_runner.torch_engine.weights.devices import Placement


class GroupedQuery:
    """The model; see `Architecture`."""

    rings: tuple[RingKind, ...] = ()

    def __init__(self, config: Any, weights: CheckpointWeights, placement: Placement) -> None:
        self.vocab_size = int(config.vocab_size)
        hidden_size, device = int(config.hidden_size), placement.device
        shape = (self.vocab_size, hidden_size)
        self._embedding = weights.get("model.embed_tokens.weight", shape).to(device)
        self._layers = [_Layer(config, weights, placement, i) for i in range(int(config.num_hidden_layers))]
        self._norm = RmsNorm(weights.get("model.norm.weight", (hidden_size,)).to(device), float(config.rms_norm_eps))
        is_tied = bool(config.tie_word_embeddings) and not weights.has("lm_head.weight")
        head = self._embedding if is_tied else weights.get("lm_head.weight", shape)
        self._head = make_linear([head], placement)
        width = _read_head_width(config)
        self._rotary = Rotary.from_config(config, config.rope_parameters, width, device)
        self.find_length_class = self._rotary.find_length_class
        kept = int(config.num_key_value_heads) * width
        self.kinds = (SegmentKind("heads", len(self._layers), 1, (("key", kept), ("value", kept))),)
        weights.check_all_used()

    def extend(self, batch: StepBatch, cache: Cache) -> Tensor:
        """See `Architecture.extend`."""
        rows = functional.embedding(batch.token_ids, self._embedding)  # (num_rows, hidden_size)
        cos, sin = (angle.to(rows.dtype) for angle in self._rotary(batch.positions, batch.lengths))
        for index, layer in enumerate(self._layers):
            rows = layer(rows, cos, sin, batch, index)
        return self._head(self._norm(rows[batch.logit_rows])).float()

    def flops(self, num_rows: int, num_logit_rows: int) -> float:
        """See `Architecture.flops`."""
        return num_rows * sum(layer.flops_per_row for layer in self._layers)


class _Layer:
    def __init__(self, config: Any, weights: CheckpointWeights, placement: Placement, index: int) -> None:
        name, hidden_size = f"model.layers.{index}", int(config.hidden_size)
        eps = float(config.rms_norm_eps)
        before = weights.get(f"{name}.input_layernorm.weight", (hidden_size,)).to(placement.device)
        after = weights.get(f"{name}.post_attention_layernorm.weight", (hidden_size,)).to(placement.device)
        self._before_norm, self._after_norm = RmsNorm(before, eps), RmsNorm(after, eps)
        self._attention = _Attention(config, weights, placement, f"{name}.self_attn")
        self._mlp: GatedMlp | _MoE
        if _is_dense(config, index):
            width = int(config.intermediate_size)
            self._mlp = GatedMlp(weights, placement, f"{name}.mlp", hidden_size=hidden_size, width=width)
        else:
            self._mlp = _MoE(config, weights, placement, f"{name}.mlp")
        self.flops_per_row = self._attention.flops_per_row + self._mlp.flops_per_row

    def __call__(self, rows: Tensor, cos: Tensor, sin: Tensor, batch: StepBatch, layer: int) -> Tensor:
        rows = rows + self._attention(self._before_norm(rows), cos, sin, batch, layer)
        return rows + self._mlp(self._after_norm(rows))


class _Attention:
    def __init__(self, config: Any, weights: CheckpointWeights, placement: Placement, name: str) -> None:
        self._width = width = _read_head_width(config)
        self._num_heads, self._num_kept = int(config.num_attention_heads), int(config.num_key_value_heads)
        hidden_size = int(config.hidden_size)
        heads = {"q": self._num_heads, "k": self._num_kept, "v": self._num_kept}
        parts = [weights.get(f"{name}.{part}_proj.weight", (num * width, hidden_size)) for part, num in heads.items()]
        has_bias = bool(getattr(config, "attention_bias", False))
        biases = [
            weights.get(f"{name}.{part}_proj.bias", (num * width,)) if has_bias else None for part, num in heads.items()
        ]
        self._parts = make_linear(parts, placement, biases)
        self._part_widths = [part.shape[0] for part in parts]
        out = weights.get(f"{name}.o_proj.weight", (hidden_size, self._num_heads * width))
        out_bias = weights.get(f"{name}.o_proj.bias", (hidden_size,)) if has_bias else None
        self._out = make_linear([out], placement, [out_bias])
        self._query_norm = self._key_norm = None
        if config.model_type == "qwen3_moe":
            eps = float(config.rms_norm_eps)
            self._query_norm = RmsNorm(weights.get(f"{name}.q_norm.weight", (width,)).to(placement.device), eps)
            self._key_norm = RmsNorm(weights.get(f"{name}.k_norm.weight", (width,)).to(placement.device), eps)
        self.flops_per_row = 2.0 * (sum(part.numel() for part in parts) + out.numel())

    def __call__(self, rows: Tensor, cos: Tensor, sin: Tensor, batch: StepBatch, layer: int) -> Tensor:
        num_rows, width = rows.shape[0], self._width
        query, key, value = self._parts(rows).split(self._part_widths, dim=-1)
        query = query.reshape(num_rows, self._num_heads, width)
        key = key.reshape(num_rows, self._num_kept, width)
        if self._query_norm is not None and self._key_norm is not None:
            query, key = self._query_norm(query), self._key_norm(key)
        query = rotate_halves(query, cos, sin) * width**-0.5
        write_entries(batch.reads[0], layer, "key", rotate_halves(key, cos, sin).flatten(1))
        write_entries(batch.reads[0], layer, "value", value)
        attended: list[Tensor] = []
        for head, group in enumerate(query.chunk(self._num_kept, dim=1)):  # (num_rows, heads of a group, width)
            merged = Merged(num_rows, group.shape[1], width, rows.device)
            columns = head * width, width
            read_shared_keys(
                batch.reads[0], layer, group, merged, key=Columns("key", *columns), value=Columns("value", *columns)
            )
            attended.append(merged.result())
        return self._out(torch.cat(attended, dim=1).to(rows.dtype).flatten(1))


class _MoE:
    def __init__(self, config: Any, weights: CheckpointWeights, placement: Placement, name: str) -> None:
        hidden_size = int(config.hidden_size)
        width = int(getattr(config, "moe_intermediate_size", None) or config.intermediate_size)
        num_experts = int(config.num_local_experts if config.model_type == "mixtral" else config.num_experts)
        self._num_chosen = int(config.num_experts_per_tok)
        self._is_normed = bool(getattr(config, "norm_topk_prob", True))
        self._router = weights.get_routing(f"{name}.gate.weight", (num_experts, hidden_size)).to(placement.device)
        self._experts = Experts(weights.experts(f"{name}.experts", num_experts, hidden_size, width), placement)
        self.flops_per_row = 6.0 * hidden_size * width * self._num_chosen + 2.0 * num_experts * hidden_size

    def __call__(self, rows: Tensor) -> Tensor:
        shares = functional.linear(rows, self._router).float().softmax(dim=-1)  # (num_rows, num_experts)
        weights, chosen = shares.topk(self._num_chosen, dim=-1)
        if self._is_normed:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return self._experts(rows, chosen, weights)


def _read_head_width(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _is_dense(config: Any, index: int) -> bool:
    """Whether a layer has a dense block: some of Qwen3-MoE's, none of Mixtral's."""
    step = int(getattr(config, "decoder_sparse_step", 1))
    return index in (getattr(config, "mlp_only_layers", None) or []) or (index + 1) % step != 0
