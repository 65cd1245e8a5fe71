"""The bound on what shards compute: for any cut of any tree, for the product's own plan, and in the simulation."""

import importlib.util
import json
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.sharding import __main__ as sharding
from benchmarks.sharding import plans as sharding_plans
from benchmarks.sharding import torch_prefill as sharding_torch
from benchmarks.sharding.simulator import (
    most_prefill_tokens,
    shard_prefill,
)
from benchmarks.sharding.workloads import WORKLOADS
from moebeam.model_runner.prefix_tree import num_tree_tokens
from moebeam.schemas.job.sections import PlanSection
from tests.support.jobs.shard_trees import PROMPTS, lengths_and_lcps, naive_prefill, real_plan


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
