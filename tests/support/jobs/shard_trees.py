"""Prompts that share prefixes, as shards and simulated caches see them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from hypothesis import strategies as st

from benchmarks.sharding.workloads import NO_NODE, Workload
from moebeam.model_runner.prefix_tree import common_prefix_lengths, prefix_key
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
