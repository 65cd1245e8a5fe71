"""Tiny random checkpoints in the layouts that the engine knows, and `transformers` as the oracle of their answers."""

import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DeepseekV4Config,
    DeepseekV4ForCausalLM,
    DeepseekV32Config,
    DeepseekV32ForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    Glm4MoeLiteConfig,
    Glm4MoeLiteForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from moebeam.model_runner.torch_engine.engine import TorchEngine
from moebeam.model_runner.torch_engine.schedule.sequences import Finished, Prompt
from moebeam.schemas.records import Sampling

VOCAB_SIZE = 97
UNSAID_TOKEN = 96
"""A token that no answer holds, and none of the prompts that `random_tokens` makes."""

MAX_TIE = 1e-4
"""Logits closer than this are equal as far as float32 can tell: both tokens are greedy. Logits spread over about 5, and
those of engine and oracle differ by up to 1e-5."""

_SPARSE, _HEAVY, _SLIDING = "compressed_sparse_attention", "heavily_compressed_attention", "sliding_attention"
_EMBEDDING = {"vocab_size": VOCAB_SIZE, "max_position_embeddings": 8192, "initializer_range": 0.2}
_V3 = {
    **_EMBEDDING,
    "hidden_size": 48,
    "intermediate_size": 64,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
}
_V4 = {
    **_EMBEDDING,
    "hidden_size": 32,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "q_lora_rank": 16,
    "num_experts_per_tok": 2,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "partial_rotary_factor": 0.5,
    "layer_types": [_SLIDING, _SPARSE, _HEAVY, _SPARSE],
    "mlp_layer_types": ["hash_moe", "moe", "moe", "moe"],
    "compress_rates": {_SPARSE: 4, _HEAVY: 8},
    "hc_mult": 2,
    "hc_sinkhorn_iters": 4,
    "sliding_window": 16,
    "o_groups": 2,
    "o_lora_rank": 16,
    "index_n_heads": 4,
    "index_head_dim": 16,
    "index_topk": 4096,
    "num_nextn_predict_layers": 0,
    "pad_token_id": 0,
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 2048,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}
_GROUPED = {
    **_EMBEDDING,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
}

# With few heads the indexer's relu leaves many entries a score of exactly 0, and `transformers` contradicts itself:
# of equals its forward pass with a cache and the one without choose different entries. 16 heads leave no such ties.
_CHOOSING = {"index_n_heads": 16}

_MODELS: dict[str, tuple[type, type, dict[str, Any]]] = {
    "deepseek_v2": (
        DeepseekV2Config,
        DeepseekV2ForCausalLM,
        _V3 | {"q_lora_rank": None, "n_group": None, "topk_group": None, "n_shared_experts": 2},
    ),
    "deepseek_v32": (DeepseekV32Config, DeepseekV32ForCausalLM, _V3 | _CHOOSING | {"index_head_dim": 16}),
    "glm4_moe": (
        Glm4MoeConfig,
        Glm4MoeForCausalLM,
        _GROUPED
        | {"head_dim": 16, "moe_intermediate_size": 24, "n_routed_experts": 8, "n_shared_experts": 1}
        | {"first_k_dense_replace": 1, "use_qk_norm": True, "attention_bias": True},
    ),
    "glm4_moe_lite": (Glm4MoeLiteConfig, Glm4MoeLiteForCausalLM, _V3 | {"rms_norm_eps": 1e-5}),
    "gpt_oss": (
        GptOssConfig,
        GptOssForCausalLM,
        _GROUPED
        | {"head_dim": 16, "num_local_experts": 4, "sliding_window": 8}
        | {"rope_parameters": _YARN | {"truncate": False}},
    ),
    "olmoe": (OlmoeConfig, OlmoeForCausalLM, _GROUPED | {"num_experts": 8, "pad_token_id": 0}),
    "qwen2_moe": (
        Qwen2MoeConfig,
        Qwen2MoeForCausalLM,
        _GROUPED
        | {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 40, "num_experts": 8}
        | {"mlp_only_layers": [1]},
    ),
    "deepseek_v3": (DeepseekV3Config, DeepseekV3ForCausalLM, _V3),
    "deepseek_v4": (DeepseekV4Config, DeepseekV4ForCausalLM, _V4),
    "mixtral": (MixtralConfig, MixtralForCausalLM, _GROUPED | {"num_local_experts": 4, "sliding_window": None}),
    "qwen3_moe": (
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
        _GROUPED
        | {"moe_intermediate_size": 24, "head_dim": 16, "num_experts": 8, "mlp_only_layers": [1]}
        | {"norm_topk_prob": True},
    ),
}

LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "v3": ("deepseek_v3", {}),
    "v3 with plain queries, tied": ("deepseek_v3", {"q_lora_rank": None, "tie_word_embeddings": True}),
    "v3 with yarn": ("deepseek_v3", {"rope_parameters": _YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}}),
    "v3 with four groups, wide values": (
        "deepseek_v3",
        {"n_group": 4, "topk_group": 2, "num_experts_per_tok": 3, "v_head_dim": 24, "norm_topk_prob": False},
    ),
    "v3 all dense": ("deepseek_v3", {"first_k_dense_replace": 3, "rope_interleave": False}),
    "v4": ("deepseek_v4", {}),
    "v4 choosing entries": ("deepseek_v4", _CHOOSING | {"index_topk": 3}),
    "v4 sliding only": (
        "deepseek_v4",
        {"layer_types": [_SLIDING] * 2, "mlp_layer_types": ["hash_moe", "moe"], "num_hidden_layers": 2},
    ),
    "v4 without sliding layers": (
        "deepseek_v4",
        _CHOOSING
        | {
            "layer_types": [_SPARSE, _HEAVY],
            "mlp_layer_types": ["moe", "hash_moe"],
            "num_hidden_layers": 2,
            "index_topk": 5,
            "sliding_window": 4,
        },
    ),
    "v4 with yarn": (
        "deepseek_v4",
        {"rope_parameters": {"main": _YARN, "compress": _YARN | {"rope_theta": 160_000.0}}},
    ),
    "v4 at real rates": (
        "deepseek_v4",
        {
            "layer_types": [_SPARSE, _HEAVY],
            "mlp_layer_types": ["hash_moe", "moe"],
            "num_hidden_layers": 2,
            "compress_rates": {_SPARSE: 4, _HEAVY: 128},
            "sliding_window": 128,
        },
    ),
    "mixtral": ("mixtral", {}),
    "qwen3_moe": ("qwen3_moe", {}),
    "qwen2_moe": ("qwen2_moe", {}),
    "olmoe": ("olmoe", {}),
    "olmoe, clipped, normed shares": ("olmoe", {"clip_qkv": 0.8, "norm_topk_prob": True}),
    "glm4_moe": ("glm4_moe", {}),
    "glm4_moe in groups, without norms": (
        "glm4_moe",
        {"n_group": 2, "topk_group": 1, "use_qk_norm": False, "attention_bias": False},
    ),
    "v2 lite": (
        "deepseek_v2",
        {"rope_parameters": _YARN | {"mscale": 0.707, "mscale_all_dim": 0.707}},
    ),
    "v2 in groups": (
        "deepseek_v2",
        {"n_group": 4, "topk_group": 2, "topk_method": "group_limited_greedy", "q_lora_rank": 24}
        | {"routed_scaling_factor": 2.0, "num_experts_per_tok": 3},
    ),
    "glm4_moe_lite": ("glm4_moe_lite", {}),
    "gpt_oss": ("gpt_oss", {}),
    "gpt_oss all sliding": ("gpt_oss", {"layer_types": ["sliding_attention"] * 3, "attention_bias": False}),
    "v3.2 choosing entries": ("deepseek_v32", {"index_topk": 3}),
    "v3.2 choosing many entries": ("deepseek_v32", {"index_topk": 20}),
}


def save_layout(folder: Path, name: str, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """Write a random checkpoint of a layout, and give its model; settings may be changed."""
    model_type, own = LAYOUTS[name]
    make_config, make_model, common = _MODELS[model_type]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model: PreTrainedModel = make_model(make_config(**(common | own | changes))).eval()
        generator = torch.Generator().manual_seed(seed)
        # What transformers leaves at zero, at one, or at one expert for all.
        for tensor_name, tensor in model.state_dict().items():
            if tensor_name.endswith("tid2eid"):
                num_experts, num_chosen = model.config.n_routed_experts, tensor.shape[1]
                tensor.copy_(torch.rand(tensor.shape[0], num_experts).topk(num_chosen, dim=-1).indices)
            elif tensor_name.endswith("e_score_correction_bias"):
                tensor.normal_(0, 0.1)
            elif tensor_name.endswith(("sinks", "position_bias")):
                tensor.normal_()
            elif tensor_name.endswith("norm.weight"):
                tensor.uniform_(0.5, 1.5, generator=generator)
            elif tensor_name.endswith((".bias", "_proj_bias")):
                tensor.normal_(0, 0.3)
            elif tensor_name.endswith("embed_tokens.weight"):
                tensor.normal_(0, model.config.initializer_range)  # that of the padding token ties all scores
            elif tensor_name == "lm_head.weight" and not model.config.tie_word_embeddings:
                tensor[UNSAID_TOKEN] = 0.0
    model.save_pretrained(folder)
    return model


@dataclass(slots=True)
class Oracle:
    """Tells whether answers are `transformers`' own: float32, one prompt at a time, no cache.

    One forward pass over a prompt and its answer gives the logits of every token of the answer; the answer is greedy
    if each token is the likeliest there. Answers that were right once are not computed again.
    """

    model: PreTrainedModel
    _right: set[tuple[tuple[int, ...], tuple[int, ...]]] = field(default_factory=set)

    @torch.inference_mode()
    def logits(self, token_ids: Sequence[int], num_last: int) -> Tensor:
        """float32, shape (num_last, vocab_size)."""
        found = self.model(torch.tensor([list(token_ids)]), use_cache=False, logits_to_keep=num_last)
        return found.logits[0]

    def check(self, token_ids: Sequence[int], answer: Sequence[int]) -> None:
        """Fail unless `answer` continues the prompt greedily."""
        known = tuple(token_ids), tuple(answer)
        if known in self._right:
            return
        logits = self.logits([*token_ids, *answer[:-1]], len(answer))
        chosen = logits.gather(1, torch.tensor(answer).unsqueeze(1)).squeeze(1)
        worse = (logits.amax(dim=1) - chosen > MAX_TIE).nonzero().flatten().tolist()
        if worse:
            at = worse[0]
            raise AssertionError(
                f"after {len(token_ids)} prompt tokens {list(token_ids)[:12]}... token {at} of the answer: expected "
                f"{int(logits[at].argmax())}, found {answer[at]} (of logit {float(chosen[at]):.6f}, "
                f"the best is {float(logits[at].max()):.6f})"
            )
        self._right.add(known)


@dataclass
class Layout:
    """A saved checkpoint, its model in `transformers`, and the engine that loaded it."""

    path: Path
    model: PreTrainedModel

    @cached_property
    def oracle(self) -> Oracle:
        return Oracle(self.model)

    @cached_property
    def _loaded(self) -> TorchEngine:
        return load_engine(self.path)

    def engine(self, **options: int) -> TorchEngine:
        """A new engine around weights that are loaded once."""
        loaded = self._loaded
        return TorchEngine(loaded.model, loaded.placement, **({"context_length": loaded.context_length} | options))


def load_engine(path: Path, **options: Any) -> TorchEngine:
    """The engine of a checkpoint, in float32 on the CPU unless said otherwise."""
    return TorchEngine.load(str(path), **({"dtype": "float32", "device": "cpu"} | options))


def with_tensors(layout: Layout, folder: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    """A copy of a checkpoint, its tensors changed in place by a function."""
    path = Path(shutil.copytree(layout.path, folder / "changed"))
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def make_prompt(token_ids: Sequence[int], max_tokens: int, prompt_id: str = "0", **values: Any) -> Prompt:
    """A greedy prompt."""
    sampling = values.pop("sampling", None) or Sampling(max_tokens)
    return Prompt(prompt_id, np.array(token_ids, dtype=np.int32), max_tokens, sampling, **values)


def make_prompts(prompts: Sequence[Sequence[int]], max_tokens: int) -> list[Prompt]:
    """Greedy prompts, named by their place."""
    return [make_prompt(token_ids, max_tokens, str(i)) for i, token_ids in enumerate(prompts)]


def run_all(engine: TorchEngine, prompts: Sequence[Prompt]) -> dict[str, Finished]:
    """What becomes of each prompt, by its id; exactly one result each."""
    found: dict[str, Finished] = {}
    for finished in engine.run(prompts):
        assert finished.prompt_id not in found
        found[finished.prompt_id] = finished
    assert set(found) == {prompt.prompt_id for prompt in prompts}
    return found


def greedy(engine: TorchEngine, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[list[int]]:
    """The engine's greedy answers, in the order of the prompts."""
    found = run_all(engine, make_prompts(prompts, max_tokens))
    for finished in found.values():
        assert finished.error is None
        assert (finished.finish_reason, len(finished.token_ids)) == ("length", max_tokens)
    return [found[str(i)].token_ids for i in range(len(prompts))]


def random_tokens(seed: int, num_tokens: int) -> list[int]:
    """Tokens of the vocabulary but `UNSAID_TOKEN`, the same for the same seed."""
    rng = random.Random(seed)
    return [rng.randrange(UNSAID_TOKEN) for _ in range(num_tokens)]


OpenLayout = Callable[[str], Layout]
