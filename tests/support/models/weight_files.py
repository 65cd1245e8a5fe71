"""Tiny models of every `model_type` that the engine reads, and their weights in every naming that occurs."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DeepseekV4Config,
    DeepseekV4ForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from moebeam.model_runner.torch_engine.weights.checkpoint_weights import CheckpointWeights

Naming = Literal["modules", "default", "released"]

NUM_EXPERTS, HIDDEN_SIZE, EXPERT_WIDTH = 4, 32, 16
_SHARED = {
    "vocab_size": 40,
    "hidden_size": HIDDEN_SIZE,
    "num_attention_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}


def build_tiny_model(model_type: str) -> PreTrainedModel:
    """A model of some KB whose every tensor is random, also those that transformers starts at zero or one."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = _MODELS[model_type]()
        for name, tensor in model.state_dict().items():
            if name.endswith("tid2eid"):
                tensor.copy_(torch.randint(NUM_EXPERTS, tensor.shape))
            else:
                tensor.normal_()
    return model


def _deepseek_v3() -> PreTrainedModel:
    config = DeepseekV3Config(
        intermediate_size=48,
        moe_intermediate_size=EXPERT_WIDTH,
        num_hidden_layers=2,
        num_key_value_heads=2,
        n_shared_experts=1,
        n_routed_experts=NUM_EXPERTS,
        n_group=2,
        topk_group=1,
        kv_lora_rank=16,
        q_lora_rank=16,
        qk_rope_head_dim=16,
        qk_nope_head_dim=16,
        v_head_dim=16,
        first_k_dense_replace=1,
        **_SHARED,
    )
    return DeepseekV3ForCausalLM(config)


def _deepseek_v4() -> PreTrainedModel:
    layer_types = ["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"]
    config = DeepseekV4Config(
        moe_intermediate_size=EXPERT_WIDTH,
        num_hidden_layers=len(layer_types),
        num_key_value_heads=1,
        head_dim=16,
        q_lora_rank=16,
        n_routed_experts=NUM_EXPERTS,
        n_shared_experts=1,
        partial_rotary_factor=0.5,
        layer_types=layer_types,
        mlp_layer_types=["hash_moe", "moe", "moe"],
        compress_rates={"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
        hc_mult=2,
        sliding_window=16,
        o_groups=2,
        o_lora_rank=16,
        index_n_heads=2,
        index_head_dim=16,
        index_topk=8,
        num_nextn_predict_layers=0,
        **_SHARED,
    )
    return DeepseekV4ForCausalLM(config)


def _mixtral() -> PreTrainedModel:
    config = MixtralConfig(
        intermediate_size=EXPERT_WIDTH,
        num_hidden_layers=2,
        num_key_value_heads=1,
        num_local_experts=NUM_EXPERTS,
        **_SHARED,
    )
    return MixtralForCausalLM(config)


def _qwen3_moe() -> PreTrainedModel:
    config = Qwen3MoeConfig(
        intermediate_size=48,
        moe_intermediate_size=EXPERT_WIDTH,
        num_hidden_layers=2,
        num_key_value_heads=1,
        head_dim=16,
        num_experts=NUM_EXPERTS,
        mlp_only_layers=[0],
        **_SHARED,
    )
    return Qwen3MoeForCausalLM(config)


_MODELS = {
    "deepseek_v3": _deepseek_v3,
    "deepseek_v4": _deepseek_v4,
    "mixtral": _mixtral,
    "qwen3_moe": _qwen3_moe,
}


def save_weights(model: PreTrainedModel, folder: Path, naming: Naming, max_shard_size: str = "1GB") -> Path:
    """A checkpoint's configuration and weights; only DeepSeek-V4 was released in a naming of its own."""
    if naming == "released":
        return write_checkpoint(folder, released_v4(model.state_dict()), model.config.to_dict())
    model.save_pretrained(folder, max_shard_size=max_shard_size, save_original_format=naming == "default")
    return folder


def write_checkpoint(folder: Path, tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config or {}))
    return folder


def read_all(
    weights: CheckpointWeights, state: Mapping[str, Tensor], *, in_its_dtypes: bool = False
) -> dict[str, Tensor]:
    """Every tensor of a model, asked for as the engine does, its experts stacked as transformers has them."""
    found: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if name.endswith(".experts.gate_up_proj"):
            prefix = name.removesuffix(".gate_up_proj")
            experts = weights.experts(prefix, NUM_EXPERTS, HIDDEN_SIZE, EXPERT_WIDTH)
            found[name] = torch.stack([torch.cat((expert.gate, expert.up)) for expert in experts])
            found[f"{prefix}.down_proj"] = torch.stack([expert.down for expert in experts])
        elif not name.endswith(".experts.down_proj"):
            found[name] = weights.get(name, tuple(tensor.shape), tensor.dtype if in_its_dtypes else None)
    return found


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0, msg=name)


_RELEASED_V4 = {
    "model.embed_tokens": "embed",
    "model.norm": "norm",
    "model.hc_head.hc_fn": "hc_head_fn",
    "model.hc_head.hc_base": "hc_head_base",
    "model.hc_head.hc_scale": "hc_head_scale",
    "lm_head": "head",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "attn_hc.fn": "hc_attn_fn",
    "attn_hc.base": "hc_attn_base",
    "attn_hc.scale": "hc_attn_scale",
    "ffn_hc.fn": "hc_ffn_fn",
    "ffn_hc.base": "hc_ffn_base",
    "ffn_hc.scale": "hc_ffn_scale",
    "self_attn.sinks": "attn.attn_sink",
    "self_attn.q_a_proj": "attn.wq_a",
    "self_attn.q_a_norm": "attn.q_norm",
    "self_attn.q_b_proj": "attn.wq_b",
    "self_attn.kv_proj": "attn.wkv",
    "self_attn.kv_norm": "attn.kv_norm",
    "self_attn.o_a_proj": "attn.wo_a",
    "self_attn.o_b_proj": "attn.wo_b",
    "self_attn.compressor.position_bias": "attn.compressor.ape",
    "self_attn.compressor.kv_proj": "attn.compressor.wkv",
    "self_attn.compressor.gate_proj": "attn.compressor.wgate",
    "self_attn.compressor.kv_norm": "attn.compressor.norm",
    "self_attn.compressor.indexer.position_bias": "attn.indexer.compressor.ape",
    "self_attn.compressor.indexer.kv_proj": "attn.indexer.compressor.wkv",
    "self_attn.compressor.indexer.gate_proj": "attn.indexer.compressor.wgate",
    "self_attn.compressor.indexer.kv_norm": "attn.indexer.compressor.norm",
    "self_attn.compressor.indexer.q_b_proj": "attn.indexer.wq_b",
    "self_attn.compressor.indexer.scorer.weights_proj": "attn.indexer.weights_proj",
    "mlp.gate": "ffn.gate",
    "mlp.gate.e_score_correction_bias": "ffn.gate.bias",
    "mlp.gate.tid2eid": "ffn.gate.tid2eid",
    "mlp.shared_experts.gate_proj": "ffn.shared_experts.w1",
    "mlp.shared_experts.down_proj": "ffn.shared_experts.w2",
    "mlp.shared_experts.up_proj": "ffn.shared_experts.w3",
}


def released_v4(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A DeepSeek-V4's tensors as `deepseek-ai/DeepSeek-V4-*` names them."""
    released: dict[str, Tensor] = {}
    for name, tensor in state.items():
        layer, inner, suffix = re.fullmatch(r"(?:model\.(layers\.\d+\.))?(.+?)(\.weight)?", name).groups("")
        if inner == "mlp.experts.gate_up_proj":
            for expert, (gate, up) in enumerate(matrix.chunk(2) for matrix in tensor):
                released[f"{layer}ffn.experts.{expert}.w1.weight"] = gate
                released[f"{layer}ffn.experts.{expert}.w3.weight"] = up
        elif inner == "mlp.experts.down_proj":
            for expert, down in enumerate(tensor):
                released[f"{layer}ffn.experts.{expert}.w2.weight"] = down
        else:
            released[f"{layer}{_RELEASED_V4[inner]}{suffix}"] = tensor
    return released
