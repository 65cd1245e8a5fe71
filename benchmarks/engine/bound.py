"""The least time that any engine could need for the work of `benchmarks.engine`: FLOPs over the best GEMM rate.

Counted are matrix products, a multiply and an add as 2: of every token of the prefix tree once, of every token fed
back, of logits where one is sampled, and of attention over the keys that a query may read. An expert counts where it
is chosen. Not counted is what no GEMM does: norms, softmax, rotation, gathering, sampling. Every layer is counted for
every token, although of a prompt's last layer only the token that is sampled from is needed.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from moebeam.model_runner.prefix_tree import common_prefix_lengths, num_tree_tokens, prefix_key, shared_spans

Counts = npt.NDArray[np.int64]
Flops = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class ModelFlops:
    """FLOPs of one model, all layers together.

    Attributes:
        per_token: of every token computed, attention's reading of keys and the logits left out.
        per_logits: of the logits of one position.
        attention: of the queries at positions, int64 (num_queries,), from 0 -> float64 (num_queries,).
        per_indexer_key: of a token's share of the indexer's keys, which nobody reads on a path of at most
            `num_unindexed_tokens`: its queries read all compressed entries anyway.
    """

    per_token: int
    per_logits: int
    attention: Callable[[Counts], Flops]
    per_indexer_key: int = 0
    num_unindexed_tokens: int = 0


@dataclass(frozen=True, slots=True)
class WorkFlops:
    """FLOPs of prompts and their answers, and what they were counted from."""

    num_tree_tokens: int
    num_fed_tokens: int
    prefill: float
    decode: float
    logits: float
    attention: float

    @property
    def total(self) -> float:
        return self.prefill + self.decode + self.logits + self.attention


@dataclass(frozen=True, slots=True)
class GemmRate:
    """The best rate found, on which path, and for which (rows, inner, columns)."""

    flops_per_s: float
    path: str
    shape: tuple[int, int, int]


def count_work(model: ModelFlops, prompts: Sequence[Sequence[int]], num_output_tokens: Sequence[int]) -> WorkFlops:
    """Count what prompts and their answers need.

    Args:
        num_output_tokens: tokens of each answer; the first comes out of the prefill, the last is not fed back. Equal
            prompts share their prefill, not their answers.
    """
    keys = [prefix_key("", np.asarray(prompt, dtype=np.int32)) for prompt in prompts]
    order = sorted(range(len(prompts)), key=keys.__getitem__)
    lengths = np.asarray([len(prompts[row]) for row in order], dtype=np.int64)
    # Positions on the path of a row: its prompt, and all of its answer but the last token.
    ends = lengths + np.maximum(np.asarray([num_output_tokens[row] for row in order], dtype=np.int64) - 1, 0)
    lcps = common_prefix_lengths([keys[row] for row in order])
    by_position = np.concatenate([[0.0], np.cumsum(model.attention(np.arange(int(ends.max(initial=0)))))])
    is_indexed = ends > model.num_unindexed_tokens

    num_tree = num_tree_tokens(lengths, lcps)
    num_fed = int((ends - lengths).sum())
    num_indexed_fed = int((ends - lengths)[is_indexed].sum())
    num_indexed_tree = 0
    attention = float((by_position[ends] - by_position[lengths]).sum())
    for span in shared_spans(lengths, lcps):
        attention += float(by_position[span.end_token] - by_position[span.start_token])
        if is_indexed[span.first_row : span.end_row].any():
            num_indexed_tree += span.num_tokens
    return WorkFlops(
        num_tree_tokens=num_tree,
        num_fed_tokens=num_fed,
        prefill=float(num_tree * model.per_token + num_indexed_tree * model.per_indexer_key),
        decode=float(num_fed * model.per_token + num_indexed_fed * model.per_indexer_key),
        logits=float(sum(num_output_tokens) * model.per_logits),
        attention=attention,
    )


def model_flops(config: Any) -> ModelFlops:
    """The FLOPs of a model from its `transformers` configuration.

    Raises:
        ValueError: its `model_type` is not one of those counted.
    """
    counters: dict[str, Callable[[Any], ModelFlops]] = {
        "deepseek_v3": _deepseek_v3,
        "deepseek_v4": _deepseek_v4,
        "mixtral": _mixtral,
        "qwen3_moe": _qwen3_moe,
    }
    if config.model_type not in counters:
        raise ValueError(f"expected a model_type of {', '.join(counters)}, found {config.model_type!r}")
    return counters[config.model_type](config)


def _deepseek_v3(config: Any) -> ModelFlops:
    """Latent attention in the cheaper of its two forms.

    Expanding a key costs `2 * kv_lora_rank * heads * (nope + v)`, and so does absorbing a query. Every token reads its
    own key, so that one of the two is paid for every token, and no mixture is cheaper than the form whose pair of
    query and key costs less, throughout: with the published sizes, every key expanded once and kept.
    """
    hidden, heads, latent = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
    nope, rope, value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    query = heads * (nope + rope)
    queries = hidden * query if config.q_lora_rank is None else config.q_lora_rank * (hidden + query)
    keys = hidden * (latent + rope) + latent * heads * (nope + value)
    attention = queries + keys + heads * value * hidden
    dense = 3 * hidden * config.intermediate_size
    expert = 3 * hidden * config.moe_intermediate_size
    experts = hidden * config.n_routed_experts + (config.num_experts_per_tok + config.n_shared_experts) * expert
    num_layers = config.num_hidden_layers
    num_dense = min(config.first_k_dense_replace, num_layers)
    expanded, absorbed = 2 * (nope + rope) + 2 * value, 2 * (latent + rope) + 2 * latent
    return ModelFlops(
        per_token=2 * (num_layers * attention + num_dense * dense + (num_layers - num_dense) * experts),
        per_logits=2 * hidden * config.vocab_size,
        attention=_window_attention(num_layers * heads * min(expanded, absorbed), window=None),
    )


def _deepseek_v4(config: Any) -> ModelFlops:
    """One key-value head; a window of keys, and compressed entries by the kind of the layer."""
    hidden, heads, width, streams = config.hidden_size, config.num_attention_heads, config.head_dim, config.hc_mult
    rates: dict[str, int] = config.compress_rates
    sparse, heavy = "compressed_sparse_attention", "heavily_compressed_attention"
    queries = config.q_lora_rank * (hidden + heads * width)
    outputs = config.o_lora_rank * (heads * width + config.o_groups * hidden)
    compressor = {sparse: 2 * hidden * 2 * width, heavy: 2 * hidden * width}
    # Before attention and before the experts: weights of the mixture, and the mixture of the streams themselves.
    connections = 2 * ((2 + streams) * streams * streams * hidden + streams * streams * hidden)
    expert = 3 * hidden * config.moe_intermediate_size
    router = {"moe": hidden * config.n_routed_experts, "hash_moe": hidden * config.num_experts_per_tok}
    per_token = 0
    for attention_kind, expert_kind in zip(config.layer_types, config.mlp_layer_types, strict=True):
        per_token += queries + hidden * width + outputs + compressor.get(attention_kind, 0) + connections
        per_token += router[expert_kind] + (config.num_experts_per_tok + config.n_shared_experts) * expert
    num_sparse = config.layer_types.count(sparse)
    num_heavy = config.layer_types.count(heavy)
    index_width = config.index_n_heads * config.index_head_dim
    index_query = 2 * (config.q_lora_rank * index_width + hidden * config.index_n_heads)
    index_key = 2 * 2 * hidden * 2 * config.index_head_dim

    def attention(positions: Counts) -> Flops:
        keys = len(config.layer_types) * np.minimum(positions + 1, config.sliding_window)
        # An entry may be read from the last token of its own window on.
        sparse_entries = (positions + 1) // rates[sparse]
        keys += num_sparse * np.minimum(sparse_entries, config.index_topk)
        keys += num_heavy * ((positions + 1) // rates[heavy])
        is_chosen = sparse_entries > config.index_topk
        indexer = num_sparse * np.where(is_chosen, index_query + 2.0 * index_width * sparse_entries, 0.0)
        return 4.0 * heads * width * keys + indexer

    return ModelFlops(
        per_token=2 * per_token,
        # The streams are collapsed once more before the head.
        per_logits=2 * hidden * (config.vocab_size + streams * streams),
        attention=attention,
        per_indexer_key=num_sparse * index_key,
        num_unindexed_tokens=(config.index_topk + 1) * rates[sparse] - 1,
    )


def _mixtral(config: Any) -> ModelFlops:
    expert = 3 * config.hidden_size * config.intermediate_size
    experts = config.hidden_size * config.num_local_experts + config.num_experts_per_tok * expert
    return _grouped_query(config, mlps=[experts] * config.num_hidden_layers)


def _qwen3_moe(config: Any) -> ModelFlops:
    dense = 3 * config.hidden_size * config.intermediate_size
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    experts = config.hidden_size * config.num_experts + config.num_experts_per_tok * expert
    is_sparse = [
        layer not in config.mlp_only_layers and (layer + 1) % config.decoder_sparse_step == 0
        for layer in range(config.num_hidden_layers)
    ]
    return _grouped_query(config, mlps=[experts if sparse else dense for sparse in is_sparse])


def _grouped_query(config: Any, *, mlps: Sequence[int]) -> ModelFlops:
    hidden, heads = config.hidden_size, config.num_attention_heads
    width = getattr(config, "head_dim", None) or hidden // heads
    attention = hidden * width * (2 * heads + 2 * config.num_key_value_heads)
    return ModelFlops(
        per_token=2 * (len(mlps) * attention + sum(mlps)),
        per_logits=2 * hidden * config.vocab_size,
        attention=_window_attention(len(mlps) * heads * 4 * width, window=getattr(config, "sliding_window", None)),
    )


def _window_attention(per_key: int, *, window: int | None) -> Callable[[Counts], Flops]:
    def attention(positions: Counts) -> Flops:
        keys = positions + 1 if window is None else np.minimum(positions + 1, window)
        return float(per_key) * keys

    return attention


_SHAPES = ((1024, 1024, 1024), (2048, 2048, 2048), (4096, 512, 2048), (4096, 2048, 512))
_ACCELERATOR_SHAPES = ((4096, 4096, 4096), (8192, 8192, 8192))
_MEASURE_S = 0.15
_NUM_BATCHES = 8
_Product = Callable[[], torch.Tensor]


def gemm_rate(
    dtype: torch.dtype, device: torch.device, shapes: Sequence[tuple[int, int, int]] | None = None
) -> GemmRate:
    """The best rate of a matrix product here and now, over several shapes and every path that torch has.

    Takes two to five seconds on a CPU. The best of many runs counts, so that a busy neighbour matters little.
    """
    best = GemmRate(0.0, "", (0, 0, 0))
    for shape in shapes or (_SHAPES if device.type == "cpu" else _ACCELERATOR_SHAPES):
        for path, product in _products(shape, dtype, device):
            rate = 2.0 * np.prod(shape, dtype=np.float64) / _least_s(product, device)
            if rate > best.flops_per_s:
                best = replace(best, flops_per_s=float(rate), path=path, shape=shape)
    return best


def _products(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> Iterator[tuple[str, _Product]]:
    """The paths that can multiply `(rows, inner) x (columns, inner)`, ready to run."""
    rows, inner, columns = shape
    left = torch.randn(rows, inner, device=device).to(dtype)
    right = torch.randn(columns, inner, device=device).to(dtype)
    yield "linear", lambda: F.linear(left, right)
    if rows % _NUM_BATCHES == 0:
        parts = left.view(_NUM_BATCHES, -1, inner)
        weights = right.t().repeat(_NUM_BATCHES, 1, 1)
        yield "bmm", lambda: torch.bmm(parts, weights)
    if device.type == "cpu" and torch.backends.mkldnn.is_available():
        yield from _onednn_products(left, right).items()


def _onednn_products(left: torch.Tensor, right: torch.Tensor) -> dict[str, _Product]:
    """By private operators, as far as this build of torch has them and they take these tensors."""
    found: dict[str, _Product] = {}
    try:
        multiply = torch.ops.mkldnn._linear_pointwise
        multiply(left, right, None, "none", [], "")
        found["oneDNN"] = lambda: multiply(left, right, None, "none", [], "")
        packed = torch.ops.mkldnn._reorder_linear_weight(right, left.shape[0])
        multiply(left, packed, None, "none", [], "")
        found["oneDNN, prepacked"] = lambda: multiply(left, packed, None, "none", [], "")
    except (AttributeError, RuntimeError, TypeError):
        return found
    return found


def _least_s(product: _Product, device: torch.device) -> float:
    """Seconds of the fastest run of a product, after one that does not count."""
    with torch.inference_mode():
        _run_to_end(product, device)
        least_s = float("inf")
        started = time.perf_counter()
        while time.perf_counter() - started < _MEASURE_S:
            before = time.perf_counter()
            _run_to_end(product, device)
            least_s = min(least_s, time.perf_counter() - before)
    return least_s


def _run_to_end(product: _Product, device: torch.device) -> None:
    product()
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
