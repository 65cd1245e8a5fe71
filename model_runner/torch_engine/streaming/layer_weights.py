"""What a layer sees as its checkpoint: at first a description of it, later what was read of it."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from moebeam.model_runner.checkpoint.weight_files import StoredTensor
from moebeam.model_runner.torch_engine.weights.checkpoint_weights import CheckpointWeights
from moebeam.model_runner.torch_engine.weights.quantized import FP4_DTYPES, QUANTIZED_DTYPES
from moebeam.model_runner.torch_engine.weights.stored_tensors import STORED_DTYPES, Stored


class DescribedWeights(CheckpointWeights):
    """A checkpoint without contents, which notes what a layer asks for.

    Routers and tables of experts are checked as if the layer were loaded.

    Attributes:
        experts_asked_for: prefix of the experts' names and their number; None if the layer has none.
    """

    def __init__(self, whole: CheckpointWeights) -> None:
        described = {name: Stored(stored.header) for name, stored in whole.tensors.items()}
        super().__init__(whole._path, described, whole.dtype, whole._fp8_block)
        self._whole = whole
        self.experts_asked_for: tuple[str, int] | None = None

    def get_routing(self, name: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        """As of `CheckpointWeights`."""
        self._whole.get_routing(name, shape, dtype)
        return self.get(name, shape, dtype)

    def get_choices(self, name: str, shape: tuple[int, ...], num_experts: int) -> Tensor:
        """As of `CheckpointWeights`."""
        self._whole.get_choices(name, shape, num_experts)
        return self.get(name, shape, torch.int64)


class ReadWeights(CheckpointWeights):
    """Tensors that were read: a layer's without its experts, or those of one expert, numbered 0.

    Attributes:
        expert_reads: reads the layer's; None if these are an expert's own.
    """

    def __init__(self, whole: CheckpointWeights, tensors: Mapping[str, Stored], experts: "ExpertReads | None") -> None:
        super().__init__(whole._path, tensors, whole.dtype, whole._fp8_block)
        self.expert_reads = experts


class ExpertReads:
    """Reads the experts of a layer that is being computed.

    Args:
        expect: announces experts that will be asked for.
        read: the weights of one.
        release: gives up one that nobody asks for again in this step.
    """

    def __init__(
        self,
        expect: Callable[[list[int]], None],
        read: Callable[[int], CheckpointWeights],
        release: Callable[[int], None],
    ) -> None:
        self.expect = expect
        self.read = read
        self.release = release


def count_converted_bytes(tensor: StoredTensor, dtype: torch.dtype) -> int:
    """The most that a tensor takes once it is of a dtype: packed numbers are counted as unpacked."""
    stored = STORED_DTYPES[tensor.dtype]
    if stored == dtype:
        return tensor.num_bytes
    if stored == torch.int32:  # eight numbers of four bits
        return 2 * tensor.num_bytes * dtype.itemsize
    num_elements = tensor.num_bytes // stored.itemsize
    if stored in FP4_DTYPES:
        num_elements *= 2
    return max(tensor.num_bytes, num_elements * dtype.itemsize) if _is_number(stored) else tensor.num_bytes


def _is_number(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype in QUANTIZED_DTYPES
