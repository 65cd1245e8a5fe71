"""What a `config.json` must say for each architecture that we run ourselves: one rule for every value that is read.

Consulted by `model_config.py`, before a run on what the file says, and at load on what `transformers` makes of it.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias, TypeGuard

from moebeam.schemas.canonical import Json

Values: TypeAlias = Mapping[str, Json]


@dataclass(frozen=True, slots=True)
class Rule:
    """What a value must be, in words and as a test."""

    expected: str
    holds: Callable[[Json], bool]

    def or_null(self) -> "Rule":
        """The same, or null."""
        return Rule(f"{self.expected}, or null", lambda value: value is None or self.holds(value))


def is_number(value: Json) -> TypeGuard[int | float]:
    """Whether a value is a finite number; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def at_least(least: int) -> Rule:
    """A whole number with a lower bound."""
    return Rule(
        f"a whole number of at least {least}",
        lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= least,
    )


def one_of(*values: Json) -> Rule:
    """One of a few values."""
    written = [json.dumps(value) for value in values]
    # Compared as written, because True equals 1 in Python.
    return Rule(" or ".join(written), lambda value: json.dumps(value) in written)


def number_of_at_least(least: float) -> Rule:
    """A number with a lower bound."""
    return Rule(f"a number of at least {least:g}", lambda value: is_number(value) and value >= least)


def number_above(bound: float) -> Rule:
    """A number with an open lower bound."""
    return Rule(f"a number above {bound:g}", lambda value: is_number(value) and value > bound)


def list_of(rule: Rule) -> Rule:
    """A list whose every entry keeps a rule."""
    return Rule(f"a list of {rule.expected}", lambda value: isinstance(value, list) and all(map(rule.holds, value)))


COUNT = at_least(1)
NATURAL = at_least(0)
FLAG = one_of(True, False)
POSITIVE = number_above(0)
EVEN = Rule(
    "an even whole number of at least 2",
    lambda value: isinstance(value, int) and at_least(2).holds(value) and value % 2 == 0,
)
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

RULES: dict[str, dict[str, Rule]] = {
    "deepseek_v3": {
        **_ALL,
        "num_key_value_heads": COUNT,
        "intermediate_size": COUNT,
        "moe_intermediate_size": COUNT,
        "n_routed_experts": COUNT,
        "n_shared_experts": NATURAL,
        "n_group": COUNT,
        "topk_group": COUNT,
        "first_k_dense_replace": NATURAL,
        "norm_topk_prob": FLAG,
        "routed_scaling_factor": POSITIVE,
        "kv_lora_rank": COUNT,
        "q_lora_rank": COUNT.or_null(),
        "qk_rope_head_dim": EVEN,
        "qk_nope_head_dim": COUNT,
        "v_head_dim": COUNT,
        "rope_interleave": FLAG,
        "attention_bias": FLAG,
        "num_nextn_predict_layers": NATURAL.or_null(),
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
    "mixtral": {
        **_ALL,
        "num_key_value_heads": COUNT,
        "head_dim": EVEN,
        "intermediate_size": COUNT,
        "num_local_experts": COUNT,
    },
    "qwen3_moe": {
        **_ALL,
        "num_key_value_heads": COUNT,
        "head_dim": EVEN,
        "intermediate_size": COUNT,
        "moe_intermediate_size": COUNT,
        "num_experts": COUNT,
        "num_local_experts": COUNT,
        "norm_topk_prob": FLAG,
        "decoder_sparse_step": COUNT,
        "mlp_only_layers": list_of(NATURAL).or_null(),
        "attention_bias": FLAG,
        "use_sliding_window": FLAG,
    },
}
"""`model_type` -> key -> what it must be if it is there, once `model_config.py` has given nulls their meaning."""

LIMITS: dict[str, dict[str, Rule]] = {
    "deepseek_v3": {
        "hidden_act": one_of("silu"),
        "moe_layer_freq": one_of(1),
        "scoring_func": one_of("sigmoid"),
        "topk_method": one_of("noaux_tc"),
    },
    "deepseek_v4": {
        "hidden_act": one_of("silu"),
        "n_shared_experts": one_of(1),
        "norm_topk_prob": one_of(True),
        "scoring_func": one_of("sqrtsoftplus"),
        "attention_bias": one_of(False),
        "mlp_bias": one_of(False),
    },
    "mixtral": {"hidden_act": one_of("silu"), "attention_bias": one_of(False)},
    "qwen3_moe": {"hidden_act": one_of("silu")},
}
"""The same for what the engine `torch` builds; other engines may do more."""


def list_conflicts(model_type: str, values: Values) -> Iterator[tuple[str, str]]:
    """Yield the keys whose values do not go together with others, each with what was expected of it."""
    heads, chosen = _whole(values, "num_attention_heads"), _whole(values, "num_experts_per_tok")
    experts_key = next(
        key for key in ("n_routed_experts", "num_experts", "num_local_experts") if key in RULES[model_type]
    )
    if experts_key not in values:
        experts_key = "num_local_experts"
    experts = _whole(values, experts_key)
    if experts and chosen > experts:
        yield "num_experts_per_tok", f"at most {experts_key} ({experts})"
    if model_type == "deepseek_v3":
        yield from _list_group_conflicts(values, experts, chosen)
        if heads and _whole(values, "num_key_value_heads") not in (0, heads):
            yield "num_key_value_heads", f"num_attention_heads ({heads})"
    elif model_type == "deepseek_v4":
        width = heads * _whole(values, "head_dim")
        if (groups := _whole(values, "o_groups")) and width % groups:
            yield "o_groups", f"a divisor of num_attention_heads * head_dim ({width})"
        yield from _list_short_layer_lists(values)
    elif heads and (kept := _whole(values, "num_key_value_heads")) and heads % kept:
        yield "num_key_value_heads", f"a divisor of num_attention_heads ({heads})"


def _list_group_conflicts(values: Values, experts: int, chosen: int) -> Iterator[tuple[str, str]]:
    groups, chosen_groups = _whole(values, "n_group"), _whole(values, "topk_group")
    if not groups or not experts:
        return
    if experts % groups:
        yield "n_group", f"a divisor of n_routed_experts ({experts})"
    elif groups > 1 and experts // groups < 2:
        yield "n_group", f"at most n_routed_experts / 2 ({experts // 2}), for a group is ranked by its best two"
    elif chosen_groups > groups:
        yield "topk_group", f"at most n_group ({groups})"
    elif chosen_groups and chosen > chosen_groups * (experts // groups):
        most = chosen_groups * (experts // groups)
        yield "num_experts_per_tok", f"at most the experts of topk_group groups ({most})"


def _list_short_layer_lists(values: Values) -> Iterator[tuple[str, str]]:
    num_layers = _whole(values, "num_hidden_layers")
    for key in ("layer_types", "mlp_layer_types", "compress_ratios"):
        found = values.get(key)
        if isinstance(found, list) and len(found) < num_layers:
            yield key, f"num_hidden_layers ({num_layers}) entries"


def _whole(values: Values, key: str) -> int:
    """A value, 0 where there is none or null."""
    found = values.get(key)
    return found if isinstance(found, int) else 0
