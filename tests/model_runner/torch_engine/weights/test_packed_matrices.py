"""Whole numbers and FP4 in the layouts of other tools: what they stand for, and products with them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from moebeam.model_runner.torch_engine.layers.integer_linear import IntegerLinear, has_integer_product
from moebeam.model_runner.torch_engine.layers.linear import make_linear
from moebeam.model_runner.torch_engine.weights.checkpoint_weights import CheckpointWeights
from moebeam.model_runner.torch_engine.weights.devices import Placement
from moebeam.model_runner.torch_engine.weights.packed_matrices import GroupedIntegers
from moebeam.schemas.errors import EngineLoadError
from tests.support.models.packed_weights import LAYOUTS, Packed, pack_integers, pack_mxfp4, pack_nvfp4, store_integers

SHAPE = (64, 96)
NAME = "a.weight"


def draw_matrix(shape: tuple[int, int] = SHAPE) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def open_parts(
    folder: Path, parts: dict[str, Tensor], dtype: torch.dtype = torch.float32, *, is_meta: bool = False
) -> CheckpointWeights:
    save_file({NAME + ending: tensor for ending, tensor in parts.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    return (CheckpointWeights.open_headers if is_meta else CheckpointWeights.open)(str(folder), "mixtral", dtype)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_packed_matrix_gives_the_numbers_that_it_stands_for(layout: str, tmp_path: Path) -> None:
    parts, plain = LAYOUTS[layout](draw_matrix())
    assert (plain - draw_matrix()).abs().max() < 1.0
    weights = open_parts(tmp_path, parts)
    torch.testing.assert_close(weights.get(NAME, SHAPE), plain, atol=1e-6, rtol=1e-6)
    weights.check_all_used()
    assert isinstance(weights.get_matrix(NAME, SHAPE), GroupedIntegers) == layout.startswith("int")
    found = open_parts(tmp_path, parts, is_meta=True).get(NAME, SHAPE)
    assert (found.device.type, tuple(found.shape)) == ("meta", SHAPE)


Change = Callable[[dict[str, Tensor]], object]


def drop(ending: str) -> Change:
    return lambda parts: parts.pop(ending)


def cut(ending: str, dim: int = 0) -> Change:
    return lambda parts: parts.update({ending: parts[ending].narrow(dim, 1, parts[ending].shape[dim] - 1).clone()})


@pytest.mark.parametrize(
    ("layout", "change", "message"),
    [
        ("int4", drop("_scale"), r"expected a tensor 'a\.weight_scale'"),
        (
            "int4",
            cut("_packed"),
            r"a\.weight_packed': expected words of 4 or 8 bits .* found .63, 12.",
        ),
        ("int4", cut("_packed", 1), r"expected words of 4 or 8 bits for shape .64, 96., found .64, 11."),
        ("int4", cut("_scale"), r"expected scales for 64 rows, found shape .63, 6."),
        ("int4", cut("_scale", 1), r"expected groups of equal width in 96 columns, found 5 groups"),
        ("int4 with zero points", cut("_zero_point", 1), r"expected a zero point for each scale, found shape .64, 5."),
        ("int4 with shuffled groups", cut("_g_idx"), r"expected the group of each of 96 columns, found .95."),
        ("int8 by row", cut("_scale"), r"expected scales for 64 rows, found shape .63, 1."),
        ("mxfp4", cut("_scale", 1), r"expected bytes and scales of shapes .64, 48. and .64, 3., found .*.64, 2."),
        ("nvfp4", drop("_global_scale"), "expected one weight_global_scale or weight_scale_2 .* found none"),
    ],
)
def test_parts_that_do_not_go_together_are_refused(layout: str, change: Change, message: str, tmp_path: Path) -> None:
    parts, _ = LAYOUTS[layout](draw_matrix())
    change(parts)
    with pytest.raises(EngineLoadError, match=message):
        open_parts(tmp_path, parts).get(NAME, SHAPE)


@pytest.mark.parametrize("num_bits", [4, 8])
@pytest.mark.parametrize("has_zeros", [False, True])
@pytest.mark.parametrize("num_rows", [5, 70])
def test_products_with_packed_numbers_are_those_with_what_they_stand_for(
    num_bits: int, has_zeros: bool, num_rows: int, tmp_path: Path
) -> None:
    shape = (128, 64)
    if num_bits == 8:
        parts, plain = store_integers(draw_matrix(shape))
    else:
        parts, plain = pack_integers(draw_matrix(shape), width=32, has_zeros=has_zeros)
    matrix = open_parts(tmp_path, parts, torch.bfloat16).get_matrix(NAME, shape)
    placement, bias = Placement(torch.device("cpu"), torch.bfloat16), torch.linspace(-1, 1, 128).bfloat16()
    linear = make_linear([matrix, matrix], placement, [bias, None])
    assert isinstance(linear, IntegerLinear) == has_integer_product(num_bits)
    rows = draw_matrix((num_rows, 64)).bfloat16()
    expected = rows.float() @ plain.t()
    found = linear(rows).float()
    assert linear(rows[:0]).shape == (0, 256)
    torch.testing.assert_close(found[:, :128], expected + bias, atol=0.15, rtol=0.02)
    torch.testing.assert_close(found[:, 128:], expected, atol=0.15, rtol=0.02)


@pytest.mark.parametrize("pack", [pack_mxfp4, pack_nvfp4, pack_integers])
def test_what_no_operator_multiplies_is_unpacked_at_load(pack: Callable[[Tensor], Packed], tmp_path: Path) -> None:
    parts, plain = pack(draw_matrix())
    matrix = open_parts(tmp_path, parts).get_matrix(NAME, SHAPE)
    rows = draw_matrix((3, 96))
    found = make_linear([matrix], Placement(torch.device("cpu"), torch.float32))(rows)
    torch.testing.assert_close(found, rows @ plain.t(), atol=1e-4, rtol=1e-4)
