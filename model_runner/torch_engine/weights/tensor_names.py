"""What a checkpoint calls its tensors, and what transformers 5.23 calls the same ones.

Three namings occur: transformers' own modules (`save_pretrained(save_original_format=False)`), what `save_pretrained`
writes by default, and what the model's authors released. The tables below lead from all of them to the first, except
that the matrices of single experts stay single: `mlp.experts.3.gate_proj.weight`, never stacked. A name that is
transformers' already passes unchanged.
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

RENAMINGS: dict[str, tuple[Renaming, ...]] = {
    "deepseek_v3": (),
    "qwen3_moe": (),
    "mixtral": _table((r"\.block_sparse_moe\.", ".mlp."), *_W1_W2_W3),
    "deepseek_v4": _table(
        # The released files have no `model.`; `save_pretrained` writes it, with the released names behind it.
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
"""For each `model_type`: expressions to replace, in this order, in every name of a file."""


def scale_name(name: str) -> str:
    """The name of the scales of a block-scaled tensor: of `a.weight` it is `a.weight_scale_inv`."""
    return f"{name}_scale_inv"


def module_names(stored: Sequence[str], renamings: Sequence[Renaming]) -> dict[str, str]:
    """transformers' name of every tensor of a checkpoint.

    DeepSeek-V4's released files say `a.scale` for the scales of `a.weight`; other tensors called `scale` are what
    they say (`attn_hc.scale`).

    Args:
        stored: names as the files have them, all shards together.
        renamings: one of `RENAMINGS`.
    Returns:
        stored name -> transformers' name, in the order given; two stored names may lead to one, which is for the
        caller to refuse.
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
