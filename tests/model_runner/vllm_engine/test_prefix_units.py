"""What a cache of whole units can reach, against a cache of blocks that is asked prompt by prompt."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moebeam.model_runner.prefix_tree import common_prefix_lengths, prefix_key
from moebeam.model_runner.vllm_engine.prefix_account import Ranks
from moebeam.model_runner.vllm_engine.prefix_units import (
    PrefixUnit,
    describe_reach,
    measure_reach,
    predict_unit,
    reachable_hits,
)

prompts = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=24), min_size=1, max_size=12)


def simulate_blocks(prompts: Sequence[Sequence[int]], size: int, num_dropped: int = 0) -> list[int]:
    """Tokens that a cache of blocks serves, as vLLM's does: whole blocks from the start, never the last token."""
    cached: set[tuple[int, ...]] = set()
    hits: list[int] = []
    for prompt in prompts:
        ends = range(size, len(prompt), size)
        found = 0
        while found < len(ends) and tuple(prompt[: ends[found]]) in cached:
            found += 1
        hits.append(max(0, found - num_dropped) * size)
        cached |= {tuple(prompt[:end]) for end in range(size, len(prompt) + 1, size)}
    return hits


@given(prompts, st.integers(1, 9), st.integers(0, 1))
def test_reachable_share_is_what_a_cache_of_blocks_serves(found: list[list[int]], size: int, num_dropped: int) -> None:
    keys = sorted(prefix_key("", np.array(prompt, dtype=np.int32)) for prompt in found)
    ordered = sorted(found)
    lengths = [len(prompt) for prompt in ordered]
    unit = PrefixUnit(size, num_dropped)
    hits = reachable_hits(lengths, common_prefix_lengths(keys), unit)
    assert hits.tolist() == simulate_blocks(ordered, size, num_dropped)
    assert measure_reach(lengths, common_prefix_lengths(keys), unit).num_reachable == sum(hits)


@pytest.mark.parametrize(
    ("model_type", "block_size", "device", "expected"),
    [
        ("deepseek_v4", 128, "npu", 16_384),
        ("deepseek_v4", 0, "npu:1", 4_096),
        ("deepseek_v4", 64, "cuda", 256),
        ("deepseek_v3", 0, "cuda", 16),
        ("deepseek_v3", 64, "auto", 64),
        ("qwen3_moe", 0, "cpu", 128),
    ],
)
def test_unit_follows_from_model_block_and_device(model_type: str, block_size: int, device: str, expected: int) -> None:
    config = {"model_type": model_type, "compress_ratios": [0, 4, 128]}
    assert predict_unit(config, block_size=block_size, device=device).num_tokens == expected


def test_what_cannot_hit_is_told_with_a_remedy() -> None:
    unit = predict_unit({"model_type": "deepseek_v4"}, block_size=128, device="npu")
    lengths, lcps = [5_000] * 4, [0, 4_200, 4_200, 4_200]
    told = describe_reach(measure_reach(lengths, lcps, unit), unit)
    assert "can reach 0.0% of h* 63.0%" in told
    assert "prefixes of 4,200 tokens cannot hit" in told
    assert told.endswith("raise the shared part to 16,384 tokens or use block_size = 32")
    small = predict_unit({"model_type": "deepseek_v4"}, block_size=32, device="npu")
    assert describe_reach(measure_reach(lengths, lcps, small), small).endswith("can reach 61.4% of h* 63.0%")


def test_group_stays_at_its_rank_while_that_has_room() -> None:
    ranks = Ranks(2, 2)
    assert [ranks.take(("", group)) for group in (b"a", b"a", b"b", b"b", b"b")][:4] == [0, 0, 1, 1]
    ranks.give_back([0, 0])
    assert ranks.take(("", b"c")) == 0
    assert Ranks(1, 2).take(("", b"a")) is None
