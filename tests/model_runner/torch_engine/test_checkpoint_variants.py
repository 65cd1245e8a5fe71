"""Checkpoints as people have them: answers are those of `transformers`, token by token, or the load says what is wrong.

The oracle is `generate`, one prompt at a time, with a cache and a rope that has seen no other prompt.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from moebeam.model_runner.protocol import check_loadable
from moebeam.model_runner.transformers_engine.loaded_models import find_ropes_by_length
from moebeam.schemas.errors import EngineLoadError
from tests.support.engines.engine_configs import engine_config
from tests.support.models.checkpoint_layouts import (
    OpenLayout,
    greedy,
    load_engine,
    random_tokens,
    save_layout,
    with_tensors,
)
from tests.support.models.packed_weights import LAYOUTS as PACK
from tests.support.models.packed_weights import Packed, pack_mxfp4

NUM_ANSWER_TOKENS = 6
ORIGINAL = 32
"""Positions that the ropes were trained for: some prompts are shorter, some longer, some grow beyond them."""

BASE = random_tokens(3, 60)
PROMPTS = [BASE[:9], BASE[:29], [*BASE[:28], 5], BASE[:33], BASE[:50], [*BASE[:49], 9]]

Change = Callable[[dict[str, Any]], object]


def generate(model: PreTrainedModel, token_ids: list[int]) -> list[int]:
    for rope in find_ropes_by_length(model):
        rope.reset()
    ids = torch.tensor([token_ids])
    with torch.inference_mode():
        found = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NUM_ANSWER_TOKENS,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
        )
    return found[0, len(token_ids) :].tolist()


def assert_equal_tokens(folder: Path, model: PreTrainedModel, **options: int) -> None:
    model.generation_config.eos_token_id = None
    found = greedy(load_engine(folder, max_step_rows=20, **options), PROMPTS, NUM_ANSWER_TOKENS)
    assert found == [generate(model, token_ids) for token_ids in PROMPTS]


def edit_config(folder: Path, change: Change) -> None:
    file = folder / "config.json"
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


def rope(rope_type: str, **values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 10_000.0, **values}}


def longrope(num_pairs: int, **values: Any) -> dict[str, Any]:
    short = [1.0 + 0.05 * pair for pair in range(num_pairs)]
    long = [1.5 + 0.9 * pair for pair in range(num_pairs)]
    trained = {"original_max_position_embeddings": ORIGINAL}
    return rope("longrope", short_factor=short, long_factor=long, **(trained | values))


YARN = {"factor": 4.0, "original_max_position_embeddings": ORIGINAL}
LLAMA3 = {**YARN, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LINEAR = rope("linear", factor=2.5)
DYNAMIC = {**rope("dynamic", factor=4.0), "max_position_embeddings": ORIGINAL}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        f"{name}, {kind}": (name, changes)
        for name, num_pairs in (("v3", 4), ("mixtral", 4), ("qwen3_moe", 8))
        for kind, changes in {
            "longrope": longrope(num_pairs) | {"max_position_embeddings": 128, "head_dim": 2 * num_pairs},
            "dynamic": DYNAMIC | {"head_dim": 2 * num_pairs},
            "yarn, length left alone": rope("yarn", **YARN)
            | {"max_position_embeddings": 40, "head_dim": 2 * num_pairs},
            "linear": LINEAR | {"head_dim": 2 * num_pairs},
            "llama3": rope("llama3", **LLAMA3) | {"head_dim": 2 * num_pairs},
        }.items()
    },
    "mixtral, longrope with a factor": ("mixtral", longrope(4, factor=4.0) | {"head_dim": 8}),
    "qwen3_moe, yarn, not truncated": ("qwen3_moe", rope("yarn", truncate=False, beta_fast=16.0, **YARN)),
    "v3, yarn, two scales": ("v3", rope("yarn", mscale=0.7, mscale_all_dim=1.0, **YARN)),
    "v3, biases in attention": ("v3", {"attention_bias": True}),
    "v3, plain queries and biases": ("v3", {"attention_bias": True, "q_lora_rank": None}),
    "qwen3_moe, biases in attention": ("qwen3_moe", {"attention_bias": True}),
    "mixtral, window of the context": ("mixtral", {"sliding_window": 8192}),
    "qwen3_moe, window beyond the context": ("qwen3_moe", {"use_sliding_window": True, "sliding_window": 9000}),
    "v3, no shared experts": ("v3", {"n_shared_experts": 0}),
    "v3, two shared experts": ("v3", {"n_shared_experts": 2}),
    "v3, one group": ("v3", {"n_group": 1, "topk_group": 1}),
    "mixtral, tied": ("mixtral", {"tie_word_embeddings": True}),
    "qwen3_moe, tied": ("qwen3_moe", {"tie_word_embeddings": True}),
    "qwen2_moe, no biases": ("qwen2_moe", {"qkv_bias": False}),
    "olmoe, biases in attention": ("olmoe", {"attention_bias": True}),
    "glm4_moe, yarn": ("glm4_moe", rope("yarn", partial_rotary_factor=0.5, **YARN)),
    "glm4_moe, whole heads rotated": ("glm4_moe", rope("default", partial_rotary_factor=1.0)),
    "glm4_moe_lite, two dense layers": ("glm4_moe_lite", {"mlp_layer_types": ["dense", "sparse", "dense"]}),
    "gpt_oss, one full layer": ("gpt_oss", {"layer_types": ["sliding_attention"] * 2 + ["full_attention"]}),
    "v4, linear": ("v4", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10_000.0}}),
}


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.integration)])
def test_a_variant_gives_the_tokens_of_transformers(variant: str, seed: int, tmp_path: Path) -> None:
    name, changes = VARIANTS[variant]
    assert_equal_tokens(tmp_path, save_layout(tmp_path, name, seed=seed, **changes))


def nest_rope(values: dict[str, Any]) -> None:
    """One set for a type of layers, as newer files have it."""
    values["layer_types"] = ["full_attention"] * values["num_hidden_layers"]
    values["rope_parameters"] = {"full_attention": values["rope_parameters"]}


def age_rope(values: dict[str, Any]) -> None:
    """The form before `transformers` 5."""
    found = values.pop("rope_parameters")
    values["rope_theta"] = found.pop("rope_theta")
    values["rope_scaling"] = None if found["rope_type"] == "default" else {"type": found.pop("rope_type"), **found}


def null_groups(values: dict[str, Any]) -> None:
    values |= {"n_group": None, "topk_group": None}


def null_shared(values: dict[str, Any]) -> None:
    values["n_shared_experts"] = None


def null_head_width(values: dict[str, Any]) -> None:
    values["head_dim"] = None


FORMS: dict[str, tuple[str, dict[str, Any], Change]] = {
    "rope_scaling null": ("v3", {}, age_rope),
    "rope_scaling with a type": ("qwen3_moe", rope("yarn", **YARN), age_rope),
    "longrope as before": ("mixtral", longrope(4) | {"head_dim": 8}, age_rope),
    "a rope by type of layer": ("mixtral", {**LINEAR, "head_dim": 8}, nest_rope),
    "n_group null": ("v3", {"n_group": 1, "topk_group": 1}, null_groups),
    "n_shared_experts null": ("v3", {"n_shared_experts": 0}, null_shared),
    "head_dim null beside yarn": ("mixtral", rope("yarn", **YARN) | {"head_dim": 8}, null_head_width),
}


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
@pytest.mark.parametrize("form", FORMS)
def test_a_form_of_a_configuration_means_what_it_meant(form: str, tmp_path: Path) -> None:
    name, changes, change = FORMS[form]
    model = save_layout(tmp_path, name, **changes)
    edit_config(tmp_path, change)
    assert_equal_tokens(tmp_path, model)


Tensors = dict[str, Tensor]


def drop_prefix(tensors: Tensors) -> None:
    for name in [name for name in tensors if name.startswith("model.")]:
        tensors[name.removeprefix("model.")] = tensors.pop(name)


def beside(*names: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: torch.ones(2) for name in names})


FILES: dict[str, tuple[str, Callable[[Tensors], None]]] = {
    "v3 without model.": ("v3", drop_prefix),
    "qwen3_moe without model.": ("qwen3_moe", drop_prefix),
    "mixtral without model.": ("mixtral", drop_prefix),
    "prediction as layer 3": ("v3", beside("model.layers.3.eh_proj.weight", "model.layers.3.mlp.gate.weight")),
    "prediction as mtp": ("v3", beside("mtp.0.eh_proj.weight", "model.mtp.layers.0.enorm.weight")),
    "prediction as mtp_layers": ("v3", beside("model.mtp_layers.0.hnorm.weight", "nextn_predict.0.head.weight")),
    "prediction of glm": ("glm4_moe", beside("model.layers.3.eh_proj.weight")),
    "prediction of qwen": ("qwen3_moe", beside("mtp.layers.0.self_attn.q_proj.weight")),
    "scales of keys and values": (
        "mixtral",
        beside("model.layers.0.self_attn.k_scale", "model.layers.0.self_attn.v_proj.v_scale"),
    ),
    "frequencies": ("mixtral", beside("model.layers.0.self_attn.rotary_emb.inv_freq")),
}


@pytest.mark.parametrize("variant", FILES)
def test_other_names_and_needless_tensors_change_no_token(
    variant: str, open_layout: OpenLayout, tmp_path: Path
) -> None:
    name, change = FILES[variant]
    layout = open_layout(name)
    assert_equal_tokens(with_tensors(layout, tmp_path, change), layout.model)


def quantize(tensors: Tensors, by: str) -> tuple[Tensors, Tensors]:
    """Projections in FP8 with scales of a kind, and the numbers that they stand for."""
    stored, plain = dict(tensors), dict(tensors)
    for name, tensor in tensors.items():
        if not name.endswith("_proj.weight"):
            continue
        peak = tensor.abs().amax() if by == "tensor" else tensor.abs().amax(dim=1, keepdim=True)
        scale = peak / 448.0
        stored[name] = (tensor / scale).to(torch.float8_e4m3fn)
        plain[name] = stored[name].float() * scale
        stored[f"{name}_scale"] = scale.clone()
        stored[name.replace(".weight", ".input_scale")] = torch.tensor(0.5)
    return stored, plain


GROUP = {"weights": {"num_bits": 8, "type": "float", "strategy": "channel"}}
QUANTIZED: dict[str, tuple[str, dict[str, Any]]] = {
    "fp8, one scale": ("tensor", {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}),
    "modelopt": ("tensor", {"quant_method": "modelopt", "quant_algo": "FP8"}),
    "compressed-tensors, by row": (
        "row",
        {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": GROUP}},
    ),
}


def pack_all(tensors: Tensors, pack: Callable[[Tensor], Packed]) -> tuple[Tensors, Tensors]:
    """Projections in a layout of another tool, and the numbers that they stand for."""
    stored, plain = dict(tensors), dict(tensors)
    for name, tensor in tensors.items():
        if name.endswith("_proj.weight") and tensor.shape[1] % 16 == 0 and "kv_b" not in name:
            parts, plain[name] = pack(tensor)
            del stored[name]
            stored |= {name + ending: part for ending, part in parts.items()}
    return stored, plain


COMPRESSED = {"quant_method": "compressed-tensors", "config_groups": {"a": {"weights": {"num_bits": 4, "type": "int"}}}}
PACKED: dict[str, tuple[str, dict[str, Any]]] = {
    "int4 with zero points": ("v2 lite", {**COMPRESSED, "format": "pack-quantized"}),
    "int8 by row": ("qwen2_moe", {**COMPRESSED, "format": "int-quantized"}),
    "nvfp4 of modelopt": ("glm4_moe", {"quant_method": "modelopt", "quant_algo": "NVFP4"}),
}


@pytest.mark.parametrize("layout", PACKED)
def test_packed_weights_give_the_tokens_of_what_they_stand_for(
    layout: str, open_layout: OpenLayout, tmp_path: Path
) -> None:
    name, settings = PACKED[layout]
    stored, plain = pack_all(load_file(open_layout(name).path / "model.safetensors"), PACK[layout])
    folder = with_tensors(open_layout(name), tmp_path / "stored", lambda tensors: replace_all(tensors, stored))
    edit_config(folder, lambda values: values.update(quantization_config=settings))
    oracle = with_tensors(open_layout(name), tmp_path / "plain", lambda tensors: tensors.update(plain))
    assert_equal_tokens(folder, AutoModelForCausalLM.from_pretrained(oracle, dtype=torch.float32).eval())


def replace_all(tensors: Tensors, others: Tensors) -> None:
    tensors.clear()
    tensors.update(others)


def test_the_experts_of_gpt_oss_may_be_in_mxfp4(tmp_path: Path) -> None:
    model = save_layout(tmp_path, "gpt_oss", intermediate_size=32)
    stored = load_file(tmp_path / "model.safetensors")
    for name, parameter in model.named_parameters():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            found = [pack_mxfp4(matrix.t().contiguous()) for matrix in parameter.detach()]
            parameter.data = torch.stack([plain.t() for _, plain in found])
            del stored[name]
            stored[f"{name}_blocks"] = torch.stack([parts["_packed"].unflatten(1, (-1, 16)) for parts, _ in found])
            stored[f"{name}_scales"] = torch.stack([parts["_scale"] for parts, _ in found])
    save_file(stored, tmp_path / "model.safetensors", metadata={"format": "pt"})
    edit_config(tmp_path, lambda values: values.update(quantization_config={"quant_method": "mxfp4"}))
    assert_equal_tokens(tmp_path, model)


@pytest.mark.parametrize("kind", QUANTIZED)
@pytest.mark.parametrize("name", ["v3", "qwen3_moe"])
def test_fp8_scaled_as_a_whole_or_by_row_gives_the_tokens_of_what_it_stands_for(
    kind: str, name: str, open_layout: OpenLayout, tmp_path: Path
) -> None:
    by, settings = QUANTIZED[kind]
    layout = open_layout(name)
    stored, plain = quantize(load_file(layout.path / "model.safetensors"), by)
    folder = with_tensors(layout, tmp_path / "stored", lambda tensors: tensors.update(stored))
    edit_config(folder, lambda values: values.update(quantization_config=settings))
    oracle = with_tensors(layout, tmp_path / "plain", lambda tensors: tensors.update(plain))
    assert_equal_tokens(folder, AutoModelForCausalLM.from_pretrained(oracle, dtype=torch.float32).eval())


def test_tensors_of_an_overlay_win_over_stale_copies(open_layout: OpenLayout, tmp_path: Path) -> None:
    layout = open_layout("v3")
    moved = "model.layers.1.self_attn.o_proj.weight"
    folder = with_tensors(layout, tmp_path, lambda tensors: tensors[moved].zero_())
    tensors = load_file(layout.path / "model.safetensors")
    (folder / "model.safetensors").rename(folder / "base.safetensors")
    save_file({moved: tensors[moved]}, folder / "overlay.safetensors", metadata={"format": "pt"})
    index = dict.fromkeys(tensors, "base.safetensors") | {moved: "overlay.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    assert_equal_tokens(folder, layout.model)


ROUTING = {
    "v3": ["mlp.gate.weight", "mlp.gate.e_score_correction_bias"],
    "v4": ["ffn.gate.weight", "ffn.gate.bias"],
    "mixtral": ["gate.weight"],
    "gpt_oss": ["router.weight", "router.bias"],
    "qwen3_moe": ["mlp.gate.weight"],
}


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ROUTING)
def test_a_router_that_holds_no_numbers_is_refused_at_load(
    name: str, bad: float, open_layout: OpenLayout, tmp_path: Path
) -> None:
    layout = open_layout(name)
    tensors = load_file(layout.path / "model.safetensors")
    for number, ending in enumerate(ROUTING[name]):
        routers = [key for key in tensors if key.endswith((ending, ending.replace("ffn", "mlp")))]
        routers = routers or [key for key in tensors if "e_score_correction_bias" in key]

        def poison(found: Tensors, key: str = routers[-1]) -> None:
            found[key].view(-1)[1] = bad

        folder = with_tensors(layout, tmp_path / str(number), poison)
        with pytest.raises(EngineLoadError, match=r"model\.safetensors: tensor .*expected finite numbers.* found 1 of"):
            load_engine(folder)


def test_a_table_of_experts_that_names_another_is_refused_at_load(open_layout: OpenLayout, tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        table = next(tensor for name, tensor in tensors.items() if name.endswith("tid2eid"))
        table[3, 0] = 9

    with pytest.raises(EngineLoadError, match=r"tid2eid.*expected experts from 0 to 3, found 0 to 9"):
        load_engine(with_tensors(open_layout("v4"), tmp_path, change))


@pytest.mark.parametrize("name", ["v3", "v4", "mixtral", "qwen3_moe", "gpt_oss", "v3.2 choosing entries"])
def test_the_check_without_weights_passes_what_loads_and_names_what_does_not(
    name: str, open_layout: OpenLayout, tmp_path: Path
) -> None:
    layout = open_layout(name)
    check_loadable(engine_config("torch", str(layout.path)))

    def shorten(tensors: Tensors) -> None:
        key = next(key for key in tensors if key.endswith("norm.weight"))
        tensors[key] = tensors[key][:-1].clone()

    folder = with_tensors(layout, tmp_path, shorten)
    with pytest.raises(EngineLoadError, match=r"model\.safetensors: tensor .*expected shape"):
        check_loadable(engine_config("torch", str(folder)))
