"""Mixture-of-experts models with grouped-query attention: Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE, GLM-4.5 and gpt-oss.

Sources: arXiv 2401.04088 (Mixtral), 2407.10671 (Qwen2), 2505.09388 (Qwen3), 2409.02060 (OLMoE), 2508.06471 (GLM-4.5),
2508.10925 (gpt-oss); settings as in `transformers`. A token keeps a key and a value for each key-value head, each read
by a group of query heads. Layers with a sliding window keep those of the last tokens in a ring, others in segments.
"""

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from moebeam.model_runner.torch_engine.layers.attention import Merged
from moebeam.model_runner.torch_engine.layers.experts import GatedMlp
from moebeam.model_runner.torch_engine.layers.linear import make_linear
from moebeam.model_runner.torch_engine.layers.norms import RmsNorm
from moebeam.model_runner.torch_engine.layers.rotary import Rotary, rotate_leading_halves
from moebeam.model_runner.torch_engine.memory.cache import Cache, Ring, RingKind
from moebeam.model_runner.torch_engine.memory.reading import read_shared_keys, write_entries
from moebeam.model_runner.torch_engine.memory.segments import Columns, SegmentKind
from moebeam.model_runner.torch_engine.memory.windows import HeadGroup, WindowPlan, plan_window
from moebeam.model_runner.torch_engine.models.architecture import StepBatch, list_behind
from moebeam.model_runner.torch_engine.models.mixtures import Mixture, make_mixture
from moebeam.model_runner.torch_engine.streaming.layers import make_layers
from moebeam.model_runner.torch_engine.weights.checkpoint_weights import CheckpointWeights
from moebeam.model_runner.torch_engine.weights.devices import Placement


@dataclass(frozen=True, slots=True)
class _Traits:
    """What the models differ in.

    Attributes:
        normed: what of queries and keys is normed: each head, or all heads together.
        clip: bound of queries, keys and values in both directions.
        has_sinks: whether each head has a key of learned score and no value.
        norm_dtype: of the weights of norms; None means that of all weights.
    """

    has_input_bias: bool
    has_output_bias: bool
    normed: Literal["", "heads", "all"] = ""
    clip: float | None = None
    has_sinks: bool = False
    norm_dtype: torch.dtype | None = None


def _read_traits(config: Any) -> _Traits:
    has_bias = bool(getattr(config, "attention_bias", False))
    match str(config.model_type):
        case "qwen2_moe":
            return _Traits(bool(config.qkv_bias), False)
        case "qwen3_moe":
            return _Traits(has_bias, has_bias, normed="heads")
        case "olmoe":
            clip = None if config.clip_qkv is None else float(config.clip_qkv)
            return _Traits(has_bias, has_bias, normed="all", clip=clip)
        case "glm4_moe":
            return _Traits(has_bias, False, normed="heads" if config.use_qk_norm else "")
        case "gpt_oss":
            return _Traits(has_bias, has_bias, has_sinks=True, norm_dtype=torch.float32)
        case _:
            return _Traits(has_bias, has_bias)


class GroupedQuery:
    """The model; see `Architecture`."""

    def __init__(self, config: Any, weights: CheckpointWeights, placement: Placement) -> None:
        self.vocab_size = int(config.vocab_size)
        hidden_size, device = int(config.hidden_size), placement.device
        self.row_width = hidden_size
        shape = (self.vocab_size, hidden_size)
        traits = _read_traits(config)
        self._embedding = weights.get("model.embed_tokens.weight", shape).to(device)
        num_layers = int(config.num_hidden_layers)
        is_sliding = [_is_sliding(config, index) for index in range(num_layers)]
        # A layer's number among those of its type is its index in their segments or their ring.
        numbers = [is_sliding[:index].count(sliding) for index, sliding in enumerate(is_sliding)]
        self.layers = make_layers(
            lambda found, place, index: _Layer(config, found, place, traits, index, numbers[index]),
            num_layers,
            weights,
            placement,
        )
        norm = weights.get("model.norm.weight", (hidden_size,), traits.norm_dtype)
        self._norm = RmsNorm(norm.to(device), float(config.rms_norm_eps))
        is_tied = bool(config.tie_word_embeddings) and not weights.has("lm_head.weight")
        head = self._embedding if is_tied else weights.get("lm_head.weight", shape)
        self._head = make_linear([head], placement)
        width = _read_head_width(config)
        rotated = width
        if config.model_type == "glm4_moe":
            rotated = int(width * float(config.rope_parameters.get("partial_rotary_factor", 1.0)))
        self._rotary = Rotary.from_config(config, config.rope_parameters, rotated, device)
        self.find_length_class = self._rotary.find_length_class
        kept, num_sliding = int(config.num_key_value_heads) * width, sum(is_sliding)
        self.kinds: tuple[SegmentKind, ...] = ()
        if num_layers > num_sliding:
            self.kinds = (SegmentKind("heads", num_layers - num_sliding, 1, (("key", kept), ("value", kept))),)
        self.rings: tuple[RingKind, ...] = ()
        if num_sliding:
            self.rings = (RingKind("window", num_sliding, int(config.sliding_window), 2 * kept),)
        weights.check_all_used(list_behind(config) if config.model_type == "glm4_moe" else [])

    def extend(self, batch: StepBatch, cache: Cache) -> Generator[None, "_Layer", Tensor]:
        """See `Architecture.extend`."""
        rows = functional.embedding(batch.token_ids, self._embedding)  # (num_rows, hidden_size)
        cos, sin = (angle.to(rows.dtype) for angle in self._rotary(batch.positions, batch.lengths))
        window = None
        if cache.rings:
            window = cache.rings[0], plan_window(batch.step.spans, [], cache.rings[0], rows.device)
        for _ in self.layers.described:
            layer = yield
            rows = layer(rows, cos, sin, batch, window)
        return rows[batch.logit_rows]

    def read_logits(self, rows: Tensor) -> Tensor:
        """See `Architecture.read_logits`."""
        return self._head(self._norm(rows)).float()

    def flops(self, num_rows: int, num_logit_rows: int) -> float:
        """See `Architecture.flops`."""
        return num_rows * sum(layer.flops_per_row for layer in self.layers.described)


class _Layer:
    def __init__(
        self, config: Any, weights: CheckpointWeights, placement: Placement, traits: _Traits, index: int, number: int
    ) -> None:
        name, hidden_size = f"model.layers.{index}", int(config.hidden_size)
        eps = float(config.rms_norm_eps)
        before = weights.get(f"{name}.input_layernorm.weight", (hidden_size,), traits.norm_dtype)
        after = weights.get(f"{name}.post_attention_layernorm.weight", (hidden_size,), traits.norm_dtype)
        self._before_norm, self._after_norm = (RmsNorm(norm.to(placement.device), eps) for norm in (before, after))
        self._attention = _Attention(config, weights, placement, traits, index, number)
        self._mlp: GatedMlp | Mixture
        if _is_dense(config, index):
            width = int(config.intermediate_size)
            self._mlp = GatedMlp(weights, placement, f"{name}.mlp", hidden_size=hidden_size, width=width)
        else:
            self._mlp = make_mixture(config, weights, placement, f"{name}.mlp")
        self.flops_per_row = self._attention.flops_per_row + self._mlp.flops_per_row

    def __call__(
        self, rows: Tensor, cos: Tensor, sin: Tensor, batch: StepBatch, window: tuple[Ring, WindowPlan] | None
    ) -> Tensor:
        rows = rows + self._attention(self._before_norm(rows), cos, sin, batch, window)
        return rows + self._mlp(self._after_norm(rows))


class _Attention:
    def __init__(
        self, config: Any, weights: CheckpointWeights, placement: Placement, traits: _Traits, index: int, number: int
    ) -> None:
        name, device = f"model.layers.{index}.self_attn", placement.device
        self._number = number
        self._is_sliding = _is_sliding(config, index)
        self._width = width = _read_head_width(config)
        self._num_heads, self._num_kept = int(config.num_attention_heads), int(config.num_key_value_heads)
        hidden_size, eps = int(config.hidden_size), float(config.rms_norm_eps)
        heads = {"q": self._num_heads, "k": self._num_kept, "v": self._num_kept}
        parts = [
            weights.get_matrix(f"{name}.{part}_proj.weight", (num * width, hidden_size)) for part, num in heads.items()
        ]
        biases: list[Tensor | None] = [None] * len(heads)
        if traits.has_input_bias:
            biases = [weights.get(f"{name}.{part}_proj.bias", (num * width,)) for part, num in heads.items()]
        self._parts = make_linear(parts, placement, biases)
        self._part_widths = [part.shape[0] for part in parts]
        out = weights.get_matrix(f"{name}.o_proj.weight", (hidden_size, self._num_heads * width))
        out_bias = weights.get(f"{name}.o_proj.bias", (hidden_size,)) if traits.has_output_bias else None
        self._out = make_linear([out], placement, [out_bias])
        self._are_heads_normed = traits.normed == "heads"
        self._norms: list[RmsNorm] = []
        if traits.normed:
            widths = (width, width) if self._are_heads_normed else self._part_widths[:2]
            found = [weights.get(f"{name}.{part}_norm.weight", (num,)) for part, num in zip("qk", widths, strict=True)]
            self._norms = [RmsNorm(norm.to(device), eps) for norm in found]
        self._clip = traits.clip
        self._sinks: Sequence[Tensor | None] = [None] * self._num_kept
        if traits.has_sinks:
            sinks = weights.get(f"{name}.sinks", (self._num_heads,), torch.float32).to(device)
            self._sinks = sinks.chunk(self._num_kept)
        self.flops_per_row = 2.0 * (sum(part.numel() for part in parts) + out.numel())

    def __call__(
        self, rows: Tensor, cos: Tensor, sin: Tensor, batch: StepBatch, window: tuple[Ring, WindowPlan] | None
    ) -> Tensor:
        num_rows, width = rows.shape[0], self._width
        query, key, value = self._project(rows)
        query = rotate_leading_halves(query.unflatten(1, (self._num_heads, width)), cos, sin) * width**-0.5
        key = rotate_leading_halves(key.unflatten(1, (self._num_kept, width)), cos, sin).flatten(1)
        groups: list[HeadGroup] = []
        for head, part in enumerate(query.chunk(self._num_kept, dim=1)):  # (num_rows, heads of a group, width)
            sinks, first = self._sinks[head], head * width
            merged = Merged(num_rows, part.shape[1], width, rows.device)
            if sinks is not None:
                merged = Merged.from_sinks(sinks, num_rows, width)
            groups.append(HeadGroup(part, merged, first, self._num_kept * width + first, width))
        if self._is_sliding and window is not None:
            ring, plan = window
            plan.read(ring, self._number, torch.cat((key, value), dim=-1), groups)
        else:
            self._read_segments(key, value, groups, batch)
        attended = torch.cat([group.merged.result() for group in groups], dim=1)
        return self._out(attended.to(rows.dtype).flatten(1))

    def _project(self, rows: Tensor) -> list[Tensor]:
        """Queries, keys and values of all heads, before they are rotated: each of shape (num_rows, heads * width)."""
        parts = list(self._parts(rows).split(self._part_widths, dim=-1))
        for index, norm in enumerate(self._norms):
            if self._are_heads_normed:
                parts[index] = norm(parts[index].unflatten(1, (-1, self._width))).flatten(1)
            else:
                parts[index] = norm(parts[index])
        if self._clip is not None:
            parts = [part.clamp(-self._clip, self._clip) for part in parts]
        return parts

    def _read_segments(self, key: Tensor, value: Tensor, groups: Sequence[HeadGroup], batch: StepBatch) -> None:
        write_entries(batch.reads[0], self._number, "key", key)
        write_entries(batch.reads[0], self._number, "value", value)
        for head, group in enumerate(groups):
            columns = head * self._width, self._width
            read_shared_keys(
                batch.reads[0],
                self._number,
                group.query,
                group.merged,
                key=Columns("key", *columns),
                value=Columns("value", *columns),
            )


def _read_head_width(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _is_sliding(config: Any, index: int) -> bool:
    """Whether a layer reads the last tokens alone: some of gpt-oss's. Of others a window is as long as the context."""
    return config.model_type == "gpt_oss" and config.layer_types[index] == "sliding_attention"


def _is_dense(config: Any, index: int) -> bool:
    """Whether a layer has a dense block: the first of GLM-4.5, some of Qwen's, none of the others."""
    if config.model_type == "glm4_moe":
        return index < int(config.first_k_dense_replace)
    step = int(getattr(config, "decoder_sparse_step", 1))
    return index in (getattr(config, "mlp_only_layers", None) or []) or (index + 1) % step != 0
