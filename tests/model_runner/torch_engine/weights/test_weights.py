import json
import re
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from moebeam.model_runner.torch_engine.weights.checkpoint_weights import CheckpointWeights
from moebeam.schemas.errors import EngineLoadError
from tests.support.models.weight_files import (
    EXPERT_WIDTH,
    HIDDEN_SIZE,
    NUM_EXPERTS,
    Naming,
    assert_same,
    build_tiny_model,
    read_all,
    save_weights,
    write_checkpoint,
)

MODEL_TYPES = ["deepseek_v3", "deepseek_v4", "mixtral", "qwen3_moe"]
NAMINGS = [(model_type, naming) for model_type in MODEL_TYPES for naming in ("modules", "default")]

tiny_model = cache(build_tiny_model)


def open_weights(
    folder: Path, model_type: str = "deepseek_v3", dtype: torch.dtype = torch.float32
) -> CheckpointWeights:
    return CheckpointWeights.open(str(folder), model_type, dtype)


def save_shards(model: PreTrainedModel, folder: Path, naming: Naming = "default") -> dict[str, str]:
    """A checkpoint in several files; gives its index."""
    save_weights(model, folder, naming, max_shard_size="20KB")
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(index.values())) > 2
    return index


@pytest.mark.parametrize(("model_type", "naming"), [*NAMINGS, ("deepseek_v4", "released")])
def test_every_tensor_is_found_in_every_naming(model_type: str, naming: Naming, tmp_path: Path) -> None:
    model = tiny_model(model_type)
    weights = open_weights(save_weights(model, tmp_path, naming), model_type)
    assert_same(read_all(weights, model.state_dict()), model.state_dict())
    weights.check_all_used()


@pytest.mark.parametrize(("model_type", "naming"), NAMINGS)
def test_shards_give_what_one_file_gives(model_type: str, naming: Naming, tmp_path: Path) -> None:
    model = tiny_model(model_type)
    save_shards(model, tmp_path, naming)
    weights = open_weights(tmp_path, model_type)
    assert_same(read_all(weights, model.state_dict()), model.state_dict())
    weights.check_all_used()


def test_the_default_naming_keeps_experts_apart_and_the_modules_naming_stacks_them(tmp_path: Path) -> None:
    """What the tests above rest on: both ways through `experts` are taken."""
    model = tiny_model("mixtral")
    apart = load_file(save_weights(model, tmp_path / "default", "default") / "model.safetensors")
    assert "model.layers.0.block_sparse_moe.experts.3.w2.weight" in apart
    stacked = load_file(save_weights(model, tmp_path / "modules", "modules") / "model.safetensors")
    assert "model.layers.0.mlp.experts.gate_up_proj" in stacked


def test_floats_become_the_dtype_of_open_and_integers_stay(tmp_path: Path) -> None:
    model = tiny_model("deepseek_v4")
    weights = open_weights(save_weights(model, tmp_path, "default"), "deepseek_v4", torch.bfloat16)
    state = model.state_dict()
    expected = {
        name: tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor for name, tensor in state.items()
    }
    assert torch.int64 in {tensor.dtype for tensor in expected.values()}
    assert_same(read_all(weights, state), expected)


def test_a_wanted_dtype_goes_before_that_of_open(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, {"a": torch.randn(3), "table": torch.arange(3, dtype=torch.int32)})
    weights = open_weights(folder, dtype=torch.bfloat16)
    assert weights.get("a", (3,), torch.float32).dtype == torch.float32
    assert weights.get("table", (3,), torch.int64).tolist() == [0, 1, 2]
    assert weights.get("table", (3,)).dtype == torch.int32


def test_a_tied_head_is_not_there(tmp_path: Path) -> None:
    weights = open_weights(write_checkpoint(tmp_path, {"model.embed_tokens.weight": torch.zeros(2, 2)}))
    assert weights.has("model.embed_tokens.weight")
    assert not weights.has("lm_head.weight")


def test_a_scale_that_belongs_to_no_weight_keeps_its_name(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, {"layers.0.attn_hc.scale": torch.ones(3)})
    assert open_weights(folder, "deepseek_v4").has("model.layers.0.attn_hc.scale")


def mapped_files(tensor: Tensor) -> list[str]:
    """The files that the addresses of a tensor's first and last byte are mapped from."""
    found: list[str] = []
    for address in (tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes - 1):
        for line in Path("/proc/self/maps").read_text().splitlines():
            first, last = (int(end, 16) for end in line.split()[0].split("-"))
            if first <= address < last:
                found.append(line.split(maxsplit=5)[5] if line.count(" ") > 5 else "")
    return found


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("naming", ["modules", "default"])
def test_tensors_of_the_wanted_dtype_stay_in_the_file(naming: Naming, tmp_path: Path) -> None:
    model = build_tiny_model("deepseek_v3").to(torch.bfloat16)
    file = str(save_weights(model, tmp_path, naming) / "model.safetensors")
    weights = open_weights(tmp_path, dtype=torch.bfloat16)
    tensors = [weights.get("model.embed_tokens.weight", (40, HIDDEN_SIZE))]
    for expert in weights.experts("model.layers.1.mlp.experts", NUM_EXPERTS, HIDDEN_SIZE, EXPERT_WIDTH):
        tensors += [expert.gate, expert.up, expert.down]
    for tensor in tensors:
        assert mapped_files(tensor) == [file, file]
    converted = weights.get("model.embed_tokens.weight", (40, HIDDEN_SIZE), torch.float32)
    assert file not in mapped_files(converted)


def test_tensors_outlive_the_weights_and_writing_leaves_the_file_alone(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"a": torch.arange(4.0)})
    weights = open_weights(tmp_path)
    tensor = weights.get("a", (4,))
    del weights
    tensor += 1
    assert tensor.tolist() == [1.0, 2.0, 3.0, 4.0]
    assert open_weights(tmp_path).get("a", (4,)).tolist() == [0.0, 1.0, 2.0, 3.0]


def test_a_tensor_that_begins_between_two_values_is_read(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {})
    header = json.dumps(
        {
            "odd": {"dtype": "U8", "shape": [3], "data_offsets": [0, 3]},
            "a": {"dtype": "F32", "shape": [2], "data_offsets": [3, 11]},
        }
    ).encode()
    content = len(header).to_bytes(8, "little") + header + b"\7\7\7" + torch.tensor([1.5, -2.0]).numpy().tobytes()
    (tmp_path / "model.safetensors").write_bytes(content)
    tensor = open_weights(tmp_path).get("a", (2,))
    assert tensor.tolist() == [1.5, -2.0]
    assert tensor.data_ptr() % 4 == 0


def assert_refused(message: str, *parts: str) -> None:
    for part in parts:
        assert part in message, message


def test_a_missing_tensor_is_named_with_what_is_beside_it(tmp_path: Path) -> None:
    names = [*(f"model.layers.0.mlp.{i}" for i in range(7)), "model.layers.0.mlp_norm"]
    write_checkpoint(tmp_path, {name: torch.zeros(1) for name in names})
    with pytest.raises(EngineLoadError) as error:
        open_weights(tmp_path).get("model.layers.0.mlp.gate.weight", (4, 32))
    assert_refused(str(error.value), str(tmp_path), "'model.layers.0.mlp.gate.weight'", "(4, 32)", "found none")
    assert_refused(str(error.value), "model.layers.0.mlp.4 and 2 more")


@pytest.mark.parametrize(("naming", "lost"), [("modules", "down_proj"), ("default", "2.up_proj.weight")])
def test_a_missing_expert_is_named(naming: Naming, lost: str, tmp_path: Path) -> None:
    prefix = "model.layers.1.mlp.experts"
    file = save_weights(tiny_model("deepseek_v3"), tmp_path, naming) / "model.safetensors"
    tensors = load_file(file)
    del tensors[f"{prefix}.{lost}"]
    save_file(tensors, file)
    with pytest.raises(EngineLoadError, match=re.escape(f"'{prefix}.{lost}'")):
        open_weights(tmp_path).experts(prefix, NUM_EXPERTS, HIDDEN_SIZE, EXPERT_WIDTH)


def test_a_misshapen_tensor_is_named_with_both_shapes_and_its_stored_name(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"layers.0.attn.wq_a.weight": torch.zeros(3, 5)})
    with pytest.raises(EngineLoadError) as error:
        open_weights(tmp_path, "deepseek_v4").get("model.layers.0.self_attn.q_a_proj.weight", (5, 3))
    assert_refused(str(error.value), "model.safetensors: tensor 'model.layers.0.self_attn.q_a_proj.weight'")
    assert_refused(str(error.value), "stored as 'layers.0.attn.wq_a.weight'", "shape (5, 3)", "found (3, 5)")


@pytest.mark.parametrize(
    ("naming", "num_experts", "expert_width"),
    [("modules", NUM_EXPERTS - 1, EXPERT_WIDTH), ("modules", NUM_EXPERTS, 8), ("default", NUM_EXPERTS, 8)],
)
def test_misshapen_experts_are_named(naming: Naming, num_experts: int, expert_width: int, tmp_path: Path) -> None:
    weights = open_weights(save_weights(tiny_model("deepseek_v3"), tmp_path, naming))
    with pytest.raises(EngineLoadError, match=r"tensor 'model\.layers\.1\.mlp\.experts\..*expected shape"):
        weights.experts("model.layers.1.mlp.experts", num_experts, HIDDEN_SIZE, expert_width)


def test_tensors_that_nothing_asked_for_are_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"a": torch.zeros(1), **{f"more.0.b{i}": torch.zeros(1) for i in range(7)}})
    weights = open_weights(tmp_path)
    with pytest.raises(EngineLoadError, match=r"found 8 more: .*model\.safetensors: tensor 'a'.* and 3 more"):
        weights.check_all_used()
    weights.get("a", (1,))
    with pytest.raises(EngineLoadError, match=r"found 7 more: .*'more\.0\.b0'"):
        weights.check_all_used(["^p"])
    weights.check_all_used([r"^more\."])


def test_one_expert_too_many_is_left_over(tmp_path: Path) -> None:
    weights = open_weights(save_weights(tiny_model("qwen3_moe"), tmp_path, "default"), "qwen3_moe")
    weights.experts("model.layers.1.mlp.experts", NUM_EXPERTS - 1, HIDDEN_SIZE, EXPERT_WIDTH)
    with pytest.raises(EngineLoadError, match=r"'model\.layers\.1\.mlp\.experts\.3\.down_proj\.weight'"):
        weights.check_all_used(
            [r"^model\.layers\.0\.", "_proj.weight(?<!experts.3.down_proj.weight)$", "norm", "embed"]
        )


@pytest.mark.parametrize(
    ("stored", "wanted"),
    [
        (torch.int64, torch.float32),
        (torch.float32, torch.int64),
        (torch.int64, torch.int32),
        (torch.int8, torch.uint8),
        (torch.float8_e5m2, None),
    ],
)
def test_a_dtype_that_would_change_values_is_refused(
    stored: torch.dtype, wanted: torch.dtype | None, tmp_path: Path
) -> None:
    write_checkpoint(tmp_path, {"model.a": torch.ones(2).to(stored)})
    with pytest.raises(EngineLoadError, match=rf"tensor 'model\.a': .*found {str(stored).removeprefix('torch.')}$"):
        open_weights(tmp_path).get("model.a", (2,), wanted)


def test_a_dtype_that_torch_has_not_is_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {})
    header = json.dumps({"model.a": {"dtype": "F6_E2M3", "shape": [4], "data_offsets": [0, 3]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\0\0\0")
    with pytest.raises(EngineLoadError, match=r"tensor 'model\.a': expected a dtype that torch has.*F6_E2M3"):
        open_weights(tmp_path).get("model.a", (4,))


def test_two_names_for_one_tensor_are_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"head.weight": torch.zeros(1), "lm_head.weight": torch.zeros(1)})
    with pytest.raises(EngineLoadError, match=r"'lm_head\.weight': .*'head\.weight'"):
        open_weights(tmp_path, "deepseek_v4")


@pytest.mark.parametrize("content", [None, b"", b"no safetensors file, whatever its name says"])
def test_a_damaged_file_is_named(content: bytes | None, tmp_path: Path) -> None:
    file = write_checkpoint(tmp_path, {"a": torch.zeros(100)}) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] if content is None else content)
    with pytest.raises(EngineLoadError, match=rf"{re.escape(str(file))}: expected a whole safetensors file"):
        open_weights(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "gptq"}, r'\.quant_method: .*"fp8".*found "gptq"'),
        ({"quant_method": "fp8", "weight_block_size": 128}, r"\.weight_block_size: .*found 128"),
        ({"quant_method": "fp8", "weight_block_size": [128, 0]}, r"\.weight_block_size\.1: .*0"),
        ({"quant_method": "modelopt", "quant_algo": "W4A8_AWQ"}, r'\.quant_algo: .*found "W4A8_AWQ"'),
        ({"quant_method": "compressed-tensors", "format": "marlin-24", "config_groups": {}}, r"\.format: .*marlin-24"),
        (
            {
                "quant_method": "compressed-tensors",
                "format": "pack-quantized",
                "config_groups": {"a": {"weights": {"num_bits": 2, "type": "int"}}},
            },
            r"\.config_groups\.a\.weights\.num_bits: .*found 2",
        ),
        ("fp8", ': expected an object or null, found "fp8"'),
    ],
)
def test_a_quantisation_of_another_kind_is_refused(settings: object, message: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"a": torch.zeros(1)}, {"quantization_config": settings})
    with pytest.raises(EngineLoadError, match=rf"config\.json: quantization_config{message}"):
        open_weights(tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(EngineLoadError, match=rf"{re.escape(str(tmp_path))}: expected a model\.safetensors or"):
        open_weights(tmp_path)


def test_an_index_without_a_map_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": 1}}')
    with pytest.raises(EngineLoadError, match=r"index\.json: weight_map\.a: .*found 1"):
        open_weights(tmp_path)


def test_a_model_type_or_a_store_that_is_unknown_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, {"a": torch.zeros(1)})
    with pytest.raises(EngineLoadError, match=r"'deepseek_v4'.*found 'llama'"):
        open_weights(tmp_path, "llama")
    with pytest.raises(EngineLoadError, match="s3://bucket/model: expected a folder on a local disk"):
        CheckpointWeights.open("s3://bucket/model", "mixtral", torch.float32)
    with pytest.raises(ValueError, match="found int8"):
        open_weights(tmp_path, dtype=torch.int8)
    assert CheckpointWeights.open(f"file://{tmp_path}", "mixtral", torch.float32).has("a")
