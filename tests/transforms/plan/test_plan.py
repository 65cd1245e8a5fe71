"""Planning: sorted runs, borders, shards, merging; the same plan from the same rows in any order."""

import contextlib
import json
from collections.abc import Generator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moebeam.model_runner.prefix_tree import prefix_key
from moebeam.schemas.chat_options import ChatOptions
from moebeam.schemas.job.sections import PlanSection
from moebeam.schemas.records import Sampling, sampling_json
from moebeam.schemas.store import storage
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.schemas.tables import plan_schema
from moebeam.transforms.answer.answer_shard import AnswerSpec, make_requests
from moebeam.transforms.answer.shard_tables import PlannedRows
from moebeam.transforms.money.account import Accounting
from moebeam.transforms.plan import shard_cut, shard_ranges, sorted_runs
from moebeam.transforms.plan.build_shards import PlanSpec, build_shards, write_plan
from moebeam.transforms.plan.plan_record import PlannedShard, PlanRecord, read_plan
from moebeam.transforms.plan.shard_ranges import cut_ranges
from moebeam.transforms.plan.sorted_runs import ROW_BYTES, RunFile, read_rows, write_runs
from moebeam.transforms.render.answer_terms import AnswerTerms, TermsCache
from moebeam.transforms.render.samples import repeat_rows
from tests.support.engines.engine_configs import engine_config

GREEDY = sampling_json(Sampling(max_tokens=16))
HOT = sampling_json(Sampling(max_tokens=16, temperature=1.0))


def prepare_rows(
    prompts: Sequence[Sequence[int] | None],
    *,
    unit: int = 0,
    first_row: int = 0,
    sampling: str = GREEDY,
    samplings: Sequence[str] | None = None,
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
            "sample": 0,
            "prefix_key": None
            if tokens is None
            else prefix_key(tenants[row] if tenants else "", np.array(tokens, np.int32)),
            "num_prompt_tokens": None if tokens is None else len(tokens),
            "messages": None if tokens is None else json.dumps([{"role": "user", "content": str(tokens)}]),
            "sampling": None if tokens is None else samplings[row] if samplings else sampling,
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
    planned = [shard for part in cut_ranges(runs, layout) for shard in build_shards(part, spec, {})]
    return list(write_plan(planned, layout))


@contextlib.contextmanager
def small_ranges(*, range_bytes: int, sample_bytes: int, shard_bytes: int = 1 << 40) -> Generator[None]:
    """Let a few rows make many ranges."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sorted_runs, "SAMPLE_BYTES", sample_bytes)
        patch.setattr(shard_ranges, "num_ranges", lambda runs: -(-sum(run.num_bytes for run in runs) // range_bytes))
        patch.setattr(shard_cut, "MAX_SHARD_BYTES", shard_bytes)
        yield


def rows_of(folder: Path, shards: Sequence[PlannedShard]) -> list[list[dict[str, Any]]]:
    layout = RunLayout(str(folder))
    return [read_rows(layout.shard_plan(shard.shard)).to_pylist() for shard in shards]


def wanting(batch: pa.RecordBatch, counts: Sequence[int]) -> pa.RecordBatch:
    """The same rows, each of which wants so many answers."""
    (repeated,) = repeat_rows(batch, counts)
    return repeated


PROMPTS = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), min_size=1, max_size=60)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prompts=PROMPTS, num_batches=st.integers(1, 4), max_shard_rows=st.integers(1, 20))
def test_every_row_is_in_exactly_one_shard_in_token_order(
    tmp_path_factory: Any, prompts: list[list[int]], num_batches: int, max_shard_rows: int
) -> None:
    folder = tmp_path_factory.mktemp("plan")
    size = -(-len(prompts) // num_batches)
    batches = [prepare_rows(prompts[start : start + size], first_row=start) for start in range(0, len(prompts), size)]
    shards = plan(folder, batches, max_shard_rows=max_shard_rows)
    planned = rows_of(folder, shards)
    keys = [row["prefix_key"] for rows in planned for row in rows]
    assert keys == sorted(prefix_key("", np.array(tokens, np.int32)) for tokens in prompts)
    ids = [row["custom_id"] for rows in planned for row in rows]
    assert sorted(ids) == sorted(f"u0:{row}" for row in range(len(prompts)))
    for before, after in pairwise(planned):
        assert before[-1]["prefix_key"] < after[0]["prefix_key"], "requests that are merged were cut apart"
    for rows in planned:
        assert len(rows) <= max_shard_rows or len({row["prefix_key"] for row in rows}) == 1


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    prompts=PROMPTS,
    samplings=st.lists(st.sampled_from([GREEDY, HOT]), min_size=60, max_size=60),
    num_batches=st.integers(1, 4),
    max_shard_rows=st.integers(1, 20),
)
def test_many_small_ranges_hold_every_row_once_in_the_order_of_one(
    tmp_path_factory: Any,
    prompts: list[list[int]],
    samplings: list[str],
    num_batches: int,
    max_shard_rows: int,
) -> None:
    folder = tmp_path_factory.mktemp("plan")
    size = -(-len(prompts) // num_batches)
    batches = [
        prepare_rows(prompts[start : start + size], first_row=start, samplings=samplings[start : start + size])
        for start in range(0, len(prompts), size)
    ]
    one = rows_of(folder / "one", plan(folder / "one", batches, max_shard_rows=max_shard_rows))
    with small_ranges(range_bytes=8 * ROW_BYTES, sample_bytes=2 * ROW_BYTES):
        shards = plan(folder / "many", batches, max_shard_rows=max_shard_rows)
    many = rows_of(folder / "many", shards)
    assert [row for rows in many for row in rows] == [row for rows in one for row in rows]
    if len(prompts) > 30 and max_shard_rows < 4 and len({tuple(tokens) for tokens in prompts}) > 30:
        assert len({shard.shard.partition("-")[0] for shard in shards}) > 1, "there was more than one range"
    for before, after in pairwise(many):
        last, first = ((row["prefix_key"], row["sampling"]) for row in (before[-1], after[0]))
        assert last != first or first[1] == HOT, "requests that are merged were cut apart"


def test_shards_of_all_ranges_have_names_in_token_order(tmp_path: Path) -> None:
    batches = [prepare_rows([[row, 1] for row in range(unit, 90, 3)], unit=unit) for unit in range(3)]
    with small_ranges(range_bytes=20 * 1200, sample_bytes=1200):
        shards = plan(tmp_path, batches, max_shard_rows=4)
    names = [shard.shard for shard in shards]
    assert names == sorted(names)
    assert {"s000000", "s000000-00001", "s000001", "s000001-00001"} <= set(names)
    keys = [row["prefix_key"] for rows in rows_of(tmp_path, shards) for row in rows]
    assert keys == sorted(keys)


def test_a_prompt_that_is_asked_again_and_again_is_cut_in_the_order_of_its_rows(tmp_path: Path) -> None:
    batches = [prepare_rows([[1, 2, 3]] * 40, unit=unit, sampling=HOT) for unit in (2, 0, 1)]
    names: list[list[str]] = []
    for range_rows in (1000, 13):
        with small_ranges(range_bytes=range_rows * 1200, sample_bytes=1200):
            shards = plan(tmp_path / str(range_rows), batches, max_shard_rows=10)
        planned = rows_of(tmp_path / str(range_rows), shards)
        assert len(planned) >= 12
        assert max(map(len, planned)) <= 10
        names.append([row["custom_id"] for rows in planned for row in rows])
    assert names[0] == names[1] == [f"u{unit}:{row}" for unit in range(3) for row in range(40)]


def test_a_prompt_that_is_merged_is_never_cut(tmp_path: Path) -> None:
    batches = [prepare_rows([[1, 2, 3]] * 40, unit=unit) for unit in range(3)]
    with small_ranges(range_bytes=10 * 1200, sample_bytes=1200):
        (shard,) = plan(tmp_path, batches, max_shard_rows=10)
    assert (shard.num_rows, shard.num_requests) == (120, 1)


def test_what_prompts_of_different_runs_share_is_reckoned_once(tmp_path: Path) -> None:
    prompts = [[document] * 50 + [row] for row in range(12) for document in range(20)]
    runs = [prepare_rows(prompts[start : start + 20], first_row=start) for start in range(0, 240, 20)]
    # Each run of 20 holds every document once: alone it shares nothing.
    apart = plan(tmp_path / "apart", runs, max_shard_tokens=1000)
    together = plan(tmp_path / "together", [prepare_rows(prompts)], max_shard_tokens=1000)
    assert [(shard.shard, shard.num_rows, shard.num_tree_tokens) for shard in apart] == [
        (shard.shard, shard.num_rows, shard.num_tree_tokens) for shard in together
    ]
    assert len(apart) <= -(-(20 * 50 + 240 * 17) // 1000) + 1


def test_a_shard_is_within_the_limit_but_for_the_path_it_begins_with(tmp_path: Path) -> None:
    prompts = [[row % 3] * 30 + [row, *range(row % 40)] for row in range(400)]
    batches = [prepare_rows(prompts[start : start + 50], first_row=start) for start in range(0, 400, 50)]
    shards = plan(tmp_path, batches, max_shard_tokens=1500)
    costs = [shard.num_tree_tokens + 16 * shard.num_requests for shard in shards]
    assert max(costs) <= 1500 + 30
    assert min(costs) >= 0.8 * max(costs)
    assert len(costs) == -(-(sum(costs) - 30 * len(costs)) // 1500)


def test_there_are_several_shards_for_each_of_many_workers_where_the_input_is_large_enough(tmp_path: Path) -> None:
    prompts = [[row % 5] * 10 + [row] for row in range(2000)]
    shards = plan(tmp_path, [prepare_rows(prompts)], max_shard_tokens=500)
    num_workers = 16
    assert sum(shard.num_tree_tokens + 16 * shard.num_requests for shard in shards) >= 4 * num_workers * 500
    assert len(shards) >= 4 * num_workers


def test_no_shard_is_larger_than_a_worker_may_hold(tmp_path: Path) -> None:
    prompts = [[row] * 300 for row in range(100)]
    with small_ranges(range_bytes=60_000, sample_bytes=3000, shard_bytes=60_000):
        shards = plan(tmp_path, [prepare_rows(prompts)], max_shard_tokens=1 << 40, max_shard_rows=1 << 40)
    sizes = [len(rows) for rows in rows_of(tmp_path, shards)]
    row_size = 300 * 4 + len(json.dumps([{"role": "user", "content": str(prompts[0])}])) + ROW_BYTES
    assert len(sizes) > 1
    assert max(sizes) * row_size <= 60_000


def test_a_shard_goes_into_the_engine_one_request_at_a_time(tmp_path: Path) -> None:
    (shard,) = plan(tmp_path, [prepare_rows([[row] for row in range(500)])])
    rows = PlannedRows.from_table(read_rows(RunLayout(str(tmp_path)).shard_plan(shard.shard)))
    made: list[str | None] = []

    class CountedTerms(TermsCache):
        def find(self, options: str | None) -> AnswerTerms:
            made.append(options)
            return super().find(options)

    engine = engine_config("fake", "", "made", "none")
    spec = AnswerSpec(RunLayout(str(tmp_path)), engine, CountedTerms(ChatOptions(), None), Accounting("run"))
    requests = make_requests(shard.shard, rows, spec, cast("Any", None))
    assert made == []
    assert [next(requests).request_id for _ in range(3)] == ["0", "1", "2"]
    assert len(made) == 3, "a request is made when the engine asks for it"


def test_a_plan_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    layout = RunLayout(str(tmp_path))
    fields = '"num_prompt_tokens":4,"num_rejects":0,"num_requests":2,"num_rows":2,'
    shards = ",".join(f'{{{fields}"num_tree_tokens":3,"shard":"s00000{number}"}}' for number in range(3))
    storage.write_whole(layout.plan_record, f'{{"shards":[{shards}]}}'.encode())
    expected = tuple(PlannedShard(f"s00000{number}", 2, 2, 0, 4, 3) for number in range(3))
    assert read_plan(layout) == PlanRecord(expected)
    # The shards of a plan that is complete are taken as they are, whatever ranges this version would make.
    ranges = list(cut_ranges([], layout))
    assert [part.shard for part in ranges] == ["s000000", "s000001", "s000002"]
    assert [[shard.shard for shard in expected if part.holds(shard.shard)] for part in ranges] == [
        ["s000000"],
        ["s000001"],
        ["s000002"],
    ]


def test_the_plan_does_not_depend_on_how_rows_came(tmp_path: Path) -> None:
    prompts = [[row % 7, row % 5, row] for row in range(80)]
    one = plan(
        tmp_path / "one", [prepare_rows(prompts[:50]), prepare_rows(prompts[50:], first_row=50)], max_shard_rows=9
    )
    batches = [prepare_rows(prompts[50:], first_row=50), prepare_rows(prompts[:50])]
    two = plan(tmp_path / "two", batches, max_shard_rows=9)
    assert one == two
    assert len(one) == 9
    for shard in one:
        names = [RunLayout(str(tmp_path / name)).shard_plan(shard.shard) for name in ("one", "two")]
        assert Path(names[0]).read_bytes() == Path(names[1]).read_bytes()


def test_shards_are_balanced_by_expected_cost(tmp_path: Path) -> None:
    prompts = [[row, *range(50 if row < 20 else 5)] for row in range(100)]
    shards = plan(tmp_path, [prepare_rows(prompts)], max_shard_tokens=600)
    costs = [shard.num_tree_tokens + 16 * shard.num_requests for shard in shards]
    assert len(shards) > 4
    assert max(costs) <= 600 + 2 * 67
    assert min(costs[:-1]) >= 300


def test_identical_greedy_requests_merge_into_the_first_of_the_input(tmp_path: Path) -> None:
    batches = [prepare_rows([[1, 2], [3], [1, 2]], unit=1), prepare_rows([[1, 2]], unit=0)]
    (shard,) = plan(tmp_path, batches)
    rows = {row["custom_id"]: row["merged_into"] for row in rows_of(tmp_path, [shard])[0]}
    assert rows == {"u0:0": None, "u1:0": "u0:0", "u1:2": "u0:0", "u1:1": None}
    assert (shard.num_rows, shard.num_requests, shard.num_prompt_tokens) == (4, 2, 3)


def test_requests_never_merge_across_tenants_cost_centres_or_samplings(tmp_path: Path) -> None:
    same = [[1, 2], [1, 2]]
    for name, batch in {
        "tenants": prepare_rows(same, tenants=["a", "b"]),
        "cost_centers": prepare_rows(same, cost_centers=["a", "b"]),
        "hot": prepare_rows(same, sampling=HOT),
    }.items():
        (shard,) = plan(tmp_path / name, [batch])
        assert shard.num_requests == 2, name
    shards = plan(tmp_path / "mixed", [prepare_rows([[1]]), prepare_rows([[1]], unit=1, sampling=HOT)])
    assert sum(shard.num_requests for shard in shards) == 2
    (merged,) = plan(tmp_path / "always", [prepare_rows(same, sampling=HOT)], merge="always")
    (kept,) = plan(tmp_path / "never", [prepare_rows(same)], merge="never")
    assert (merged.num_requests, kept.num_requests) == (1, 2)


def test_rejects_form_shards_of_their_own(tmp_path: Path) -> None:
    shards = plan(tmp_path, [prepare_rows([[1], None, None]), prepare_rows([None], unit=1)])
    assert [(shard.shard, shard.num_requests, shard.num_rejects) for shard in shards] == [
        ("s000000", 1, 0),
        ("x000000", 0, 3),
    ]


def test_the_plan_record_tells_the_hit_rate_and_ends_planning(tmp_path: Path) -> None:
    layout = RunLayout(str(tmp_path))
    assert read_plan(layout) is None
    plan(tmp_path, [prepare_rows([[1, 2, 3, 4], [1, 2, 3, 5]])])
    record = read_plan(layout)
    assert record is not None
    assert record.max_hit_rate == 3 / 8
    assert not Path(layout.sorted_runs).exists()


def test_no_rows_give_a_plan_without_shards(tmp_path: Path) -> None:
    assert plan(tmp_path, []) == []
    record = read_plan(RunLayout(str(tmp_path)))
    assert record is not None
    assert (record.num_rows, record.max_hit_rate) == (0, 0.0)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    prompts=PROMPTS,
    samplings=st.lists(st.sampled_from([GREEDY, HOT]), min_size=60, max_size=60),
    counts=st.lists(st.integers(1, 4), min_size=60, max_size=60),
    merge=st.sampled_from(["auto", "always", "never"]),
)
def test_samples_of_a_row_stay_in_one_shard_and_only_greedy_ones_are_merged(
    tmp_path_factory: Any, prompts: list[list[int]], samplings: list[str], counts: list[int], merge: str
) -> None:
    folder, counts = tmp_path_factory.mktemp("plan"), counts[: len(prompts)]
    batch = wanting(prepare_rows(prompts, samplings=samplings[: len(prompts)]), counts)
    with small_ranges(range_bytes=4 * ROW_BYTES, sample_bytes=ROW_BYTES):
        shards = plan(folder, [batch], max_shard_rows=3, merge=merge)
    planned = rows_of(folder, shards)
    places = [[(row["source_row"], row["sample"]) for row in rows] for rows in planned]
    assert sorted(place for rows in places for place in rows) == [
        (row, sample) for row, count in enumerate(counts) for sample in range(count)
    ]
    for rows, shard in zip(places, shards, strict=True):
        assert all(rows.count((row, sample)) == 1 for row, _ in rows for sample in range(counts[row]))
        assert shard.num_further_samples == sum(sample > 0 for _, sample in rows)
    for rows in planned:
        first: dict[Any, Any] = {}
        for row in rows:
            is_greedy = row["sampling"] == GREEDY
            request = (row["prefix_key"], row["sampling"], 0 if is_greedy else row["sample"])
            if merge == "never" or (merge == "auto" and not is_greedy):
                assert row["merged_into"] is None
            else:
                assert row["merged_into"] == first.get(request)
                first.setdefault(request, row["custom_id"])
        table = pa.Table.from_pylist(rows, schema=plan_schema([]))
        followers = PlannedRows.from_table(table).followers
        for asked, copies in followers.items():
            wanted = {(rows[copy]["prefix_key"], rows[copy]["sampling"]) for copy in copies}
            assert wanted == {(rows[asked]["prefix_key"], rows[asked]["sampling"])}
            if rows[asked]["sampling"] == HOT:
                assert {rows[copy]["sample"] for copy in copies} == {rows[asked]["sample"]}


def test_a_row_whose_id_came_before_is_one_reject_whatever_answers_it_wants(tmp_path: Path) -> None:
    layout = RunLayout(str(tmp_path))
    spec = PlanSpec(PlanSection(), layout, ())
    runs = list(write_runs([wanting(prepare_rows([[1], [2]], sampling=HOT), [2, 3])], layout, spec.section))
    (shard,) = [shard for part in cut_ranges(runs, layout) for shard in build_shards(part, spec, {0: {1}})]
    rows = read_rows(layout.shard_plan(shard.shard)).to_pylist()
    assert [(row["source_row"], row["sample"], row["error_type"]) for row in rows] == [
        (0, 0, None),
        (0, 1, None),
        (1, 0, "duplicate_id"),
    ]
    assert (shard.num_rows, shard.num_requests, shard.num_rejects, shard.num_further_samples) == (3, 2, 1, 1)
