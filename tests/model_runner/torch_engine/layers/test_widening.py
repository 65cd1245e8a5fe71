"""Products of 16-bit numbers that are widened tile by tile."""

import pytest
import torch
from torch import Tensor

from moebeam.model_runner.torch_engine.layers import attention, widening
from moebeam.model_runner.torch_engine.layers.linear import make_linear
from moebeam.model_runner.torch_engine.layers.packed_linear import has_packed_linear
from moebeam.model_runner.torch_engine.layers.widening import WidenedLinear, multiply_batches
from moebeam.model_runner.torch_engine.weights.devices import Placement


def is_short(dtype: torch.dtype, device: torch.device) -> bool:
    return dtype != torch.float32 and device.type == "cpu"


@pytest.fixture
def widened(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU without 16-bit instructions, and tiles so small that every product takes several."""
    for module in (widening, attention):
        monkeypatch.setattr(module, "needs_widening", is_short)
    monkeypatch.setattr(widening, "_NUM_TILE_ELEMENTS", 40)


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.usefixtures("widened")
@pytest.mark.parametrize("bias", [None, draw(30).bfloat16()])
def test_a_widened_product_rounds_once(bias: Tensor | None) -> None:
    weight, rows = draw(30, 16).bfloat16(), draw(7, 16).bfloat16()
    found = WidenedLinear(weight, bias)(rows)
    exact = rows.double() @ weight.double().t() + (0.0 if bias is None else bias.double())
    assert torch.equal(found, exact.float().bfloat16())
    assert WidenedLinear(weight, bias)(rows[:0]).shape == (0, 30)


@pytest.mark.usefixtures("widened")
@pytest.mark.parametrize("is_transposed", [False, True])
def test_batches_are_widened_as_they_lie_in_memory(is_transposed: bool) -> None:
    left, right = draw(9, 5, 8), draw(9, 8, 12).bfloat16()
    if is_transposed:
        right = draw(9, 20, 8).bfloat16()[:, :12].transpose(1, 2)
    torch.testing.assert_close(multiply_batches(left, right), torch.bmm(left, right.float()))


@pytest.mark.usefixtures("widened")
def test_widened_keys_get_the_attention_of_float32() -> None:
    query, key = draw(6, 2, 4, 16).bfloat16(), draw(6, 11, 16).bfloat16()
    found = attention.attend(query, key, key, None)
    scores = torch.einsum("srhw,skw->srhk", query.float(), key.float()).flatten(0, 1)
    expected = torch.einsum("srhk,skw->srhw", scores.softmax(-1).unflatten(0, (6, 2)), key.float()).flatten(0, 1)
    torch.testing.assert_close(found.out / found.total.unsqueeze(-1), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(has_packed_linear(torch.bfloat16), reason="this CPU multiplies bfloat16")
def test_a_cpu_without_bfloat16_widens_its_weights() -> None:
    assert isinstance(
        make_linear([draw(4, 8).bfloat16()], Placement(torch.device("cpu"), torch.bfloat16)), WidenedLinear
    )
