"""The routed experts of a layer: all in memory, or each read when rows have chosen it."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moebeam.model_runner.torch_engine.layers.experts import Experts, apply_swiglu
from moebeam.model_runner.torch_engine.layers.linear import make_linear
from moebeam.model_runner.torch_engine.streaming.layer_weights import DescribedWeights, ExpertReads, ReadWeights
from moebeam.model_runner.torch_engine.weights.checkpoint_weights import CheckpointWeights, Expert
from moebeam.model_runner.torch_engine.weights.devices import Placement

ReadExperts = Callable[[CheckpointWeights, str, int, int, int], Sequence[Expert]]
"""Called with weights, prefix, number of experts, hidden size and width."""


def make_experts(
    weights: CheckpointWeights,
    placement: Placement,
    prefix: str,
    num_experts: int,
    hidden_size: int,
    width: int,
    *,
    read: ReadExperts = CheckpointWeights.experts,
    limit: float | None = None,
    gain: float | None = None,
) -> Experts:
    """Make the experts of a layer.

    Args:
        prefix: such as `model.layers.1.mlp.experts`.
        read: gets them from the weights.
        limit, gain: as of `apply_swiglu`.
    Raises:
        EngineLoadError: a tensor is missing or misshapen.
    """
    if isinstance(weights, ReadWeights) and weights.expert_reads is not None:
        reads = weights.expert_reads

        def make(expert: int) -> Expert:
            return read(reads.read(expert), prefix, 1, hidden_size, width)[0]

        return _ReadExperts(make, reads, placement, num_experts, limit, gain, 6.0 * hidden_size * width)
    if isinstance(weights, DescribedWeights):
        weights.experts_asked_for = prefix, num_experts
    found = read(weights, prefix, num_experts, hidden_size, width)
    return Experts(found, placement, limit=limit, gain=gain)


class _ReadExperts(Experts):
    """Experts of which one is in use at a time."""

    def __init__(
        self,
        make: Callable[[int], Expert],
        reads: ExpertReads,
        placement: Placement,
        num_experts: int,
        limit: float | None,
        gain: float | None,
        flops_per_row: float,
    ) -> None:
        self.flops_per_row = flops_per_row
        self._num_experts = num_experts
        self._limit = limit
        self._gain = gain
        self._make = make
        self._reads = reads
        self._placement = placement

    def _run_experts(self, gathered: Tensor, counts: Tensor) -> Tensor:
        num_rows: list[int] = counts.tolist()
        busy = [expert for expert, num in enumerate(num_rows) if num]
        self._reads.expect(busy)
        made = torch.empty_like(gathered)
        first = 0
        for number in busy:
            end = first + num_rows[number]
            made[first:end] = self._run(self._make(number), gathered[first:end])
            self._reads.release(number)
            first = end
        return made

    def _run(self, expert: Expert, rows: Tensor) -> Tensor:
        gate = make_linear([expert.gate], self._placement, [expert.gate_bias])
        up = make_linear([expert.up], self._placement, [expert.up_bias])
        down = make_linear([expert.down], self._placement, [expert.down_bias])
        gated = torch.cat((gate(rows), up(rows)), dim=-1)  # joining their weights would copy these
        return down(apply_swiglu(gated, self._limit, self._gain))
