"""Who answers which prompt, and what is then computed: the plan's shards and the ways that others take.

The plan's side is the product's own arithmetic: `common_prefix_lengths` and `num_tree_tokens` count, `sample_places`
samples runs of rows as they arrive, `cut_ranges` finds the ranges and `cut_rows` their shards. A shard begins with an
empty cache. The others keep one for as long as a worker lives, without limit or of the least recently used tokens.

A worker's cost is what the plan reckons in: computed prompt tokens and output tokens, one as much as the other.
"""

import heapq
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np
import pyarrow as pa

from benchmarks.sharding.workloads import NO_NODE, Ints, Workload
from moebeam.model_runner.prefix_tree import common_prefix_lengths, num_tree_tokens, prefix_key
from moebeam.schemas.job.sections import PlanSection
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.transforms.plan.row_order import RowKey
from moebeam.transforms.plan.shard_cut import RowCosts, cut_rows, estimate_output_tokens
from moebeam.transforms.plan.shard_ranges import cut_ranges
from moebeam.transforms.plan.sorted_runs import (
    MAX_SORTED_RUN_BYTES,
    ROW_BYTES,
    SHARD_WEIGHT,
    RunFile,
    hash_share,
    pick_sample_rows,
    sample_places,
    samples_table,
    write_rows,
)
from moebeam.transforms.read.input_scan import GROUP_ROWS

Cache: TypeAlias = Literal["a shard", "unlimited", "lru"]

TOKEN_BYTES = 8
"""About what a token takes in a run: four bytes in the key, and its text in the messages."""


@dataclass(frozen=True, slots=True)
class Run:
    """A sorted run of the plan: keys, bytes of each row, and what its rows are expected to cost with no other run."""

    keys: Sequence[bytes]
    num_bytes: Ints
    planned_cost: int


@dataclass(frozen=True, slots=True)
class TokenOrder:
    """A workload in token order.

    Attributes:
        rows: rows of the workload; shape (num_rows,), like all others.
        lengths: tokens of each prompt.
        lcps: tokens that each shares with the one before.
        outputs: tokens that the plan expects of each answer.
    """

    rows: Ints
    keys: Sequence[bytes]
    lengths: Ints
    lcps: Ints
    outputs: Ints
    runs: Sequence[Run]

    @property
    def tree_tokens(self) -> int:
        return num_tree_tokens(self.lengths, self.lcps)

    @property
    def deepest_tokens(self) -> int:
        """Tokens of the longest path from the root."""
        return int(self.lengths.max(initial=0))

    @property
    def planned_cost(self) -> int:
        """What the plan expects all rows to cost, uncut."""
        return self.tree_tokens + int(self.outputs.sum())


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one way of dividing the work comes to.

    Attributes:
        num_groups: shards, chunks, or streams: what is given to a worker whole.
        max_group_cost: of the largest shard; None where groups are not shards.
        ideal_cost: of a worker, if every token were computed once and all were equally busy.
    """

    way: str
    cache: Cache
    num_workers: int
    num_groups: int
    prefill_tokens: int
    max_group_cost: int | None
    max_worker_cost: int
    mean_worker_cost: float
    ideal_cost: float

    @property
    def balance(self) -> float:
        """Cost of the busiest worker over the mean."""
        return self.max_worker_cost / self.mean_worker_cost

    @property
    def slowdown(self) -> float:
        """Cost of the busiest worker over the ideal one: how much later the job ends."""
        return self.max_worker_cost / self.ideal_cost

    @property
    def largest_over_mean(self) -> float | None:
        """Cost of the largest shard over the mean shard."""
        if self.max_group_cost is None:
            return None
        return self.max_group_cost * self.num_groups / (self.mean_worker_cost * self.num_workers)


def rows_a_run(workload: Workload) -> int:
    """How many rows of a workload the plan sorts at once: a group of units, or what a run may hold."""
    row_bytes = max(1, round(float(workload.lengths.mean()) * TOKEN_BYTES))
    return max(1, min(GROUP_ROWS, MAX_SORTED_RUN_BYTES // row_bytes))


def token_order(workload: Workload, *, run_rows: int | None = None) -> TokenOrder:
    """Sort a workload as the plan does, whole and in runs of so many rows."""
    run_rows = rows_a_run(workload) if run_rows is None else run_rows
    depths = (workload.paths != NO_NODE).sum(axis=1)
    words = workload.paths.astype(np.int32)
    keys = [prefix_key("", path[:depth]) for path, depth in zip(words, depths.tolist(), strict=True)]
    rows = np.array(sorted(range(len(keys)), key=keys.__getitem__), dtype=np.int64)
    outputs = expected_outputs(workload)
    runs: list[Run] = []
    by_run = np.argsort(rows // run_rows, kind="stable")
    for run in np.split(rows[by_run], range(run_rows, len(keys), run_rows)):
        lengths, lcps = workload.lengths[run], _shared_tokens(workload, keys, run)
        cost = num_tree_tokens(lengths, lcps) + int(outputs[run].sum())
        runs.append(Run([keys[row] for row in run], lengths * TOKEN_BYTES + ROW_BYTES, cost))
    lcps = _shared_tokens(workload, keys, rows)
    return TokenOrder(rows, [keys[row] for row in rows], workload.lengths[rows], lcps, outputs[rows], runs)


def _shared_tokens(workload: Workload, keys: Sequence[bytes], rows: Ints) -> Ints:
    """Tokens that each of some rows shares with the one before it."""
    num_shared_nodes = common_prefix_lengths([keys[row] for row in rows])
    up_to = np.cumsum(workload.path_tokens[rows], axis=1)
    last = np.maximum(num_shared_nodes - 1, 0)
    return np.where(num_shared_nodes > 0, up_to[np.arange(len(rows)), last], 0)


def expected_outputs(workload: Workload) -> Ints:
    """Output tokens that the plan expects of each row; shape (num_rows,)."""
    return np.array([estimate_output_tokens(most) for most in workload.max_tokens.tolist()], dtype=np.int64)


def planned_starts(order: TokenOrder, folder: Path, section: PlanSection) -> Ints:
    """Positions in token order at which the shards of the plan begin; the first is 0, and none is empty.

    Args:
        folder: a place for the samples of runs, which are all that the ranges depend on.
    """
    layout = RunLayout(str(folder))
    runs = [_sampled(run, f"{number:06d}-requests", layout, section) for number, run in enumerate(order.runs)]
    lower = [RowKey.from_text(part.lower).key for part in cut_ranges(runs, layout)]
    keys = np.array(order.keys, dtype=object)
    ranges = np.unique(np.searchsorted(keys, np.array(lower, dtype=object), side="left"))
    starts: list[int] = []
    for start, end in pairwise([*ranges[ranges < len(keys)].tolist(), len(keys)]):
        starts += [start + row for row in cut_rows(_costs_of(order, start, end), section)]
    return np.array(starts, dtype=np.int64)


def _sampled(run: Run, name: str, layout: RunLayout, section: PlanSection) -> RunFile:
    """Write the samples of a run as the plan does; a prompt's row number stands for all else that orders equal ones."""
    num_rows = len(run.keys)
    rows = pa.table(
        {
            "prefix_key": pa.array(run.keys, pa.large_binary()),
            "sampling": ["{}"] * num_rows,
            "options": pa.nulls(num_rows, pa.string()),
            "cost_center": [""] * num_rows,
            "unit": [0] * num_rows,
            "source_row": range(num_rows),
        }
    )
    bytes_before = np.append(0, np.cumsum(run.num_bytes))
    picked = pick_sample_rows(bytes_before, offset_share=hash_share(name))
    unmerged = section.model_copy(update={"merge": "never"})
    samples = samples_table(sample_places(rows, picked, unmerged), bytes_before, batch_rows=1)
    write_rows(layout.sorted_run_samples(name), samples)
    by_tokens = run.planned_cost * SHARD_WEIGHT // section.max_shard_tokens
    weight = max(by_tokens, num_rows * SHARD_WEIGHT // section.max_shard_rows)
    return RunFile(name, "requests", num_rows, int(bytes_before[-1]), weight)


def _costs_of(order: TokenOrder, start: int, end: int) -> RowCosts:
    """What the rows of a range cost; its first row shares with nobody."""
    shared = order.lcps[start:end].copy()
    shared[0] = 0
    return RowCosts(
        tokens=order.lengths[start:end] - shared + order.outputs[start:end],
        shared_tokens=shared,
        num_rows=np.ones(end - start, dtype=np.int64),
        num_bytes=order.lengths[start:end] * TOKEN_BYTES + ROW_BYTES,
        can_begin=np.ones(end - start, dtype=np.bool_),
    )


def shard_prefill(lengths: Ints, lcps: Ints, starts: Ints) -> Ints:
    """Tokens that each shard computes, of contiguous shards in token order that begin at `starts`.

    Inside a shard every token of its own prefix tree is computed once, so this is `num_tree_tokens` of each.
    """
    uncached = lengths - lcps
    uncached[starts] = lengths[starts]
    return np.add.reduceat(uncached, starts)


def most_prefill_tokens(tree_tokens: int, num_shards: int, deepest_tokens: int) -> int:
    """The bound: the tree, and one root path for each cut."""
    return tree_tokens + (num_shards - 1) * deepest_tokens


class Caches:
    """What workers compute of a workload, by who answers which row, in the order of arrival."""

    def __init__(self, workload: Workload) -> None:
        path_tokens = workload.path_tokens
        is_node = workload.paths != NO_NODE
        uses = np.bincount(workload.paths[is_node], minlength=len(workload.node_tokens))
        is_shared = is_node & (uses[workload.paths] > 1)
        self._own_tokens = np.where(is_shared, 0, path_tokens).sum(axis=1)
        self._shared_rows, columns = np.nonzero(is_shared)
        self._shared_nodes = workload.paths[self._shared_rows, columns]
        self._node_tokens = workload.node_tokens
        depths = is_node.sum(axis=1).tolist()
        # Deepest first, so that a node is never forgotten before what hangs on it.
        self._paths = [path[:depth][::-1] for path, depth in zip(workload.paths.tolist(), depths, strict=True)]
        self._node_sizes: list[int] = workload.node_tokens.tolist()

    def unlimited(self, group_of_row: Ints, num_groups: int) -> Ints:
        """Tokens that each group computes if it forgets nothing; shape (num_groups,)."""
        num_nodes = len(self._node_tokens)
        pairs = np.unique(group_of_row[self._shared_rows] * num_nodes + self._shared_nodes)
        shared = np.bincount(pairs // num_nodes, self._node_tokens[pairs % num_nodes], num_groups)
        return (shared + np.bincount(group_of_row, self._own_tokens, num_groups)).astype(np.int64)

    def least_recently_used(self, worker_of_row: Ints, unlimited: Ints, capacity_tokens: int) -> Ints:
        """Tokens that each worker computes with a cache of so many tokens; shape (num_workers,).

        Args:
            unlimited: what they compute if they forget nothing. Where all of that fits, it is the answer.
        """
        found = unlimited.copy()
        by_worker = np.argsort(worker_of_row, kind="stable")
        ends = np.cumsum(np.bincount(worker_of_row, minlength=len(unlimited)))
        for worker in np.flatnonzero(unlimited > capacity_tokens).tolist():
            start = int(ends[worker - 1]) if worker else 0
            found[worker] = self.stream_prefill(by_worker[start : ends[worker]].tolist(), capacity_tokens)
        return found

    def stream_prefill(self, rows: Sequence[int], capacity_tokens: int) -> int:
        """Tokens that one worker computes of rows in this order; the cache is cut down after each row."""
        cached: OrderedDict[int, None] = OrderedDict()
        num_cached = num_computed = 0
        sizes, paths = self._node_sizes, self._paths
        for row in rows:
            for node in paths[row]:
                if node in cached:
                    cached.move_to_end(node)
                else:
                    cached[node] = None
                    num_cached += sizes[node]
                    num_computed += sizes[node]
            while num_cached > capacity_tokens:
                num_cached -= sizes[cached.popitem(last=False)[0]]
        return num_computed


def next_free_worker(costs: Ints, num_workers: int, draw: np.random.Generator) -> Ints:
    """Give groups, in random order, each to the worker that is free first: the worker of each; shape (num_groups,)."""
    loads = [(0, worker) for worker in range(num_workers)]
    workers = np.zeros(len(costs), dtype=np.int64)
    for group in draw.permutation(len(costs)).tolist():
        load, worker = loads[0]
        workers[group] = worker
        heapq.heapreplace(loads, (load + int(costs[group]), worker))
    return workers


def hashed_workers(workload: Workload, num_tokens: int, num_workers: int, draw: np.random.Generator) -> Ints:
    """The worker of each row, by a hash of its first tokens; shape (num_rows,).

    A node stands for the whole path to it, so prompts agree in their first tokens where they agree in the node that
    holds the last of them. The hash is a random function: no real one spreads better.
    """
    path_tokens = workload.path_tokens
    begins = np.cumsum(path_tokens, axis=1) - path_tokens
    column = ((begins < num_tokens) & (workload.paths != NO_NODE)).sum(axis=1) - 1
    nodes = workload.paths[np.arange(workload.num_rows), column]
    return draw.integers(num_workers, size=len(workload.node_tokens))[nodes]
