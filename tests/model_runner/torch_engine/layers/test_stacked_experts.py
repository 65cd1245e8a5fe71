"""Experts in one stack: where rows lie, and that the product for all gives what one for each gives."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from moebeam.model_runner.torch_engine.layers.experts import Experts
from moebeam.model_runner.torch_engine.layers.stacked_experts import StackedExperts, choose_depth, lay_out
from moebeam.model_runner.torch_engine.weights.checkpoint_weights import Expert
from moebeam.model_runner.torch_engine.weights.devices import Placement

NUM_EXPERTS, HIDDEN, WIDTH, NUM_CHOSEN = 6, 24, 16, 2


def draw_experts(dtype: torch.dtype, *, has_biases: bool) -> list[Expert]:
    source = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=source).mul_(0.3).to(dtype)

    biases = (WIDTH, WIDTH, HIDDEN) if has_biases else ()
    shapes = (WIDTH, HIDDEN), (WIDTH, HIDDEN), (HIDDEN, WIDTH)
    return [Expert(*(draw(*shape) for shape in shapes), *(draw(width) for width in biases)) for _ in range(NUM_EXPERTS)]


def answer_row(experts: list[Expert], row: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
    """The sum for one row, expert by expert in float32."""
    total = torch.zeros(HIDDEN)
    for number, weight in zip(chosen.tolist(), weights, strict=True):
        matrices = experts[number]
        parts = [(matrices.gate, matrices.gate_bias), (matrices.up, matrices.up_bias)]
        gate, up = (
            functional.linear(row, matrix.float(), None if bias is None else bias.float())
            for matrix, bias in parts
            if isinstance(matrix, Tensor)
        )
        assert isinstance(matrices.down, Tensor)
        bias = None if matrices.down_bias is None else matrices.down_bias.float()
        total += weight * functional.linear(functional.silu(gate) * up, matrices.down.float(), bias)
    return total


@pytest.mark.parametrize("has_biases", [False, True])
@pytest.mark.parametrize("load", ["even", "crowded", "few rows", "one row"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_a_row_gets_the_sum_of_its_experts_however_crowded_these_are(
    dtype: torch.dtype, tolerance: float, load: str, has_biases: bool
) -> None:
    experts = draw_experts(dtype, has_biases=has_biases)
    source = torch.Generator().manual_seed(2)
    num_rows = {"one row": 1, "few rows": 3}.get(load, 90)
    rows = torch.randn((num_rows, HIDDEN), generator=source).to(dtype)
    ranked = torch.rand((num_rows, NUM_EXPERTS), generator=source)
    if load == "crowded":
        ranked[:, 4] += 1.0
    chosen = ranked.topk(NUM_CHOSEN).indices
    weights = torch.rand((num_rows, NUM_CHOSEN), generator=source)
    stacked = StackedExperts(experts, Placement(torch.device("cpu"), dtype))
    mixture = Experts(experts, Placement(torch.device("cpu"), dtype))
    mixture._stacked = stacked  # pyright: ignore[reportPrivateUsage]
    found = mixture(rows, chosen, weights)
    assert found.dtype == dtype
    expected = torch.stack([answer_row(experts, *row) for row in zip(rows.float(), chosen, weights, strict=True)])
    torch.testing.assert_close(found.float(), expected, atol=tolerance, rtol=tolerance)


@given(
    chosen=st.lists(
        st.lists(st.integers(0, NUM_EXPERTS - 1), min_size=NUM_CHOSEN, max_size=NUM_CHOSEN, unique=True),
        min_size=1,
        max_size=80,
    )
)
def test_each_row_has_a_place_of_its_own_with_each_of_its_experts(chosen: list[list[int]]) -> None:
    numbers = np.array(chosen)
    layout = lay_out(numbers, NUM_EXPERTS)
    expert_at = np.arange(layout.sources.shape[0]) // max(1, layout.depth)
    first = NUM_EXPERTS * layout.depth
    for expert, start, end in layout.rest:
        assert start == first < end
        expert_at[start:end] = expert
        first = end
    assert first == layout.sources.shape[0]
    assert np.unique(layout.places).shape[0] == layout.places.size
    assert np.array_equal(expert_at[layout.places], numbers)
    assert np.array_equal(layout.sources[layout.places], np.repeat(np.arange(len(chosen))[:, None], NUM_CHOSEN, axis=1))


@pytest.mark.parametrize(
    ("counts", "depth"),
    [
        pytest.param([12] * 32, 12, id="even"),
        pytest.param([11, 13] * 16, 16, id="nearly even"),
        pytest.param([12] * 31 + [200], 12, id="one crowded"),
        pytest.param([2] + [0] * 31, 0, id="most idle"),
    ],
)
def test_idle_and_crowded_experts_cost_the_others_nothing(counts: list[int], depth: int) -> None:
    assert choose_depth(np.array(counts)) == depth
