"""The layers of a model, visited in order: all in memory, or most of them read while the one before computes.

read     layer 1 | layer 2 | layer 3 | layer 1 ...      layer 0 is pinned: it was read once and stays
compute  layer 0 | layer 1 | layer 2 | layer 3 ...      a step's rows go through a layer before the next begins
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Generic, Protocol, TypeVar

import torch

from moebeam.model_runner.torch_engine.streaming.buffers import Buffers
from moebeam.model_runner.torch_engine.streaming.direct_reads import RangeReader
from moebeam.model_runner.torch_engine.streaming.layer_weights import (
    DescribedWeights,
    ExpertReads,
    ReadWeights,
    count_converted_bytes,
)
from moebeam.model_runner.torch_engine.streaming.reader import WeightReader
from moebeam.model_runner.torch_engine.streaming.units import LayerUnits, Unit, count_pinned, split_layer
from moebeam.model_runner.torch_engine.weights.checkpoint_weights import CheckpointWeights
from moebeam.model_runner.torch_engine.weights.devices import Placement
from moebeam.model_runner.torch_engine.weights.stored_tensors import STORED_DTYPES
from moebeam.schemas.errors import EngineLoadError

LayerT = TypeVar("LayerT")
BuildLayer = Callable[[CheckpointWeights, Placement, int], LayerT]
"""Called with weights, placement and the number of the layer."""


class Layers(Protocol[LayerT]):
    """The layers of a model.

    Attributes:
        described: the layers, for what they say of themselves; only `visit` gives such that compute.
        num_bytes_read: of weights, since the model was loaded.
        wait_s: seconds that computing waited for weights.
    """

    described: Sequence[LayerT]

    @property
    def num_bytes_read(self) -> int: ...

    @property
    def wait_s(self) -> float: ...

    def visit(self, num_rows: int, num_logit_rows: int, num_batches: int) -> Iterator[LayerT]:
        """Give each layer in order; it can compute until the next is asked for.

        Args:
            num_rows: that will go through all layers but the last.
            num_logit_rows: that will go through the last.
            num_batches: in how many parts they will go through a layer, one after another.
        """
        ...


def make_layers(
    build: BuildLayer[LayerT], num_layers: int, weights: CheckpointWeights, placement: Placement
) -> Layers[LayerT]:
    """Build the layers, or describe those that are read later.

    Raises:
        EngineLoadError: a tensor is missing or misshapen.
    """
    if placement.max_weight_bytes:
        return StreamedLayers(build, num_layers, weights, placement)
    return _LoadedLayers([build(weights, placement, index) for index in range(num_layers)])


class _LoadedLayers(Generic[LayerT]):
    """Layers that are all in memory."""

    num_bytes_read = 0
    wait_s = 0.0

    def __init__(self, layers: Sequence[LayerT]) -> None:
        self.described = layers

    def visit(self, num_rows: int, num_logit_rows: int, num_batches: int) -> Iterator[LayerT]:
        """See `Layers`."""
        return iter(self.described)


class StreamedLayers(Generic[LayerT]):
    """Layers of which some are read in every step.

    Weights of a layer are read as they are stored; the layer is built around them anew each time.
    """

    def __init__(
        self, build: BuildLayer[LayerT], num_layers: int, weights: CheckpointWeights, placement: Placement
    ) -> None:
        self._build = build
        self._weights = weights
        self._placement = placement
        self._num_pinned = 0
        self._reader: WeightReader | None = None
        self._names: set[str] = set()
        self._units: list[LayerUnits] = []
        self.described: Sequence[LayerT] = [self._describe(index) for index in range(num_layers)]

    @property
    def num_bytes_read(self) -> int:
        """See `Layers`."""
        return self._reader.num_bytes_read if self._reader is not None else 0

    @property
    def wait_s(self) -> float:
        """See `Layers`."""
        return self._reader.wait_s if self._reader is not None else 0.0

    def divide_memory(self) -> None:
        """Divide the memory for weights, once the rest of the model has its own.

        Raises:
            EngineLoadError: it does not hold the largest layer.
        """
        rest = self._weights.used_names - self._names
        resident = sum(self._count_converted(name) for name in rest)
        resident += max((layer.converted_bytes for layer in self._units), default=0)
        largest = max((layer.num_bytes for layer in self._units), default=0)
        found = self._placement.max_weight_bytes
        if found < resident + largest:
            raise EngineLoadError(
                f"[model] max_weight_bytes: expected at least {resident + largest:,} bytes, {largest:,} for the "
                f"largest layer as stored and {resident:,} for what stays in memory, found {found:,}"
            )
        self._num_pinned = count_pinned(self._units, found - resident)
        self._buffers = Buffers(found - resident, self._placement.device)

    def start(self, *, bypasses_cache: bool) -> None:
        """Start the thread that reads; call `divide_memory` before.

        Args:
            bypasses_cache: whether what was read shall not stay in the page cache.
        """
        self._reader = WeightReader(self._buffers, RangeReader(bypasses_cache=bypasses_cache))

    def visit(self, num_rows: int, num_logit_rows: int, num_batches: int) -> Iterator[LayerT]:
        """See `Layers`."""
        reader, num_layers = self._reader, len(self._units)
        assert reader is not None
        for index, units in enumerate(self._units):
            following = (index + 1) % num_layers
            for number in (index, following):
                is_last = number == num_layers - 1
                reader.expect(self._list_ahead(number, num_logit_rows if is_last else num_rows))
            try:
                yield self._make(index, reader, is_used_once=num_batches == 1)
            finally:
                if index >= self._num_pinned:
                    reader.release(units.all)

    def _describe(self, index: int) -> LayerT:
        """Build a layer without contents, to learn which tensors it has."""
        described = DescribedWeights(self._weights)
        placement = Placement(torch.device("meta"), self._placement.dtype, is_packed=False)
        layer = self._build(described, placement, index)
        names = described.used_names
        self._weights.mark_used(names)
        self._names |= names
        tensors = {name: self._weights.tensors[name].header for name in names}
        units = split_layer(index, tensors, described.experts_asked_for)
        dtype = self._placement.dtype
        # Until the next layer is built, the last one is still there.
        shared = 2 * _count_unlike(units.shared, dtype)
        converted = shared + max((_count_unlike(unit, dtype) for unit in units.experts), default=0)
        self._units.append(replace(units, converted_bytes=converted))
        return layer

    def _make(self, index: int, reader: WeightReader, *, is_used_once: bool) -> LayerT:
        """Build a layer around what was read, and wait for that."""
        units = self._units[index]
        is_pinned = index < self._num_pinned

        def expect(experts: list[int]) -> None:
            reader.expect([units.experts[expert] for expert in experts], is_urgent=True)

        def read(expert: int) -> CheckpointWeights:
            return ReadWeights(self._weights, reader.take(units.experts[expert]), None)

        def release(expert: int) -> None:
            if is_used_once and not is_pinned:
                reader.release([units.experts[expert]])

        found = ReadWeights(self._weights, reader.take(units.shared), ExpertReads(expect, read, release))
        placement = replace(self._placement, is_packed=False)
        return self._build(found, placement, index)

    def _list_ahead(self, index: int, num_rows: int) -> tuple[Unit, ...]:
        """The units of a layer to read before any row has chosen: with few rows none of the experts."""
        units = self._units[index]
        return units.all if num_rows >= len(units.experts) // 2 else (units.shared,)

    def _count_converted(self, name: str) -> int:
        return count_converted_bytes(self._weights.tensors[name].header, self._placement.dtype)


def _count_unlike(unit: Unit, dtype: torch.dtype) -> int:
    """Bytes of a unit's tensors of other dtypes, once they are converted."""
    converted = {name: count_converted_bytes(tensor, dtype) for name, tensor in unit.tensors.items()}
    return sum(converted[name] for name, tensor in unit.tensors.items() if STORED_DTYPES[tensor.dtype] != dtype)
