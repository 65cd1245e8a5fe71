"""Maps the tensor names of a checkpoint to those of transformers 5.23.

Checkpoints use three namings: transformers' module names (`save_pretrained(save_original_format=False)`), what
`save_pretrained` writes by default, and what the model's authors released. The tables below map all of them to the
first, except that single experts are never stacked: `mlp.experts.3.gate_proj.weight`. Module names map to themselves.
"""

import re
from collections.abc import Sequence

Renaming = tuple[re.Pattern[str], str]


def _table(*rules: tuple[str, str]) -> tuple[Renaming, ...]:
    return tuple((re.compile(pattern), replacement) for pattern, replacement in rules)


_W1_W2_W3 = (
    (r"experts(\.\d+)?\.w1\.", r"experts\1.gate_proj."),
    (r"experts(\.\d+)?\.w2\.", r"experts\1.down_proj."),
    (r"experts(\.\d+)?\.w3\.", r"experts\1.up_proj."),
)

# What a model without its head was saved as: `layers.0...`, not `model.layers.0...`.
_UNPREFIXED = ((r"^(embed_tokens|norm|layers)\.", r"model.\1."),)

RENAMINGS: dict[str, tuple[Renaming, ...]] = {
    **{
        name: _table(*_UNPREFIXED)
        for name in (
            "deepseek_v2",
            "deepseek_v3",
            "deepseek_v32",
            "glm4_moe",
            "glm4_moe_lite",
            "gpt_oss",
            "olmoe",
            "qwen2_moe",
            "qwen3_moe",
        )
    },
    "mixtral": _table(*_UNPREFIXED, (r"\.block_sparse_moe\.", ".mlp."), *_W1_W2_W3),
    "deepseek_v4": _table(
        # Released names lack the `model.` that `save_pretrained` puts before them.
        (r"^(embed|norm|layers|hc_head_\w+)\b", r"model.\1"),
        (r"^model\.embed\.", "model.embed_tokens."),
        (r"^model\.hc_head_", "model.hc_head.hc_"),
        (r"^head\.", "lm_head."),
        (r"\.hc_(attn|ffn)_(fn|base|scale)$", r".\1_hc.\2"),
        (r"\.attn_norm\.", ".input_layernorm."),
        (r"\.ffn_norm\.", ".post_attention_layernorm."),
        (r"\.attn\.indexer\.compressor\.", ".attn.compressor.indexer."),
        (r"\.attn\.indexer\.weights_proj\.", ".attn.compressor.indexer.scorer.weights_proj."),
        (r"\.attn\.indexer\.", ".attn.compressor.indexer."),
        (r"\.attn\.attn_sink$", ".attn.sinks"),
        (r"\.attn\.q_norm\.", ".attn.q_a_norm."),
        (r"\.attn\.((?:compressor\.)?(?:indexer\.)?)norm\.", r".attn.\1kv_norm."),
        (r"\.attn\.", ".self_attn."),
        (r"\.ape$", ".position_bias"),
        (r"\.w(q_a|q_b|kv|o_a|o_b)\.", r".\1_proj."),
        (r"\.wgate\.", ".gate_proj."),
        (r"\.ffn\.", ".mlp."),
        (r"\.mlp\.gate\.bias$", ".mlp.gate.e_score_correction_bias"),
        *_W1_W2_W3,
    ),
}
"""For each `model_type`, what to replace in every name, in this order."""


IGNORED = (
    # Layers of multi-token prediction, whatever they were called: `mtp.0`, `model.mtp_layers.0`, `nextn_predict.0`.
    r"(^|\.)(mtp|nextn)(_\w+)?\.",
    # Scales of inputs and of keys and values that others keep in FP8; here they are not quantised.
    r"\.(input|activation|output|q|k|v|kv|prob)_scale$",
    r"rotary_emb\.inv_freq$",
)
"""Regular expressions, searched in transformers' names, of tensors that no model needs."""


def scale_name(name: str) -> str:
    """Name the scales of a block-scaled tensor: `a.weight` has `a.weight_scale_inv`."""
    return f"{name}_scale_inv"


def scale_names(name: str) -> tuple[str, str]:
    """The names that scales have: DeepSeek's, and that of other tools for the same, `a.weight_scale`."""
    return scale_name(name), f"{name}_scale"


def module_names(stored: Sequence[str], renamings: Sequence[Renaming]) -> dict[str, str]:
    """Map every tensor name of a checkpoint to transformers'.

    DeepSeek-V4's released files call the scales of `a.weight` `a.scale`; other tensors called `scale`, such as
    `attn_hc.scale`, keep their name.

    Args:
        stored: names as the files have them, all shards together.
        renamings: one of `RENAMINGS`.
    Returns:
        stored name -> transformers' name, in the order given; the caller must refuse two stored names of one tensor.
    """
    found: dict[str, str] = {}
    for name in stored:
        renamed = name
        for pattern, replacement in renamings:
            renamed = pattern.sub(replacement, renamed)
        found[name] = renamed
    weights = {name for name in found.values() if name.endswith(".weight")}
    for name, renamed in found.items():
        weight = renamed.removesuffix("scale") + "weight"
        if renamed.endswith(".scale") and weight in weights:
            found[name] = scale_name(weight)
    return found
