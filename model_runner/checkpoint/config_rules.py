"""What a `config.json` must say for each architecture that we run ourselves: one rule for every value that is read.

Consulted by `model_config.py`, before a run on what the file says, and at load on what `transformers` makes of it.
"""

from collections.abc import Iterator, Mapping

from moebeam.model_runner.checkpoint.value_rules import (
    COUNT,
    EVEN,
    FLAG,
    NATURAL,
    POSITIVE,
    SHARE,
    Rule,
    Values,
    list_of,
    number_above,
    number_of_at_least,
    one_of,
)

LATENT = ("deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite")
"""Architectures with multi-head latent attention."""

_RATES = Rule(
    "whole numbers of at least 1 by layer type",
    lambda value: isinstance(value, dict) and all(COUNT.holds(rate) for rate in value.values()),
)

_ALL = {
    "vocab_size": COUNT,
    "hidden_size": COUNT,
    "num_hidden_layers": COUNT,
    "num_attention_heads": COUNT,
    "num_experts_per_tok": COUNT,
    "max_position_embeddings": COUNT,
    "rms_norm_eps": POSITIVE,
    "tie_word_embeddings": FLAG,
}
_LAYER_TYPES = one_of("sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention")

_MLP_TYPES = one_of("dense", "sparse")
_DEEPSEEK_MIXTURE = {
    "intermediate_size": COUNT,
    "moe_intermediate_size": COUNT,
    "n_routed_experts": COUNT,
    "n_shared_experts": NATURAL,
    "n_group": COUNT,
    "topk_group": COUNT,
    "norm_topk_prob": FLAG,
    "routed_scaling_factor": POSITIVE,
    "num_nextn_predict_layers": NATURAL.or_null(),
}
_LATENT_RULES = {
    **_ALL,
    **_DEEPSEEK_MIXTURE,
    "num_key_value_heads": COUNT,
    "kv_lora_rank": COUNT,
    "q_lora_rank": COUNT.or_null(),
    "qk_rope_head_dim": EVEN,
    "qk_nope_head_dim": COUNT,
    "v_head_dim": COUNT,
    "attention_bias": FLAG,
}
_GROUPED_RULES = {**_ALL, "num_key_value_heads": COUNT, "head_dim": EVEN, "intermediate_size": COUNT}
_QWEN_RULES = {
    **_GROUPED_RULES,
    "moe_intermediate_size": COUNT,
    "num_experts": COUNT,
    "norm_topk_prob": FLAG,
    "decoder_sparse_step": COUNT,
    "mlp_only_layers": list_of(NATURAL).or_null(),
    "use_sliding_window": FLAG,
}

RULES: dict[str, dict[str, Rule]] = {
    "deepseek_v2": {
        **_LATENT_RULES,
        "n_group": COUNT.or_null(),
        "topk_group": COUNT.or_null(),
        "topk_method": one_of("greedy", "group_limited_greedy"),
        "first_k_dense_replace": NATURAL,
    },
    "deepseek_v3": {**_LATENT_RULES, "first_k_dense_replace": NATURAL, "rope_interleave": FLAG},
    "deepseek_v32": {
        **_LATENT_RULES,
        "q_lora_rank": COUNT,
        "first_k_dense_replace": NATURAL,
        "mlp_layer_types": list_of(_MLP_TYPES).or_null(),
        "index_n_heads": COUNT,
        "index_head_dim": EVEN,
        "index_topk": COUNT,
    },
    "deepseek_v4": {
        **_ALL,
        "head_dim": COUNT,
        "q_lora_rank": COUNT,
        "moe_intermediate_size": COUNT,
        "n_routed_experts": COUNT,
        "routed_scaling_factor": POSITIVE,
        "swiglu_limit": POSITIVE,
        "layer_types": list_of(_LAYER_TYPES).or_null(),
        "mlp_layer_types": list_of(one_of("hash_moe", "moe")).or_null(),
        "compress_ratios": list_of(one_of(0, 4, 128)).or_null(),
        "compress_rates": _RATES.or_null(),
        "num_hash_layers": NATURAL.or_null(),
        "qk_rope_head_dim": EVEN.or_null(),
        "compress_rope_theta": number_above(1),
        "hc_mult": COUNT,
        "hc_sinkhorn_iters": COUNT,
        "hc_eps": number_of_at_least(0),
        "sliding_window": COUNT,
        "o_groups": COUNT,
        "o_lora_rank": COUNT,
        "index_n_heads": COUNT,
        "index_head_dim": COUNT,
        "index_topk": COUNT,
    },
    "glm4_moe": {
        **_GROUPED_RULES,
        **_DEEPSEEK_MIXTURE,
        "first_k_dense_replace": NATURAL,
        "use_qk_norm": FLAG,
        "attention_bias": FLAG,
        "partial_rotary_factor": SHARE,
    },
    "glm4_moe_lite": {
        **_LATENT_RULES,
        "first_k_dense_replace": NATURAL,
        "mlp_layer_types": list_of(_MLP_TYPES).or_null(),
        "rope_interleave": FLAG,
    },
    "gpt_oss": {
        **_GROUPED_RULES,
        "num_local_experts": COUNT,
        "attention_bias": FLAG,
        "sliding_window": COUNT,
        "layer_types": list_of(one_of("sliding_attention", "full_attention")).or_null(),
        "swiglu_alpha": POSITIVE,
        "swiglu_limit": POSITIVE,
    },
    "mixtral": {**_GROUPED_RULES, "num_local_experts": COUNT},
    "olmoe": {
        **_GROUPED_RULES,
        "num_experts": COUNT,
        "norm_topk_prob": FLAG,
        "attention_bias": FLAG,
        "clip_qkv": POSITIVE.or_null(),
    },
    "qwen2_moe": {**_QWEN_RULES, "shared_expert_intermediate_size": COUNT, "qkv_bias": FLAG},
    "qwen3_moe": {**_QWEN_RULES, "num_local_experts": COUNT, "attention_bias": FLAG},
}
"""`model_type` -> key -> what it must be if it is there, once `model_config.py` has given nulls their meaning."""

_SIGMOID_LIMITS = {
    "hidden_act": one_of("silu"),
    "moe_layer_freq": one_of(1),
    "scoring_func": one_of("sigmoid"),
    "topk_method": one_of("noaux_tc"),
}

LIMITS: dict[str, dict[str, Rule]] = {
    "deepseek_v2": {
        "hidden_act": one_of("silu"),
        "moe_layer_freq": one_of(1),
        "scoring_func": one_of("softmax"),
        "norm_topk_prob": one_of(False),
        "mlp_bias": one_of(False),
        "rope_interleave": one_of(True),
    },
    "deepseek_v3": _SIGMOID_LIMITS,
    "deepseek_v32": {**_SIGMOID_LIMITS, "mlp_bias": one_of(False), "rope_interleave": one_of(True)},
    "deepseek_v4": {
        "hidden_act": one_of("silu"),
        "n_shared_experts": one_of(1),
        "norm_topk_prob": one_of(True),
        "scoring_func": one_of("sqrtsoftplus"),
        "attention_bias": one_of(False),
        "mlp_bias": one_of(False),
    },
    "glm4_moe": {**_SIGMOID_LIMITS, "rope_interleave": one_of(False)},
    "glm4_moe_lite": _SIGMOID_LIMITS,
    "gpt_oss": {"hidden_act": one_of("silu")},
    "mixtral": {"hidden_act": one_of("silu"), "attention_bias": one_of(False)},
    "olmoe": {"hidden_act": one_of("silu"), "sliding_window": one_of(None)},
    "qwen2_moe": {
        "hidden_act": one_of("silu"),
        "use_sliding_window": one_of(False),
        "layer_types": list_of(one_of("full_attention")).or_null(),
    },
    "qwen3_moe": {"hidden_act": one_of("silu")},
}
"""The same for what the engine `torch` builds; other engines may do more."""


def list_conflicts(model_type: str, values: Values) -> Iterator[tuple[str, str]]:
    """Yield the keys whose values do not go together with others, each with what was expected of it."""
    heads, chosen = _whole(values, "num_attention_heads"), _whole(values, "num_experts_per_tok")
    hidden = _whole(values, "hidden_size")
    experts_key = next(
        key for key in ("n_routed_experts", "num_experts", "num_local_experts") if key in RULES[model_type]
    )
    if experts_key not in values:
        experts_key = "num_local_experts"
    experts = _whole(values, experts_key)
    if experts and chosen > experts:
        yield "num_experts_per_tok", f"at most {experts_key} ({experts})"
    if "n_group" in RULES[model_type]:
        if model_type != "deepseek_v2":
            yield from _list_group_conflicts(values, experts, chosen, num_ranked=2)
        elif values.get("topk_method") == "group_limited_greedy":
            for key in ("n_group", "topk_group"):
                if values.get(key) is None:
                    yield key, 'a whole number, beside topk_method "group_limited_greedy"'
            yield from _list_group_conflicts(values, experts, chosen, num_ranked=1)
    yield from _list_short_layer_lists(values, RULES[model_type])
    if model_type in LATENT:
        if heads and _whole(values, "num_key_value_heads") not in (0, heads):
            yield "num_key_value_heads", f"num_attention_heads ({heads})"
    elif model_type == "deepseek_v4":
        width = heads * _whole(values, "head_dim")
        if (groups := _whole(values, "o_groups")) and width % groups:
            yield "o_groups", f"a divisor of num_attention_heads * head_dim ({width})"
    elif heads and (kept := _whole(values, "num_key_value_heads")) and heads % kept:
        yield "num_key_value_heads", f"a divisor of num_attention_heads ({heads})"
    if 0 < _whole(values, "index_head_dim") < (rotated := _whole(values, "qk_rope_head_dim")):
        yield "index_head_dim", f"at least qk_rope_head_dim ({rotated})"
    if model_type == "olmoe" and heads and _whole(values, "head_dim") not in (0, hidden // heads):
        yield "head_dim", f"hidden_size / num_attention_heads ({hidden // heads})"


def _list_group_conflicts(values: Values, experts: int, chosen: int, *, num_ranked: int) -> Iterator[tuple[str, str]]:
    """The same of groups of experts, ranked by the best `num_ranked` of each."""
    groups, chosen_groups = _whole(values, "n_group"), _whole(values, "topk_group")
    if not groups or not experts:
        return
    if experts % groups:
        yield "n_group", f"a divisor of n_routed_experts ({experts})"
    elif groups > 1 and experts // groups < num_ranked:
        yield "n_group", f"at most n_routed_experts / 2 ({experts // 2}), for a group is ranked by its best two"
    elif chosen_groups > groups:
        yield "topk_group", f"at most n_group ({groups})"
    elif chosen_groups and chosen > chosen_groups * (experts // groups):
        most = chosen_groups * (experts // groups)
        yield "num_experts_per_tok", f"at most the experts of topk_group groups ({most})"


def _list_short_layer_lists(values: Values, rules: Mapping[str, Rule]) -> Iterator[tuple[str, str]]:
    num_layers = _whole(values, "num_hidden_layers")
    for key in ("layer_types", "mlp_layer_types", "compress_ratios"):
        found = values.get(key)
        if key in rules and isinstance(found, list) and len(found) < num_layers:
            yield key, f"num_hidden_layers ({num_layers}) entries"


def _whole(values: Values, key: str) -> int:
    """A value, 0 where there is none or null."""
    found = values.get(key)
    return found if isinstance(found, int) else 0
