"""Where the keys of live nodes are: one segment a node and kind, in blocks, shared by all descendants.

A *kind* is a family of layers that keep one entry for every `rate` tokens (1 for latents or keys and values, 4 or 128
for DeepSeek-V4's compressed entries). A node's entries of a kind are a slot of a block; nobody copies its ancestors'
entries. All slots of a block have one capacity, so one batched product reads many short segments in place:

    tree                extents                        block, capacity 8       block, capacity 4
    S, 7 tokens         S  entries [0, 7)  slot 0      0  S S S S S S S .      0  A A A .
    |-- A, 3 tokens     A  entries [7, 10) slot 0      1  (free)               1  B B . .
    `-- B, 2 tokens     B  entries [7, 9)  slot 1

A's path is S's segment and then its own; so is B's. When an answer outgrows its slot, it moves to a larger one.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moebeam.model_runner.torch_engine.schedule.prompt_tree import Node

MIN_CAPACITY = 4
MAX_BLOCK_SLOTS = 256
MAX_BLOCK_ENTRIES = 65_536


@dataclass(frozen=True, slots=True)
class SegmentKind:
    """What a family of layers keeps.

    Attributes:
        rate: tokens for an entry; entry `i` stands for the positions `[i * rate, (i + 1) * rate)` of a path.
        widths: name of each field and its elements for an entry.
        has_fresh_reads: whether the architecture does `ReadPlan.fresh` reads; if not, they are planned as batched.
    """

    name: str
    num_layers: int
    rate: int
    widths: tuple[tuple[str, int], ...]
    has_fresh_reads: bool = False

    def num_entries(self, start: int, end: int) -> int:
        """How many entries a node of the positions `[start, end)` owns: those whose last token is its own."""
        return end // self.rate - start // self.rate

    def entry_elements(self) -> int:
        """Elements of an entry, over all layers and fields."""
        return self.num_layers * sum(width for _, width in self.widths)


@dataclass(slots=True, eq=False)
class Block:
    """Slots of one capacity.

    Attributes:
        fields: name to tensor, shape (num_layers, num_slots, capacity, width).
    """

    kind: SegmentKind
    num_slots: int
    capacity: int
    fields: dict[str, Tensor]
    free_slots: list[int]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.fields.values())


@dataclass(slots=True, eq=False)
class Extent:
    """A node's entries of one kind: `num_entries` of its path from `first_entry` on, in a slot of a block."""

    first_entry: int
    num_entries: int = 0
    block: Block | None = None
    slot: int = 0


@dataclass(slots=True, eq=False)
class NodeMemory:
    """What is kept for a live node.

    Attributes:
        extents: one for each kind.
        state_slot: its slot in every ring; -1 if there are no rings.
        expanded: by layer, keys and values of each head that were computed from its entries.
        num_expanded: by layer, how many entries have been.
    """

    extents: list[Extent]
    state_slot: int = -1
    expanded: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict[int, tuple[Tensor, Tensor]])
    num_expanded: dict[int, int] = field(default_factory=dict[int, int])


class SegmentStore:
    """Blocks of every kind, allocated when nodes need them and freed with their last slot."""

    def __init__(self, kinds: Sequence[SegmentKind], *, dtype: torch.dtype, device: torch.device) -> None:
        self.kinds = tuple(kinds)
        self._dtype = dtype
        self._device = device
        self._blocks: dict[tuple[int, int], list[Block]] = {}
        self._expected: Callable[[], Iterable[tuple[int, int]]] = tuple
        self.num_bytes = 0
        self.peak_bytes = 0

    def open(self, node: Node) -> NodeMemory:
        """Give a node memory, without slots yet."""
        return NodeMemory([Extent(node.start // kind.rate) for kind in self.kinds])

    def expect(self, spans: Callable[[], Iterable[tuple[int, int]]]) -> None:
        """Set which nodes `[start, end)` will be live together, present ones included; sizes new blocks."""
        self._expected = spans

    def reserve(self, node: Node, end: int) -> None:
        """Make room for a node's entries before position `end`."""
        memory: NodeMemory = node.memory
        for index, (kind, extent) in enumerate(zip(self.kinds, memory.extents, strict=True)):
            num_entries = kind.num_entries(node.start, end)
            if num_entries and (extent.block is None or num_entries > extent.block.capacity):
                self._move(index, extent, choose_capacity(num_entries))

    def close(self, memory: NodeMemory) -> None:
        """Free a node's slots."""
        for index, extent in enumerate(memory.extents):
            self._free(index, extent)

    def clear(self) -> None:
        """Forget everything, as after a failed step."""
        self._blocks.clear()
        self.num_bytes = 0

    def _move(self, index: int, extent: Extent, capacity: int) -> None:
        block = self._block_with_room(index, capacity)
        slot = block.free_slots.pop()
        if extent.block is not None and extent.num_entries:
            for name, tensor in extent.block.fields.items():
                block.fields[name][:, slot, : extent.num_entries] = tensor[:, extent.slot, : extent.num_entries]
        self._free(index, extent)
        extent.block, extent.slot = block, slot

    def _free(self, index: int, extent: Extent) -> None:
        block = extent.block
        if block is None:
            return
        extent.block = None
        block.free_slots.append(extent.slot)
        block.free_slots.sort(reverse=True)
        if len(block.free_slots) == block.num_slots:
            blocks = self._blocks.get((index, block.capacity), [])
            if block in blocks:
                blocks.remove(block)
                self.num_bytes -= block.num_bytes

    def _block_with_room(self, index: int, capacity: int) -> Block:
        blocks = self._blocks.setdefault((index, capacity), [])
        for block in blocks:
            if block.free_slots:
                return block
        most = max(1, min(MAX_BLOCK_SLOTS, MAX_BLOCK_ENTRIES // capacity))
        kind = self.kinds[index]
        num_similar = sum(choose_capacity(kind.num_entries(*span)) == capacity for span in self._expected())
        num_slots = min(most, max(1, num_similar - sum(block.num_slots for block in blocks)))
        fields = {
            name: torch.empty((kind.num_layers, num_slots, capacity, width), dtype=self._dtype, device=self._device)
            for name, width in kind.widths
        }
        block = Block(kind, num_slots, capacity, fields, list(range(num_slots))[::-1])
        for tensor in fields.values():
            tensor.zero_()
        blocks.append(block)
        self.num_bytes += block.num_bytes
        self.peak_bytes = max(self.peak_bytes, self.num_bytes)
        return block


def choose_capacity(num_entries: int) -> int:
    """The capacity of a slot for so many entries: at most an eighth more, but at least 4."""
    grain = max(MIN_CAPACITY, 1 << max(0, num_entries.bit_length() - 4))
    return -(-num_entries // grain) * grain


@dataclass(frozen=True, slots=True)
class Columns:
    """Elements `[first, first + width)` of each entry of a field."""

    field: str
    first: int
    width: int

    def view(self, fields: Mapping[str, Tensor], layer: int) -> Tensor:
        """A view of a block's field: shape (num_slots, capacity, width)."""
        return fields[self.field][layer, ..., self.first : self.first + self.width]

    def starts_with(self, other: "Columns") -> bool:
        """Whether the other's elements are the first of these."""
        return self.field == other.field and self.first == other.first and other.width <= self.width
