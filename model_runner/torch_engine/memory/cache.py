"""The memory of live nodes: segments, which descendants read in place, and rings, which they get a copy of."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moebeam.model_runner.torch_engine.memory.segments import NodeMemory, SegmentKind, SegmentStore
from moebeam.model_runner.torch_engine.schedule.prompt_tree import Node
from moebeam.model_runner.torch_engine.schedule.steps import Span

_NUM_FIRST_SLOTS = 8


@dataclass(frozen=True, slots=True)
class RingKind:
    """The last `size` rows of a path, kept by a family of layers; position `p` is at index `p % size`."""

    name: str
    num_layers: int
    size: int
    width: int


class Ring:
    """Slots of one ring kind, and behind them the rows of a step, so that one index reaches both.

        | slot 0: size rows | slot 1 | ... | rows of the step |

    Attributes:
        rows: shape (num_layers, num_slots * size + num_step_rows, width).
    """

    def __init__(self, kind: RingKind, dtype: torch.dtype, device: torch.device) -> None:
        self.kind = kind
        self.num_slots = 0
        self.num_step_rows = 0
        self.rows = torch.zeros((kind.num_layers, 0, kind.width), dtype=dtype, device=device)

    def ensure(self, num_slots: int, num_step_rows: int) -> None:
        """Make room and keep what the slots hold."""
        if num_slots <= self.num_slots and num_step_rows <= self.num_step_rows:
            return
        num_before = self.num_slots * self.kind.size
        self.num_slots = max(num_slots, self.num_slots)
        self.num_step_rows = max(num_step_rows, self.num_step_rows)
        num_rows = self.num_slots * self.kind.size + self.num_step_rows
        rows = self.rows.new_zeros((self.kind.num_layers, num_rows, self.kind.width))
        rows[:, :num_before] = self.rows[:, :num_before]
        self.rows = rows

    @property
    def first_step_row(self) -> int:
        return self.num_slots * self.kind.size

    def slots(self, layer: int) -> Tensor:
        """All slots: a view of shape (num_slots, size, width)."""
        return self.rows[layer, : self.first_step_row].view(self.num_slots, self.kind.size, self.kind.width)

    def put_step_rows(self, layer: int, new_rows: Tensor) -> None:
        """Copy a step's rows, shape (num_rows, width), behind the slots."""
        first = self.first_step_row
        self.rows[layer, first : first + new_rows.shape[0]] = new_rows

    def wipe(self, slot: int) -> None:
        """Set a slot to zero, for all layers."""
        self.rows[:, slot * self.kind.size : (slot + 1) * self.kind.size] = 0

    def copy(self, source: int, target: int) -> None:
        """Copy a slot, for all layers."""
        size = self.kind.size
        self.rows[:, target * size : (target + 1) * size] = self.rows[:, source * size : (source + 1) * size]


class Cache:
    """What an architecture keeps between steps; call `prepare` before a step and `commit` after it.

    Attributes:
        num_idle_steps: for each node with expanded copies, how many steps ago they were read.
    """

    def __init__(
        self,
        kinds: Sequence[SegmentKind],
        rings: Sequence[RingKind],
        *,
        dtype: torch.dtype,
        device: torch.device,
        max_expanded_bytes: int,
    ) -> None:
        self.max_expanded_bytes = max_expanded_bytes
        self.store = SegmentStore(kinds, dtype=dtype, device=device)
        self.rings = [Ring(kind, dtype, device) for kind in rings]
        self._free_slots: list[int] = []
        self._num_slots = 0
        self._element_bytes = torch.empty(0, dtype=dtype).element_size()
        self.expanded_bytes = 0
        self.peak_expanded_bytes = 0
        self.num_idle_steps: dict[Node, int] = {}
        self.peak_bytes = 0

    @property
    def num_bytes(self) -> int:
        return self.store.num_bytes + sum(ring.rows.nbytes for ring in self.rings)

    @property
    def state_bytes(self) -> int:
        """Bytes of a node's ring slots."""
        return self._element_bytes * sum(ring.kind.num_layers * ring.kind.size * ring.kind.width for ring in self.rings)

    def span_bytes(self, start: int, end: int) -> int:
        """Bytes of a node's entries for the positions `[start, end)`."""
        return self._element_bytes * sum(
            kind.num_entries(start, end) * kind.entry_elements() for kind in self.store.kinds
        )

    def prepare(self, spans: Sequence[Span], num_rows: int, expected: Callable[[], Iterable[tuple[int, int]]]) -> None:
        """Make room for what a step writes; new nodes get a copy of their parent's rings.

        Args:
            expected: the positions `[start, end)` of nodes that will be live together; sizes new blocks.
        """
        started: list[Node] = []
        self.store.expect(expected)
        for span in spans:
            node = span.node
            if node.memory is None:
                node.memory = self.store.open(node)
                if self.rings:
                    node.memory.state_slot = self._take_slot()
                    started.append(node)
            running = span.running
            end = node.end if running is None else max(running.reserved_end, span.position + span.num_rows)
            self.store.reserve(node, end)
        for ring in self.rings:
            ring.ensure(self._num_slots, num_rows)
        self.peak_bytes = max(self.peak_bytes, self.num_bytes)
        for node in started:
            self._fork(node)

    def commit(self, spans: Sequence[Span]) -> None:
        """Count a step's new entries as written, once the step is through."""
        kinds = self.store.kinds
        for span in spans:
            memory: NodeMemory = span.node.memory
            for kind, extent in zip(kinds, memory.extents, strict=True):
                extent.num_entries = (span.position + span.num_rows) // kind.rate - extent.first_entry

    def close(self, node: Node) -> None:
        """Free a node's memory."""
        memory: NodeMemory | None = node.memory
        if memory is None:
            return
        if node.is_suspect:
            self._wipe(memory)
        self.store.close(memory)
        self.drop_expanded(memory)
        if memory.state_slot >= 0:
            self._free_slots.append(memory.state_slot)
            self._free_slots.sort(reverse=True)
        node.memory = None

    def forget_expanded(self, node: Node) -> None:
        """Stop counting a node's idle steps, and drop its expanded copies if it is still live."""
        del self.num_idle_steps[node]
        memory: NodeMemory | None = node.memory
        if memory is not None:
            self.drop_expanded(memory)

    def drop_expanded(self, memory: NodeMemory) -> None:
        """Free the expanded copies of a node."""
        for key, value in memory.expanded.values():
            self.expanded_bytes -= key.nbytes + value.nbytes
        memory.expanded.clear()
        memory.num_expanded.clear()

    def _wipe(self, memory: NodeMemory) -> None:
        """Zero a node's memory: its next owner masks what it did not write, but NaN times 0 is NaN."""
        for extent in memory.extents:
            if extent.block is not None:
                for tensor in extent.block.fields.values():
                    tensor[:, extent.slot].zero_()
        if memory.state_slot >= 0:
            for ring in self.rings:
                ring.wipe(memory.state_slot)

    def _fork(self, node: Node) -> None:
        """Copy the parent's rings to a new node; a root needs none, since nothing before position 0 is read."""
        if node.parent is not None:
            for ring in self.rings:
                ring.copy(node.parent.memory.state_slot, node.memory.state_slot)

    def _take_slot(self) -> int:
        if not self._free_slots:
            num_more = max(_NUM_FIRST_SLOTS, self._num_slots // 2)
            self._free_slots = list(range(self._num_slots, self._num_slots + num_more))[::-1]
            self._num_slots += num_more
        return self._free_slots.pop()
