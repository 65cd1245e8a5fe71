"""The engine benchmark's prompts and reference checkpoints."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
)

from benchmarks.engine import work as engine_work
from benchmarks.engine.bound import ModelFlops, count_work
from tests.support.models.engine_models import PROMPTS, VOCAB_SIZE, v3_config


@pytest.mark.parametrize(
    ("name", "num_prompts", "num_tokens", "num_tree_tokens"),
    [
        ("shared", 128, 720, 512 + 32 * 192 + 128 * 16),
        ("unshared", 32, 720, 32 * 720),
        ("unshared_64", 96, 64, 96 * 64),
        ("chat", 96, 460, 400 + 96 * 60),
        ("short_cache", 256, 784, 64 * 768 + 256 * 16),
        ("ten_times", 1280, 720, 10 * (512 + 32 * 192 + 128 * 16)),
    ],
)
def test_prompt_sets_have_the_tree_they_promise(
    name: engine_work.PromptSet, num_prompts: int, num_tokens: int, num_tree_tokens: int
) -> None:
    prompts = engine_work.make_prompts(name)
    assert [len(prompt) for prompt in prompts] == [num_tokens] * num_prompts
    assert prompts != sorted(prompts)
    # Two branches may begin alike by chance.
    assert 0 <= num_tree_tokens - tree_tokens_of(prompts) <= 4
    assert engine_work.make_prompts(name) == prompts
    assert min(map(min, prompts)) >= engine_work.NUM_SPECIAL_TOKENS
    assert max(map(max, prompts)) < engine_work.VOCAB_SIZE


def tree_tokens_of(prompts: list[list[int]]) -> int:
    flops = ModelFlops(1, 1, attention=lambda positions: np.zeros(positions.shape))
    return count_work(flops, prompts, [1] * len(prompts)).num_tree_tokens


def test_random_trees_share_at_many_depths() -> None:
    prompts = engine_work.make_prompts("random_tree")
    num_tokens = sum(map(len, prompts))
    assert 150 < len(prompts) < 400
    assert tree_tokens_of(prompts) < 0.6 * num_tokens
    ordered = sorted(prompts)
    assert any(after[: len(before)] == before for before, after in pairwise(ordered))


def test_foreign_prompts_begin_as_no_prompt_does() -> None:
    prompts = [[token, 5, 5, 5, 5] for token in range(60)]
    found = engine_work.foreign_prompts(prompts, vocab_size=VOCAB_SIZE)
    assert [len(prompt) for prompt in found] == [5] * 4
    assert {tuple(prompt[:4]) for prompt in found}.isdisjoint({tuple(prompt[:4]) for prompt in prompts})


def test_prompts_survive_their_file(tmp_path: Path) -> None:
    engine_work.write_prompts(tmp_path / "new" / "prompts.json", PROMPTS)
    assert engine_work.read_prompts(tmp_path / "new" / "prompts.json") == PROMPTS


@pytest.mark.parametrize("content", ["[]", "{}", "[[1], []]", "[[1], [2.5]]", "[[1], [true]]", '[[1], "2"]'])
def test_file_that_holds_no_prompts_is_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"prompts\.json: expected"):
        engine_work.read_prompts(path)


def test_reference_checkpoints_have_the_sizes_of_the_issue() -> None:
    sizes = {}
    for layout in engine_work.LAYOUTS:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(engine_work.reference_config(layout))
        sizes[layout] = round(sum(parameter.numel() for parameter in model.parameters()) / 1e6)
    assert sizes == {"v3": 120, "v4": 121}


def test_v3_checkpoint_says_how_it_routes(tmp_path: Path) -> None:
    engine_work.save_checkpoint(v3_config(), tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    assert (settings["topk_method"], settings["scoring_func"]) == ("noaux_tc", "sigmoid")
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert model.model.layers[1].mlp.gate.e_score_correction_bias.unique().numel() == 4


def test_v4_checkpoint_routes_a_token_to_different_experts(checkpoint: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    table = model.model.layers[0].mlp.gate.tid2eid
    assert table.shape == (VOCAB_SIZE, 2)
    assert bool((table[:, 0] != table[:, 1]).all())
    assert table.unique().tolist() == [0, 1, 2, 3]
