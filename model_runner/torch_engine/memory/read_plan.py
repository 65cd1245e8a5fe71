"""Which rows of a step write and read which segments: planned once a step on the host, used by every layer.

Stands between the schedule's step and an architecture's layers. Index tensors live on the model's device.

A row writes its entry (W) into the segment of its own node, and reads (r) that segment up to itself and the segments of
all ancestors in full. S is computed and shared by A and C, which decode, and B, which prefills three tokens:

    row  span |  S, 100 entries   |  A, 3    |  B, 3    |  C, 4
    ----------+-------------------+----------+----------+-----------
     0    A   |  r r r r ... r r  |  r r W   |          |
     1    B   |  r r r r ... r r  |          |  W       |
     2    B   |  r r r r ... r r  |          |  r W     |
     3    B   |  r r r r ... r r  |          |  r r W   |
     4    C   |  r r r r ... r r  |          |          |  r r r W
              |   one WideRead:   |  one BatchRead over the slots of
              |   rows [0, 5)     |  the block that holds A, B and C

Depth-first order makes the rows that read a node neighbours, so a wide read needs no gather. Reads of fewer than
`MIN_WIDE_ROWS` rows are batched.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from moebeam.model_runner.torch_engine.layers.attention import MASKED, MAX_SCORES
from moebeam.model_runner.torch_engine.memory.batch_reads import (
    ROW_CLASSES,
    BatchRead,
    Ints,
    SlotRead,
    make_bias,
    plan_slot_reads,
)
from moebeam.model_runner.torch_engine.memory.segments import Block, Extent, NodeMemory, SegmentKind
from moebeam.model_runner.torch_engine.schedule.prompt_tree import Node
from moebeam.model_runner.torch_engine.schedule.steps import Span

MIN_WIDE_ROWS = 24
"""From so many rows on a segment gets a product of its own; the reads of fewer rows are batched."""


_CAUSAL_TILE = 256


@dataclass(slots=True, eq=False)
class Write:
    """Entries `sources` of a step (None: all) go to the places `targets` of a block's flattened slots."""

    block: Block
    targets: Tensor
    sources: Tensor | None


@dataclass(slots=True, eq=False)
class WideRead:
    """Rows `[first_row, end_row)` read the first `num_keys` entries of an extent.

    `limits`, ascending: how many of them each row sees; None means all.
    """

    node: Node
    extent: Extent
    first_row: int
    end_row: int
    num_keys: int
    limits: Ints | None
    _bias: dict[tuple[int, int, int], Tensor] = field(default_factory=dict[tuple[int, int, int], Tensor])

    def renumber(self, compact: Ints) -> "WideRead":
        """The same read after row `i` became row `compact[i]`."""
        first_row = int(compact[self.first_row])
        return replace(self, first_row=first_row, end_row=first_row + self.end_row - self.first_row, _bias={})

    @property
    def num_pairs(self) -> int:
        """How many (row, key) pairs see each other."""
        return (self.end_row - self.first_row) * self.num_keys if self.limits is None else int(self.limits.sum())

    @property
    def has_copy(self) -> bool:
        """Whether the node has expanded copies with room for what is read."""
        memory: NodeMemory = self.node.memory
        return any(key.shape[1] >= self.num_keys for key, _ in memory.expanded.values())

    def tiles(self, num_heads: int) -> "list[tuple[int, int, int]]":
        """Cut the read into products of about `MAX_SCORES` scores: (first key, end key, first row that sees any)."""
        num_rows = self.end_row - self.first_row
        num_tile = max(_CAUSAL_TILE, MAX_SCORES // (num_rows * num_heads))
        if self.limits is not None:
            num_tile = _CAUSAL_TILE
        found: list[tuple[int, int, int]] = []
        for first in range(0, self.num_keys, num_tile):
            row = 0 if self.limits is None else int(np.searchsorted(self.limits, first, side="right"))
            if row < num_rows:
                found.append((first, min(first + num_tile, self.num_keys), self.first_row + row))
        return found

    def bias(self, first: int, end: int, first_row: int, device: torch.device) -> Tensor | None:
        """The mask of a tile, made once for all layers: float32, shape (num_rows, num_keys); None masks nothing."""
        if self.limits is None:
            return None
        limits = self.limits[first_row - self.first_row :]
        if int(limits[0]) >= end:
            return None
        if (first, end, first_row) not in self._bias:
            self._bias[first, end, first_row] = make_bias(np.arange(first, end), limits[:, None], device)
        return self._bias[first, end, first_row]


@dataclass(frozen=True, slots=True)
class FreshRead:
    """Rows that begin their nodes and read each other's entries straight from the step: a causal square for each node.

    Attributes:
        rows: int64, shape (num_nodes, num_rows); places without a row repeat the node's first row.
        bias: float32, shape (num_nodes, num_rows, num_rows).
        merged_rows, places: the rows that get a result, each once, and its place in the flattened `rows`.
    """

    rows: Tensor
    bias: Tensor
    merged_rows: Tensor
    places: Tensor


@dataclass(slots=True, eq=False)
class ReadPlan:
    """What a step writes and reads of one segment kind."""

    writes: list[Write]
    wide: list[WideRead]
    batches: list[BatchRead]
    fresh: list[FreshRead] = field(default_factory=list[FreshRead])

    def drop_writes(self) -> "ReadPlan":
        """The same reads, without writes."""
        return ReadPlan([], self.wide, self.batches, self.fresh)


def plan_reads(spans: Sequence[Span], kind_index: int, kind: SegmentKind, device: torch.device) -> ReadPlan:
    """Plan the writes and reads of one kind; reads include the entries that the step itself writes.

    Args:
        spans: of a step, in depth-first order; room for their entries is reserved.
    """
    readers: dict[Node, list[int]] = {}
    writes: dict[Block, tuple[list[Ints], list[Ints]]] = {}
    wide: list[WideRead] = []
    fresh: list[Span] = []
    narrow: dict[Block, list[SlotRead]] = {}
    num_entries = 0
    for span in spans:
        node = span.node.parent
        while node is not None:
            if node in readers:
                readers[node][1] = span.end_row
            else:
                readers[node] = [span.first_row, span.end_row]
            node = node.parent
        extent = _get_extent(span.node, kind_index)
        first, end = span.position // kind.rate, (span.position + span.num_rows) // kind.rate
        if end > first and extent.block is not None:
            targets, sources = writes.setdefault(extent.block, ([], []))
            targets.append(np.arange(first, end) - extent.first_entry + extent.slot * extent.block.capacity)
            sources.append(np.arange(num_entries, num_entries + end - first))
            num_entries += end - first
        num_keys = end - extent.first_entry
        if kind.has_fresh_reads and 1 < span.num_rows < MIN_WIDE_ROWS and span.position == span.node.start:
            fresh.append(span)
        elif num_keys > 0 and extent.block is not None:
            limits = None
            if span.num_rows > 1:
                after = np.arange(span.position + 1, span.position + span.num_rows + 1)
                limits = after // kind.rate - extent.first_entry
            _add_read(wide, narrow, span.node, extent, span.first_row, span.end_row, num_keys, limits)
    for node, (first_row, end_row) in readers.items():
        extent = _get_extent(node, kind_index)
        if extent.num_entries:
            _add_read(wide, narrow, node, extent, first_row, end_row, extent.num_entries, None)
    batches = [batch for block, reads in narrow.items() for batch in plan_slot_reads(reads, device, block)]
    return ReadPlan(
        [_plan_write(block, *pieces, num_entries, device) for block, pieces in writes.items()],
        wide,
        batches,
        [_plan_fresh_read(group, device) for group in _group_by_num_rows(fresh)],
    )


def _get_extent(node: Node, kind_index: int) -> Extent:
    memory: NodeMemory = node.memory
    return memory.extents[kind_index]


def _add_read(
    wide: list[WideRead],
    narrow: dict[Block, list[SlotRead]],
    node: Node,
    extent: Extent,
    first_row: int,
    end_row: int,
    num_keys: int,
    limits: Ints | None,
) -> None:
    assert extent.block is not None
    if end_row - first_row >= MIN_WIDE_ROWS:
        wide.append(WideRead(node, extent, first_row, end_row, num_keys, limits))
    else:
        read = SlotRead(extent.slot, first_row, num_keys, end_row - first_row, limits, extent.first_entry)
        narrow.setdefault(extent.block, []).append(read)


def _group_by_num_rows(spans: Sequence[Span]) -> list[list[Span]]:
    """Group spans by their number of rows."""
    groups: dict[int, list[Span]] = {}
    for span in spans:
        groups.setdefault(next(n for n in ROW_CLASSES if span.num_rows <= n), []).append(span)
    return list(groups.values())


def _plan_fresh_read(spans: Sequence[Span], device: torch.device) -> FreshRead:
    num_rows = max(span.num_rows for span in spans)
    offsets = np.arange(num_rows)
    first_rows = np.array([span.first_row for span in spans])[:, None]
    is_used = offsets < np.array([span.num_rows for span in spans])[:, None]  # (num_nodes, num_rows)
    rows = np.where(is_used, first_rows + offsets, first_rows)
    is_seen = (offsets[None, :] <= offsets[:, None]) & is_used[:, None, :]
    used = np.flatnonzero(is_used)
    return FreshRead(
        torch.from_numpy(rows).to(device),
        torch.from_numpy(np.where(is_seen, np.float32(0), np.float32(MASKED))).to(device),
        torch.from_numpy(rows.reshape(-1)[used]).to(device),
        torch.from_numpy(used).to(device),
    )


def _plan_write(
    block: Block, targets: list[Ints], sources: list[Ints], num_entries: int, device: torch.device
) -> Write:
    target, source = np.concatenate(targets), np.concatenate(sources)
    is_all = source.shape[0] == num_entries
    return Write(block, torch.from_numpy(target).to(device), None if is_all else torch.from_numpy(source).to(device))
