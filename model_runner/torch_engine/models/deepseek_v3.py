"""Models with multi-head latent attention: DeepSeek-V2, V3, R1 and V3.2, GLM-4.7-Flash.

Sources: the reports on DeepSeek-V2 (arXiv 2405.04434), V3 (arXiv 2412.19437, sections 2.1.1 and 2.1.2) and V3.2, whose
rows choose the entries that they read; settings as in `transformers`' `DeepseekV2Config`, `DeepseekV3Config`,
`DeepseekV32Config` and `Glm4MoeLiteConfig`.
"""

from collections.abc import Generator
from functools import partial
from typing import Any

from torch import Tensor
from torch.nn import functional

from moebeam.model_runner.torch_engine.layers.experts import GatedMlp
from moebeam.model_runner.torch_engine.layers.linear import make_linear
from moebeam.model_runner.torch_engine.layers.norms import RmsNorm
from moebeam.model_runner.torch_engine.layers.rotary import Rotary
from moebeam.model_runner.torch_engine.memory.cache import Cache, RingKind
from moebeam.model_runner.torch_engine.memory.segments import SegmentKind
from moebeam.model_runner.torch_engine.models.architecture import StepBatch, list_behind
from moebeam.model_runner.torch_engine.models.entry_choice import plan_choice
from moebeam.model_runner.torch_engine.models.latent_attention import LatentAttention, LatentReads, plan_latent_reads
from moebeam.model_runner.torch_engine.models.latent_expansion import Expansion
from moebeam.model_runner.torch_engine.models.mixtures import Mixture, make_mixture
from moebeam.model_runner.torch_engine.streaming.layers import make_layers
from moebeam.model_runner.torch_engine.weights.checkpoint_weights import CheckpointWeights
from moebeam.model_runner.torch_engine.weights.devices import Placement


class DeepseekV3:
    """The model; see `Architecture`."""

    rings: tuple[RingKind, ...] = ()

    def __init__(self, config: Any, weights: CheckpointWeights, placement: Placement) -> None:
        self.vocab_size = int(config.vocab_size)
        hidden_size = int(config.hidden_size)
        self.row_width = hidden_size
        shape = (self.vocab_size, hidden_size)
        self._embedding = weights.get("model.embed_tokens.weight", shape).to(placement.device)
        num_layers = int(config.num_hidden_layers)
        self.layers = make_layers(partial(_Layer, config), num_layers, weights, placement)
        self._norm = RmsNorm(weights.get("model.norm.weight", (hidden_size,)).to(placement.device), config.rms_norm_eps)
        is_tied = bool(config.tie_word_embeddings) and not weights.has("lm_head.weight")
        head = self._embedding if is_tied else weights.get("lm_head.weight", shape)
        self._head = make_linear([head], placement)
        rotated = int(config.qk_rope_head_dim)
        self._rotary = Rotary.from_config(config, config.rope_parameters, rotated, placement.device)
        self.find_length_class = self._rotary.find_length_class
        latent_width = int(config.kv_lora_rank) + rotated
        first = self.layers.described[0].attention
        indexer = first.indexer
        self._num_chosen = indexer.num_chosen if indexer is not None else None
        fields = (("latent", latent_width), *((("index", indexer.width),) if indexer is not None else ()))
        self.kinds = (SegmentKind("latent", num_layers, 1, fields, has_fresh_reads=indexer is None),)
        self._expansion = Expansion(num_layers, first, placement)
        # Of no shared experts some files hold empty tensors.
        unused = [r"\.shared_experts\."] if not config.n_shared_experts else []
        weights.check_all_used([*list_behind(config), *unused])

    def extend(self, batch: StepBatch, cache: Cache) -> Generator[None, "_Layer", Tensor]:
        """See `Architecture.extend`."""
        cos, sin = self._rotary(batch.positions, batch.lengths)  # (num_rows, num_pairs)
        rows = functional.embedding(batch.token_ids, self._embedding)  # (num_rows, hidden_size)
        expanded, absorbed = self._expansion.choose(batch.reads[0].wide, cache)
        choice = None if self._num_chosen is None else plan_choice(batch, self._num_chosen)
        reads = plan_latent_reads(batch.reads[0], batch.num_rows, expanded, absorbed, rows.device, choice)
        for _ in self.layers.described[:-1]:
            layer = yield
            rows = layer(rows, cos, sin, batch, reads)
        last_layer = yield
        if batch.last_rows is not None:
            last = batch.logit_reads[0]
            split = self._expansion.split(last.wide)
            choice = choice and choice.select_rows(last, batch.last_rows)
            reads = plan_latent_reads(last, int(batch.last_rows.shape[0]), *split, rows.device, choice)
        rows = last_layer(rows, cos, sin, batch, reads, batch.last_rows)
        self._expansion.forget_idle(expanded, cache)
        return rows

    def read_logits(self, rows: Tensor) -> Tensor:
        """See `Architecture.read_logits`."""
        return self._head(self._norm(rows)).float()

    def flops(self, num_rows: int, num_logit_rows: int) -> float:
        """See `Architecture.flops`."""
        *layers, last = self.layers.described
        before = sum(layer.flops_per_row for layer in layers) + last.attention.input_flops_per_row
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
        self._mlp: GatedMlp | Mixture
        if _is_dense(config, index):
            self._mlp = GatedMlp(
                weights, placement, f"{name}.mlp", hidden_size=hidden_size, width=int(config.intermediate_size)
            )
        else:
            self._mlp = make_mixture(config, weights, placement, f"{name}.mlp")
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


def _is_dense(config: Any, index: int) -> bool:
    if config.model_type in ("deepseek_v32", "glm4_moe_lite"):
        return config.mlp_layer_types[index] == "dense"
    return index < int(config.first_k_dense_replace)
