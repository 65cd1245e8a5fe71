"""Mixtures of experts: how a row's experts are chosen, and what is added to their outputs.

    softmax             Mixtral, Qwen2- and Qwen3-MoE, OLMoE; DeepSeek-V2 (arXiv 2405.04434), maybe of the best groups
    sigmoid             DeepSeek-V3 (arXiv 2412.19437), V3.2, GLM-4.5 and 4.7-Flash: a bias affects the choice alone
    softmax of chosen   gpt-oss (arXiv 2508.10925)

Settings and roundings are those of `transformers`.
"""

import math
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from moebeam.model_runner.torch_engine.layers.experts import Experts, GatedMlp
from moebeam.model_runner.torch_engine.streaming.experts import make_experts
from moebeam.model_runner.torch_engine.weights.checkpoint_weights import CheckpointWeights
from moebeam.model_runner.torch_engine.weights.devices import Placement
from moebeam.model_runner.torch_engine.weights.interleaved_experts import read_interleaved_experts


class Router(Protocol):
    """Chooses `num_chosen` experts for each row."""

    num_chosen: int
    flops_per_row: float

    def __call__(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Rows, shape (num_rows, hidden_size), to numbers and weights of experts, both (num_rows, num_chosen)."""
        ...


class Mixture:
    """Routed experts, and an expert that every row uses, if there is one."""

    def __init__(self, router: Router, experts: Experts, shared: GatedMlp | None, shared_gate: Tensor | None) -> None:
        """
        Args:
            shared_gate: by which each row weighs the shared expert; shape (1, hidden_size). None: in full.
        """
        self._route = router
        self._experts = experts
        self._shared = shared
        self._shared_gate = shared_gate
        self.flops_per_row = router.flops_per_row + router.num_chosen * experts.flops_per_row
        self.flops_per_row += 0.0 if shared is None else shared.flops_per_row

    def __call__(self, rows: Tensor) -> Tensor:
        """Shape (num_rows, hidden_size) to the same."""
        made = self._experts(rows, *self._route(rows))
        if self._shared is None:
            return made
        added = self._shared(rows)
        if self._shared_gate is not None:
            added = functional.linear(rows, self._shared_gate).sigmoid() * added
        return made + added


def make_mixture(config: Any, weights: CheckpointWeights, placement: Placement, name: str) -> Mixture:
    """Make the mixture of a layer, as a configuration has it.

    Args:
        name: such as `model.layers.1.mlp`.
    Raises:
        EngineLoadError: a weight is missing or misshapen, or a router holds no finite numbers.
    """
    make = {"gpt_oss": _make_gpt_oss, **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe", "olmoe"), _make_softmax)}
    return make.get(str(config.model_type), _make_deepseek)(config, weights, placement, name)


def _make_softmax(config: Any, weights: CheckpointWeights, placement: Placement, name: str) -> Mixture:
    device, hidden_size, model_type = placement.device, int(config.hidden_size), str(config.model_type)
    num_experts = int(config.num_local_experts if model_type == "mixtral" else config.num_experts)
    width = int(config.moe_intermediate_size if model_type.startswith("qwen") else config.intermediate_size)
    weight = weights.get_routing(f"{name}.gate.weight", (num_experts, hidden_size)).to(device)
    is_normed = bool(getattr(config, "norm_topk_prob", True))
    router = _SoftmaxRouter(weight, int(config.num_experts_per_tok), is_normed=is_normed)
    experts = make_experts(weights, placement, f"{name}.experts", num_experts, hidden_size, width)
    if model_type != "qwen2_moe":
        return Mixture(router, experts, None, None)
    shared_width = int(config.shared_expert_intermediate_size)
    shared = GatedMlp(weights, placement, f"{name}.shared_expert", hidden_size=hidden_size, width=shared_width)
    return Mixture(
        router, experts, shared, weights.get(f"{name}.shared_expert_gate.weight", (1, hidden_size)).to(device)
    )


def _make_gpt_oss(config: Any, weights: CheckpointWeights, placement: Placement, name: str) -> Mixture:
    device, hidden_size = placement.device, int(config.hidden_size)
    num_experts, width = int(config.num_local_experts), int(config.intermediate_size)
    weight = weights.get_routing(f"{name}.router.weight", (num_experts, hidden_size)).to(device)
    bias = weights.get_routing(f"{name}.router.bias", (num_experts,)).to(device)
    router = _ChosenSoftmaxRouter(weight, bias, int(config.num_experts_per_tok))
    experts = make_experts(
        weights,
        placement,
        f"{name}.experts",
        num_experts,
        hidden_size,
        width,
        read=read_interleaved_experts,
        limit=float(config.swiglu_limit),
        gain=float(config.swiglu_alpha),
    )
    return Mixture(router, experts, None, None)


def _make_deepseek(config: Any, weights: CheckpointWeights, placement: Placement, name: str) -> Mixture:
    device, hidden_size = placement.device, int(config.hidden_size)
    num_experts, num_shared = int(config.n_routed_experts), int(config.n_shared_experts)
    width, num_chosen = int(config.moe_intermediate_size), int(config.num_experts_per_tok)
    scale, groups = float(config.routed_scaling_factor), (int(config.n_group or 1), int(config.topk_group or 1))
    weight = weights.get_routing(f"{name}.gate.weight", (num_experts, hidden_size), torch.float32).to(device)
    router: Router
    if config.model_type == "deepseek_v2":
        groups = groups if config.topk_method == "group_limited_greedy" else (1, 1)
        router = _SoftmaxRouter(weight, num_chosen, groups=groups, scale=scale)
    else:
        bias = weights.get_routing(f"{name}.gate.e_score_correction_bias", (num_experts,), torch.float32).to(device)
        is_normed = bool(config.norm_topk_prob)
        router = _SigmoidRouter(weight, bias, num_chosen, groups=groups, is_normed=is_normed, scale=scale)
    experts = make_experts(weights, placement, f"{name}.experts", num_experts, hidden_size, width)
    shared: GatedMlp | None = None
    if num_shared:
        shared = GatedMlp(
            weights, placement, f"{name}.shared_experts", hidden_size=hidden_size, width=width * num_shared
        )
    return Mixture(router, experts, shared, None)


class _SoftmaxRouter:
    """The likeliest experts by the softmax over all, of the best groups if there are several."""

    def __init__(
        self,
        weight: Tensor,
        num_chosen: int,
        *,
        is_normed: bool = False,
        groups: tuple[int, int] = (1, 1),
        scale: float = 1.0,
    ) -> None:
        self._weight = weight
        self.num_chosen = num_chosen
        self.flops_per_row = 2.0 * weight.numel()
        self._is_normed = is_normed
        self._num_groups, self._num_chosen_groups = groups
        self._scale = scale

    def __call__(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        logits = functional.linear(rows.to(self._weight.dtype), self._weight)
        shares = logits.float().softmax(dim=-1)  # (num_rows, num_experts)
        if self._num_groups > 1:
            best = shares.view(rows.shape[0], self._num_groups, -1).amax(dim=-1)
            shares = _mask_other_groups(shares, best, self._num_chosen_groups, 0.0)
        weights, chosen = shares.topk(self.num_chosen, dim=-1)
        if self._is_normed:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return chosen, weights * self._scale if self._scale != 1.0 else weights


class _SigmoidRouter:
    """The best experts by sigmoid plus a bias, weighted without the bias; groups are ranked by their best two."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor,
        num_chosen: int,
        *,
        groups: tuple[int, int],
        is_normed: bool,
        scale: float,
    ) -> None:
        self._weight = weight
        self._bias = bias
        self.num_chosen = num_chosen
        self.flops_per_row = 2.0 * weight.numel()
        self._num_groups, self._num_chosen_groups = groups
        self._is_normed = is_normed
        self._scale = scale

    def __call__(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        scores = functional.linear(rows.float(), self._weight).sigmoid()  # (num_rows, num_experts)
        ranked = scores + self._bias
        if self._num_groups > 1:
            best = ranked.view(rows.shape[0], self._num_groups, -1).topk(2, dim=-1).values.sum(-1)
            ranked = _mask_other_groups(ranked, best, self._num_chosen_groups, -math.inf)
        chosen = ranked.topk(self.num_chosen, dim=-1, sorted=False).indices
        weights = scores.gather(1, chosen)
        if self._is_normed:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return chosen, weights * self._scale


class _ChosenSoftmaxRouter:
    """The best experts by their logits, weighted by the softmax over these alone."""

    def __init__(self, weight: Tensor, bias: Tensor, num_chosen: int) -> None:
        self._weight = weight
        self._bias = bias
        self.num_chosen = num_chosen
        self.flops_per_row = 2.0 * weight.numel()

    def __call__(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        logits = functional.linear(rows, self._weight, self._bias)  # (num_rows, num_experts)
        best, chosen = logits.topk(self.num_chosen, dim=-1)
        return chosen, best.softmax(dim=-1)


def _mask_other_groups(scores: Tensor, of_groups: Tensor, num_chosen: int, value: float) -> Tensor:
    """Give the experts of all but the best groups a score.

    Args:
        scores: shape (num_rows, num_experts).
        of_groups: what groups are ranked by; shape (num_rows, num_groups).
    """
    best = of_groups.topk(num_chosen, dim=-1, sorted=False).indices
    is_in = torch.zeros_like(of_groups, dtype=torch.bool).scatter_(1, best, True)
    return scores.unflatten(1, (of_groups.shape[1], -1)).masked_fill(~is_in.unsqueeze(-1), value).flatten(1)
