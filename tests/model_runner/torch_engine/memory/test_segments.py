"""Blocks of segments: what is written stays where it is found, until it is given back."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moebeam.model_runner.torch_engine.memory.segments import (
    MAX_BLOCK_ENTRIES,
    MAX_BLOCK_SLOTS,
    MIN_CAPACITY,
    Extent,
    NodeMemory,
    SegmentKind,
    SegmentStore,
    choose_capacity,
)
from moebeam.model_runner.torch_engine.schedule.prompt_tree import Node

KINDS = (
    SegmentKind("every", 2, 1, (("key", 3), ("value", 2))),
    SegmentKind("fourth", 1, 4, (("key", 5),)),
    SegmentKind("never", 1, 1_000, (("key", 1),)),
)


def make_store(*kinds: SegmentKind) -> SegmentStore:
    return SegmentStore(kinds or KINDS, dtype=torch.float32, device=torch.device("cpu"))


def node_at(start: int) -> Node:
    return Node(None, start, np.zeros(0, dtype=np.int32), 0, is_private=True)


def open_node(store: SegmentStore, start: int) -> Node:
    node = node_at(start)
    node.memory = store.open(node)
    return node


def write(store: SegmentStore, node: Node, end: int, mark: float) -> None:
    """Fill a node's entries up to a position as a step does."""
    store.reserve(node, end)
    memory: NodeMemory = node.memory
    for kind, extent in zip(store.kinds, memory.extents, strict=True):
        num_entries = kind.num_entries(node.start, end)
        if num_entries:
            assert extent.block is not None
            for tensor in extent.block.fields.values():
                tensor[:, extent.slot, extent.num_entries : num_entries] = mark
        extent.num_entries = num_entries


def assert_entries(extent: Extent, marks: list[int]) -> None:
    """Each entry holds its mark, in all layers and fields."""
    assert extent.num_entries == len(marks)
    assert extent.block is not None or not marks
    for field in extent.block.fields.values() if extent.block is not None else ():
        expected = torch.tensor(marks, dtype=torch.float32).view(1, -1, 1).expand_as(field[:, 0, : len(marks)])
        assert torch.equal(field[:, extent.slot, : len(marks)], expected)


def bytes_in_use(nodes: list[Node]) -> int:
    blocks = {extent.block for node in nodes for extent in node.memory.extents if extent.block is not None}
    return sum(block.num_bytes for block in blocks)


@given(st.integers(1, 3_000_000))
def test_capacity_wastes_an_eighth_or_less_than_four_entries(num_entries: int) -> None:
    waste = choose_capacity(num_entries) - num_entries
    assert 0 <= waste < max(MIN_CAPACITY, num_entries / 8 + 1)


@given(st.integers(1, 100_000), st.integers(0, 1_000))
def test_capacities_ascend_and_hold_themselves(num_entries: int, num_more: int) -> None:
    capacity = choose_capacity(num_entries)
    assert capacity <= choose_capacity(num_entries + num_more)
    assert choose_capacity(capacity) == capacity


def test_there_are_few_capacities() -> None:
    assert len({choose_capacity(n) for n in range(1, 65_537)}) <= 8 * 16


@given(st.integers(0, 300), st.lists(st.integers(0, 200), min_size=1, max_size=5), st.integers(1, 130))
def test_entries_of_a_path_belong_to_one_node_each(start: int, lengths: list[int], rate: int) -> None:
    kind = SegmentKind("any", 1, rate, (("key", 1),))
    ends = np.cumsum([start, *lengths]).tolist()
    num_entries = [kind.num_entries(*span) for span in pairwise(ends)]
    assert sum(num_entries) == kind.num_entries(start, ends[-1])
    assert kind.num_entries(0, start) + sum(num_entries) == ends[-1] // rate


def test_elements_of_an_entry_count_layers_and_fields() -> None:
    assert [kind.entry_elements() for kind in KINDS] == [10, 5, 1]


operations = st.lists(
    st.tuples(st.sampled_from(["open", "grow", "grow", "close"]), st.integers(0, 20), st.integers(1, 40)), max_size=40
)


@given(operations, st.lists(st.integers(1, 60), max_size=6))
def test_what_was_written_survives_growth_and_neighbours(
    operations: list[tuple[str, int, int]], expected_ends: list[int]
) -> None:
    store = make_store()
    store.expect(lambda: [(0, end) for end in expected_ends])
    ends: dict[Node, int] = {}
    marks: dict[Node, list[list[int]]] = {}
    most = 0
    for mark, (name, number, num_tokens) in enumerate(operations):
        node = list(ends)[number % len(ends)] if ends and name != "open" else open_node(store, number)
        if name == "close" and node in ends:
            store.close(node.memory)
            del ends[node], marks[node]
        else:
            ends[node] = ends.get(node, node.start) + num_tokens
            before = marks.get(node, [[] for _ in KINDS])
            nums = [kind.num_entries(node.start, ends[node]) for kind in KINDS]
            marks[node] = [old + [mark] * (num - len(old)) for old, num in zip(before, nums, strict=True)]
            write(store, node, ends[node], mark)
        extents = [
            (extent, found) for live in ends for extent, found in zip(live.memory.extents, marks[live], strict=True)
        ]
        for extent, found in extents:
            assert_entries(extent, found)
            assert extent.block is None or extent.block.capacity == choose_capacity(len(found))
        slots = [(extent.block, extent.slot) for extent, _ in extents if extent.block is not None]
        assert len(set(slots)) == len(slots)
        assert store.num_bytes == bytes_in_use(list(ends))
        most = max(most, store.num_bytes)
        assert store.peak_bytes >= most
    for node in ends:
        store.close(node.memory)
    assert store.num_bytes == 0


def test_kind_without_entries_takes_no_memory() -> None:
    store = make_store(KINDS[2])
    node = open_node(store, 0)
    store.reserve(node, 999)
    assert store.num_bytes == 0
    store.reserve(node, 1_000)
    assert store.num_bytes > 0


def test_room_for_what_is_there_moves_nothing() -> None:
    store = make_store(KINDS[0])
    node = open_node(store, 10)
    write(store, node, 30, 1.0)
    (extent,) = node.memory.extents
    before = extent.block, extent.slot
    store.reserve(node, 30)
    store.reserve(node, 12)
    assert (extent.block, extent.slot) == before


def test_nodes_that_live_together_share_a_block() -> None:
    store = make_store(KINDS[0])
    store.expect(lambda: [(5, 25)] * 7)
    nodes = [open_node(store, 5) for _ in range(7)]
    for node in nodes:
        store.reserve(node, 25)
    (block,) = {node.memory.extents[0].block for node in nodes}
    assert (block.num_slots, block.capacity) == (7, 20)
    assert sorted(node.memory.extents[0].slot for node in nodes) == list(range(7))
    assert store.num_bytes == store.peak_bytes == block.num_bytes == 7 * 20 * KINDS[0].entry_elements() * 4


@pytest.mark.parametrize("num_tokens", [10, 300, 70_000])
def test_blocks_are_bounded(num_tokens: int) -> None:
    store = make_store(SegmentKind("thin", 1, 1, (("key", 1),)))
    store.expect(lambda: [(0, num_tokens)] * 10_000)
    node = open_node(store, 0)
    store.reserve(node, num_tokens)
    block = node.memory.extents[0].block
    assert block.num_slots <= MAX_BLOCK_SLOTS
    assert block.num_slots == 1 or block.num_slots * block.capacity <= MAX_BLOCK_ENTRIES


def test_freed_slots_serve_others_and_the_last_one_frees_the_block() -> None:
    store = make_store(KINDS[0])
    store.expect(lambda: [(0, 8)] * 2)
    first, second = (open_node(store, 0) for _ in range(2))
    for node in (first, second):
        store.reserve(node, 8)
    num_bytes = store.num_bytes
    block, slot = first.memory.extents[0].block, first.memory.extents[0].slot
    store.close(first.memory)
    assert store.num_bytes == num_bytes
    third = open_node(store, 3)
    store.reserve(third, 11)
    assert (third.memory.extents[0].block, third.memory.extents[0].slot) == (block, slot)
    for node in (second, third):
        store.close(node.memory)
    assert (store.num_bytes, store.peak_bytes) == (0, num_bytes)
