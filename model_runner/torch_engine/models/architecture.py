"""The protocol of a model, and a step on the device."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from moebeam.model_runner.torch_engine.memory.cache import Cache, RingKind
from moebeam.model_runner.torch_engine.memory.read_plan import ReadPlan, plan_reads
from moebeam.model_runner.torch_engine.memory.segments import SegmentKind
from moebeam.model_runner.torch_engine.schedule.steps import Step
from moebeam.model_runner.torch_engine.weights.checkpoint_weights import CheckpointWeights
from moebeam.model_runner.torch_engine.weights.devices import Placement
from moebeam.schemas.errors import EngineLoadError


@dataclass(frozen=True, slots=True)
class StepBatch:
    """A step on the device.

    Attributes:
        token_ids, positions: int64, shape (num_rows,).
        logit_rows: int64, shape (num_logit_rows,).
        reads: one plan for each of the architecture's kinds.
        logit_reads: the same for the rows with logits, counted among themselves; the last layer computes only these.
    """

    step: Step
    token_ids: Tensor
    positions: Tensor
    logit_rows: Tensor
    reads: list[ReadPlan]
    logit_reads: list[ReadPlan]

    @property
    def num_rows(self) -> int:
        return int(self.token_ids.shape[0])

    @property
    def last_rows(self) -> Tensor | None:
        """The rows that the last layer returns: `logit_rows`, or None if that is all of them."""
        return None if self.logit_rows.shape[0] == self.token_ids.shape[0] else self.logit_rows


def place_step(step: Step, kinds: Sequence[SegmentKind], device: torch.device) -> StepBatch:
    """Copy a step to the device and plan its reads."""
    reads = [plan_reads(step.spans, index, kind, device) for index, kind in enumerate(kinds)]
    logit_reads = reads
    if len(step.logit_rows) < step.num_rows:
        logit_spans = step.logit_spans()
        logit_reads = [plan_reads(logit_spans, index, kind, device).drop_writes() for index, kind in enumerate(kinds)]
    return StepBatch(
        step,
        torch.from_numpy(step.token_ids).to(device, torch.long),
        torch.from_numpy(step.positions).to(device),
        torch.tensor(step.logit_rows, dtype=torch.long, device=device),
        reads,
        logit_reads,
    )


class Architecture(Protocol):
    """A model that extends sequences of a prefix tree.

    `kinds` and `rings` say what it keeps for a node: segments that descendants read in place, and rings that new
    nodes get a copy of.
    """

    kinds: tuple[SegmentKind, ...]
    rings: tuple[RingKind, ...]
    vocab_size: int
    context_length: int

    def extend(self, batch: StepBatch, cache: Cache) -> Tensor:
        """Compute a step's rows, keep what later rows need in the cache, and return logits.

        Returns:
            float32, shape (num_logit_rows, vocab_size).
        """
        ...

    def flops(self, num_rows: int, num_logit_rows: int) -> float:
        """Count floating point operations of a step's products with weights, without attention and head."""
        ...


ARCHITECTURES: dict[str, str] = {
    "deepseek_v3": "moebeam.model_runner.torch_engine.models.deepseek_v3:DeepseekV3",
    "deepseek_v4": "moebeam.model_runner.torch_engine.models.deepseek_v4:DeepseekV4",
    "mixtral": "moebeam.model_runner.torch_engine.models.grouped_query:GroupedQuery",
    "qwen3_moe": "moebeam.model_runner.torch_engine.models.grouped_query:GroupedQuery",
}
"""`model_type` of a configuration -> the class that runs it, called with configuration, weights and placement."""


def build_architecture(config: Any, weights: CheckpointWeights, placement: Placement) -> Architecture:
    """Build the model of a checkpoint.

    Raises:
        EngineLoadError: the model type is unknown, or the weights do not fit the configuration.
    """
    model_type = str(config.model_type)
    if model_type not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise EngineLoadError(f"engine 'torch' expected a model_type of {known}, found {model_type!r}")
    module_name, _, class_name = ARCHITECTURES[model_type].partition(":")
    build = cast(
        "Callable[[Any, CheckpointWeights, Placement], Architecture]", getattr(import_module(module_name), class_name)
    )
    return build(config, weights, placement)


def refuse_settings(config: Any, expected: Mapping[str, object]) -> None:
    """Refuse a configuration that asks for an unsupported variant.

    Raises:
        EngineLoadError: a setting has another value than the one expected.
    """
    for name, value in expected.items():
        found = getattr(config, name, value)
        if found != value:
            raise EngineLoadError(
                f"engine 'torch' expected {name} = {value!r} in the config.json of a {config.model_type}, "
                f"found {found!r}"
            )
