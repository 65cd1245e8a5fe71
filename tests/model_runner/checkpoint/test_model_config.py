"""Every value of a `config.json` that an engine reads is checked in one place, and its error says what is needed."""

import json
from pathlib import Path
from typing import Any

import pytest

from moebeam.model_runner.checkpoint.config_rules import LIMITS, RULES
from moebeam.model_runner.checkpoint.model_config import ModelConfig, check_limits, read_model_config
from moebeam.model_runner.torch_engine.models.architecture import ARCHITECTURES
from moebeam.model_runner.torch_engine.weights.tensor_names import RENAMINGS
from moebeam.schemas.errors import EngineLoadError

_SIZES = {
    "vocab_size": 97,
    "num_hidden_layers": 3,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 80,
    "rope_theta": 10_000.0,
}
_LATENT = {**_SIZES, "hidden_size": 48, "num_attention_heads": 4, "n_routed_experts": 8, "qk_rope_head_dim": 8}
_GROUPED = {**_SIZES, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}

CONFIGS: dict[str, dict[str, Any]] = {
    "deepseek_v3": {
        "vocab_size": 97,
        "hidden_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 80,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "n_group": 2,
        "topk_group": 1,
        "qk_rope_head_dim": 8,
        "rope_theta": 10_000.0,
    },
    **dict.fromkeys(("deepseek_v2", "deepseek_v32", "glm4_moe_lite"), _LATENT),
    "glm4_moe": {**_GROUPED, "n_routed_experts": 8, "head_dim": 16},
    "gpt_oss": {
        **_GROUPED,
        "num_local_experts": 4,
        "rope_scaling": {"rope_type": "yarn", "factor": 1.0, "original_max_position_embeddings": 80},
    },
    "olmoe": {**_GROUPED, "num_experts": 8},
    "qwen2_moe": {**_GROUPED, "num_experts": 8},
    "mixtral": {
        "vocab_size": 97,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts_per_tok": 2,
        "num_local_experts": 4,
        "max_position_embeddings": 80,
        "rope_theta": 10_000.0,
    },
    "qwen3_moe": {
        "vocab_size": 97,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "max_position_embeddings": 80,
        "rope_theta": 10_000.0,
    },
    "deepseek_v4": {
        "vocab_size": 97,
        "hidden_size": 32,
        "head_dim": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_experts_per_tok": 2,
        "n_routed_experts": 4,
        "o_groups": 2,
        "max_position_embeddings": 80,
    },
}


def read(folder: Path, model_type: str, max_model_len: int = 0, **changes: Any) -> ModelConfig:
    values = {"model_type": model_type, **CONFIGS.get(model_type, {}), **changes}
    (folder / "config.json").write_text(json.dumps(values))
    config = read_model_config(str(folder), max_model_len)
    check_limits(config)
    return config


def rope(rope_type: str, **values: Any) -> dict[str, Any]:
    return {"rope_scaling": {"rope_type": rope_type, **values}}


FACTORS = [1.0, 1.0, 1.0, 1.0]


def test_every_architecture_has_rules_limits_and_names() -> None:
    assert RULES.keys() == LIMITS.keys() == ARCHITECTURES.keys() == RENAMINGS.keys() == CONFIGS.keys()


@pytest.mark.parametrize("bad", [None, 0, -1, 2.5, "8", True, [], float("nan")], ids=str)
@pytest.mark.parametrize("model_type", CONFIGS)
def test_no_size_may_be_null_zero_or_no_number(model_type: str, bad: object, tmp_path: Path) -> None:
    for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_experts_per_tok", "max_position_embeddings"):
        with pytest.raises(EngineLoadError) as error:
            read(tmp_path, model_type, **{key: bad})
        expected = f"{tmp_path}/config.json: {key}: expected a whole number of at least 1"
        assert str(error.value).startswith(expected)
        assert str(error.value).endswith(f"found {json.dumps(bad)}")


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        ("deepseek_v3", {"n_group": 0}, "n_group: expected a whole number of at least 1, found 0"),
        ("deepseek_v3", {"n_group": 3}, r"n_group: expected a divisor of n_routed_experts \(8\), found 3"),
        ("deepseek_v3", {"n_group": 8}, r"n_group: expected at most n_routed_experts / 2 \(4\).*found 8"),
        ("deepseek_v3", {"topk_group": 3}, r"topk_group: expected at most n_group \(2\), found 3"),
        ("deepseek_v3", {"topk_group": None}, "topk_group: expected a whole number of at least 1, found null"),
        ("deepseek_v3", {"num_experts_per_tok": 9}, r"num_experts_per_tok: expected at most n_routed_experts \(8\)"),
        ("deepseek_v3", {"num_experts_per_tok": 5}, "num_experts_per_tok: expected at most the experts of topk_group"),
        ("deepseek_v3", {"n_shared_experts": -1}, "n_shared_experts: expected a whole number of at least 0, found -1"),
        (
            "deepseek_v3",
            {"num_key_value_heads": 2},
            "num_key_value_heads: expected num_attention_heads .* found 2",
        ),
        ("deepseek_v3", {"qk_rope_head_dim": 7}, "qk_rope_head_dim: expected an even whole number .* found 7"),
        ("deepseek_v3", {"kv_lora_rank": None}, "kv_lora_rank: expected a whole number .* found null"),
        ("deepseek_v3", {"first_k_dense_replace": None}, "first_k_dense_replace: expected .* found null"),
        ("deepseek_v3", {"routed_scaling_factor": 0}, "routed_scaling_factor: expected a number above 0, found 0"),
        ("deepseek_v3", {"rms_norm_eps": None}, "rms_norm_eps: expected a number above 0, found null"),
        ("deepseek_v3", {"norm_topk_prob": None}, "norm_topk_prob: expected true or false, found null"),
        ("deepseek_v3", {"scoring_func": "softmax"}, 'scoring_func: expected "sigmoid", found "softmax"'),
        ("deepseek_v3", {"hidden_act": "gelu"}, 'hidden_act: expected "silu", found "gelu"'),
        ("deepseek_v3", {"rope_theta": None}, "rope_theta: expected a number above 1, found null"),
        ("deepseek_v4", {"scoring_func": "sigmoid"}, 'scoring_func: expected "sqrtsoftplus", found "sigmoid"'),
        ("deepseek_v4", {"n_shared_experts": 2}, "n_shared_experts: expected 1, found 2"),
        ("deepseek_v4", {"o_groups": 3}, "o_groups: expected a divisor of .* found 3"),
        (
            "deepseek_v4",
            {"layer_types": ["sliding_attention"]},
            "layer_types: expected num_hidden_layers .2. entries",
        ),
        ("deepseek_v4", {"compress_ratios": [4, 5]}, "compress_ratios: expected a list of 0 or 4 or 128, or null"),
        ("deepseek_v4", {"sliding_window": None}, "sliding_window: expected a whole number .* found null"),
        (
            "mixtral",
            {"num_key_value_heads": 3},
            "num_key_value_heads: expected a divisor of num_attention",
        ),
        ("mixtral", {"num_local_experts": 0}, "num_local_experts: expected a whole number of at least 1, found 0"),
        ("mixtral", {"attention_bias": True}, "attention_bias: expected false, found true"),
        ("mixtral", {"hidden_size": 36, "num_attention_heads": 4}, "head_dim: expected an even whole number"),
        ("mixtral", {"sliding_window": 16}, "sliding_window: expected null or at least the context of 80 .* found 16"),
        ("mixtral", {"sliding_window": 0}, "sliding_window: expected null or .* found 0"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step: expected .* at least 1, found 0"),
        ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 79}, "sliding_window: expected .* found 79"),
        ("qwen3_moe", {"mlp_only_layers": [0, None]}, "mlp_only_layers: expected a list of a whole number"),
        ("deepseek_v2", {"norm_topk_prob": True}, "norm_topk_prob: expected false, found true"),
        ("deepseek_v2", {"topk_method": "noaux_tc"}, 'topk_method: expected "greedy" or "group_limited_greedy", found'),
        ("deepseek_v2", {"topk_method": "group_limited_greedy"}, "n_group: expected a whole number, beside .* null"),
        (
            "deepseek_v2",
            {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 5},
            "topk_group: expected at most n_group .4., found 5",
        ),
        ("deepseek_v2", {"mlp_bias": True}, "mlp_bias: expected false, found true"),
        ("deepseek_v32", {"q_lora_rank": None}, "q_lora_rank: expected a whole number .* found null"),
        ("deepseek_v32", {"index_topk": 0}, "index_topk: expected a whole number of at least 1, found 0"),
        ("deepseek_v32", {"index_head_dim": 6}, "index_head_dim: expected at least qk_rope_head_dim .8., found 6"),
        ("deepseek_v32", {"mlp_layer_types": ["sparse"]}, "mlp_layer_types: expected num_hidden_layers .3. entries"),
        ("glm4_moe_lite", {"mlp_layer_types": ["moe"] * 3}, "mlp_layer_types: expected a list of .dense. or .sparse"),
        ("glm4_moe_lite", {"partial_rotary_factor": 0.5}, "rope_parameters.partial_rotary_factor: expected 1, for"),
        ("glm4_moe", {"scoring_func": "softmax"}, 'scoring_func: expected "sigmoid", found "softmax"'),
        ("glm4_moe", {"partial_rotary_factor": 1.5}, "partial_rotary_factor: expected a number above 0 and at most 1"),
        ("glm4_moe", {"partial_rotary_factor": 0.07}, "rope_parameters.partial_rotary_factor: expected a share"),
        ("gpt_oss", {"rope_scaling": None}, "rope_parameters: expected an object with a rope_type.* found null"),
        ("gpt_oss", {"sliding_window": None}, "sliding_window: expected a whole number .* found null"),
        ("gpt_oss", {"layer_types": ["chunked_attention"]}, "layer_types: expected a list of .sliding_attention"),
        ("gpt_oss", {"hidden_act": "gelu"}, 'hidden_act: expected "silu", found "gelu"'),
        ("olmoe", {"clip_qkv": 0}, "clip_qkv: expected a number above 0, or null, found 0"),
        ("olmoe", {"head_dim": 16}, "head_dim: expected hidden_size / num_attention_heads .8., found 16"),
        ("qwen2_moe", {"use_sliding_window": True}, "use_sliding_window: expected false, found true"),
        ("qwen2_moe", {"qkv_bias": None}, "qkv_bias: expected true or false, found null"),
        ("qwen2_moe", {"shared_expert_intermediate_size": 0}, "shared_expert_intermediate_size: expected .* found 0"),
        (
            "llama",
            {"max_position_embeddings": 80},
            'model_type: expected deepseek_v2 .* found "llama"',
        ),
        ("mixtral", rope("nonsense"), r'rope_scaling\.rope_type: expected "default" or .* found "nonsense"'),
        ("mixtral", rope("linear"), r"rope_scaling\.factor: expected a number of at least 1, found null"),
        ("mixtral", rope("linear", factor=0.5), r"rope_scaling\.factor: expected a number of at least 1, found 0\.5"),
        (
            "mixtral",
            rope("linear", factor=2, partial_rotary_factor=0.5),
            r"rope_scaling\.partial_rotary_factor: expected 1, .*0.5",
        ),
        (
            "mixtral",
            rope("yarn", factor=2) | {"partial_rotary_factor": 0.5},
            r"rope_scaling\.partial_rotary_factor: expected 1",
        ),
        ("mixtral", rope("yarn", factor=None), r"rope_scaling\.factor: expected .* found null"),
        (
            "mixtral",
            rope("yarn", factor=2, original_max_position_embeddings=0),
            r"rope_scaling\.original_max_position_embeddings: ",
        ),
        (
            "mixtral",
            rope("longrope", short_factor=FACTORS),
            r"rope_scaling\.long_factor: expected a list of .* found null",
        ),
        (
            "mixtral",
            rope("longrope", short_factor=FACTORS, long_factor=[1.0]),
            r"rope_scaling\.long_factor: expected a factor for each of 4 rotated pairs, found 1",
        ),
        (
            "mixtral",
            rope("longrope", short_factor=[0, 1, 1, 1], long_factor=FACTORS),
            r"rope_scaling\.short_factor: expected a list",
        ),
        (
            "deepseek_v3",
            rope("llama3", factor=2, low_freq_factor=4, high_freq_factor=1),
            r"rope_scaling\.high_freq_factor: expected a number above low_freq_factor",
        ),
        (
            "deepseek_v4",
            rope("longrope", short_factor=FACTORS, long_factor=FACTORS),
            r"rope_scaling\.rope_type: .* found .longrope.",
        ),
        ("mixtral", {"rope_parameters": "yarn"}, r"rope_parameters: expected an object or null, found .yarn."),
        (
            "mixtral",
            {"rope_parameters": {"a": {"rope_theta": 1e4}, "b": {"rope_theta": 1e6}}},
            "rope_parameters: expected one set for all layers of a mixtral",
        ),
    ],
)
def test_a_value_that_cannot_be_is_refused_with_file_key_expected_and_found(
    model_type: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(EngineLoadError, match=rf"config\.json: {message}"):
        read(tmp_path, model_type, **changes)


def test_a_configuration_without_a_model_type_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["mixtral"]))
    with pytest.raises(EngineLoadError, match=r"config\.json: model_type: expected the name .* found null"):
        read_model_config(str(tmp_path))


@pytest.mark.parametrize(
    ("changes", "context_length"),
    [
        ({}, 80),
        ({"rope_scaling": None}, 80),
        (rope("default"), 80),
        (rope("yarn", factor=4.0, original_max_position_embeddings=64), 256),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}}, 256),
        ({"rope_parameters": rope("yarn", factor=4.0, original_max_position_embeddings=64)["rope_scaling"]}, 256),
        (rope("yarn", factor=2.0, original_max_position_embeddings=10), 80),
        (rope("yarn", factor=2.0), 160),
        (rope("yarn", factor=4.0) | {"original_max_position_embeddings": 30}, 120),
        (rope("linear", factor=2.5), 200),
        (rope("dynamic", factor=3.0), 240),
        (rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0), 80),
        (rope("longrope", short_factor=FACTORS, long_factor=FACTORS, factor=4.0), 80),
        ({"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 2.0}}}, 160),
    ],
)
def test_a_scaled_rope_stretches_the_context_as_in_vllm(
    changes: dict[str, Any], context_length: int, tmp_path: Path
) -> None:
    assert read(tmp_path, "mixtral", **changes).context_length == context_length
    assert read(tmp_path, "mixtral", 99, **changes).context_length == 99


def test_a_window_is_measured_against_the_context_that_the_job_asks_for(tmp_path: Path) -> None:
    assert read(tmp_path, "mixtral", 40, sliding_window=40).context_length == 40
    with pytest.raises(EngineLoadError, match="at least the context of 81 tokens"):
        read(tmp_path, "mixtral", 81, sliding_window=80)


def test_nulls_get_the_meaning_that_other_tools_give_them(tmp_path: Path) -> None:
    changes = {"n_group": None, "topk_group": None, "n_shared_experts": None, "num_key_value_heads": None}
    values = read(tmp_path, "deepseek_v3", **changes).values
    assert [values[key] for key in changes] == [1, 1, 0, 4]
    assert read(tmp_path, "mixtral", head_dim=None).values["head_dim"] == 8


@pytest.mark.parametrize(("num_dense", "types"), [(0, ["sparse"] * 3), (2, ["dense", "dense", "sparse"])])
def test_the_dense_layers_of_glm4_moe_lite_are_those_that_the_file_counts(
    num_dense: int, types: list[str], tmp_path: Path
) -> None:
    assert read(tmp_path, "glm4_moe_lite", first_k_dense_replace=num_dense).values["mlp_layer_types"] == types
    said = ["sparse", "dense", "sparse"]
    found = read(tmp_path, "glm4_moe_lite", first_k_dense_replace=num_dense, mlp_layer_types=said)
    assert found.values["mlp_layer_types"] == said
