"""The protocol of a model, and a step on the device."""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from moebeam.model_runner.torch_engine.memory.cache import Cache, RingKind
from moebeam.model_runner.torch_engine.memory.read_plan import ReadPlan, plan_reads
from moebeam.model_runner.torch_engine.memory.segments import SegmentKind
from moebeam.model_runner.torch_engine.schedule.steps import Step
from moebeam.model_runner.torch_engine.streaming.layers import Layers
from moebeam.model_runner.torch_engine.weights.checkpoint_weights import CheckpointWeights
from moebeam.model_runner.torch_engine.weights.devices import Placement


@dataclass(frozen=True, slots=True)
class StepBatch:
    """A step on the device.

    Attributes:
        token_ids, positions: int64, shape (num_rows,).
        logit_rows: int64, shape (num_logit_rows,).
        lengths: of the sequence at each row, itself included; int64, shape (num_rows,). None where no frequency depends
            on it.
        reads: one plan for each of the architecture's kinds.
        logit_reads: the same for the rows with logits, counted among themselves; the last layer computes only these.
    """

    step: Step
    token_ids: Tensor
    positions: Tensor
    lengths: Tensor | None
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


def place_step(step: Step, model: "Architecture", device: torch.device) -> StepBatch:
    """Copy a step to the device and plan its reads."""
    kinds = model.kinds
    reads = [plan_reads(step.spans, index, kind, device) for index, kind in enumerate(kinds)]
    logit_reads = reads
    if len(step.logit_rows) < step.num_rows:
        logit_spans = step.logit_spans()
        logit_reads = [plan_reads(logit_spans, index, kind, device).drop_writes() for index, kind in enumerate(kinds)]
    return StepBatch(
        step,
        torch.from_numpy(step.token_ids).to(device, torch.long),
        torch.from_numpy(step.positions).to(device),
        torch.from_numpy(step.list_lengths()).to(device) if model.find_length_class is not None else None,
        torch.tensor(step.logit_rows, dtype=torch.long, device=device),
        reads,
        logit_reads,
    )


class Architecture(Protocol):
    """A model that extends sequences of a prefix tree.

    `kinds` and `rings` say what it keeps for a node: segments that descendants read in place, and rings that new
    nodes get a copy of.

    Attributes:
        layers: what `extend` asks for.
        row_width: elements of a row between two layers.
        find_length_class: what of a prompt's number of tokens its keys depend on, see `Rotary`: prompts of different
            classes share none. None where no key depends on it.
    """

    kinds: tuple[SegmentKind, ...]
    rings: tuple[RingKind, ...]
    vocab_size: int
    row_width: int
    layers: Layers[Any]
    find_length_class: Callable[[int], int] | None

    def extend(self, batch: StepBatch, cache: Cache) -> Generator[None, Any, Tensor]:
        """Compute a step's rows and keep what later rows need in the cache.

        Yields for each layer, in order, to be sent it. It computes until the next yield.

        Returns:
            What `read_logits` takes, of the rows with logits; the first dimension is theirs.
        """
        ...

    def read_logits(self, rows: Tensor) -> Tensor:
        """Logits, float32, shape (num_rows, vocab_size), of rows that `extend` returned."""
        ...

    def flops(self, num_rows: int, num_logit_rows: int) -> float:
        """Count floating point operations of a step's products with weights, without attention and head."""
        ...


def extend_batches(model: Architecture, batches: Sequence[StepBatch], cache: Cache) -> list[Tensor]:
    """Take batches through a model, all through a layer before the next; each may continue what the one before wrote.

    Returns:
        What `Architecture.extend` returned for each.
    """
    num_rows = sum(batch.num_rows for batch in batches)
    num_logit_rows = sum(int(batch.logit_rows.shape[0]) for batch in batches)
    passes = [model.extend(batch, cache) for batch in batches]
    for one in passes:
        next(one)
    found: list[Tensor] = []
    for layer in model.layers.visit(num_rows, num_logit_rows, len(batches)):
        for one in passes:
            try:
                one.send(layer)
            except StopIteration as end:
                found.append(end.value)
    return found


ARCHITECTURES: dict[str, str] = {
    "deepseek_v2": "moebeam.model_runner.torch_engine.models.deepseek_v3:DeepseekV3",
    "deepseek_v3": "moebeam.model_runner.torch_engine.models.deepseek_v3:DeepseekV3",
    "deepseek_v32": "moebeam.model_runner.torch_engine.models.deepseek_v3:DeepseekV3",
    "deepseek_v4": "moebeam.model_runner.torch_engine.models.deepseek_v4:DeepseekV4",
    "glm4_moe": "moebeam.model_runner.torch_engine.models.grouped_query:GroupedQuery",
    "glm4_moe_lite": "moebeam.model_runner.torch_engine.models.deepseek_v3:DeepseekV3",
    "gpt_oss": "moebeam.model_runner.torch_engine.models.grouped_query:GroupedQuery",
    "mixtral": "moebeam.model_runner.torch_engine.models.grouped_query:GroupedQuery",
    "olmoe": "moebeam.model_runner.torch_engine.models.grouped_query:GroupedQuery",
    "qwen2_moe": "moebeam.model_runner.torch_engine.models.grouped_query:GroupedQuery",
    "qwen3_moe": "moebeam.model_runner.torch_engine.models.grouped_query:GroupedQuery",
}
"""`model_type` of a configuration -> the class that runs it, called with configuration, weights and placement."""


def build_architecture(config: Any, weights: CheckpointWeights, placement: Placement) -> Architecture:
    """Build the model of a checkpoint, whose model type is one of `ARCHITECTURES`.

    Raises:
        EngineLoadError: the weights do not fit the configuration.
    """
    module_name, _, class_name = ARCHITECTURES[str(config.model_type)].partition(":")
    build = cast(
        "Callable[[Any, CheckpointWeights, Placement], Architecture]", getattr(import_module(module_name), class_name)
    )
    return build(config, weights, placement)


def list_behind(config: Any) -> list[str]:
    """Patterns of tensors of the layers behind the last, which predict further tokens."""
    num_layers = int(config.num_hidden_layers)
    num_predicting = max(1, int(getattr(config, "num_nextn_predict_layers", None) or 0))
    behind = "|".join(str(num_layers + index) for index in range(num_predicting))
    return [rf"^model\.layers\.({behind})\."]
