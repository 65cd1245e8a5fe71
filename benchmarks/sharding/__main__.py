"""What cutting the prefix tree into shards costs: `python -m benchmarks.sharding --rows 20000 [--plot FILE.svg]`.

Simulates who computes which prompt tokens at 1 to 1,000 workers: the plan's contiguous shards in token order beside a
hash of the first tokens, round-robin, and chunks in the order of arrival. No model runs and no token is made. Held
against each plan: `computed <= tree + (shards - 1) x deepest path`; docs/sharding.md has the proof and figures.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.sharding.simulator import (
    Cache,
    Caches,
    Outcome,
    TokenOrder,
    hashed_workers,
    most_prefill_tokens,
    next_free_worker,
    planned_starts,
    shard_prefill,
    token_order,
)
from benchmarks.sharding.workloads import WORKLOADS, Ints, Workload
from moebeam.schemas.job.sections import PlanSection

NUM_WORKERS = (1, 2, 5, 10, 30, 100, 300, 1000)
PLANNED = "contiguous"
HASH_TOKENS = (64, 1024)
"""A usual choice, and one that looks past most system prompts."""

OTHERS = (*(f"hash {num_tokens}" for num_tokens in HASH_TOKENS), "round-robin", "arrival")
KEPT_CACHES: tuple[Cache, Cache] = ("unlimited", "lru")
"""Of the other ways, whose workers keep their caches."""

_TABLES = (("prefill over tree", "at most"), ("busiest worker over mean", "largest"), ("busiest worker over ideal", ""))
"""Title of a table, and of what it tells of the shards beside: the bound, the largest shard over the mean one."""


@dataclass(frozen=True, slots=True)
class Options:
    """What is asked for; see `parse_options`."""

    rows: int
    workloads: tuple[str, ...]
    workers: tuple[int, ...]
    shards_a_worker: int
    cache_share: float
    seed: int
    plot: Path | None
    is_json: bool


@dataclass(frozen=True, slots=True)
class Comparison:
    """A workload under all ways.

    Attributes:
        cache_tokens: what the cache of the least recently used tokens holds, at each worker.
    """

    name: str
    title: str
    num_rows: int
    num_prompt_tokens: int
    num_output_tokens: int
    tree_tokens: int
    deepest_tokens: int
    num_runs: int
    cache_tokens: int
    outcomes: tuple[Outcome, ...]

    @property
    def max_hit_rate(self) -> float:
        return 1 - self.tree_tokens / self.num_prompt_tokens

    def outcome(self, way: str, cache: Cache, num_workers: int) -> Outcome:
        """The one outcome of a way with a cache at a number of workers."""
        (found,) = (
            outcome
            for outcome in self.outcomes
            if (outcome.way, outcome.cache, outcome.num_workers) == (way, cache, num_workers)
        )
        return found

    def bound_tokens(self, outcome: Outcome) -> int:
        """What the contiguous shards of an outcome compute at most."""
        return most_prefill_tokens(self.tree_tokens, outcome.num_groups, self.deepest_tokens)

    def broken_bounds(self) -> list[str]:
        """The plans that compute more than the bound, or less than the tree, in words."""
        return [
            f"{self.name}, {outcome.num_workers} workers, {outcome.num_groups} shards: expected between "
            f"{self.tree_tokens} and {self.bound_tokens(outcome)} computed tokens, found {outcome.prefill_tokens}"
            for outcome in self.outcomes
            if outcome.way == PLANNED and not self.tree_tokens <= outcome.prefill_tokens <= self.bound_tokens(outcome)
        ]

    def as_json(self) -> dict[str, Any]:
        """All values, and what follows from them."""
        outcomes = [
            {
                **asdict(outcome),
                "bound_tokens": self.bound_tokens(outcome) if outcome.way == PLANNED else None,
                "prefill_over_tree": outcome.prefill_tokens / self.tree_tokens,
                "balance": outcome.balance,
                "slowdown": outcome.slowdown,
                "largest_over_mean": outcome.largest_over_mean,
            }
            for outcome in self.outcomes
        ]
        return {**asdict(self), "max_hit_rate": self.max_hit_rate, "outcomes": outcomes}


def parse_options(argv: Sequence[str] | None) -> Options:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sharding", description="What cutting the prefix tree into shards costs."
    )
    parser.add_argument("--rows", type=int, default=20_000, help="prompts of each workload")
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--workers", type=int, nargs="+", default=list(NUM_WORKERS))
    parser.add_argument("--shards_a_worker", type=int, default=4)
    parser.add_argument(
        "--cache_share", type=float, default=0.02, help="share of the tree's tokens that a worker's bounded cache holds"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plot", type=Path, help="draw to this file, .png or .svg; needs matplotlib")
    parser.add_argument("--json", action="store_true", help="one line of JSON on stdout")
    args = parser.parse_args(argv)
    for name in ("rows", "shards_a_worker", "cache_share"):
        if getattr(args, name) <= 0:
            parser.error(f"--{name}: expected more than 0, found {getattr(args, name)}")
    if min(args.workers) < 1:
        parser.error(f"--workers: expected at least 1, found {min(args.workers)}")
    return Options(
        rows=args.rows,
        workloads=tuple(args.workloads),
        workers=tuple(sorted(set(args.workers))),
        shards_a_worker=args.shards_a_worker,
        cache_share=args.cache_share,
        seed=args.seed,
        plot=args.plot,
        is_json=args.json,
    )


def compare(workload: Workload, options: Options) -> Comparison:
    """Divide a workload in every way among each number of workers."""
    order, caches = token_order(workload), Caches(workload)
    cache_tokens = max(round(order.tree_tokens * options.cache_share), order.deepest_tokens)
    num_output_tokens = int(workload.num_output_tokens.sum())
    outcomes: list[Outcome] = []
    for num_workers in options.workers:
        ideal_cost = (order.tree_tokens + num_output_tokens) / num_workers
        # A fresh generator for each: figures of one number of workers do not depend on which others are asked for.
        draw = np.random.default_rng([options.seed, num_workers])
        planned = divide_by_plan(workload, order, num_workers, options.shards_a_worker, ideal_cost, draw)
        outcomes.append(planned)
        for way, workers, num_groups in other_ways(workload, caches, num_workers, options.shards_a_worker, draw):
            unlimited = caches.unlimited(workers, num_workers)
            bounded = caches.least_recently_used(workers, unlimited, cache_tokens)
            outputs = _sums(workers, workload.num_output_tokens, num_workers)
            outcomes += [
                _outcome(way, cache, num_groups, prefill, prefill + outputs, ideal_cost)
                for cache, prefill in zip(KEPT_CACHES, (unlimited, bounded), strict=True)
            ]
    return Comparison(
        name=workload.name,
        title=workload.title,
        num_rows=workload.num_rows,
        num_prompt_tokens=int(order.lengths.sum()),
        num_output_tokens=num_output_tokens,
        tree_tokens=order.tree_tokens,
        deepest_tokens=order.deepest_tokens,
        num_runs=len(order.runs),
        cache_tokens=cache_tokens,
        outcomes=tuple(outcomes),
    )


def divide_by_plan(
    workload: Workload,
    order: TokenOrder,
    num_workers: int,
    shards_a_worker: int,
    ideal_cost: float,
    draw: np.random.Generator,
) -> Outcome:
    """Cut a workload as the plan does; whoever is free takes a shard and begins with an empty cache."""
    with tempfile.TemporaryDirectory(prefix="moebeam-sharding-") as folder:
        starts = planned_starts(
            order,
            Path(folder),
            PlanSection(
                max_shard_tokens=max(1, -(-order.planned_cost // (num_workers * shards_a_worker))),
                max_shard_rows=workload.num_rows,
            ),
        )
    prefill = shard_prefill(order.lengths, order.lcps, starts)
    costs = prefill + np.add.reduceat(workload.num_output_tokens[order.rows], starts)
    workers = next_free_worker(costs, num_workers, draw)
    return _outcome(
        PLANNED,
        "a shard",
        len(starts),
        _sums(workers, prefill, num_workers),
        _sums(workers, costs, num_workers),
        ideal_cost,
        max_group_cost=int(costs.max()),
    )


def other_ways(
    workload: Workload, caches: Caches, num_workers: int, shards_a_worker: int, draw: np.random.Generator
) -> Iterator[tuple[str, Ints, int]]:
    """Each other way's name, the worker of each row, and how many groups were given out."""
    for num_tokens in HASH_TOKENS:
        yield f"hash {num_tokens}", hashed_workers(workload, num_tokens, num_workers, draw), num_workers
    rows = np.arange(workload.num_rows, dtype=np.int64)
    yield "round-robin", rows % num_workers, num_workers
    num_chunks = min(workload.num_rows, num_workers * shards_a_worker)
    chunks = rows * num_chunks // workload.num_rows
    costs = caches.unlimited(chunks, num_chunks) + _sums(chunks, workload.num_output_tokens, num_chunks)
    yield "arrival", next_free_worker(costs, num_workers, draw)[chunks], num_chunks


def _sums(groups: Ints, values: Ints, num_groups: int) -> Ints:
    return np.bincount(groups, values, num_groups).astype(np.int64)


def _outcome(
    way: str,
    cache: Cache,
    num_groups: int,
    prefill: Ints,
    costs: Ints,
    ideal_cost: float,
    max_group_cost: int | None = None,
) -> Outcome:
    return Outcome(
        way=way,
        cache=cache,
        num_workers=len(costs),
        num_groups=num_groups,
        prefill_tokens=int(prefill.sum()),
        max_group_cost=max_group_cost,
        max_worker_cost=int(costs.max()),
        mean_worker_cost=float(costs.mean()),
        ideal_cost=ideal_cost,
    )


def table_lines(found: Comparison) -> list[str]:
    """A workload's tables: what is computed, how even the work is, and how much later the job ends for both."""
    lines = [
        f"{found.name}: {found.title}",
        f"{found.num_rows:,} prompts, {found.num_prompt_tokens:,} tokens, tree {found.tree_tokens:,} "
        f"(h* {found.max_hit_rate:.1%}), deepest path {found.deepest_tokens:,}; answers {found.num_output_tokens:,}; "
        f"{found.num_runs} runs; lru holds {found.cache_tokens:,}",
    ]
    kinds: list[tuple[str, Cache]] = [(way, cache) for way in OTHERS for cache in KEPT_CACHES]
    others = "".join(f"{way:>15}" for way in OTHERS)
    sides = "".join(f"{'∞':>8}{'lru':>7}" for _ in OTHERS)
    for title, of_shards in _TABLES:
        lines.append(f"{title:<26}{'':>9}{PLANNED:>12}{others}")
        lines.append(f"{'workers':>9}{'shards':>9}{of_shards:>9}{'':>20}{sides}")
        for num_workers in sorted({outcome.num_workers for outcome in found.outcomes}):
            planned = found.outcome(PLANNED, "a shard", num_workers)
            row = [planned, *(found.outcome(way, cache, num_workers) for way, cache in kinds)]
            values = [_value(outcome, title, found.tree_tokens) for outcome in row]
            beside = {"at most": found.bound_tokens(planned) / found.tree_tokens, "largest": planned.largest_over_mean}
            cells = "".join(
                f"{_short(value):>{width}}" for value, width in zip(values, (20, *(8, 7) * len(OTHERS)), strict=True)
            )
            lines.append(f"{num_workers:>9,}{planned.num_groups:>9,}{_short(beside.get(of_shards)):>9}{cells}")
    return lines


def _value(outcome: Outcome, title: str, tree_tokens: int) -> float:
    if title.startswith("prefill"):
        return outcome.prefill_tokens / tree_tokens
    return outcome.balance if title.endswith("mean") else outcome.slowdown


def _short(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.2f}" if value < 10 else f"{value:.0f}"


def main(argv: Sequence[str] | None = None) -> int:
    """Simulate and print; 1 if a plan broke the bound, 2 if there is nothing to draw with."""
    options = parse_options(argv)
    if options.plot is not None:
        from benchmarks.sharding.plot import can_plot

        if not can_plot(options.plot):
            print(f"--plot {options.plot}: expected .png or .svg and matplotlib installed", file=sys.stderr)
            return 2
    found: list[Comparison] = []
    for name in options.workloads:
        started = time.perf_counter()
        workload = WORKLOADS[name](options.rows, np.random.default_rng(options.seed))
        found.append(compare(workload, options))
        print("\n".join(table_lines(found[-1])), file=sys.stderr)
        print(f"simulated in {time.perf_counter() - started:.1f} s\n", file=sys.stderr)
    if options.plot is not None:
        from benchmarks.sharding.plot import plot

        plot([comparison.as_json() for comparison in found], options.plot)
    if options.is_json:
        print(json.dumps({"benchmark": "sharding", "workloads": [comparison.as_json() for comparison in found]}))
    broken = [words for comparison in found for words in comparison.broken_bounds()]
    for words in broken:
        print(f"the bound is broken: {words}", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
