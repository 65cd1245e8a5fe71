import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.quantizers.quantizer_finegrained_fp8
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import DeepseekV3ForCausalLM, DeepseekV4ForCausalLM, FineGrainedFP8Config, PreTrainedModel
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from moebeam.model_runner.torch_engine.weights.checkpoint_weights import CheckpointWeights
from moebeam.model_runner.torch_engine.weights.quantized import dequantize, scale_grid
from moebeam.schemas.errors import EngineLoadError
from tests.support.models.weight_files import (
    assert_same,
    build_tiny_model,
    read_all,
    released_v4,
    save_weights,
    write_checkpoint,
)

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
FP8_CONFIG = {"quant_method": "fp8", "activation_scheme": "dynamic"}


def e4m3_value(code: int) -> float:
    """OCP 8-bit floating point specification, table 1: no infinities, one NaN of each sign."""
    sign = -1.0 if code & 0x80 else 1.0
    exponent, mantissa = (code >> 3) & 0xF, code & 0x7
    if code & 0x7F == 0x7F:
        return math.nan
    return sign * (mantissa / 8 * 2**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7))


def quantize_fp8(matrix: Tensor, block: tuple[int, int], is_ue8m0: bool) -> tuple[Tensor, Tensor]:
    """Block by block: the largest value of a block becomes e4m3's largest, 448."""
    stored = torch.empty(matrix.shape, dtype=torch.float8_e4m3fn)
    scales = torch.empty(scale_grid((matrix.shape[0], matrix.shape[1]), block))
    for row in range(scales.shape[0]):
        for column in range(scales.shape[1]):
            place = (
                slice(row * block[0], (row + 1) * block[0]),
                slice(column * block[1], (column + 1) * block[1]),
            )
            scale = matrix[place].abs().max() / 448
            scale = 2 ** scale.log2().ceil() if is_ue8m0 else scale
            scales[row, column] = scale
            stored[place] = (matrix[place] / scale).to(torch.float8_e4m3fn)
    return stored, scales.to(torch.float8_e8m0fnu) if is_ue8m0 else scales


def quantize_fp4(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """32 neighbours of a row share a power of two; the first of two values is in the low half of their byte."""
    rows = [[row[first : first + 32] for first in range(0, len(row), 32)] for row in matrix.to(torch.float64).tolist()]
    scales = [[2.0 ** math.ceil(math.log2(max(map(abs, group)) / 6)) for group in row] for row in rows]
    packed: list[list[int]] = []
    for row, row_scales in zip(rows, scales, strict=True):
        codes: list[int] = []
        for group, scale in zip(row, row_scales, strict=True):
            for value in group:
                nearest = min(range(8), key=lambda code: abs(E2M1[code] - abs(value) / scale))
                codes.append(nearest + (8 if value < 0 else 0))
        packed.append([low + 16 * high for low, high in zip(codes[::2], codes[1::2], strict=True)])
    return torch.tensor(packed, dtype=torch.uint8).view(torch.int8), torch.tensor(scales).to(torch.float8_e8m0fnu)


def expected_fp8(stored: Tensor, scales: Tensor, block: tuple[int, int]) -> Tensor:
    """Value by value, in float64, which holds every product."""
    rows, columns = torch.arange(stored.shape[0])[:, None], torch.arange(stored.shape[1])[None, :]
    return stored.double() * scales.to(torch.float32).double()[rows // block[0], columns // block[1]]


def test_every_e4m3_code_means_what_the_specification_says() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(1, 256).view(torch.float8_e4m3fn)
    found = dequantize(codes, torch.tensor([[1.0, 2.0]]), (128, 128), torch.float32)[0].tolist()
    expected = [e4m3_value(code) * (1 if code < 128 else 2) for code in range(256)]
    assert [repr(value) for value in found] == [repr(value) for value in expected]


@pytest.mark.parametrize("block", [(128, 128), (24, 20), (7, 1), (1, 32), (500, 500)])
@pytest.mark.parametrize("shape", [(1, 1), (128, 256), (300, 130), (129, 1)])
def test_partial_blocks_have_their_own_scale(shape: tuple[int, int], block: tuple[int, int]) -> None:
    torch.manual_seed(0)
    stored = torch.randn(shape).to(torch.float8_e4m3fn)
    scales = torch.rand(scale_grid(shape, block)) + 0.5
    found = dequantize(stored, scales, block, torch.float32)
    torch.testing.assert_close(found, expected_fp8(stored, scales, block).float(), rtol=0, atol=0)


@pytest.mark.parametrize("is_ue8m0", [False, True])
def test_dequantising_gives_back_what_was_quantised(is_ue8m0: bool) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(60, 45) * torch.logspace(-3, 3, 60)[:, None]
    found = dequantize(*quantize_fp8(matrix, (16, 16), is_ue8m0), (16, 16), torch.float32)
    smallest = matrix.abs().max(dim=1, keepdim=True).values.new_full((60, 45), 0.0)
    for row in range(0, 60, 16):
        for column in range(0, 45, 16):
            block = matrix[row : row + 16, column : column + 16]
            smallest[row : row + 16, column : column + 16] = block.abs().max() / 448 * 2**-8
    assert bool(((found - matrix).abs() <= matrix.abs() / 16 + smallest).all())


def test_scale_bytes_are_exponents() -> None:
    stored = torch.ones(2, 2).to(torch.float8_e4m3fn)
    found = dequantize(stored, torch.tensor([[127, 130], [120, 127]], dtype=torch.uint8), (1, 1), torch.float32)
    assert found.tolist() == [[1.0, 8.0], [2.0**-7, 1.0]]


def test_the_low_half_of_an_fp4_byte_comes_first() -> None:
    packed = torch.tensor([[0x21, 0x7F], [0x80, 0xA3]], dtype=torch.uint8)
    scales = torch.tensor([[2.0], [1.0]])
    expected = [[1.0, 2.0, -12.0, 12.0], [0.0, -0.0, 1.5, -1.0]]
    for stored in (packed, packed.view(torch.int8)):
        found = dequantize(stored, scales, (1, 32), torch.float32).tolist()
        assert repr(found) == repr(expected)


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu])
def test_fp8_and_fp4_agree_with_transformers(scale_dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    oracle = Fp8Dequantize(None)
    scales = (torch.rand(3, 2) + 0.1).to(scale_dtype)
    stored = torch.randn(48, 64).to(torch.float8_e4m3fn)
    found = dequantize(stored, scales, (16, 32), torch.bfloat16)
    torch.testing.assert_close(found, oracle._dequantize_one(stored, scales, torch.bfloat16), rtol=0, atol=0)
    packed = torch.randint(-128, 128, (3, 32), dtype=torch.int8)
    found = dequantize(packed, scales, (1, 32), torch.bfloat16)
    torch.testing.assert_close(found, oracle._dequantize_one(packed, scales, torch.bfloat16), rtol=0, atol=0)


def test_beside_the_result_only_some_rows_are_held_in_float32() -> None:
    class LargestFloat32(TorchDispatchMode):
        num_values = 0

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            for tensor in tree_leaves(result):
                if isinstance(tensor, Tensor) and tensor.dtype == torch.float32:
                    self.num_values = max(self.num_values, tensor.numel())
            return result

    for stored, block in [
        (torch.zeros(1024, 64).to(torch.float8_e4m3fn), (128, 16)),
        (torch.zeros(1024, 32).char(), (1, 32)),
    ]:
        scales = torch.ones(scale_grid((1024, 64), block))
        with LargestFloat32() as largest:
            dequantize(stored, scales, block, torch.bfloat16)
        assert 0 < largest.num_values <= 1024 * 64 // 8


def quantize_state(
    state: Mapping[str, Tensor], block: tuple[int, int], is_ue8m0: bool, linear: str, experts_fp4: str = "(?!)"
) -> dict[str, Tensor]:
    """Weights that match `linear` in FP8, those that match `experts_fp4` in FP4; the rest as it was.

    Scales are float32 beside `a.weight` as `a.weight_scale_inv`, as V3 was released; ue8m0 as `a.scale`, as V4 was.
    """
    stored: dict[str, Tensor] = {}
    for name, tensor in state.items():
        scale_name = name.removesuffix("weight") + "scale" if is_ue8m0 else f"{name}_scale_inv"
        if re.search(experts_fp4, name):
            stored[name], stored[scale_name] = quantize_fp4(tensor)
        elif re.search(linear, name):
            stored[name], stored[scale_name] = quantize_fp8(tensor, block, is_ue8m0)
        else:
            stored[name] = tensor
    assert any(tensor.dtype == torch.float8_e4m3fn for tensor in stored.values())
    return stored


V3_LINEAR = r"_proj(_with_mqa)?\.weight$"
V4_LINEAR = r"\.w(q_a|q_b|o_a|o_b|\d)\.weight$|attn\.wkv\.weight$"
V4_EXPERTS = r"\.experts\.\d+\.w\d\.weight$"


@pytest.fixture
def without_accelerate(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers asks for accelerate before it reads FP8, and does without it when it dequantises."""
    quantizer = transformers.quantizers.quantizer_finegrained_fp8
    monkeypatch.setattr(quantizer, "is_accelerate_available", lambda: True)


def assert_reads_like(model: PreTrainedModel, weights: CheckpointWeights) -> None:
    assert_same(read_all(weights, model.state_dict(), in_its_dtypes=True), model.state_dict())
    weights.check_all_used()


@pytest.mark.usefixtures("without_accelerate")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_fp8_v3_reads_as_transformers_dequantises_it(dtype: torch.dtype, tmp_path: Path) -> None:
    model = build_tiny_model("deepseek_v3")
    state = load_file(save_weights(model, tmp_path / "plain", "default") / "model.safetensors")
    config = {**model.config.to_dict(), "quantization_config": {**FP8_CONFIG, "weight_block_size": [16, 16]}}
    folder = write_checkpoint(tmp_path / "fp8", quantize_state(state, (16, 16), False, V3_LINEAR), config)
    oracle = DeepseekV3ForCausalLM.from_pretrained(
        folder, dtype=dtype, quantization_config=FineGrainedFP8Config(dequantize=True, weight_block_size=(16, 16))
    )
    assert_reads_like(oracle, CheckpointWeights.open(str(folder), "deepseek_v3", dtype))


@pytest.mark.usefixtures("without_accelerate")
@pytest.mark.parametrize("experts_fp4", ["(?!)", V4_EXPERTS])
def test_a_released_v4_reads_as_transformers_dequantises_it(experts_fp4: str, tmp_path: Path) -> None:
    model = build_tiny_model("deepseek_v4")
    config = {
        **model.config.to_dict(),
        "expert_dtype": "fp4",
        "quantization_config": {**FP8_CONFIG, "scale_fmt": "ue8m0", "weight_block_size": [16, 16]},
    }
    state = quantize_state(released_v4(model.state_dict()), (16, 16), True, V4_LINEAR, experts_fp4)
    assert state["layers.1.attn.indexer.wq_b.scale"].dtype == torch.float8_e8m0fnu
    folder = write_checkpoint(tmp_path, state, config)
    quantization = FineGrainedFP8Config(dequantize=True, weight_block_size=(16, 16), scale_fmt="ue8m0")
    oracle = DeepseekV4ForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, quantization_config=quantization)
    assert_reads_like(oracle, CheckpointWeights.open(str(folder), "deepseek_v4", torch.bfloat16))


def write_v3_experts(folder: Path, gate_up: Tensor, scales: Tensor | None, down: Tensor) -> CheckpointWeights:
    """Stacked experts with their scales, of one layer; FP8 blocks are 128 x 128, as where nothing is said."""
    tensors = {"e.gate_up_proj": gate_up, "e.down_proj": down}
    if scales is not None:
        tensors["e.gate_up_proj_scale_inv"] = scales
    return CheckpointWeights.open(str(write_checkpoint(folder, tensors)), "deepseek_v3", torch.float32)


@pytest.mark.parametrize("width", [128, 100, 150, 320])
def test_stacked_fp8_experts_read_as_single_ones(width: int, tmp_path: Path) -> None:
    """transformers makes the stack from single experts, and so joins the scales of gate and of up."""
    torch.manual_seed(0)
    singles = [[quantize_fp8(torch.randn(width, 8), (128, 128), False) for _ in range(2)] for _ in range(3)]
    gate_up = torch.stack([torch.cat([stored for stored, _ in pair]) for pair in singles])
    scales = torch.stack([torch.cat([scale for _, scale in pair]) for pair in singles])
    weights = write_v3_experts(tmp_path, gate_up, scales, torch.zeros(3, 8, width))
    for expert, pair in zip(weights.experts("e", 3, 8, width), singles, strict=True):
        for found, (stored, scale) in zip((expert.gate, expert.up), pair, strict=True):
            expected = expected_fp8(stored, scale, (128, 128)).float()
            torch.testing.assert_close(found, expected, rtol=0, atol=0)
    weights.check_all_used()


def test_blocks_that_run_from_gate_into_up_are_read(tmp_path: Path) -> None:
    """transformers' own FP8 module has room for this many scales only: 3 for 2 x 192 rows, not 2 x 2."""
    torch.manual_seed(0)
    stored, scales = quantize_fp8(torch.randn(384, 8), (128, 128), False)
    weights = write_v3_experts(tmp_path, stored[None], scales[None], torch.zeros(1, 8, 192))
    (expert,) = weights.experts("e", 1, 8, 192)
    expected = expected_fp8(stored, scales, (128, 128)).float()
    torch.testing.assert_close(torch.cat((expert.gate, expert.up)), expected, rtol=0, atol=0)


def test_stacked_fp4_experts_are_unpacked(tmp_path: Path) -> None:
    torch.manual_seed(0)
    packed, scales = quantize_fp4(torch.randn(2 * 6 * 2, 64))
    weights = write_v3_experts(tmp_path, packed.view(2, 12, 32), scales.view(2, 12, 2), torch.zeros(2, 64, 6))
    experts = weights.experts("e", 2, 64, 6)
    found = torch.cat([torch.cat((expert.gate, expert.up)) for expert in experts])
    expected = Fp8Dequantize(None)._dequantize_one(packed, scales, torch.float32)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def refusal(folder: Path, tensors: Mapping[str, Tensor], wanted: torch.dtype | None = None) -> str:
    """What is said when `a.b.weight` of shape (256, 130) is asked for."""
    weights = CheckpointWeights.open(str(write_checkpoint(folder, tensors)), "deepseek_v3", torch.bfloat16)
    with pytest.raises(EngineLoadError) as error:
        weights.get("a.b.weight", (256, 130), wanted)
    return str(error.value)


FP8 = torch.zeros(256, 130).to(torch.float8_e4m3fn)


def test_fp8_without_scales_is_refused(tmp_path: Path) -> None:
    assert "'a.b.weight': expected its scales 'a.b.weight_scale_inv'" in refusal(tmp_path, {"a.b.weight": FP8})


def test_scales_of_another_shape_are_refused(tmp_path: Path) -> None:
    message = refusal(tmp_path, {"a.b.weight": FP8, "a.b.weight_scale_inv": torch.ones(2, 1)})
    assert "'a.b.weight_scale_inv': expected shape (2, 2), found (2, 1)" in message
    fp4 = torch.zeros(256, 65, dtype=torch.int8)
    message = refusal(tmp_path, {"a.b.weight": fp4, "a.b.scale": torch.ones(256, 4)})
    assert "'a.b.weight_scale_inv' (stored as 'a.b.scale'): expected shape (256, 5), found (256, 4)" in message


def test_a_misshapen_quantised_tensor_is_refused_by_the_shape_it_stands_for(tmp_path: Path) -> None:
    fp4 = torch.zeros(256, 130, dtype=torch.uint8)
    message = refusal(tmp_path, {"a.b.weight": fp4, "a.b.weight_scale_inv": torch.ones(256, 9)})
    assert "'a.b.weight': expected shape (256, 130), found (256, 260)" in message


@pytest.mark.parametrize(("stored", "scale"), [(torch.bfloat16, torch.float32), (torch.float8_e4m3fn, torch.float64)])
def test_scales_beside_what_has_none_are_refused(stored: torch.dtype, scale: torch.dtype, tmp_path: Path) -> None:
    tensors = {"a.b.weight": torch.zeros(256, 130).to(stored), "a.b.weight_scale_inv": torch.ones(2, 2, dtype=scale)}
    message = refusal(tmp_path, tensors)
    assert re.search(r"'a\.b\.weight': expected float8_e4m3fn or int8 or uint8 with scales 'a\.b\.", message)
    assert str(stored).removeprefix("torch.") in message.split("found")[1]
    assert str(scale).removeprefix("torch.") in message.split("found")[1]


def test_fp8_does_not_become_integers(tmp_path: Path) -> None:
    tensors = {"a.b.weight": FP8, "a.b.weight_scale_inv": torch.ones(2, 2)}
    assert "'a.b.weight': expected a dtype that becomes int64, found float8" in refusal(tmp_path, tensors, torch.int64)


@pytest.mark.parametrize("shape", [(3, 2, 1), (2, 3, 1), (4, 1), (2, 2, 2)])
def test_misshapen_scales_of_a_stack_are_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    gate_up = torch.zeros(2, 200, 8).to(torch.float8_e4m3fn)
    weights = write_v3_experts(tmp_path, gate_up, torch.ones(shape), torch.zeros(2, 8, 100))
    with pytest.raises(EngineLoadError, match=r"'e\.gate_up_proj_scale_inv': expected shape .*found \("):
        weights.experts("e", 2, 8, 100)
