"""Experts of a layer as one stack on a CPU: a step's rows go through all of them in one batched product.

Threads share the experts of a batch between them, where the products of single experts, of a dozen rows each, are
split over all threads and wait for the slowest after each. Rows are laid out as a rectangle of `depth` rows for each
expert, and behind it what the rows of crowded experts have more:

    expert 0   r0 r2 .        depth 3; the places without a row repeat row 0, and nobody reads what they give
    expert 1   r1 r2 r3
    expert 2   r0 . .
    rest       r4 r5          of expert 1: a product of its own
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moebeam.model_runner.torch_engine.layers.widening import multiply_batches, multiply_rows
from moebeam.model_runner.torch_engine.weights.checkpoint_weights import Expert
from moebeam.model_runner.torch_engine.weights.devices import Placement
from moebeam.model_runner.torch_engine.weights.packed_matrices import to_tensor

Ints = npt.NDArray[np.int64]

_STACKED_ROWS, _SINGLE_ROWS, _SINGLE_ROW = 30.0, 40.0, 1.4
"""What an expert costs in a batched product before its first row, what a product of its own does, and each row there.

In rows of a batched product, measured with experts of 512 by 512 (`docs/adr/0013`).
"""
_DEPTH_MULTIPLE = 4


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the rows of a step are.

    Attributes:
        depth: rows of each expert in the rectangle; 0 if there is none.
        sources: row at each place; int64, shape (num_places,).
        places: of each row's experts; int64, shape (num_rows, num_chosen).
        rest: expert, first place and end of each product of its own.
    """

    depth: int
    sources: Ints
    places: Ints
    rest: list[tuple[int, int, int]]


def lay_out(chosen: Ints, num_experts: int) -> Layout:
    """Lay out the rows of a step, whose experts are `chosen`: shape (num_rows, num_chosen)."""
    num_chosen = chosen.shape[1]
    flat = chosen.reshape(-1)
    by_expert = flat.argsort(kind="stable")
    expert = flat[by_expert]
    counts = np.bincount(flat, minlength=num_experts)
    rank = np.arange(flat.shape[0]) - np.repeat(counts.cumsum() - counts, counts)
    depth = choose_depth(counts)
    is_rest = rank >= depth
    place = expert * depth + rank
    num_rest = int(is_rest.sum())
    place[is_rest] = num_experts * depth + np.arange(num_rest)
    sources = np.zeros(num_experts * depth + num_rest, dtype=np.int64)
    sources[place] = by_expert // num_chosen
    places = np.empty_like(place)
    places[by_expert] = place
    rest: list[tuple[int, int, int]] = []
    first = num_experts * depth
    for index, num_more in enumerate((counts - depth).clip(min=0).tolist()):
        if num_more:
            rest.append((index, first, first + num_more))
            first += num_more
    return Layout(depth, sources, places.reshape(chosen.shape), rest)


def choose_depth(counts: Ints) -> int:
    """The depth of the rectangle that costs least, for the numbers of rows of all experts."""
    depths = np.unique(-(-counts // _DEPTH_MULTIPLE)) * _DEPTH_MULTIPLE
    depths = np.concatenate(([0], depths[depths > 0]))
    more = np.maximum(counts[:, None] - depths, 0)  # (num_experts, num_depths)
    of_rest = ((more > 0) * _SINGLE_ROWS + _SINGLE_ROW * more).sum(axis=0)
    return int(depths[(of_rest + counts.shape[0] * (depths + _STACKED_ROWS) * (depths > 0)).argmin()])


@dataclass(frozen=True, slots=True)
class ExpertStack:
    """The weights of a layer's experts on a device, each kept once.

    Attributes:
        gate_up: shape (num_experts, 2 * width, hidden_size).
        down: shape (num_experts, hidden_size, width).
        gate_up_bias, down_bias: a row for each expert; None where no expert has biases.
    """

    gate_up: Tensor
    down: Tensor
    gate_up_bias: Tensor | None
    down_bias: Tensor | None

    @classmethod
    def copy(cls, experts: Sequence[Expert], placement: Placement) -> "ExpertStack":
        """Copy the weights of experts side by side."""
        width, hidden_size = experts[0].gate.shape
        dtype, device = placement.dtype, placement.device
        gate_up = torch.empty((len(experts), 2 * width, hidden_size), dtype=dtype, device=device)
        down = torch.empty((len(experts), hidden_size, width), dtype=dtype, device=device)
        for i, expert in enumerate(experts):
            gate_up[i, :width].copy_(to_tensor(expert.gate, dtype))
            gate_up[i, width:].copy_(to_tensor(expert.up, dtype))
            down[i].copy_(to_tensor(expert.down, dtype))
        gate_up_bias = _stack_biases([(expert.gate_bias, expert.up_bias) for expert in experts], device)
        down_bias = _stack_biases([(expert.down_bias,) for expert in experts], device)
        return cls(gate_up, down, gate_up_bias, down_bias)


class StackedExperts:
    """Products with all experts of a layer, in float32 whatever the weights' dtype."""

    def __init__(self, experts: Sequence[Expert], placement: Placement) -> None:
        self._stack = ExpertStack.copy(experts, placement)

    def __call__(self, rows: Tensor, chosen: Tensor, activate: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Run rows, shape (num_rows, hidden_size), through their chosen experts, shape (num_rows, num_chosen).

        Returns:
            Outputs, float32 of shape (num_places, hidden_size), and for each row the places of its experts' outputs,
            int64 of the shape of `chosen`.
        """
        stack = self._stack
        layout = lay_out(chosen.numpy(), stack.gate_up.shape[0])
        gathered = rows.float().index_select(0, torch.from_numpy(layout.sources))
        gated = _multiply(gathered, stack.gate_up, stack.gate_up_bias, layout)
        made = _multiply(activate(gated), stack.down, stack.down_bias, layout)
        return made, torch.from_numpy(layout.places)


def _multiply(rows: Tensor, weights: Tensor, bias: Tensor | None, layout: Layout) -> Tensor:
    num_experts, num_out, num_in = weights.shape
    made = rows.new_empty((rows.shape[0], num_out))
    num_stacked = num_experts * layout.depth
    if num_stacked:
        shape = (num_experts, layout.depth)
        stacked = made[:num_stacked].view(*shape, num_out)
        multiply_batches(rows[:num_stacked].view(*shape, num_in), weights.transpose(1, 2), stacked)
        if bias is not None:
            stacked.add_(bias.unsqueeze(1))
    for expert, first, end in layout.rest:
        multiply_rows(rows[first:end], weights[expert], made[first:end])
        if bias is not None:
            made[first:end].add_(bias[expert])
    return made


def _stack_biases(biases: Sequence[tuple[Tensor | None, ...]], device: torch.device) -> Tensor | None:
    """Join each expert's biases into a row: shape (num_experts, num_out); None where no expert has any."""
    rows = [torch.cat(found) for parts in biases if (found := [part for part in parts if part is not None])]
    return torch.stack(rows).to(device) if rows else None
