"""Which segments latent attention reads expanded, and their copies, under a limit of memory."""

import math
from collections.abc import Mapping
from typing import Any

import torch

from moebeam.model_runner.torch_engine.memory.cache import Cache
from moebeam.model_runner.torch_engine.memory.read_plan import WideRead
from moebeam.model_runner.torch_engine.memory.segments import NodeMemory
from moebeam.model_runner.torch_engine.models.latent_attention import LatentAttention
from moebeam.model_runner.torch_engine.weights.devices import Placement

_NUM_IDLE_STEPS = 4
"""Steps after which an unread copy is freed."""


class Expansion:
    """Decides which wide reads are done expanded, and owns the copies.

    By operations alone, expanding pays from `_num_worth` queries a key on, but copies cost memory and bandwidth. A
    segment that one step reads that often is expanded tile by tile, without a copy, if there is no room for one.
    """

    def __init__(self, num_layers: int, attention: LatentAttention, placement: Placement) -> None:
        self._num_layers = num_layers
        self._attention = attention
        self._placement = placement
        widths = attention.nope + attention.rotated, attention.value_width
        absorbed, expanded = 2 * attention.rank + attention.rotated, sum(widths)
        per_key = attention.rank * (attention.nope + attention.value_width)
        self._num_worth = per_key / max(1, absorbed - expanded) if absorbed > expanded else math.inf
        self._key_bytes = attention.num_heads * sum(widths) * num_layers * placement.dtype.itemsize

    def choose(self, wide: list[WideRead], cache: Cache) -> tuple[list[WideRead], list[WideRead]]:
        """Split wide reads into expanded ones, with a copy or without, and absorbed ones; allocates copies."""
        for read in wide:
            if read.node in cache.num_idle_steps:
                cache.num_idle_steps[read.node] = 0
        expanded: list[WideRead] = []
        absorbed: list[WideRead] = []
        for read in wide:
            is_expanded = self._has_room(read, cache) or read.num_pairs >= self._num_worth * read.num_keys
            (expanded if is_expanded else absorbed).append(read)
        return expanded, absorbed

    def split(self, wide: list[WideRead]) -> tuple[list[WideRead], list[WideRead]]:
        """Split wide reads by whether there is a copy already."""
        expanded = [read for read in wide if read.has_copy]
        return expanded, [read for read in wide if not read.has_copy]

    def _has_room(self, read: WideRead, cache: Cache) -> bool:
        node = read.node
        memory: NodeMemory = node.memory
        if read.has_copy:
            return True
        if memory.expanded:
            cache.drop_expanded(memory)
        num_reads = read.end_row - read.first_row + 32 * node.num_prompts * (not node.is_private)
        num_keys = max(node.num_tokens, read.num_keys)
        num_bytes = num_keys * self._key_bytes
        if num_reads < self._num_worth:
            return False
        self._make_room(num_bytes, cache)
        if cache.expanded_bytes + num_bytes > cache.max_expanded_bytes:
            return False
        attention = self._attention
        options: Mapping[str, Any] = {"dtype": self._placement.dtype, "device": self._placement.device}
        for layer in range(self._num_layers):
            memory.expanded[layer] = (
                torch.empty((attention.num_heads, num_keys, attention.nope + attention.rotated), **options),
                torch.empty((attention.num_heads, num_keys, attention.value_width), **options),
            )
            memory.num_expanded[layer] = 0
        cache.expanded_bytes += num_bytes
        cache.peak_expanded_bytes = max(cache.peak_expanded_bytes, cache.expanded_bytes)
        return True

    def _make_room(self, num_bytes: int, cache: Cache) -> None:
        """Free copies that this step does not read, the longest unread first, until there is room."""
        idle = cache.num_idle_steps
        for node in sorted(idle, key=idle.__getitem__, reverse=True):
            if idle[node] == 0 or cache.expanded_bytes + num_bytes <= cache.max_expanded_bytes:
                return
            cache.forget_expanded(node)

    def forget_idle(self, used: list[WideRead], cache: Cache) -> None:
        """Free copies that were not read for some steps, and those of private nodes after one."""
        idle = cache.num_idle_steps
        for read in used:
            if read.has_copy:
                idle[read.node] = 0
        for node, num_steps in list(idle.items()):
            if num_steps >= (1 if node.is_private else _NUM_IDLE_STEPS):
                cache.forget_expanded(node)
            else:
                idle[node] = num_steps + 1
