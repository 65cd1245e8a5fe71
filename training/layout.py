"""The demo model's layout: DeepSeek V4 with every kind of layer that it has, at about four million parameters."""

import torch
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM, PreTrainedTokenizerFast

from training.tokenizer import BOS, EOS, PAD, get_token_id

LAYER_TYPES: tuple[str, ...] = (
    "sliding_attention",
    "compressed_sparse_attention",
    "heavily_compressed_attention",
    "compressed_sparse_attention",
)
MLP_LAYER_TYPES: tuple[str, ...] = ("hash_moe", "moe", "moe", "moe")
EXPERTS_IMPLEMENTATION = "grouped_mm"

# With 16 rotated pairs a head, 10,000 leaves two that can tell a token from its neighbour; 100 leaves six. The
# other layers match content, for which slowly rotating pairs are as good as unrotated ones.
ROPE_THETA = 100.0
# V4 normalises queries and keys, so that no score exceeds sqrt(head_dim) times this weight: 23 at the full model's 512,
# but 8 at 64 with a weight of 1, too flat to single out one token of two hundred.
INITIAL_KEY_SCALE = 2.5


def demo_config(tokenizer: PreTrainedTokenizerFast) -> DeepseekV4Config:
    """The configuration, for this tokenizer's vocabulary.

    The window of 192 tokens reaches from an answer's end back to the ticket; a prompt's first third is then only
    visible through compressed entries (one every 4 tokens in CSA layers, one every 16 in the HCA layer).
    """
    return DeepseekV4Config(
        vocab_size=len(tokenizer),
        hidden_size=192,
        moe_intermediate_size=96,
        num_hidden_layers=len(LAYER_TYPES),
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=64,
        q_lora_rank=96,
        num_experts_per_tok=2,
        n_routed_experts=8,
        n_shared_experts=1,
        routed_scaling_factor=1.5,
        max_position_embeddings=2048,
        rope_theta=ROPE_THETA,
        compress_rope_theta=10_000.0,
        partial_rotary_factor=0.5,
        layer_types=list(LAYER_TYPES),
        mlp_layer_types=list(MLP_LAYER_TYPES),
        compress_rates={"compressed_sparse_attention": 4, "heavily_compressed_attention": 16},
        hc_mult=4,
        hc_sinkhorn_iters=8,
        sliding_window=192,
        o_groups=2,
        o_lora_rank=96,
        index_n_heads=2,
        index_head_dim=32,
        index_topk=64,
        num_nextn_predict_layers=0,
        bos_token_id=get_token_id(tokenizer, BOS),
        eos_token_id=get_token_id(tokenizer, EOS),
        pad_token_id=get_token_id(tokenizer, PAD),
    )


def build_model(config: DeepseekV4Config, *, seed: int) -> DeepseekV4ForCausalLM:
    """A fresh model in float32 whose hash-routed layers send each token to fixed, distinct experts.

    `transformers` leaves the hash table at zero, one expert twice, and expects it from a checkpoint.
    """
    torch.manual_seed(seed)
    model = DeepseekV4ForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("kv_norm.weight"):
                parameter.fill_(INITIAL_KEY_SCALE)
        look_back(model)
    generator = torch.Generator().manual_seed(seed)
    for name, table in model.named_buffers():
        if name.endswith("tid2eid"):
            scores = torch.rand(config.vocab_size, config.n_routed_experts, generator=generator)
            table.copy_(scores.topk(config.num_experts_per_tok, dim=-1).indices)
    model.set_experts_implementation(EXPERTS_IMPLEMENTATION)
    return model


@torch.no_grad()
def look_back(model: DeepseekV4ForCausalLM) -> None:
    """Begin with three heads of the first layer that look one, two and three tokens back.

    Copying needs a layer that knows what came before each token, and a layer that looks for it. The first is slow to
    learn here, since V4's projections have no biases: a constant in every embedding takes their place. It gives keys a
    fixed direction in the fastest rotary pairs, and queries the same one, rotated by the distance.
    """
    config = model.config
    assert config.head_dim is not None
    num_unrotated = config.head_dim - config.qk_rope_head_dim
    weights = dict(model.named_parameters())
    attention = "model.layers.0.self_attn"
    frequencies = model.get_buffer("model.rotary_emb.main_inv_freq")[:5]  # (5,)
    fast = slice(num_unrotated, num_unrotated + 10)

    embeddings = weights["model.embed_tokens.weight"]  # (vocab_size, hidden_size)
    embeddings.mul_(5.0)
    embeddings[:, 0] = embeddings[:, 1:].std() * (config.hidden_size - 1) ** 0.5  # as strong as all the rest

    keys = weights[f"{attention}.kv_proj.weight"]  # (head_dim, hidden_size)
    keys[:, 0] = 0.0
    keys[fast] = 0.0
    keys[num_unrotated : num_unrotated + 10 : 2, 0] = 0.05
    weights[f"{attention}.kv_norm.weight"].fill_(3.5)

    latents = weights[f"{attention}.q_a_proj.weight"]  # (q_lora_rank, hidden_size)
    latents[:, 0] = 0.0
    latents[0] = 0.0
    latents[0, 0] = 0.2
    queries = weights[f"{attention}.q_b_proj.weight"].view(config.num_attention_heads, config.head_dim, -1)
    for head in range(3):
        angles = -(head + 1) * frequencies
        queries[head, :, 0] = 0.0
        queries[head, fast] = 0.0
        queries[head, fast, 0] = 0.2 * torch.stack([angles.cos(), angles.sin()], dim=-1).flatten()
