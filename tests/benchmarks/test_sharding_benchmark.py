"""The bound on what shards compute: for any cut of any tree, for the product's own plan, and in the simulation."""

import importlib.util
import json
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import sharding, sharding_plans, sharding_torch
from benchmarks.sharding_simulator import (
    Caches,
    hashed_workers,
    most_prefill_tokens,
    next_free_worker,
    planned_starts,
    rows_a_run,
    shard_prefill,
    token_order,
)
from benchmarks.sharding_workloads import NO_NODE, WORKLOADS, Workload
from moebeam.model_runner.prefix_tree import common_prefix_lengths, num_tree_tokens, prefix_key
from moebeam.schemas.job.sections import PlanSection
from moebeam.schemas.records import Sampling, sampling_json
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.schemas.tables import plan_schema
from moebeam.transforms.plan.build_shards import PlanSpec, build_shards
from moebeam.transforms.plan.plan_record import PlannedShard
from moebeam.transforms.plan.shard_ranges import cut_ranges
from moebeam.transforms.plan.sorted_runs import read_rows, write_runs

# Few token values and short prompts, so that prefixes, forks and repeated prompts are common.
PROMPTS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=7), min_size=1, max_size=50)


def naive_prefill(groups: Sequence[Sequence[Sequence[int]]]) -> int:
    """Every prefix that a group holds is computed once by it."""
    return sum(len({tuple(row[:end]) for row in rows for end in range(1, len(row) + 1)}) for rows in groups)


def lengths_and_lcps(prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Of prompts in token order."""
    keys = [prefix_key("", np.array(tokens, np.int32)) for tokens in prompts]
    assert keys == sorted(keys)
    return np.array([len(tokens) for tokens in prompts], dtype=np.int64), common_prefix_lengths(keys)


def rendered(prompts: Sequence[Sequence[int]], max_tokens: Sequence[int]) -> pa.RecordBatch:
    """Rows as *render* leaves them."""
    rows = [
        {
            "custom_id": f"row{row}",
            "source_file": "file",
            "source_row": row,
            "unit": 0,
            "scope": "row",
            "num_rows": 1,
            "sample": 0,
            "prefix_key": prefix_key("", np.array(tokens, np.int32)),
            "num_prompt_tokens": len(tokens),
            "messages": "[]",
            "sampling": sampling_json(Sampling(max_tokens=most)),
            "tenant": "",
            "cost_center": "",
            "passthrough": {},
        }
        for row, (tokens, most) in enumerate(zip(prompts, max_tokens, strict=True))
    ]
    return pa.RecordBatch.from_pylist(rows, schema=plan_schema([]))


def real_plan(
    folder: Path, prompts: Sequence[Sequence[int]], *, max_tokens: Sequence[int], run_rows: int, **section: Any
) -> tuple[list[PlannedShard], list[list[dict[str, Any]]]]:
    """The product's plan of prompts, in runs of so many rows: its shards, and the rows of each."""
    spec = PlanSpec(PlanSection(**section), RunLayout(str(folder)), ())
    batch = rendered(prompts, max_tokens)
    runs = [
        run
        for start in range(0, len(prompts), run_rows)
        for run in write_runs([batch.slice(start, run_rows)], spec.layout, spec.section)
    ]
    shards = [shard for part in cut_ranges(runs, spec.layout) for shard in build_shards(part, spec, {})]
    return shards, [read_rows(spec.layout.shard_plan(shard.shard)).to_pylist() for shard in shards]


def tokens_of(workload: Workload) -> list[list[int]]:
    """The prompts themselves, each node as its id so many times over."""
    return [
        [node for node in path if node != NO_NODE for _ in range(int(workload.node_tokens[node]))]
        for path in workload.paths.tolist()
    ]


@st.composite
def workloads(draw: st.DrawFn) -> Workload:
    """Small trees with nodes of different sizes and prompts that end at any node, some of them equal."""
    paths = draw(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4), min_size=1, max_size=30))
    ids: dict[tuple[int, ...], int] = {}
    for node in sorted(tuple(path[:end]) for path in paths for end in range(1, len(path) + 1)):
        ids.setdefault(node, len(ids))
    table = [
        [ids[tuple(path[: end + 1])] if end < len(path) else NO_NODE for end in range(max(map(len, paths)))]
        for path in paths
    ]
    sizes = draw(st.lists(st.integers(1, 5), min_size=len(ids), max_size=len(ids)))
    # Of equal prompts the plan puts one sampling before the other, which the simulation does not know: they ask alike.
    most = draw(st.lists(st.sampled_from([1, 8, 600]), min_size=len(ids), max_size=len(ids)))
    max_tokens = np.array([most[ids[tuple(path)]] for path in paths])
    return Workload("made", "made", np.array(table), np.array(sizes), max_tokens, np.ones_like(max_tokens))


@given(prompts=PROMPTS, data=st.data())
def test_any_contiguous_cut_computes_the_tree_and_at_most_one_path_a_cut(
    prompts: list[list[int]], data: st.DataObject
) -> None:
    prompts = sorted(prompts)
    cuts = data.draw(st.sets(st.integers(1, max(1, len(prompts) - 1)), max_size=len(prompts) - 1))
    starts = np.array([0, *sorted(cuts)], dtype=np.int64)
    lengths, lcps = lengths_and_lcps(prompts)
    groups = [prompts[start:end] for start, end in zip(starts, [*starts[1:], len(prompts)], strict=True)]
    computed = shard_prefill(lengths, lcps, starts)
    tree = num_tree_tokens(lengths, lcps)
    assert computed.tolist() == [naive_prefill([group]) for group in groups]
    assert computed.sum() == tree + lcps[starts[1:]].sum(), "a cut repeats what its two neighbours share"
    assert tree <= computed.sum() <= most_prefill_tokens(tree, len(starts), int(lengths.max()))


def test_groups_that_are_not_contiguous_break_the_bound() -> None:
    prompts = sorted([first, *([9] * 10), last] for first in range(4) for last in range(4))
    lengths, lcps = lengths_and_lcps(prompts)
    bound = most_prefill_tokens(num_tree_tokens(lengths, lcps), 4, 12)
    assert naive_prefill([prompts[start : start + 4] for start in range(0, 16, 4)]) <= bound
    assert naive_prefill([prompts[start::4] for start in range(4)]) > bound


@settings(max_examples=25)
@given(
    prompts=PROMPTS,
    run_rows=st.integers(1, 50),
    max_shard_rows=st.integers(1, 20),
    max_shard_tokens=st.integers(20, 2000),
)
def test_the_plan_of_the_product_obeys_the_bound(
    tmp_path_factory: pytest.TempPathFactory,
    prompts: list[list[int]],
    run_rows: int,
    max_shard_rows: int,
    max_shard_tokens: int,
) -> None:
    shards, rows = real_plan(
        tmp_path_factory.mktemp("plan"),
        prompts,
        max_tokens=[8] * len(prompts),
        run_rows=run_rows,
        max_shard_rows=max_shard_rows,
        max_shard_tokens=max_shard_tokens,
    )
    tree = naive_prefill([prompts])
    computed = sum(shard.num_tree_tokens for shard in shards)
    assert computed == naive_prefill([[prompts[row["source_row"]] for row in shard] for shard in rows])
    assert tree <= computed <= most_prefill_tokens(tree, len(shards), max(map(len, prompts)))


def test_a_hot_subtree_larger_than_a_shard_is_split_below_its_root(tmp_path: Path) -> None:
    root = [1] * 200
    hot = [[*root, branch, leaf, *([3] * 20)] for branch in range(8) for leaf in range(10)]
    cold = [[2, row, *([3] * 20)] for row in range(10)]
    shards, rows = real_plan(
        tmp_path, [*hot, *cold], max_tokens=[8] * 90, run_rows=90, max_shard_tokens=500, max_shard_rows=1000
    )
    hot_rows = [sum(row["source_row"] < len(hot) for row in shard) for shard in rows]
    holds_hot = [number for number in hot_rows if number]
    expected_cost = 200 + 8 * 1 + 80 * (21 + 8)
    assert len(holds_hot) >= expected_cost // 500, "the subtree is some shards large"
    assert max(holds_hot) <= 2 * len(hot) / len(holds_hot), "no shard holds most of it"
    assert sum(shard.num_tree_tokens for shard in shards) == naive_prefill([[*hot, *cold]]) + sum(
        len(root) + (before[-1]["prefix_key"][:812] == after[0]["prefix_key"][:812])
        for before, after in pairwise(rows)
        if before[-1]["source_row"] < len(hot) and after[0]["source_row"] < len(hot)
    ), "what is repeated is the root, and the branch where a cut goes through one"


@pytest.mark.parametrize(("most", "expected"), [(256, 256), (4096, 1024), (65_536, 4096)])
def test_heavy_expected_outputs_take_more_shards(tmp_path: Path, most: int, expected: int) -> None:
    prompts = [[half, row, *([3] * 20)] for half in range(2) for row in range(100)]
    _, rows = real_plan(
        tmp_path,
        prompts,
        max_tokens=[8] * 100 + [most] * 100,
        run_rows=200,
        max_shard_tokens=5000,
        max_shard_rows=1000,
    )
    rows_a_shard = 5000 // (21 + expected)
    heavy = [len(shard) for shard in rows if shard[0]["source_row"] >= 100]
    assert max(heavy) <= rows_a_shard
    assert len(heavy) == pytest.approx(100 / rows_a_shard, abs=1)
    assert len(rows) - len(heavy) == 1, "all of the light ones and a few of the heavy"


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


def test_every_way_is_compared_and_nobody_beats_the_tree(capsys: pytest.CaptureFixture[str]) -> None:
    assert sharding.main(["--rows", "400", "--workers", "1", "7", "50", "--json"]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)["workloads"]
    assert [workload["name"] for workload in found] == list(WORKLOADS)
    for workload in found:
        assert workload["name"] in printed.err
        assert len(workload["outcomes"]) == 3 * (1 + 2 * len(sharding.OTHERS))
        for outcome in workload["outcomes"]:
            assert outcome["prefill_over_tree"] >= 1
            assert outcome["slowdown"] >= outcome["balance"] >= 1
            if outcome["way"] == sharding.PLANNED:
                assert outcome["prefill_tokens"] <= outcome["bound_tokens"]


def test_figures_do_not_change_from_run_to_run(capsys: pytest.CaptureFixture[str]) -> None:
    outs: list[str] = []
    for workers in (["7"], ["7"], ["2", "7"]):
        assert sharding.main(["--rows", "200", "--workloads", "deep_trees", "--workers", *workers, "--json"]) == 0
        (workload,) = json.loads(capsys.readouterr().out)["workloads"]
        outs.append(json.dumps([outcome for outcome in workload["outcomes"] if outcome["num_workers"] == 7]))
    assert len(set(outs)) == 1


def test_a_plan_that_breaks_the_bound_fails_the_benchmark(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        sharding, "shard_prefill", lambda lengths, lcps, starts: shard_prefill(lengths, 0 * lcps, starts)
    )
    assert sharding.main(["--rows", "200", "--workloads", "hot_subtree", "--workers", "2"]) == 1
    assert "the bound is broken: hot_subtree, 2 workers, 9 shards: expected between" in capsys.readouterr().err


@pytest.mark.parametrize(
    "argv", [["--rows", "0"], ["--workers", "0"], ["--cache_share", "0"], ["--workloads", "nothing"]]
)
def test_a_wrong_command_line_is_refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        sharding.main(argv)
    assert argv[1] in capsys.readouterr().err


def test_a_plot_that_cannot_be_drawn_is_refused_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharding, "compare", lambda *_: pytest.fail("simulated for nothing"))
    assert sharding.main(["--rows", "10", "--plot", str(tmp_path / "figures.txt")]) == 2
    assert "expected .png or .svg and matplotlib installed" in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="matplotlib is not installed")
@pytest.mark.filterwarnings("default")
def test_figures_are_drawn(tmp_path: Path) -> None:
    target = tmp_path / "figures.svg"
    assert sharding.main(["--rows", "100", "--workers", "1", "5", "--plot", str(target)]) == 0
    assert "<svg" in target.read_text()


@pytest.mark.parametrize("name", sharding_plans.INPUTS)
def test_real_plans_of_made_inputs_keep_every_row_and_the_bound(name: str) -> None:
    section = PlanSection(max_shard_tokens=20_000, max_shard_rows=50)
    found = sharding_plans.plan_input(name, 600, section)
    assert found.num_rows == 600
    assert found.keeps_bound
    assert found.most_rows <= 50
    assert len(found.expected_tokens) >= 12
    if name != "equal":
        assert found.tree_tokens < found.num_prompt_tokens or name == "distinct"
    assert max(found.expected_tokens) <= 20_000 + found.deepest_tokens


def test_the_sorted_input_is_sorted() -> None:
    keys = [key for batch in sharding_plans.rendered_batches("sorted", 400) for key in batch.column("prefix_key")]
    assert keys == sorted(keys, key=lambda key: key.as_py())


def test_a_plan_that_loses_rows_fails_the_benchmark(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sharding_plans, "ProcessPoolExecutor", _ThisProcess)
    assert sharding_plans.main(["--rows", "30", "--inputs", "zipf", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["plans"]
    assert (found["name"], found["num_rows"]) == ("zipf", 30)
    monkeypatch.setattr(sharding_plans, "build_shards", lambda *_: [])
    assert sharding_plans.main(["--rows", "30", "--inputs", "zipf"]) == 1
    assert "zipf: expected 30 rows" in capsys.readouterr().err


class _ThisProcess:
    """Runs what a pool of processes would, here."""

    def __init__(self, *_: Any, initializer: Callable[..., Any] | None = None, initargs: tuple[Any, ...] = ()) -> None:
        if initializer is not None:
            initializer(*initargs)

    def __enter__(self) -> "_ThisProcess":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        done: Future[Any] = Future()
        done.set_result(function(*arguments))
        return done

    def map(self, function: Callable[..., Any], items: Sequence[Any]) -> list[Any]:
        return [function(item) for item in items]


def test_the_torch_engine_loses_one_path_a_cut_at_most_and_answers_alike(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharding_torch, "ProcessPoolExecutor", _ThisProcess)
    found = sharding_torch.compare("zipf", 24, str(tiny_checkpoint), num_shards=6, num_workers=2)
    assert found.num_rows == 24
    assert found.num_shards >= 6
    assert found.one_shard_tokens < found.num_prompt_tokens
    assert found.computed_tokens == found.planned_tokens
    assert 0 < found.lost_tokens <= found.most_lost_tokens
    assert found.num_other_answers == 0
