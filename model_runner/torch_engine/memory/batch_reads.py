"""Reads of short segments by few rows: many slots of one block, or of a ring, in one batched product.

slot   rows              keys         A batch is a rectangle: slots by rows by keys. `bias` masks keys past a
0      r0                k k k k .    slot's end and keys that a row may not see; places without a row repeat
1      r1 r2 r3          k k . . .    row 0, and their results are dropped.
3      r7                k k k k k
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from moebeam.model_runner.torch_engine.layers.attention import MASKED, MAX_SCORES, Merged, Partials
from moebeam.model_runner.torch_engine.memory.segments import Block

Ints = npt.NDArray[np.int64]

ROW_CLASSES = (1, 4, 8, 16, 32, 64)
"""Reads are grouped by the least of these that holds their rows, so that padding stays small."""


@dataclass(slots=True, eq=False)
class BatchRead:
    """Slots of a block, or of a ring without one, each read by a few rows.

    Attributes:
        slots: a range of slots, or their numbers if they lie too far apart.
        rows: int64, shape (num_slots, num_rows); None if they are consecutive from `first_row` on.
        first_entries: path entry of each slot's first key; int64, shape (num_slots,).
        bias: float32, shape (num_slots, num_rows, num_keys); None if every row sees every key.
        merged_rows, places: the rows that get a result, each once, and its place in the flattened `rows`.
        row_numbers: the same rows, on the host.
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

    def renumber(self, compact: Ints) -> "BatchRead":
        """The same read after row `i` became row `compact[i]`."""
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

        A view if `slots` is a range.
        """
        picked = slots[self.slots] if isinstance(self.slots, slice) else slots.index_select(0, self.slots)
        return picked[:, : self.num_keys]

    def gather(self, rows: Tensor) -> Tensor:
        """The rows that read, of a tensor of rows: shape (num_slots, num_rows, ...)."""
        if self.rows is None:
            return rows[self.first_row : self._end_row].unflatten(0, (self.num_slots, self.num_rows))
        return rows[self.rows]

    def merge(self, merged: Merged, found: Partials) -> None:
        """Merge results into their rows."""
        if self.rows is None:
            merged.merge(self.first_row, self._end_row, found)
        elif self.merged_rows is not None:
            merged.merge_at(self.merged_rows, found, self.places)


@dataclass(frozen=True, slots=True)
class SlotRead:
    """Rows `[first_row, first_row + num_rows)` read the first `num_keys` entries of a slot.

    `limits`: how many of them each row sees; None means all. `first_entry`: the slot's first entry within the path.
    """

    slot: int
    first_row: int
    num_keys: int
    num_rows: int = 1
    limits: Ints | None = None
    first_entry: int = 0


def plan_slot_reads(reads: Sequence[SlotRead], device: torch.device, block: Block | None = None) -> list[BatchRead]:
    """Group reads of one block's slots, or of a ring's, into batches of about equally many rows a slot."""
    return [batch for group in _group_reads(reads) for batch in _plan_batches(block, group, device)]


def _group_reads(reads: Sequence[SlotRead]) -> list[list[SlotRead]]:
    """Group reads by their number of rows, so that no row occurs twice in a group."""
    groups: dict[int, list[list[SlotRead]]] = {}
    for read in sorted(reads, key=lambda read: read.first_row):
        rounds = groups.setdefault(next(n for n in ROW_CLASSES if read.num_rows <= n), [])
        for group in rounds:
            if group[-1].first_row + group[-1].num_rows <= read.first_row:
                group.append(read)
                break
        else:
            rounds.append([read])
    return [group for rounds in groups.values() for group in rounds]


def _plan_batches(block: Block | None, group: list[SlotRead], device: torch.device) -> list[BatchRead]:
    """Cut a group into batches of about `MAX_SCORES` padded scores at most."""
    num_rows = max(read.num_rows for read in group)
    num_keys = max(read.num_keys for read in group)
    num_at_once = max(1, MAX_SCORES // (num_rows * num_keys * 8))
    group = sorted(group, key=lambda read: read.slot)
    return [
        _plan_batch(block, group[first : first + num_at_once], device) for first in range(0, len(group), num_at_once)
    ]


def _plan_batch(block: Block | None, group: list[SlotRead], device: torch.device) -> BatchRead:
    """Lay out one batch; `group` is in ascending order of slots."""
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
    bias = make_bias(np.arange(num_keys), limits[..., None], device) if has_bias else None
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


def make_bias(keys: Ints, limits: Ints, device: torch.device) -> Tensor:
    """0 for keys below their row's limit, `MASKED` for others; float32, the broadcast shape of both."""
    return torch.from_numpy(np.where(keys < limits, np.float32(0), np.float32(MASKED))).to(device)
