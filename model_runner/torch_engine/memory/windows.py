"""How a step reads and updates rings: sliding windows, and the windows that compressed entries are made from.

Planned once a step on the host and used by every layer. A row of the step reads positions before the step from its
node's slot, and later ones from the step's rows behind the slots:

    position     5    6    7    8  |  9   10   11
    index       slot * size + p % size  |  first_step_row + first_row + p - span.position
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moebeam.model_runner.torch_engine.layers.attention import MASKED, Merged, Partials, attend
from moebeam.model_runner.torch_engine.memory.batch_reads import BatchRead, SlotRead, plan_slot_reads
from moebeam.model_runner.torch_engine.memory.cache import Ring
from moebeam.model_runner.torch_engine.memory.segments import NodeMemory
from moebeam.model_runner.torch_engine.schedule.steps import Span

_ROW_BLOCKS = (16, 64)
"""Rows of a prompt that share a block of keys: larger blocks make fewer products but mask more keys."""

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class RingUpdate:
    """Rows of a step that a ring keeps: its rows `targets` get the step's rows `sources`."""

    targets: Tensor
    sources: Tensor


@dataclass(frozen=True, slots=True)
class WindowRead:
    """Blocks of prompt rows and the keys of their windows.

    Attributes:
        rows: int64, shape (num_blocks, num_rows); places without a row repeat row 0.
        keys: rows of the ring; int64, shape (num_blocks, num_keys).
        bias: float32, shape (num_blocks, num_rows, num_keys).
        merged_rows, places: the rows that get a result, each once, and its place in the flattened `rows`.
    """

    rows: Tensor
    keys: Tensor
    bias: Tensor
    merged_rows: Tensor
    places: Tensor


@dataclass(frozen=True, slots=True)
class HeadGroup:
    """Query heads that share keys and values, and where these are in a ring's rows.

    Attributes:
        query: scaled; shape (num_rows, num_heads, width).
        merged: takes the results.
        first_key, first_value: first elements of both.
        width: of each; None means all elements.
    """

    query: Tensor
    merged: Merged
    first_key: int = 0
    first_value: int = 0
    width: int | None = None

    def attend(self, rows: Tensor, keys: Tensor, bias: Tensor | None) -> Partials:
        """Attend from `rows` of the query to a window's rows, shape (num_segments, num_keys, ring's width)."""
        if self.width is None:
            return attend(rows, keys, keys, bias)
        key, value = (keys.narrow(-1, first, self.width) for first in (self.first_key, self.first_value))
        return attend(rows, key, value, bias)


@dataclass(frozen=True, slots=True)
class WindowPlan:
    """How a step uses a sliding window: blocks read before the ring is updated, single rows their whole slot after.

    Attributes:
        last_rows: reads of the rows with logits, counted among themselves; all come after the update.
    """

    update: RingUpdate
    blocks: list[WindowRead]
    singles: list[BatchRead]
    last_rows: list[BatchRead]

    def read(self, ring: Ring, layer: int, new_rows: Tensor, groups: Sequence[HeadGroup]) -> None:
        """Attend to the last `ring.kind.size` positions, and update the ring.

        Args:
            new_rows: what the ring keeps of the step's rows; shape (num_rows, width).
        """
        ring.put_step_rows(layer, new_rows)
        data = ring.rows[layer]
        for block in self.blocks:
            keys = data.index_select(0, block.keys.flatten()).view(*block.keys.shape, data.shape[-1])
            for group in groups:
                found = group.attend(group.query[block.rows], keys, block.bias)
                group.merged.merge_at(block.merged_rows, found, block.places)
        keep_rows(ring, layer, new_rows, self.update)
        self._read_slots(self.singles, ring, layer, groups)

    def read_last_rows(self, ring: Ring, layer: int, new_rows: Tensor, groups: Sequence[HeadGroup]) -> None:
        """The same for groups of the rows with logits alone, each the last of its span."""
        ring.put_step_rows(layer, new_rows)
        keep_rows(ring, layer, new_rows, self.update)
        self._read_slots(self.last_rows, ring, layer, groups)

    def _read_slots(self, reads: Sequence[BatchRead], ring: Ring, layer: int, groups: Sequence[HeadGroup]) -> None:
        slots = ring.slots(layer)
        for batch in reads:
            keys = batch.pick(slots)
            for group in groups:
                batch.merge(group.merged, group.attend(batch.gather(group.query), keys, batch.bias))


@dataclass(frozen=True, slots=True)
class CompressionPlan:
    """The compression windows that a step closes, and the rows to keep for the next.

    Attributes:
        sources: rows of the ring; int64, shape (num_windows, num_window_rows).
        is_first: whether it is its path's first window; bool, shape (num_windows,).
        positions: of each window's first token; int64, shape (num_windows,).
    """

    update: RingUpdate
    sources: Tensor
    is_first: Tensor
    positions: Tensor

    @property
    def num_windows(self) -> int:
        return int(self.positions.shape[0])

    def gather(self, ring: Ring, layer: int, new_rows: Tensor) -> Tensor:
        """The closed windows' rows, shape (num_windows, num_window_rows, width); updates the ring."""
        ring.put_step_rows(layer, new_rows)
        found = ring.rows[layer].index_select(0, self.sources.flatten()).view(*self.sources.shape, new_rows.shape[-1])
        keep_rows(ring, layer, new_rows, self.update)
        return found


def keep_rows(ring: Ring, layer: int, new_rows: Tensor, update: RingUpdate) -> None:
    """Copy the last rows of each span into its slot."""
    kept = new_rows if update.sources.shape[0] == new_rows.shape[0] else new_rows[update.sources]
    ring.rows[layer].index_copy_(0, update.targets, kept)


def plan_window(spans: Sequence[Span], logit_spans: Sequence[Span], ring: Ring, device: torch.device) -> WindowPlan:
    """Plan the reads of a sliding window of `ring.kind.size` positions, a row's own included.

    Args:
        logit_spans: the rows with logits, as spans of one row each.
    """
    singles: list[SlotRead] = []
    blocks: dict[int, list[tuple[Span, int]]] = {}
    for span in spans:
        if span.num_rows == 1:
            singles.append(_plan_slot_read(span, ring))
        else:
            num_block = next((n for n in _ROW_BLOCKS if span.num_rows <= n), _ROW_BLOCKS[-1])
            for first in range(0, span.num_rows, num_block):
                blocks.setdefault(num_block, []).append((span, first))
    reads = [_plan_window_read(pieces, num_block, ring, device) for num_block, pieces in blocks.items()]
    last = [_plan_slot_read(span, ring) for span in logit_spans]
    return WindowPlan(
        _plan_update(spans, ring, device), reads, plan_slot_reads(singles, device), plan_slot_reads(last, device)
    )


def plan_compression(
    spans: Sequence[Span], ring: Ring, rate: int, num_overlap: int, device: torch.device
) -> CompressionPlan:
    """Plan the windows of `rate` positions that a step closes, in the order of spans and positions.

    Args:
        num_overlap: rows of the window before that each also reads; `rate` or 0.
    """
    sources: list[Ints] = []
    windows: list[Ints] = []
    offsets = np.arange(-num_overlap, rate)
    for span in spans:
        closed = np.arange(span.position // rate, (span.position + span.num_rows) // rate)
        if closed.shape[0]:
            positions = closed[:, None] * rate + offsets
            sources.append(_locate(span, positions, ring))
            windows.append(closed)
    first = np.concatenate(windows) if windows else np.zeros(0, dtype=np.int64)
    found = np.concatenate(sources) if sources else np.zeros((0, rate + num_overlap), dtype=np.int64)
    return CompressionPlan(
        _plan_update(spans, ring, device),
        torch.from_numpy(found).to(device),
        torch.from_numpy(first == 0).to(device),
        torch.from_numpy(first * rate).to(device),
    )


def _plan_window_read(
    pieces: Sequence[tuple[Span, int]], num_block: int, ring: Ring, device: torch.device
) -> WindowRead:
    num_blocks, size = len(pieces), ring.kind.size
    num_keys = num_block + size - 1
    rows = np.zeros((num_blocks, num_block), dtype=np.int64)
    keys = np.zeros((num_blocks, num_keys), dtype=np.int64)
    bias = np.full((num_blocks, num_block, num_keys), MASKED, dtype=np.float32)
    is_used = np.zeros((num_blocks, num_block), dtype=bool)
    distance = np.arange(num_block)[:, None] + size - 1 - np.arange(num_keys)  # from a row back to a key
    is_near = (distance >= 0) & (distance < size)
    for i, (span, first) in enumerate(pieces):
        num_rows = min(num_block, span.num_rows - first)
        rows[i, :num_rows] = np.arange(span.first_row + first, span.first_row + first + num_rows)
        is_used[i, :num_rows] = True
        positions = span.position + first - (size - 1) + np.arange(num_keys)
        is_there = (positions >= 0) & (positions < span.position + span.num_rows)
        keys[i] = _locate(span, np.where(is_there, positions, span.position), ring)
        bias[i][is_near & is_there] = 0.0
    used = np.flatnonzero(is_used)
    return WindowRead(
        torch.from_numpy(rows).to(device),
        torch.from_numpy(keys).to(device),
        torch.from_numpy(bias).to(device),
        torch.from_numpy(rows.reshape(-1)[used]).to(device),
        torch.from_numpy(used).to(device),
    )


def _plan_slot_read(span: Span, ring: Ring) -> SlotRead:
    return SlotRead(_get_slot(span), span.first_row, min(span.position + 1, ring.kind.size))


def _plan_update(spans: Sequence[Span], ring: Ring, device: torch.device) -> RingUpdate:
    size = ring.kind.size
    targets: list[Ints] = []
    sources: list[Ints] = []
    for span in spans:
        num_kept = min(span.num_rows, size)
        last = span.position + span.num_rows
        targets.append(_get_slot(span) * size + np.arange(last - num_kept, last) % size)
        sources.append(np.arange(span.end_row - num_kept, span.end_row))
    return RingUpdate(
        torch.from_numpy(np.concatenate(targets)).to(device), torch.from_numpy(np.concatenate(sources)).to(device)
    )


def _locate(span: Span, positions: Ints, ring: Ring) -> Ints:
    """Ring rows of positions of a span's path: in its slot, or among the step's rows."""
    in_slot = _get_slot(span) * ring.kind.size + positions % ring.kind.size
    in_step = ring.first_step_row + span.first_row + positions - span.position
    return np.where(positions >= span.position, in_step, in_slot)


def _get_slot(span: Span) -> int:
    memory: NodeMemory = span.node.memory
    return memory.state_slot
