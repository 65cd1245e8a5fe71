"""What a model must compute at least: counted by hand, by torch, and for any batch."""

from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
)

from benchmarks.engine import bound as engine_bound
from benchmarks.engine.bound import ModelFlops, count_work, gemm_rate, model_flops
from tests.support.models.engine_models import VOCAB_SIZE, mixtral_config, qwen3_moe_config, v3_config, v4_config


def test_v3_flops_are_those_counted_by_hand() -> None:
    flops = model_flops(v3_config())
    attention = 6 * (8 + 2 * 6) + 8 * (10 + 2) + 10 * 2 * (4 + 3) + 2 * 3 * 8
    dense, experts = 3 * 8 * 16, 8 * 4 + 3 * (3 * 8 * 4)
    assert flops.per_token == 2 * (2 * attention + dense + experts) == 3024
    assert flops.per_logits == 2 * 8 * VOCAB_SIZE
    # Expanded, a pair costs 2 * 6 + 2 * 3; absorbed, 2 * 12 + 2 * 10.
    assert flops.attention(np.arange(3)).tolist() == [2 * 2 * 18, 2 * 2 * 36, 2 * 2 * 54]


def test_v3_attention_is_absorbed_where_that_is_cheaper() -> None:
    flops = model_flops(v3_config(kv_lora_rank=1, v_head_dim=30))
    assert flops.attention(np.arange(1)).tolist() == [2 * 2 * (2 * 3 + 2 * 1)]


def test_v4_attention_reads_window_and_entries_and_chooses_beyond_topk() -> None:
    flops = model_flops(v4_config())
    per_key = 4 * 2 * 8
    # Position 4, five tokens: a window of 4 in each layer, 2 entries of 2 tokens, 1 of 4.
    # Position 5: 3 entries of 2 tokens, of which the indexer chooses 2.
    chosen = 2 * (6 * 16 + 8 * 2) + 2 * 16 * 3
    assert flops.attention(np.asarray([0, 4, 5])).tolist() == [3 * per_key, 15 * per_key, 15 * per_key + chosen]
    assert (flops.num_unindexed_tokens, flops.per_indexer_key) == (5, 2 * 2 * 8 * 16)


@pytest.mark.parametrize("config", [v3_config(), v3_config(q_lora_rank=None), mixtral_config(), qwen3_moe_config()])
def test_one_token_costs_what_torch_counts(config: Any) -> None:
    flops = model_flops(config)
    assert counted_by_torch(config) == flops.per_token + flops.per_logits + flops.attention(np.arange(1))[0]


def test_one_token_of_v4_costs_what_torch_counts_beyond_what_nobody_needs() -> None:
    flops = model_flops(v4_config())
    needed = flops.per_token + flops.per_logits + flops.attention(np.arange(1))[0]
    unread_indexer = flops.per_indexer_key + 2 * (6 * 16 + 8 * 2)
    unread_scores = 2 * 8 * (4 - 2)  # a hash-routed token's other experts
    assert counted_by_torch(v4_config()) == needed + unread_indexer + unread_scores


def counted_by_torch(config: Any) -> int:
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager")
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model(torch.tensor([[5]]), use_cache=False)
    return counter.get_total_flops()


def test_sliding_window_bounds_the_keys_of_a_query() -> None:
    config = mixtral_config()
    config.sliding_window = 2
    assert model_flops(config).attention(np.arange(4)).tolist() == [2 * 4 * 4 * 2 * keys for keys in (1, 2, 2, 2)]


def test_unknown_model_type_is_refused() -> None:
    config = mixtral_config()
    config.model_type = "llama"
    with pytest.raises(ValueError, match="mixtral, qwen3_moe, found 'llama'"):
        model_flops(config)


rows = st.lists(st.tuples(st.lists(st.integers(3, 5), min_size=1, max_size=6), st.integers(1, 5)), min_size=1)


@given(rows)
def test_work_is_counted_once_a_tree_node_and_once_a_fed_token(batch: list[tuple[list[int], int]]) -> None:
    """Against the plainest count: a set of prefixes."""
    model = ModelFlops(
        per_token=3,
        per_logits=7,
        attention=lambda positions: (positions.astype(np.float64) + 1) ** 2,
        per_indexer_key=11,
        num_unindexed_tokens=6,
    )
    paths = [(prompt, len(prompt) + num_tokens - 1) for prompt, num_tokens in batch]
    nodes = {tuple(prompt[: i + 1]) for prompt, _ in paths for i in range(len(prompt))}
    indexed = {tuple(prompt[: i + 1]) for prompt, end in paths for i in range(len(prompt)) if end > 6}
    fed = [position for prompt, end in paths for position in range(len(prompt), end)]
    num_indexed_fed = sum(end - len(prompt) for prompt, end in paths if end > 6)

    found = count_work(model, [prompt for prompt, _ in batch], [num_tokens for _, num_tokens in batch])

    assert (found.num_tree_tokens, found.num_fed_tokens) == (len(nodes), len(fed))
    assert found.prefill == 3 * len(nodes) + 11 * len(indexed)
    assert found.decode == 3 * len(fed) + 11 * num_indexed_fed
    assert found.logits == 7 * sum(num_tokens for _, num_tokens in batch)
    assert found.attention == sum(len(node) ** 2 for node in nodes) + sum((place + 1) ** 2 for place in fed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_best_rate_names_its_path(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_bound, "_MEASURE_S", 0.002)
    found = gemm_rate(dtype, torch.device("cpu"), [(16, 8, 24), (32, 16, 8)])
    assert found.flops_per_s > 0
    assert found.path in ("linear", "bmm", "oneDNN", "oneDNN, prepacked")
    assert found.shape in ((16, 8, 24), (32, 16, 8))


def test_every_path_multiplies_alike() -> None:
    products = dict(engine_bound._products((16, 8, 24), torch.float32, torch.device("cpu")))
    expected = products["linear"]()
    for product in products.values():
        torch.testing.assert_close(product().reshape(16, 24), expected)


def test_a_torch_without_private_operators_still_has_a_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_bound, "_MEASURE_S", 0.002)
    monkeypatch.setattr(torch.ops, "mkldnn", ModuleType("mkldnn"))
    assert gemm_rate(torch.float32, torch.device("cpu"), [(16, 8, 24)]).path in ("linear", "bmm")
