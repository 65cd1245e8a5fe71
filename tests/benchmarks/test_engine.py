"""The engine benchmark at tiny size: what is counted, compared and handed on. No time is asserted."""

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
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
    DeepseekV3Config,
    DeepseekV4Config,
    MixtralConfig,
    Qwen3MoeConfig,
)

from benchmarks import engine, engine_bound, engine_contenders, engine_work
from benchmarks.engine_bound import ModelFlops, count_work, gemm_rate, model_flops
from benchmarks.engine_contenders import ContenderFailed, Run, Work
from moebeam.model_runner.torch_engine.schedule.sequences import Finished, Prompt
from moebeam.schemas.errors import EngineFailed

VOCAB_SIZE = 61
PROMPTS = [[7, 8, 9, 10], [7, 8, 9, 11], [20, 21], [7, 8, 9, 10, 12, 13]]
NUM_TREE_TOKENS = 4 + 1 + 2 + 2


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def v3_config(**settings: Any) -> DeepseekV3Config:
    return DeepseekV3Config(
        **{
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 8,
            "intermediate_size": 16,
            "moe_intermediate_size": 4,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "q_lora_rank": 6,
            "kv_lora_rank": 10,
            "qk_rope_head_dim": 2,
            "qk_nope_head_dim": 4,
            "v_head_dim": 3,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "num_mtp_layers": 0,
            "initializer_range": 0.3,
            "eos_token_id": 1,
            **settings,
        }
    )


def v4_config(**settings: Any) -> DeepseekV4Config:
    return DeepseekV4Config(
        **{
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 8,
            "moe_intermediate_size": 4,
            "num_hidden_layers": 3,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "q_lora_rank": 6,
            "num_experts_per_tok": 2,
            "n_routed_experts": 4,
            "partial_rotary_factor": 0.5,
            "layer_types": ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
            "mlp_layer_types": ["hash_moe", "moe", "moe"],
            "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
            "hc_mult": 2,
            "hc_sinkhorn_iters": 2,
            "sliding_window": 4,
            "o_groups": 2,
            "o_lora_rank": 3,
            "index_n_heads": 2,
            "index_head_dim": 8,
            "index_topk": 2,
            "initializer_range": 0.3,
            "eos_token_id": 1,
            **settings,
        }
    )


def mixtral_config() -> MixtralConfig:
    return MixtralConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=8,
        intermediate_size=6,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
    )


def qwen3_moe_config() -> Qwen3MoeConfig:
    return Qwen3MoeConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=8,
        intermediate_size=10,
        moe_intermediate_size=6,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=6,
        num_experts=4,
        num_experts_per_tok=2,
        mlp_only_layers=[1],
    )


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("v4")
    engine_work.save_checkpoint(v4_config(), folder)
    return str(folder)


@pytest.fixture
def work(checkpoint: str) -> Work:
    return Work(checkpoint=checkpoint, prompts=PROMPTS, warm_up=[[30, 31]], max_tokens=5, num_threads=1)


# The bound.


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


# The work.


@pytest.mark.parametrize(
    ("name", "num_prompts", "num_tokens", "num_tree_tokens"),
    [
        ("shared", 128, 720, 512 + 32 * 192 + 128 * 16),
        ("unshared", 32, 720, 32 * 720),
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


# The contenders.


@dataclass
class StandInCounters:
    """Counters that go on from run to run, as the engine's do."""

    num_tree_tokens: int = 0
    num_computed_prefill_tokens: int = 0
    num_decode_tokens: int = 0
    peak_cache_bytes: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: {"extend": 0.0})


class StandInEngine:
    """Says the prompt's length, then counts on; answers backwards, and fails for a prompt of 99."""

    def __init__(self) -> None:
        self.counters = StandInCounters()
        self.settings: dict[str, Any] = {}

    @classmethod
    def load(cls, path: str, **settings: Any) -> "StandInEngine":
        loaded = cls()
        loaded.settings = {"path": path, **settings}
        return loaded

    def run(self, prompts: Iterable[Prompt]) -> Iterator[Finished]:
        for prompt in reversed(list(prompts)):
            self.counters.num_computed_prefill_tokens += prompt.num_tokens
            self.counters.seconds["extend"] += 0.5
            self.counters.peak_cache_bytes = max(self.counters.peak_cache_bytes, 1000)
            if prompt.token_ids[0] == 99:
                yield Finished(prompt.prompt_id, [], "error", error=EngineFailed("no"))
            elif prompt.token_ids[0] != 98:
                answer = [prompt.num_tokens + place for place in range(prompt.max_tokens)]
                yield Finished(prompt.prompt_id, answer, "length")


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("moebeam.model_runner.torch_engine.engine")
    module.TorchEngine = StandInEngine  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "moebeam.model_runner.torch_engine.engine", module)


@pytest.mark.usefixtures("stand_in")
def test_torch_run_counts_itself_and_not_its_warm_up(work: Work) -> None:
    run = engine_contenders.run_torch(work)
    assert run.output_tokens == [[len(prompt) + place for place in range(5)] for prompt in PROMPTS]
    assert run.computed_prefill_tokens == sum(map(len, PROMPTS))
    assert run.counters["seconds"] == {"extend": 0.5 * len(PROMPTS)}
    assert run.counters["peak_cache_bytes"] == 1000
    assert run.peak_rss_bytes > 10 << 20


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize(("token", "message"), [(99, "prompt 1: EngineFailed: no"), (98, "none for prompts .1.")])
def test_prompt_without_an_answer_stops_the_run(token: int, message: str, work: Work) -> None:
    broken = Work(work.checkpoint, [[5], [token], [6]], work.warm_up, max_tokens=2)
    with pytest.raises(ContenderFailed, match=message):
        engine_contenders.run_torch(broken)


def test_transformers_says_in_batches_what_it_says_alone(work: Work) -> None:
    run = engine_contenders.run_transformers(work)
    model = AutoModelForCausalLM.from_pretrained(work.checkpoint, dtype=torch.float32)
    for prompt, answer in zip(PROMPTS, run.output_tokens, strict=True):
        input_ids = torch.tensor([prompt])
        for token_id in answer:
            logits = model(input_ids).logits[0, -1]
            assert int(logits.argmax()) == token_id
            input_ids = torch.cat([input_ids, torch.tensor([[token_id]])], dim=1)
    assert {len(answer) for answer in run.output_tokens} == {5}
    assert len({tuple(answer) for answer in run.output_tokens}) > 1
    assert run.computed_prefill_tokens == sum(map(len, PROMPTS))


def test_end_token_ends_an_answer_only_where_it_is_named(checkpoint: str, tmp_path: Path) -> None:
    """The checkpoint's own end token is one that the answers hold."""
    free = engine_contenders.run_transformers(Work(checkpoint, PROMPTS, [[30, 31]], max_tokens=5))
    end = free.output_tokens[0][2]
    engine_work.save_checkpoint(v4_config(eos_token_id=end), tmp_path)
    assert engine.eos_token_ids(str(tmp_path)) == (end,)
    ignored = engine_contenders.run_transformers(Work(str(tmp_path), PROMPTS, [[30, 31]], max_tokens=5))
    ended = engine_contenders.run_transformers(
        Work(str(tmp_path), PROMPTS, [[30, 31]], max_tokens=5, stop_token_ids=(end,))
    )
    assert ignored.output_tokens == free.output_tokens
    assert ended.output_tokens == [
        answer[: answer.index(end) + 1] if end in answer else answer for answer in free.output_tokens
    ]


def test_batches_hold_prompts_of_one_length() -> None:
    assert list(engine_contenders.equal_batches([3, 2, 3, 3, 2], 2)) == [[0, 2], [3], [1, 4]]


FAKE_VLLM = """
import os
__version__ = "0.0"

class SamplingParams:
    def __init__(self, **settings):
        self.settings = settings

class Output:
    def __init__(self, token_ids, num_cached_tokens):
        self.token_ids, self.num_cached_tokens, self.outputs = token_ids, num_cached_tokens, [self]

class LLM:
    def __init__(self, **settings):
        assert settings["skip_tokenizer_init"] and settings["enable_prefix_caching"], settings
        assert (settings["max_model_len"], settings["max_num_seqs"]) == (11, 7), settings
        self.is_cache_clean = True

    def generate(self, prompts, params, use_tqdm):
        assert params.settings["ignore_eos"] and params.settings["stop_token_ids"] == [1]
        assert self.is_cache_clean
        self.is_cache_clean = False
        num_tokens = params.settings["max_tokens"]
        print("noise on stdout", os.environ["VLLM_CPU_KVCACHE_SPACE"])
        return [Output([len(prompt["prompt_token_ids"])] * num_tokens, 1) for prompt in prompts]

    def reset_prefix_cache(self):
        self.is_cache_clean = True
"""


@pytest.fixture
def vllm_work(work: Work, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Work:
    (tmp_path / "vllm.py").write_text(FAKE_VLLM)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return Work(work.checkpoint, PROMPTS, [[30, 31]], max_tokens=5, stop_token_ids=(1,), batch_size=7)


def test_vllm_answers_from_an_interpreter_of_its_own(vllm_work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_MLA_DISABLE", "1")
    run = engine_contenders.run_vllm(vllm_work, sys.executable)
    assert run.output_tokens == [[len(prompt)] * 5 for prompt in PROMPTS]
    assert run.computed_prefill_tokens == sum(map(len, PROMPTS)) - len(PROMPTS)
    assert run.versions["vllm"] == "0.0"
    assert run.counters["environment"]["VLLM_MLA_DISABLE"] == "1"
    assert run.peak_rss_bytes > 1 << 20


def test_failing_vllm_is_quoted(vllm_work: Work, tmp_path: Path) -> None:
    (tmp_path / "vllm.py").write_text("raise SystemExit('no AVX512')")
    with pytest.raises(ContenderFailed, match="no AVX512"):
        engine_contenders.run_vllm(vllm_work, sys.executable)
    with pytest.raises(ContenderFailed, match="/nowhere/python: expected an interpreter"):
        engine_contenders.run_vllm(vllm_work, "/nowhere/python")


def test_cache_of_vllm_is_given_in_whole_gib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    bare = {"checkpoint": "c", "prompts": PROMPTS, "warm_up": PROMPTS, "max_tokens": 1}
    space = "VLLM_CPU_KVCACHE_SPACE"
    assert engine_contenders.vllm_environment(Work(**bare))[space] == "2"
    assert engine_contenders.vllm_environment(Work(**bare, max_cache_bytes=3 << 30))[space] == "3"
    with pytest.raises(ContenderFailed, match="whole GiB"):
        engine_contenders.vllm_environment(Work(**bare, max_cache_bytes=(1 << 30) + 1))


# The command.


@pytest.fixture
def quick_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_bound, "_MEASURE_S", 0.001)
    monkeypatch.setattr(engine_bound, "_SHAPES", ((16, 8, 24),))


@pytest.mark.usefixtures("stand_in", "quick_rate")
@pytest.mark.parametrize("order", engine.ORDERS)
def test_result_holds_answers_in_input_order_and_the_bound(
    order: str, checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine_work.write_prompts(tmp_path / "prompts.json", PROMPTS)
    command = ["--engine", "torch", "--checkpoint", checkpoint, "--prompts", str(tmp_path / "prompts.json")]
    command += ["--max-tokens", "3", "--dtype", "float32", "--ignore-eos", "--json", str(tmp_path / "out.json")]
    assert engine.main([*command, "--order", order, "--threads", "1"]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["output_tokens"] == [[len(prompt) + place for place in range(3)] for prompt in PROMPTS]
    assert found["tree_tokens"] == NUM_TREE_TOKENS
    assert found["computed_prefill_tokens"] == sum(map(len, PROMPTS))
    assert found["flops"]["num_fed_tokens"] == 2 * len(PROMPTS)
    assert found["bound_s"] == pytest.approx(found["flops"]["total"] / found["gemm"]["flops_per_s"])
    assert found["time_over_bound"] == pytest.approx(found["wall_s"] / found["bound_s"])
    assert found["rows_per_s"] == pytest.approx(len(PROMPTS) / found["wall_s"])
    assert found["peak_rss_bytes"] > 0
    assert "9 in the tree, 16 in prompts; computed / tree 1.778" in capsys.readouterr().out


def test_order_of_feeding_is_as_given_or_by_tokens() -> None:
    assert engine.feeding_order(PROMPTS, "given") == [0, 1, 2, 3]
    assert engine.feeding_order(PROMPTS, "sorted") == [0, 3, 1, 2]


def test_answers_of_no_token_stop_the_benchmark(work: Work, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Run(1.0, 1.0, [[1], [], [1], [1]], 1, 1, {})
    monkeypatch.setattr(engine, "run_transformers", lambda work: run)
    options = engine.Options("transformers", "c", Path("p"), 1, "float32", True, None, 0, 0, "auto", 0, "given")
    with pytest.raises(ContenderFailed, match="expected 4 answers, found 4, of which 1 hold no token"):
        engine.run_contender(options, work)


def result(name: str, rows_per_s: float, output_tokens: list[list[int]], digest: str = "a") -> dict[str, Any]:
    return {
        "engine": name,
        "rows_per_s": rows_per_s,
        "computed_prefill_tokens": 9,
        "time_over_bound": 2.0,
        "prompts_sha256": digest,
        "output_tokens": output_tokens,
    }


@pytest.mark.parametrize(
    ("answers", "verdict"),
    [
        ([[1, 2, 3], [4]], "2.50 times the rows/s; identical tokens"),
        ([[1, 2, 4], [4]], "2.50 times the rows/s; 1 of 2 rows differ, the first after 2 equal tokens"),
        ([[1, 2, 4], []], "2.50 times the rows/s; 2 of 2 rows differ, the first after 0 equal tokens"),
    ],
)
def test_results_are_compared_row_by_row(
    answers: list[list[int]], verdict: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [tmp_path / "first.json", tmp_path / "second.json"]
    paths[0].write_text(json.dumps(result("torch", 5.0, [[1, 2, 3], [4]])))
    paths[1].write_text(json.dumps(result("vllm", 2.0, answers)))
    assert engine.main(["--compare", *map(str, paths)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == verdict


def test_results_of_other_prompts_are_not_compared() -> None:
    with pytest.raises(ValueError, match="same prompts"):
        engine.compare_lines(result("torch", 5.0, [[1]]), result("vllm", 2.0, [[1]], digest="b"))


def test_command_makes_checkpoints_and_prompts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(engine, "reference_config", lambda layout: {"v3": v3_config, "v4": v4_config}[layout]())
    folder, file = tmp_path / "v3", tmp_path / "prompts.json"
    assert engine.main(["--make", "v3", str(folder), "--make-prompts", "unshared", str(file)]) == 0
    assert json.loads((folder / "config.json").read_text())["model_type"] == "deepseek_v3"
    assert len(engine_work.read_prompts(file)) == 32
    assert "32 prompts, 23,040 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ([], "expected --engine, --make"),
        (["--make", "v5", "x"], "expected one of v3, v4, found 'v5'"),
        (["--make-prompts", "big", "x"], "found 'big'"),
        (["--engine", "torch"], "needs --checkpoint and --prompts"),
        (["--engine", "torch", "--checkpoint", "c", "--prompts", "p", "--max-tokens", "0"], "at least 1"),
        (["--engine", "vllm", "--checkpoint", "c", "--prompts", "p", "--device", "cpu"], "--device"),
    ],
)
def test_wrong_commands_are_refused(command: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        engine.main(command)
    assert message in capsys.readouterr().err


def test_failure_is_told_in_one_line(checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--engine", "torch", "--checkpoint", checkpoint, "--prompts", str(tmp_path / "none.json")]
    assert engine.main(command) == 1
    assert "none.json" in capsys.readouterr().err
