"""The routed experts of a layer: one product for all, batched or grouped, or one for each expert."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from moebeam.model_runner.torch_engine.layers.integer_linear import can_keep_integers
from moebeam.model_runner.torch_engine.layers.linear import Linear, make_linear
from moebeam.model_runner.torch_engine.layers.stacked_experts import ExpertStack, StackedExperts
from moebeam.model_runner.torch_engine.layers.widening import needs_widening
from moebeam.model_runner.torch_engine.weights.checkpoint_weights import CheckpointWeights, Expert
from moebeam.model_runner.torch_engine.weights.devices import Placement


def apply_swiglu(gated: Tensor, limit: float | None, gain: float | None = None) -> Tensor:
    """SwiGLU: silu(gate) * up, both clamped if the model has a limit.

    Args:
        gated: gate and up side by side; shape (num_rows, 2 * width). May be overwritten.
        limit: upper bound of the gate, and bound of `up` in both directions.
        gain: gpt-oss's, whose form is gate * sigmoid(gain * gate) * (up + 1).
    """
    gate_part, up_part = gated.chunk(2, dim=-1)
    if limit is not None:
        gate_part = gate_part.clamp(max=limit)
        up_part = up_part.clamp(min=-limit, max=limit)
    if gain is not None:
        return (gate_part * gain).sigmoid_().mul_(gate_part).mul_(up_part + 1)
    return functional.silu(gate_part).mul_(up_part)


class GatedMlp:
    """A dense SwiGLU block; also the shared experts, which every row uses."""

    def __init__(
        self,
        weights: CheckpointWeights,
        placement: Placement,
        name: str,
        *,
        hidden_size: int,
        width: int,
        limit: float | None = None,
    ) -> None:
        gate_up = [weights.get_matrix(f"{name}.{part}_proj.weight", (width, hidden_size)) for part in ("gate", "up")]
        self._gate_up = make_linear(gate_up, placement)
        self._down = make_linear([weights.get_matrix(f"{name}.down_proj.weight", (hidden_size, width))], placement)
        self._limit = limit
        self.flops_per_row = 6.0 * hidden_size * width

    def __call__(self, rows: Tensor) -> Tensor:
        """Shape (num_rows, hidden_size) to the same."""
        return self._down(apply_swiglu(self._gate_up(rows), self._limit))


class Experts:
    """Routed experts."""

    _stacked: StackedExperts | None = None

    def __init__(
        self,
        experts: Sequence[Expert],
        placement: Placement,
        *,
        limit: float | None = None,
        gain: float | None = None,
    ) -> None:
        self._num_experts = len(experts)
        self._limit = limit
        self._gain = gain
        self._grouped: _GroupedWeights | None = None
        self.flops_per_row = 6.0 * experts[0].gate.numel()
        """Of one expert."""
        self._gate_up: list[Linear] = []
        self._down: list[Linear] = []
        device = placement.device
        if device.type != "cpu" and _has_grouped_product(device, placement.dtype):
            self._grouped = _GroupedWeights(experts, placement)
            return
        if _can_stack(experts[0], placement):
            self._stacked = StackedExperts(experts, placement)
            return
        for expert in experts:
            self._gate_up.append(make_linear([expert.gate, expert.up], placement, [expert.gate_bias, expert.up_bias]))
            self._down.append(make_linear([expert.down], placement, [expert.down_bias]))

    def __call__(self, rows: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """Sum the chosen experts' outputs for each row.

        Args:
            rows: shape (num_rows, hidden_size).
            chosen: expert numbers; int64, shape (num_rows, num_chosen).
            weights: shape (num_rows, num_chosen).
        Returns:
            Shape (num_rows, hidden_size). A row's sum is in the order of `chosen`, whatever its neighbours chose.
        """
        if self._stacked is not None:
            made, places = self._stacked(rows, chosen, partial(apply_swiglu, limit=self._limit, gain=self._gain))
            return _sum_weighted(made, places, weights.float()).to(rows.dtype)
        num_rows, num_chosen = chosen.shape
        flat = chosen.reshape(-1)
        by_expert = flat.argsort(stable=True)
        gathered = rows.index_select(0, by_expert // num_chosen)  # (num_rows * num_chosen, hidden_size)
        counts = torch.bincount(flat, minlength=self._num_experts)
        made = self._run_experts(gathered, counts)
        back = torch.empty_like(by_expert)
        back[by_expert] = torch.arange(by_expert.shape[0], device=rows.device)
        return _sum_weighted(made, back.view(num_rows, num_chosen), weights.to(made.dtype))

    def _run_experts(self, gathered: Tensor, counts: Tensor) -> Tensor:
        if self._grouped is not None:
            return self._grouped(gathered, counts, self._limit, self._gain)
        num_rows: list[int] = counts.tolist()
        busy = [expert for expert, num in enumerate(num_rows) if num]
        sizes = [num_rows[expert] for expert in busy]
        parts = gathered.split(sizes)
        gated = torch.cat([self._gate_up[expert](part) for expert, part in zip(busy, parts, strict=True)])
        parts = apply_swiglu(gated, self._limit, self._gain).split(sizes)
        return torch.cat([self._down[expert](part) for expert, part in zip(busy, parts, strict=True)])


def _can_stack(expert: Expert, placement: Placement) -> bool:
    """Whether a batched product of all experts in float32 is faster than one for each, see `docs/adr/0013`."""
    if placement.device.type != "cpu" or not placement.is_packed or can_keep_integers([expert.gate], placement):
        return False
    return placement.dtype == torch.float32 or needs_widening(placement.dtype, placement.device)


def _sum_weighted(made: Tensor, places: Tensor, weights: Tensor) -> Tensor:
    """Sum for each row the rows of `made` at its `places` by its `weights`, both of shape (num_rows, num_chosen)."""
    if made.device.type == "cpu":
        # One pass: 1,024 rows of 512 take 0.12 ms, as a product 0.65 ms; in bfloat16 0.08 and 0.83 ms.
        return functional.embedding_bag(places, made, mode="sum", per_sample_weights=weights)
    picked = made.index_select(0, places.flatten()).view(*places.shape, -1)
    return torch.bmm(weights.unsqueeze(1), picked).squeeze(1)


class _GroupedWeights:
    """Experts stacked on an accelerator for grouped products."""

    def __init__(self, experts: Sequence[Expert], placement: Placement) -> None:
        self._stack = ExpertStack.copy(experts, placement)

    def __call__(self, gathered: Tensor, counts: Tensor, limit: float | None, gain: float | None) -> Tensor:
        stack, ends = self._stack, counts.cumsum(0).to(torch.int32)
        gated = _multiply_grouped(gathered, stack.gate_up, ends)
        if stack.gate_up_bias is not None:
            gated = gated + stack.gate_up_bias.repeat_interleave(counts, dim=0, output_size=gathered.shape[0])
        made = _multiply_grouped(apply_swiglu(gated, limit, gain), stack.down, ends)
        if stack.down_bias is not None:
            made = made + stack.down_bias.repeat_interleave(counts, dim=0, output_size=gathered.shape[0])
        return made


def _multiply_grouped(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    grouped: Any = functional.grouped_mm
    return grouped(rows, weights.transpose(1, 2), offs=ends)


def _has_grouped_product(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the grouped product works on this device and gives the same as a loop."""
    try:
        rows = torch.randn((24, 32), device=device).to(dtype)
        weights = torch.randn((3, 16, 32), device=device).to(dtype)
        ends = torch.tensor([8, 8, 24], dtype=torch.int32, device=device)
        found = _multiply_grouped(rows, weights, ends).float()
        expected = torch.cat([rows[:8] @ weights[0].t(), rows[8:] @ weights[2].t()]).float()
        return torch.allclose(found, expected, atol=0.5, rtol=0.05)
    except (RuntimeError, AttributeError):
        return False
