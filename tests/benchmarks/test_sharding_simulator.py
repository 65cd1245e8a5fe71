"""The simulation of workers with prefix caches: held against what any cache must compute, and the product's cuts."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.sharding.simulator import (
    Caches,
    hashed_workers,
    next_free_worker,
    planned_starts,
    rows_a_run,
    shard_prefill,
    token_order,
)
from benchmarks.sharding.workloads import NO_NODE, WORKLOADS, Workload
from moebeam.schemas.job.sections import PlanSection
from tests.support.jobs.shard_trees import naive_prefill, real_plan, tokens_of, workloads


@settings(max_examples=25)
@given(
    workload=workloads(),
    run_rows=st.integers(1, 30),
    max_shard_tokens=st.integers(20, 3000),
    max_shard_rows=st.integers(1, 20),
)
def test_the_simulation_cuts_where_the_product_does(
    tmp_path_factory: pytest.TempPathFactory,
    workload: Workload,
    run_rows: int,
    max_shard_tokens: int,
    max_shard_rows: int,
) -> None:
    folder = tmp_path_factory.mktemp("plan")
    prompts = tokens_of(workload)
    shards, _ = real_plan(
        folder / "real",
        prompts,
        max_tokens=workload.max_tokens.tolist(),
        run_rows=run_rows,
        max_shard_tokens=max_shard_tokens,
        max_shard_rows=max_shard_rows,
        merge="never",
    )
    order = token_order(workload, run_rows=run_rows)
    section = PlanSection(max_shard_tokens=max_shard_tokens, max_shard_rows=max_shard_rows, merge="never")
    starts = planned_starts(order, folder / "simulated", section)
    ends = [*starts[1:].tolist(), workload.num_rows]
    assert np.diff([*starts, workload.num_rows]).tolist() == [shard.num_rows for shard in shards]
    computed = shard_prefill(order.lengths, order.lcps, starts)
    assert computed.tolist() == [shard.num_tree_tokens for shard in shards]
    groups = [[prompts[row] for row in order.rows[start:end]] for start, end in zip(starts, ends, strict=True)]
    assert computed.sum() == naive_prefill(groups)


@given(workload=workloads(), num_workers=st.integers(1, 5), seed=st.integers(0, 9))
def test_an_unlimited_cache_computes_every_prefix_of_its_stream_once(
    workload: Workload, num_workers: int, seed: int
) -> None:
    workers = np.random.default_rng(seed).integers(num_workers, size=workload.num_rows)
    prompts = tokens_of(workload)
    computed = Caches(workload).unlimited(workers, num_workers)
    expected = [naive_prefill([[prompts[row] for row in np.flatnonzero(workers == w)]]) for w in range(num_workers)]
    assert computed.tolist() == expected


@given(workload=workloads(), capacity_tokens=st.integers(0, 60), num_workers=st.integers(1, 3))
def test_a_bounded_cache_forgets_what_was_used_longest_ago(
    workload: Workload, capacity_tokens: int, num_workers: int
) -> None:
    workers = np.arange(workload.num_rows) % num_workers
    caches = Caches(workload)
    unlimited = caches.unlimited(workers, num_workers)
    computed = caches.least_recently_used(workers, unlimited, capacity_tokens)
    for worker in range(num_workers):
        used: list[int] = []  # nodes, the one to be forgotten first ahead
        expected = 0
        for row in np.flatnonzero(workers == worker):
            path = [node for node in workload.paths[row].tolist() if node != NO_NODE]
            expected += sum(int(workload.node_tokens[node]) for node in path if node not in used)
            used = [node for node in used if node not in path] + path[::-1]
            while sum(int(workload.node_tokens[node]) for node in used) > capacity_tokens:
                used.pop(0)
        assert computed[worker] == expected


@given(workload=workloads())
def test_in_token_order_a_cache_of_the_longest_prompt_is_ideal(workload: Workload) -> None:
    order = token_order(workload)
    computed = Caches(workload).stream_prefill(order.rows.tolist(), order.deepest_tokens)
    assert computed == order.tree_tokens == naive_prefill([tokens_of(workload)])


@given(workload=workloads(), num_tokens=st.integers(1, 12))
def test_prompts_with_the_same_first_tokens_hash_to_one_worker(workload: Workload, num_tokens: int) -> None:
    workers = hashed_workers(workload, num_tokens, 1000, np.random.default_rng(0)).tolist()
    by_prefix: dict[tuple[int, ...], set[int]] = {}
    for tokens, worker in zip(tokens_of(workload), workers, strict=True):
        by_prefix.setdefault(tuple(tokens[:num_tokens]), set()).add(worker)
    assert all(len(found) == 1 for found in by_prefix.values())


def test_shards_go_to_whoever_is_free() -> None:
    costs = np.array([10, 1, 1, 1, 1, 1, 1, 1, 1, 1])
    workers = next_free_worker(costs, 2, np.random.default_rng(0))
    loads = np.bincount(workers, costs, minlength=2)
    assert loads.sum() == costs.sum()
    assert loads.max() - loads.min() <= costs.max()
    assert next_free_worker(np.ones(12, dtype=np.int64), 4, np.random.default_rng(1)).tolist().count(0) == 3


@pytest.mark.parametrize("name", WORKLOADS)
def test_workloads_are_trees(name: str) -> None:
    workload = WORKLOADS[name](300, np.random.default_rng(3))
    parents: dict[int, int] = {}
    for path in workload.paths.tolist():
        nodes = [node for node in path if node != NO_NODE]
        assert nodes == path[: len(nodes)], "nodes after the end of a path"
        for parent, node in zip([-2, *nodes], nodes, strict=False):
            assert parents.setdefault(node, parent) == parent
    assert set(parents) == set(range(len(workload.node_tokens)))
    assert ((workload.num_output_tokens >= 1) & (workload.num_output_tokens <= workload.max_tokens)).all()
    assert len({tuple(path) for path in workload.paths.tolist()}) == 300, "every prompt has a tail of its own"
    assert 1 <= rows_a_run(workload) <= 20_000
