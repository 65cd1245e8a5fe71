"""What is read at once: the tensors of a layer that every row needs, or those of one of its experts.

A unit is some ranges of files, laid one behind another in a buffer; a tensor is a view of it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from moebeam.model_runner.checkpoint.weight_files import StoredTensor

PAGE_BYTES = 4096
"""Reads that bypass the page cache begin and end at multiples of it."""

_MAX_GAP_BYTES = 16 * PAGE_BYTES
"""Between tensors that are read together, although nobody needs what lies between."""


@dataclass(frozen=True, slots=True)
class FileRange:
    """Bytes `[begin, end)` of a file, and where they go in the buffer; all are multiples of `PAGE_BYTES`.

    `last_byte` is where the last tensor ends; the file may end there, too.
    """

    file: str
    begin: int
    end: int
    place: int
    last_byte: int


@dataclass(frozen=True, slots=True)
class Unit:
    """Tensors that are read together.

    Attributes:
        expert: None for what all rows of the layer need.
        tensors: name -> the tensor, or an expert's part of a stack. Names are those of a layer with this one expert.
        places: name -> its first byte in the buffer.
        num_bytes: of the buffer.
    """

    layer: int
    expert: int | None
    tensors: Mapping[str, StoredTensor]
    places: Mapping[str, int]
    ranges: tuple[FileRange, ...]
    num_bytes: int

    @property
    def key(self) -> tuple[int, int]:
        """What it is told apart by."""
        return self.layer, -1 if self.expert is None else self.expert


def make_unit(layer: int, expert: int | None, tensors: Mapping[str, StoredTensor]) -> Unit:
    """Lay tensors out in a buffer, as they lie in their files."""
    by_place = sorted(tensors.items(), key=lambda item: (item[1].file, item[1].offset))
    ranges: list[FileRange] = []
    places: dict[str, int] = {}
    for name, tensor in by_place:
        begin = tensor.offset // PAGE_BYTES * PAGE_BYTES
        last_byte = tensor.offset + tensor.num_bytes
        end = -(-last_byte // PAGE_BYTES) * PAGE_BYTES
        last = ranges[-1] if ranges else None
        if last is not None and last.file == tensor.file and begin <= last.end + _MAX_GAP_BYTES:
            ranges[-1] = replace(last, end=max(last.end, end), last_byte=max(last.last_byte, last_byte))
        else:
            place = last.place + last.end - last.begin if last is not None else 0
            ranges.append(FileRange(tensor.file, begin, end, place, last_byte))
        places[name] = ranges[-1].place + tensor.offset - ranges[-1].begin
    num_bytes = ranges[-1].place + ranges[-1].end - ranges[-1].begin if ranges else 0
    return Unit(layer, expert, dict(by_place), places, tuple(ranges), num_bytes)


@dataclass(frozen=True, slots=True)
class LayerUnits:
    """The units of one layer.

    Attributes:
        converted_bytes: most that tensors of another dtype take beside the buffers, once they are converted.
    """

    shared: Unit
    experts: tuple[Unit, ...]
    converted_bytes: int = 0

    @property
    def all(self) -> tuple[Unit, ...]:
        """In the order in which they are needed."""
        return (self.shared, *self.experts)

    @property
    def num_bytes(self) -> int:
        """Of all buffers."""
        return sum(unit.num_bytes for unit in self.all)


def split_layer(layer: int, tensors: Mapping[str, StoredTensor], experts: tuple[str, int] | None) -> LayerUnits:
    """Split the tensors of a layer into units.

    Args:
        tensors: by module names.
        experts: prefix of the experts' names, such as `model.layers.1.mlp.experts`, and their number.
    """
    if experts is None:
        return LayerUnits(make_unit(layer, None, tensors), ())
    prefix, num_experts = f"{experts[0]}.", experts[1]
    shared = {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}
    own: list[dict[str, StoredTensor]] = [{} for _ in range(num_experts)]
    for name, tensor in tensors.items():
        if not name.startswith(prefix):
            continue
        number, _, rest = name.removeprefix(prefix).partition(".")
        if number.isdecimal():
            own[int(number)][f"{prefix}0.{rest}"] = tensor
            continue
        for expert in range(num_experts):
            own[expert][name] = _cut_stack(tensor, expert, num_experts)
    units = [make_unit(layer, expert, own[expert]) for expert in range(num_experts)]
    # Where files begin and end, experts differ by a page; of one size, each can have the buffer of another.
    most = max(unit.num_bytes for unit in units)
    return LayerUnits(make_unit(layer, None, shared), tuple(replace(unit, num_bytes=most) for unit in units))


def _cut_stack(tensor: StoredTensor, expert: int, num_experts: int) -> StoredTensor:
    """An expert's part of a stack, as a stack of one; what is not by expert, such as one scale for all, as it is."""
    if not tensor.shape or tensor.shape[0] != num_experts:
        return tensor
    num_bytes = tensor.num_bytes // num_experts
    shape = (1, *tensor.shape[1:])
    return replace(tensor, shape=shape, offset=tensor.offset + expert * num_bytes, num_bytes=num_bytes)


def count_pinned(layers: Sequence[LayerUnits], num_free_bytes: int) -> int:
    """How many of the first layers stay in memory, if the others are to have room for two of them at a time."""
    largest = max((layer.num_bytes for layer in layers), default=0)
    num_pinned, num_left = 0, num_free_bytes - 2 * largest
    for layer in layers:
        num_left -= layer.num_bytes
        if num_left < 0:
            break
        num_pinned += 1
    return num_pinned
