"""Models of a few hundred weights for the engine benchmark, and prompts for them."""

from typing import Any

from transformers import (
    DeepseekV3Config,
    DeepseekV4Config,
    MixtralConfig,
    Qwen3MoeConfig,
)

VOCAB_SIZE = 61


PROMPTS = [[7, 8, 9, 10], [7, 8, 9, 11], [20, 21], [7, 8, 9, 10, 12, 13]]


NUM_TREE_TOKENS = 4 + 1 + 2 + 2


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
