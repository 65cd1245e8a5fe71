"""DeepSeek-V3 and R1: multi-head latent attention and sigmoid-gated experts.

Source: the DeepSeek-V3 report (arXiv 2412.19437), sections 2.1.1 and 2.1.2; settings as in `transformers`'
`DeepseekV3Config`.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from moebeam.model_runner.torch_engine.layers.experts import Experts, GatedMlp
from moebeam.model_runner.torch_engine.layers.linear import make_linear
from moebeam.model_runner.torch_engine.layers.norms import RmsNorm
from moebeam.model_runner.torch_engine.layers.rotary import Rotary
from moebeam.model_runner.torch_engine.memory.cache import Cache, RingKind
from moebeam.model_runner.torch_engine.memory.segments import SegmentKind
from moebeam.model_runner.torch_engine.models.architecture import StepBatch
from moebeam.model_runner.torch_engine.models.latent_attention import LatentAttention, LatentReads, plan_latent_reads
from moebeam.model_runner.torch_engine.models.latent_expansion import Expansion
from moebeam.model_runner.torch_engine.weights.checkpoint_weights import CheckpointWeights
from moebeam.model_runner.torch_engine.weights.devices import Placement


class DeepseekV3:
    """The model; see `Architecture`."""

    rings: tuple[RingKind, ...] = ()

    def __init__(self, config: Any, weights: CheckpointWeights, placement: Placement) -> None:
        self.vocab_size = int(config.vocab_size)
        hidden_size = int(config.hidden_size)
        shape = (self.vocab_size, hidden_size)
        self._embedding = weights.get("model.embed_tokens.weight", shape).to(placement.device)
        self._layers = [_Layer(config, weights, placement, i) for i in range(int(config.num_hidden_layers))]
        self._norm = RmsNorm(weights.get("model.norm.weight", (hidden_size,)).to(placement.device), config.rms_norm_eps)
        is_tied = bool(config.tie_word_embeddings) and not weights.has("lm_head.weight")
        head = self._embedding if is_tied else weights.get("lm_head.weight", shape)
        self._head = make_linear([head], placement)
        rotated = int(config.qk_rope_head_dim)
        self._rotary = Rotary.from_config(config, config.rope_parameters, rotated, placement.device)
        self.find_length_class = self._rotary.find_length_class
        latent_width = int(config.kv_lora_rank) + rotated
        self.kinds = (SegmentKind("latent", len(self._layers), 1, (("latent", latent_width),), True),)
        self._expansion = Expansion(len(self._layers), self._layers[0].attention, placement)
        # Layers behind the last predict further tokens; of no shared experts some files hold empty tensors.
        num_predicting = max(1, int(getattr(config, "num_nextn_predict_layers", None) or 0))
        behind = "|".join(str(len(self._layers) + index) for index in range(num_predicting))
        unused = [r"\.shared_experts\."] if not config.n_shared_experts else []
        weights.check_all_used([rf"^model\.layers\.({behind})\.", *unused])

    def extend(self, batch: StepBatch, cache: Cache) -> Tensor:
        """See `Architecture.extend`."""
        cos, sin = self._rotary(batch.positions, batch.lengths)  # (num_rows, num_pairs)
        rows = functional.embedding(batch.token_ids, self._embedding)  # (num_rows, hidden_size)
        expanded, absorbed = self._expansion.choose(batch.reads[0].wide, cache)
        reads = plan_latent_reads(batch.reads[0], batch.num_rows, expanded, absorbed, rows.device)
        for layer in self._layers[:-1]:
            rows = layer(rows, cos, sin, batch, reads)
        if batch.last_rows is not None:
            last = batch.logit_reads[0]
            split = self._expansion.split(last.wide)
            reads = plan_latent_reads(last, int(batch.last_rows.shape[0]), *split, rows.device)
        rows = self._layers[-1](rows, cos, sin, batch, reads, batch.last_rows)
        self._expansion.forget_idle(expanded, cache)
        return self._head(self._norm(rows)).float()

    def flops(self, num_rows: int, num_logit_rows: int) -> float:
        """See `Architecture.flops`."""
        last = self._layers[-1]
        before = sum(layer.flops_per_row for layer in self._layers[:-1]) + last.attention.input_flops_per_row
        return num_rows * before + num_logit_rows * (last.flops_per_row - last.attention.input_flops_per_row)


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
        self.attention = LatentAttention(config, weights, placement, f"{name}.self_attn")
        self._mlp: GatedMlp | _MoE
        if index < int(config.first_k_dense_replace):
            self._mlp = GatedMlp(
                weights, placement, f"{name}.mlp", hidden_size=hidden_size, width=int(config.intermediate_size)
            )
        else:
            self._mlp = _MoE(config, weights, placement, f"{name}.mlp")
        self.flops_per_row = self.attention.flops_per_row + self._mlp.flops_per_row

    def __call__(
        self, rows: Tensor, cos: Tensor, sin: Tensor, batch: StepBatch, reads: LatentReads, chosen: Tensor | None = None
    ) -> Tensor:
        """Write every row's entries to the cache; return only the `chosen` rows (all by default)."""
        normed = self._input_norm(rows)
        rows = rows if chosen is None else rows[chosen]
        attended = self.attention(normed, cos, sin, batch, reads, self._index, chosen)
        if not rows.shape[0]:
            return rows
        rows = rows + attended
        return rows + self._mlp(self._after_norm(rows))


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
        self._router = weights.get_routing(f"{name}.gate.weight", gate_shape, torch.float32).to(placement.device)
        bias = weights.get_routing(f"{name}.gate.e_score_correction_bias", (self._num_experts,), torch.float32)
        self._bias = bias.to(placement.device)
        experts = weights.experts(f"{name}.experts", self._num_experts, hidden_size, width)
        self._experts = Experts(experts, placement)
        num_shared = int(config.n_shared_experts)
        self._shared: GatedMlp | None = None
        if num_shared:
            self._shared = GatedMlp(
                weights, placement, f"{name}.shared_experts", hidden_size=hidden_size, width=width * num_shared
            )
        self.flops_per_row = 6.0 * hidden_size * width * self._num_chosen + 2.0 * math.prod(gate_shape)
        self.flops_per_row += self._shared.flops_per_row if self._shared is not None else 0.0

    def __call__(self, rows: Tensor) -> Tensor:
        chosen, weights = self._route(rows)
        made = self._experts(rows, chosen, weights)
        return made if self._shared is None else made + self._shared(rows)

    def _route(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Choose each row's experts and their weights; the bias affects only the choice."""
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
