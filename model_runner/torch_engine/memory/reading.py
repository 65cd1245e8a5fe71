"""Carries out a read plan in one layer: writes the step's entries, then attends to those that its rows see."""

import torch
from torch import Tensor

from moebeam.model_runner.torch_engine.layers.attention import Merged, attend
from moebeam.model_runner.torch_engine.memory.batch_reads import BatchRead
from moebeam.model_runner.torch_engine.memory.read_plan import ReadPlan
from moebeam.model_runner.torch_engine.memory.segments import Columns


def read_shared_keys(
    plan: ReadPlan,
    layer: int,
    query: Tensor,
    merged: Merged,
    *,
    key: Columns,
    value: Columns,
    selection: Tensor | None = None,
) -> None:
    """Attend to the entries of a kind, with keys and values that all heads of `query` share.

    Args:
        layer: number of the layer within the kind.
        query: scaled; shape (num_rows, num_heads, key_width).
        merged: takes the results.
        key, value: where in an entry they are; values at the start of the keys are not read twice.
        selection: added to scores; float32, shape (num_rows, num_path_entries); None adds nothing.
    """
    num_heads = query.shape[1]
    for read in plan.wide:
        assert read.extent.block is not None
        fields, slot = read.extent.block.fields, read.extent.slot
        keys, values = key.view(fields, layer)[slot], value.view(fields, layer)[slot]
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
            bias = _gather_selection(batch, selection)
        keys = batch.pick(key.view(fields, layer))
        values = keys[..., : value.width] if key.starts_with(value) else batch.pick(value.view(fields, layer))
        batch.merge(merged, attend(batch.gather(query), keys, values, bias))


def write_entries(plan: ReadPlan, layer: int, name: str, entries: Tensor) -> None:
    """Write a step's new entries, shape (num_entries, width), into their blocks."""
    for write in plan.writes:
        flat = write.block.fields[name][layer].view(-1, entries.shape[-1])
        flat.index_copy_(0, write.targets, entries if write.sources is None else entries[write.sources])


def _gather_selection(batch: BatchRead, selection: Tensor) -> Tensor:
    """Pick the scores of `selection` that a batch reads: shape (num_slots, num_rows, num_keys)."""
    rows = batch.gather(torch.arange(selection.shape[0], device=selection.device))  # (num_slots, num_rows)
    offsets = torch.arange(batch.num_keys, device=selection.device)
    entries = (batch.first_entries.unsqueeze(1) + offsets).clamp_(max=selection.shape[1] - 1)
    picked = selection[rows.unsqueeze(2), entries.unsqueeze(1)]
    return picked if batch.bias is None else torch.minimum(picked, batch.bias)
