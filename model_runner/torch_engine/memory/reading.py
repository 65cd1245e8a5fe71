"""Which rows of a step write and read which segments: worked out once a step on the host, used by every layer.

Stands between the schedule's step and an architecture's layers. Index tensors live on the model's device.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moebeam.model_runner.torch_engine.layers.attention import MASKED, MAX_SCORES, Merged, Partials, attend
from moebeam.model_runner.torch_engine.memory.segments import Block, Extent, NodeMemory, SegmentKind
from moebeam.model_runner.torch_engine.schedule.prompt_tree import Node
from moebeam.model_runner.torch_engine.schedule.schedule import Span

MIN_WIDE_ROWS = 24
"""Rows from which a segment is read by a product of its own: fewer are gathered with other segments."""

_CAUSAL_TILE = 256
_ROW_CLASSES = (1, 4, 8, 16, 32, 64)

Ints = npt.NDArray[np.int64]


@dataclass(slots=True, eq=False)
class Write:
    """New entries of a step, numbers `sources` of them, that go into a block, at `targets` of its flattened slots."""

    block: Block
    targets: Tensor
    sources: Tensor | None


@dataclass(slots=True, eq=False)
class WideRead:
    """Rows `[first_row, end_row)` read the first `num_keys` entries of an extent.

    `limits`, ascending, says how many of them each row may see; None lets all rows see all.
    """

    node: Node
    extent: Extent
    first_row: int
    end_row: int
    num_keys: int
    limits: Ints | None
    _bias: dict[tuple[int, int, int], Tensor] = field(default_factory=dict[tuple[int, int, int], Tensor])

    def among(self, compact: Ints) -> "WideRead":
        """The same read, where row `i` is now row `compact[i]`."""
        first_row = int(compact[self.first_row])
        return replace(self, first_row=first_row, end_row=first_row + self.end_row - self.first_row, _bias={})

    @property
    def num_pairs(self) -> int:
        """Pairs of a row and a key that it sees."""
        return (self.end_row - self.first_row) * self.num_keys if self.limits is None else int(self.limits.sum())

    def tiles(self, num_heads: int) -> "list[tuple[int, int, int]]":
        """(first key, end key, first row) of products that hold at most `MAX_SCORES` scores, about."""
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
        """What is added to the scores of a tile: float32, shape (num_rows, num_keys), or None."""
        if self.limits is None:
            return None
        limits = self.limits[first_row - self.first_row :]
        if int(limits[0]) >= end:
            return None
        if (first, end, first_row) not in self._bias:
            self._bias[first, end, first_row] = _bias_of(np.arange(first, end), limits[:, None], device)
        return self._bias[first, end, first_row]


@dataclass(slots=True, eq=False)
class BatchRead:
    """Slots of a block, each read by a few rows.

    Attributes:
        slots: a range of slots, or their numbers where they lie too far apart.
        rows: int64, shape (num_slots, num_rows), or None where these are neighbours, in order, from `first_row` on.
        first_entries: path entry of each slot's first key; int64, shape (num_slots,).
        bias: float32, shape (num_slots, num_rows, num_keys), or None.
        merged_rows, places: the distinct rows that get a result, and where in the flattened `rows` it is.
        row_numbers: the distinct rows, on the host.
    """

    block: Block | None
    slots: slice | Tensor
    rows: Tensor | None
    first_row: int
    num_slots: int
    num_rows: int
    num_keys: int
    first_entries: Tensor
    bias: Tensor | None
    merged_rows: Tensor | None
    places: Tensor | None
    row_numbers: Ints

    @property
    def _end_row(self) -> int:
        return self.first_row + self.num_slots * self.num_rows

    def among(self, compact: Ints) -> "BatchRead":
        """The same read, where row `i` is now row `compact[i]`."""
        rows = self.rows
        index = torch.from_numpy(compact).to(rows.device) if rows is not None else None
        return replace(
            self,
            rows=None if rows is None or index is None else index[rows].clamp_(min=0),
            first_row=int(compact[self.first_row]),
            merged_rows=None if self.merged_rows is None or index is None else index[self.merged_rows],
        )

    def pick(self, slots: Tensor) -> Tensor:
        """The keys read, of all slots (num_all_slots, capacity, width): shape (num_slots, num_keys, width).

        A view where the slots are neighbours.
        """
        picked = slots[self.slots] if isinstance(self.slots, slice) else slots.index_select(0, self.slots)
        return picked[:, : self.num_keys]

    def gather(self, rows: Tensor) -> Tensor:
        """The rows that read, of a tensor of rows: shape (num_slots, num_rows, ...)."""
        if self.rows is None:
            return rows[self.first_row : self._end_row].unflatten(0, (self.num_slots, self.num_rows))
        return rows[self.rows]

    def merge(self, merged: Merged, found: Partials) -> None:
        """Bring results back to their rows."""
        if self.rows is None:
            merged.merge(self.first_row, self._end_row, found)
        elif self.merged_rows is not None:
            merged.merge_at(self.merged_rows, found, self.places)


@dataclass(frozen=True, slots=True)
class Columns:
    """Elements `[first, first + width)` of a field."""

    field: str
    first: int
    width: int

    def of(self, fields: Mapping[str, Tensor], layer: int) -> Tensor:
        """A view of a block's field: shape (num_slots, capacity, width)."""
        return fields[self.field][layer, ..., self.first : self.first + self.width]

    def is_start_of(self, other: "Columns") -> bool:
        """Whether these are the first of the other's elements."""
        return self.field == other.field and self.first == other.first and self.width <= other.width


@dataclass(frozen=True, slots=True)
class FreshRead:
    """Rows that begin nodes and read each other, each those of its node up to itself.

    Attributes:
        rows: int64, shape (num_nodes, num_rows); places without a row repeat the node's first.
        bias: float32, shape (num_nodes, num_rows, num_rows).
        merged_rows, places: rows that get a result, and where in the flattened `rows` it is.
    """

    rows: Tensor
    bias: Tensor
    merged_rows: Tensor
    places: Tensor


@dataclass(slots=True, eq=False)
class ReadPlan:
    """What a step writes and reads of one kind."""

    writes: list[Write]
    wide: list[WideRead]
    batches: list[BatchRead]
    fresh: list[FreshRead] = field(default_factory=list[FreshRead])

    def without_writes(self) -> "ReadPlan":
        """The reads alone."""
        return ReadPlan([], self.wide, self.batches, self.fresh)


@dataclass(frozen=True, slots=True)
class SlotRead:
    """Rows `[first_row, first_row + num_rows)` read the first `num_keys` entries of a slot.

    `limits` says how many of them each row may see; None lets all rows see all.
    """

    slot: int
    first_row: int
    num_keys: int
    num_rows: int = 1
    limits: Ints | None = None
    first_entry: int = 0


def plan_reads(spans: Sequence[Span], kind_index: int, kind: SegmentKind, device: torch.device) -> ReadPlan:
    """Work out the reads of one kind; the step's new entries count as written.

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
        extent = _extent(span.node, kind_index)
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
            _add(wide, narrow, span.node, extent, span.first_row, span.end_row, num_keys, limits)
    for node, (first_row, end_row) in readers.items():
        extent = _extent(node, kind_index)
        if extent.num_entries:
            _add(wide, narrow, node, extent, first_row, end_row, extent.num_entries, None)
    batches = [batch for block, reads in narrow.items() for batch in plan_slot_reads(reads, device, block)]
    return ReadPlan(
        [_write(block, *pieces, num_entries, device) for block, pieces in writes.items()],
        wide,
        batches,
        [_fresh_read(group, device) for group in _by_num_rows(fresh)],
    )


def plan_slot_reads(reads: Sequence[SlotRead], device: torch.device, block: Block | None = None) -> list[BatchRead]:
    """Gather reads of slots of one block, or of a ring, into products of about equal numbers of rows."""
    return [batch for group in _groups(reads) for batch in _batches(block, group, device)]


def read_shared_keys(
    plan: ReadPlan,
    layer: int,
    query: Tensor,
    merged: Merged,
    *,
    key: Columns,
    value: Columns,
    wide: Sequence[WideRead] | None = None,
    selection: Tensor | None = None,
) -> None:
    """Read the entries of a kind, by keys and values that all heads of `query` share.

    Args:
        layer: number of the layer within the kind.
        query: scaled; shape (num_rows, num_heads, key_width).
        merged: takes the results.
        wide: the wide reads to do; None does all.
        selection: added to scores; float32, shape (num_rows, num_path_entries); None lets rows see all they may.
    """
    num_heads = query.shape[1]
    for read in plan.wide if wide is None else wide:
        assert read.extent.block is not None
        fields, slot = read.extent.block.fields, read.extent.slot
        keys, values = key.of(fields, layer)[slot], value.of(fields, layer)[slot]
        for first, end, first_row in read.tiles(num_heads):
            bias = read.bias(first, end, first_row, query.device)
            if selection is not None:
                offset = read.extent.first_entry
                bias = selection[first_row : read.end_row, offset + first : offset + end]
            found = attend(
                query[None, first_row : read.end_row],
                keys[None, first:end],
                values[None, first:end],
                None if bias is None else bias[None],
            )
            merged.merge(first_row, read.end_row, found)
    for batch in plan.batches:
        assert batch.block is not None
        fields = batch.block.fields
        bias = batch.bias
        if selection is not None:
            bias = _selected(batch, selection)
        keys = batch.pick(key.of(fields, layer))
        values = keys[..., : value.width] if value.is_start_of(key) else batch.pick(value.of(fields, layer))
        batch.merge(merged, attend(batch.gather(query), keys, values, bias))


def write_entries(plan: ReadPlan, layer: int, name: str, entries: Tensor) -> None:
    """Put a step's new entries, shape (num_entries, width), where they belong."""
    for write in plan.writes:
        flat = write.block.fields[name][layer].view(-1, entries.shape[-1])
        flat.index_copy_(0, write.targets, entries if write.sources is None else entries[write.sources])


def commit_entries(spans: Sequence[Span], kinds: Sequence[SegmentKind]) -> None:
    """Count a step's new entries as there, once the step is through."""
    for span in spans:
        memory: NodeMemory = span.node.memory
        for kind, extent in zip(kinds, memory.extents, strict=True):
            extent.num_entries = (span.position + span.num_rows) // kind.rate - extent.first_entry


def _extent(node: Node, kind_index: int) -> Extent:
    memory: NodeMemory = node.memory
    return memory.extents[kind_index]


def _add(
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


def _groups(reads: Sequence[SlotRead]) -> list[list[SlotRead]]:
    """Reads of one block with about as many rows each, in which no row occurs twice."""
    groups: dict[int, list[list[SlotRead]]] = {}
    for read in sorted(reads, key=lambda read: read.first_row):
        rounds = groups.setdefault(next(n for n in _ROW_CLASSES if read.num_rows <= n), [])
        for group in rounds:
            if group[-1].first_row + group[-1].num_rows <= read.first_row:
                group.append(read)
                break
        else:
            rounds.append([read])
    return [group for rounds in groups.values() for group in rounds]


def _batches(block: Block | None, group: list[SlotRead], device: torch.device) -> list[BatchRead]:
    """Products over the slots of a group, each with at most `MAX_SCORES` padded scores, about."""
    num_rows = max(read.num_rows for read in group)
    num_keys = max(read.num_keys for read in group)
    num_at_once = max(1, MAX_SCORES // (num_rows * num_keys * 8))
    group = sorted(group, key=lambda read: read.slot)
    return [_batch(block, group[first : first + num_at_once], device) for first in range(0, len(group), num_at_once)]


def _batch(block: Block | None, group: list[SlotRead], device: torch.device) -> BatchRead:
    """One product over the slots of `group`, which are in ascending order."""
    numbers = [read.slot for read in group]
    first_slot, num_slots = numbers[0], numbers[-1] - numbers[0] + 1
    slots: slice | Tensor = slice(first_slot, first_slot + num_slots)
    if num_slots > 2 * len(group):
        slots = torch.tensor(numbers, device=device)
        places = np.arange(len(group))
        num_slots = len(group)
    else:
        places = np.array(numbers) - first_slot
    num_rows = max(read.num_rows for read in group)
    num_keys = max(read.num_keys for read in group)
    rows = np.zeros((num_slots, num_rows), dtype=np.int64)
    limits = np.zeros((num_slots, num_rows), dtype=np.int64)
    first_entries = np.zeros(num_slots, dtype=np.int64)
    is_used = np.zeros((num_slots, num_rows), dtype=bool)
    for place, read in zip(places, group, strict=True):
        rows[place, : read.num_rows] = np.arange(read.first_row, read.first_row + read.num_rows)
        limits[place, : read.num_rows] = read.num_keys if read.limits is None else read.limits
        first_entries[place] = read.first_entry
        is_used[place, : read.num_rows] = True
    has_bias = bool((limits[is_used] < num_keys).any())
    bias = _bias_of(np.arange(num_keys), limits[..., None], device) if has_bias else None
    first_row = int(rows[0, 0])
    is_straight = is_used.all() and np.array_equal(rows.reshape(-1), np.arange(first_row, first_row + rows.size))
    used = np.flatnonzero(is_used)
    return BatchRead(
        block,
        slots,
        None if is_straight else torch.from_numpy(rows).to(device),
        first_row,
        num_slots,
        num_rows,
        num_keys,
        torch.from_numpy(first_entries).to(device),
        bias,
        None if is_straight else torch.from_numpy(rows.reshape(-1)[used]).to(device),
        None if is_straight else torch.from_numpy(used).to(device),
        rows.reshape(-1)[used],
    )


def _bias_of(keys: Ints, limits: Ints, device: torch.device) -> Tensor:
    return torch.from_numpy(np.where(keys < limits, np.float32(0), np.float32(MASKED))).to(device)


def _selected(batch: BatchRead, selection: Tensor) -> Tensor:
    """The part of `selection` that a batch reads: shape (num_slots, num_rows, num_keys)."""
    rows = batch.gather(torch.arange(selection.shape[0], device=selection.device))  # (num_slots, num_rows)
    offsets = torch.arange(batch.num_keys, device=selection.device)
    entries = (batch.first_entries.unsqueeze(1) + offsets).clamp_(max=selection.shape[1] - 1)
    picked = selection[rows.unsqueeze(2), entries.unsqueeze(1)]
    return picked if batch.bias is None else torch.minimum(picked, batch.bias)


def _by_num_rows(spans: Sequence[Span]) -> list[list[Span]]:
    """Spans with about as many rows each."""
    groups: dict[int, list[Span]] = {}
    for span in spans:
        groups.setdefault(next(n for n in _ROW_CLASSES if span.num_rows <= n), []).append(span)
    return list(groups.values())


def _fresh_read(spans: Sequence[Span], device: torch.device) -> FreshRead:
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


def _write(block: Block, targets: list[Ints], sources: list[Ints], num_entries: int, device: torch.device) -> Write:
    target, source = np.concatenate(targets), np.concatenate(sources)
    is_all = source.shape[0] == num_entries
    return Write(block, torch.from_numpy(target).to(device), None if is_all else torch.from_numpy(source).to(device))
