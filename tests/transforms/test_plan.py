"""Planning: sorted runs, borders, shards, merging; the same plan from the same rows in any order."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from model_runner.prefix_tree import prefix_key
from schemas.job import PlanSection
from schemas.layout import RunLayout
from schemas.records import Sampling
from schemas.tables import plan_schema
from transforms.plan import PlannedShard, PlanSpec, build_shard, cut_shards, read_plan, write_plan
from transforms.render import sampling_json
from transforms.sorted_runs import RunFile, read_rows, write_runs

GREEDY = sampling_json(Sampling(max_tokens=16))
HOT = sampling_json(Sampling(max_tokens=16, temperature=1.0))


def planned_rows(
    prompts: Sequence[Sequence[int] | None],
    *,
    unit: int = 0,
    first_row: int = 0,
    sampling: str = GREEDY,
    tenants: Sequence[str] | None = None,
    cost_centers: Sequence[str] | None = None,
) -> pa.RecordBatch:
    """Rendered rows with given token ids; None makes a reject."""
    rows = [
        {
            "custom_id": f"u{unit}:{first_row + row}",
            "source_file": f"file{unit}",
            "source_row": first_row + row,
            "unit": unit,
            "scope": "row",
            "num_rows": 1,
            "prefix_key": None
            if tokens is None
            else prefix_key(tenants[row] if tenants else "", np.array(tokens, np.int32)),
            "num_prompt_tokens": None if tokens is None else len(tokens),
            "messages": None if tokens is None else json.dumps([{"role": "user", "content": str(tokens)}]),
            "sampling": None if tokens is None else sampling,
            "tenant": tenants[row] if tenants else "",
            "cost_center": cost_centers[row] if cost_centers else "",
            "error_type": "null_value" if tokens is None else None,
            "passthrough": {},
        }
        for row, tokens in enumerate(prompts)
    ]
    return pa.RecordBatch.from_pylist(rows, schema=plan_schema([]))


def plan(folder: Path, batches: Sequence[pa.RecordBatch], **section: Any) -> list[PlannedShard]:
    """Plan batches, one run each."""
    layout = RunLayout(str(folder))
    spec = PlanSpec(PlanSection(**section), layout, ())
    runs: list[RunFile] = []
    for batch in batches:
        runs += write_runs([batch], layout, spec.section)
    return list(write_plan([build_shard(shard, spec, {}) for shard in cut_shards(runs, layout)], layout))


def rows_of(folder: Path, shards: Sequence[PlannedShard]) -> list[list[dict[str, Any]]]:
    layout = RunLayout(str(folder))
    return [read_rows(layout.shard_plan(shard.shard)).to_pylist() for shard in shards]


PROMPTS = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), min_size=1, max_size=60)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prompts=PROMPTS, num_batches=st.integers(1, 4), max_shard_rows=st.integers(1, 20))
def test_every_row_is_in_exactly_one_shard_in_token_order(
    tmp_path_factory: Any, prompts: list[list[int]], num_batches: int, max_shard_rows: int
) -> None:
    folder = tmp_path_factory.mktemp("plan")
    size = -(-len(prompts) // num_batches)
    batches = [planned_rows(prompts[start : start + size], first_row=start) for start in range(0, len(prompts), size)]
    shards = plan(folder, batches, max_shard_rows=max_shard_rows)
    keys = [row["prefix_key"] for rows in rows_of(folder, shards) for row in rows]
    assert keys == sorted(prefix_key("", np.array(tokens, np.int32)) for tokens in prompts)
    ids = [row["custom_id"] for rows in rows_of(folder, shards) for row in rows]
    assert sorted(ids) == sorted(f"u0:{row}" for row in range(len(prompts)))
    for before, after in zip(rows_of(folder, shards), rows_of(folder, shards)[1:], strict=False):
        assert before[-1]["prefix_key"] < after[0]["prefix_key"], "equal requests were cut apart"


def test_the_plan_does_not_depend_on_how_rows_came(tmp_path: Path) -> None:
    prompts = [[row % 7, row % 5, row] for row in range(80)]
    one = plan(
        tmp_path / "one", [planned_rows(prompts[:50]), planned_rows(prompts[50:], first_row=50)], max_shard_rows=9
    )
    batches = [planned_rows(prompts[50:], first_row=50), planned_rows(prompts[:50])]
    two = plan(tmp_path / "two", batches, max_shard_rows=9)
    assert one == two
    assert len(one) == 9
    for shard in one:
        names = [RunLayout(str(tmp_path / name)).shard_plan(shard.shard) for name in ("one", "two")]
        assert Path(names[0]).read_bytes() == Path(names[1]).read_bytes()


def test_shards_are_balanced_by_expected_cost(tmp_path: Path) -> None:
    prompts = [[row, *range(50 if row < 20 else 5)] for row in range(100)]
    shards = plan(tmp_path, [planned_rows(prompts)], max_shard_tokens=600)
    costs = [shard.num_tree_tokens + 16 * shard.num_requests for shard in shards]
    assert len(shards) > 4
    assert max(costs) <= 600 + 2 * 67
    assert min(costs[:-1]) >= 300


def test_identical_greedy_requests_merge_into_the_first_of_the_input(tmp_path: Path) -> None:
    batches = [planned_rows([[1, 2], [3], [1, 2]], unit=1), planned_rows([[1, 2]], unit=0)]
    (shard,) = plan(tmp_path, batches)
    rows = {row["custom_id"]: row["merged_into"] for row in rows_of(tmp_path, [shard])[0]}
    assert rows == {"u0:0": None, "u1:0": "u0:0", "u1:2": "u0:0", "u1:1": None}
    assert (shard.num_rows, shard.num_requests, shard.num_prompt_tokens) == (4, 2, 3)


def test_requests_never_merge_across_tenants_cost_centres_or_samplings(tmp_path: Path) -> None:
    same = [[1, 2], [1, 2]]
    for name, batch in {
        "tenants": planned_rows(same, tenants=["a", "b"]),
        "cost_centers": planned_rows(same, cost_centers=["a", "b"]),
        "hot": planned_rows(same, sampling=HOT),
    }.items():
        (shard,) = plan(tmp_path / name, [batch])
        assert shard.num_requests == 2, name
    shards = plan(tmp_path / "mixed", [planned_rows([[1]]), planned_rows([[1]], unit=1, sampling=HOT)])
    assert sum(shard.num_requests for shard in shards) == 2
    (merged,) = plan(tmp_path / "always", [planned_rows(same, sampling=HOT)], merge="always")
    (kept,) = plan(tmp_path / "never", [planned_rows(same)], merge="never")
    assert (merged.num_requests, kept.num_requests) == (1, 2)


def test_rejects_form_shards_of_their_own(tmp_path: Path) -> None:
    shards = plan(tmp_path, [planned_rows([[1], None, None]), planned_rows([None], unit=1)])
    assert [(shard.shard, shard.num_requests, shard.num_rejects) for shard in shards] == [
        ("s000000", 1, 0),
        ("x000000", 0, 3),
    ]


def test_the_plan_record_tells_the_hit_rate_and_ends_planning(tmp_path: Path) -> None:
    layout = RunLayout(str(tmp_path))
    assert read_plan(layout) is None
    plan(tmp_path, [planned_rows([[1, 2, 3, 4], [1, 2, 3, 5]])])
    record = read_plan(layout)
    assert record is not None
    assert record.max_hit_rate == 3 / 8
    assert not Path(layout.runs).exists()


def test_no_rows_give_a_plan_without_shards(tmp_path: Path) -> None:
    assert plan(tmp_path, []) == []
    record = read_plan(RunLayout(str(tmp_path)))
    assert record is not None
    assert (record.num_rows, record.max_hit_rate) == (0, 0.0)
