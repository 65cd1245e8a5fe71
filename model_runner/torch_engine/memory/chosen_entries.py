"""Reads only the entries that each row chose of its path: gathered, a few rows at a time.

`reading.py` instead reads whole segments and masks what a row did not choose, which costs operations for every entry of
a path. Here the cost depends on the number of chosen entries alone, but each row copies its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from moebeam.model_runner.torch_engine.layers.attention import MASKED, Merged, attend
from moebeam.model_runner.torch_engine.memory.segments import Block, Columns, NodeMemory
from moebeam.model_runner.torch_engine.schedule.steps import Span

MIN_ENTRIES_A_CHOSEN = 5
"""From so many entries a chosen one on, gathering is faster than masking (`docs/adr/0003`)."""

_MAX_GATHERED = 4 * 1024 * 1024
"""About how many elements of keys are gathered at a time."""

_NO_ENTRY = np.iinfo(np.int64).max


@dataclass(frozen=True, slots=True)
class EntryPlaces:
    """Where the entries of each row's path are, in blocks concatenated into one pool.

    Attributes:
        starts: first path entry of each extent of a span's path, ascending, padded with the largest int64; int64,
            shape (num_spans, num_extents).
        shifts: place in the pool minus path entry, for each extent; int64, the same shape.
        spans: the span of each row; int64, shape (num_rows,).
    """

    blocks: tuple[Block, ...]
    starts: Tensor
    shifts: Tensor
    spans: Tensor

    def select_rows(self, rows: Tensor) -> "EntryPlaces":
        """The same for some of the rows."""
        return replace(self, spans=self.spans[rows])

    def join_blocks(self, columns: Columns, layer: int) -> Tensor:
        """The pool: shape (num_places, width); a view if there is only one block."""
        flat = [columns.view(block.fields, layer).flatten(0, 1) for block in self.blocks]
        return flat[0] if len(flat) == 1 else torch.cat(flat)

    def locate(self, first_row: int, entries: Tensor) -> Tensor:
        """Pool places of path entries, int64 of shape (num_rows, num_chosen), for the rows from `first_row` on."""
        spans = self.spans[first_row : first_row + entries.shape[0]]
        # A row without entries asks for entry 0 and masks it: any place will do.
        extents = (torch.searchsorted(self.starts[spans], entries, right=True) - 1).clamp_(min=0)
        return entries + self.shifts[spans].gather(1, extents)


def plan_entry_places(spans: Sequence[Span], kind_index: int, device: torch.device) -> EntryPlaces:
    """Find where entries are, once a step; entries that the step itself writes are included.

    Args:
        spans: of a step; at least one of their paths has an entry.
    """
    first_places: dict[Block, int] = {}
    num_places = 0
    paths: list[list[tuple[int, int]]] = []
    for span in spans:
        path: list[tuple[int, int]] = []
        node = span.node
        while node is not None:
            memory: NodeMemory = node.memory
            extent = memory.extents[kind_index]
            block = extent.block
            if block is not None and (extent.num_entries or node is span.node):
                if block not in first_places:
                    first_places[block] = num_places
                    num_places += block.num_slots * block.capacity
                first_place = first_places[block] + extent.slot * block.capacity
                path.append((extent.first_entry, first_place - extent.first_entry))
            node = node.parent
        paths.append(path[::-1])
    starts = np.full((len(spans), max(map(len, paths))), _NO_ENTRY, dtype=np.int64)
    shifts = np.zeros_like(starts)
    for row, path in enumerate(paths):
        starts[row, : len(path)] = [start for start, _ in path]
        shifts[row, : len(path)] = [shift for _, shift in path]
    of_rows = np.repeat(np.arange(len(spans)), [span.num_rows for span in spans])
    tensors = (torch.from_numpy(array).to(device) for array in (starts, shifts, of_rows))
    return EntryPlaces(tuple(first_places), *tensors)


def read_chosen(
    places: EntryPlaces,
    layer: int,
    query: Tensor,
    merged: Merged,
    selection: Tensor,
    num_chosen: int,
    columns: Columns,
    value_width: int | None = None,
) -> None:
    """Attend to each row's chosen entries, whose keys are also the values and are shared by all heads.

    Args:
        layer: number of the layer within the kind.
        query: scaled; shape (num_rows, num_heads, width).
        merged: takes the results.
        selection: 0 for chosen entries, less for others, at most `num_chosen` a row; shape (num_rows, num_entries).
        value_width: first elements of a key that are its value; None means all.
    """
    entries, bias = list_chosen(selection, num_chosen)
    pool = places.join_blocks(columns, layer)
    num_at_once = max(1, _MAX_GATHERED // (num_chosen * columns.width))
    for first in range(0, query.shape[0], num_at_once):
        rows = slice(first, min(first + num_at_once, query.shape[0]))
        numbers = places.locate(first, entries[rows])
        keys = pool.index_select(0, numbers.flatten()).view(*numbers.shape, columns.width)
        found = attend(query[rows].unsqueeze(1), keys, keys[..., :value_width], bias[rows].unsqueeze(1))
        merged.merge(rows.start, rows.stop, found)


def list_chosen(selection: Tensor, num_chosen: int) -> tuple[Tensor, Tensor]:
    """List each row's chosen entries, ascending.

    Returns:
        Entries, int64 of shape (num_rows, num_chosen), padded with 0, and the bias of their scores: 0, or `MASKED` for
        padding; float32, the same shape.
    """
    num_rows = selection.shape[0]
    rows, entries = (selection == 0).nonzero(as_tuple=True)
    counts = torch.bincount(rows, minlength=num_rows)  # (num_rows,)
    columns = torch.arange(rows.shape[0], device=rows.device) - (counts.cumsum(0) - counts)[rows]
    numbers = torch.zeros((num_rows, num_chosen), dtype=torch.int64, device=rows.device)
    numbers[rows, columns] = entries
    is_there = torch.arange(num_chosen, device=rows.device) < counts.unsqueeze(1)
    return numbers, torch.where(is_there, 0.0, MASKED)
