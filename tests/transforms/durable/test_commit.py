"""Commits: exclusive, whole, and only of tables that agree."""

import threading
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moebeam.schemas.answers import ShardCommit, Totals
from moebeam.schemas.errors import CommitError
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.schemas.tables import LEDGER_SCHEMA, RESULT_SCHEMA, Table
from moebeam.transforms.durable.commit import commit_shard, ledger_totals, read_commit, sum_tables
from moebeam.transforms.publish.manifest import publish_shard

ROW: dict[str, Any] = {
    "custom_id": "a",
    "status": "ok",
    "prompt_tokens": 10,
    "cached_tokens": 4,
    "completion_tokens": 3,
    "reasoning_tokens": 1,
    "cost": Decimal("0.5"),
    "cost_allocated": Decimal("0.5"),
    "currency": "USD",
    "cost_basis": "exact",
    "scope": "row",
    "num_rows": 1,
}
LINE: dict[str, Any] = {
    "custom_id": "a",
    "cache_hit_tokens": 4,
    "cache_miss_tokens": 6,
    "visible_output_tokens": 2,
    "reasoning_tokens": 1,
    "cost": Decimal("0.5"),
    "cost_allocated": Decimal("0.5"),
    "currency": "USD",
    "cost_basis": "exact",
    "started_at": datetime(2026, 1, 1, tzinfo=UTC),
}


def tables(rows: list[dict[str, Any]], ledger: list[dict[str, Any]]) -> dict[Table, pa.Table]:
    return {
        "results": pa.Table.from_pylist([row for row in rows if row["status"] == "ok"], schema=RESULT_SCHEMA),
        "rejects": pa.Table.from_pylist([row for row in rows if row["status"] != "ok"], schema=RESULT_SCHEMA),
        "ledger": pa.Table.from_pylist(ledger, schema=LEDGER_SCHEMA),
    }


def test_of_racing_attempts_one_wins_and_all_name_its_files(tmp_path: Path) -> None:
    layout = RunLayout(str(tmp_path))
    commits: list[ShardCommit] = []
    barrier = threading.Barrier(6)

    def attempt() -> None:
        barrier.wait()
        commits.append(commit_shard(layout, "run", "s0", tables([ROW], [LINE])))

    threads = [threading.Thread(target=attempt) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({commit.attempt for commit in commits}) == 1
    assert read_commit(layout, "s0") == commits[0]
    staged = sorted(path.name for path in (tmp_path / "_moebeam" / "staging").iterdir())
    assert staged == sorted(Path(file.path).name for file in commits[0].files)


def test_staged_files_match_no_parquet_glob_until_published(tmp_path: Path) -> None:
    layout = RunLayout(str(tmp_path))
    commit = commit_shard(layout, "run", "s0", tables([ROW], [LINE]))
    assert list(tmp_path.glob("**/*.parquet")) == []
    publish_shard(commit, layout)
    publish_shard(commit, layout)
    assert pq.read_table(tmp_path / "results").column("custom_id").to_pylist() == ["a"]
    assert sorted(path.name for path in tmp_path.glob("**/*.parquet")) == ["part-s0.parquet"] * 2


def test_publishing_a_damaged_or_missing_file_raises(tmp_path: Path) -> None:
    layout = RunLayout(str(tmp_path))
    commit = commit_shard(layout, "run", "s0", tables([ROW], [LINE]))
    staged = tmp_path / commit.files[0].path
    staged.write_bytes(b"damaged")
    with pytest.raises(CommitError, match="is damaged: expected content with SHA-256"):
        publish_shard(commit, layout)
    staged.unlink()
    with pytest.raises(CommitError, match="expected the results of shard s0, found no file"):
        publish_shard(commit, layout)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("cache_miss_tokens", 7, "prompt_tokens: expected rows and ledger to agree, found 10 in the rows, 11"),
        ("visible_output_tokens", 1, "completion_tokens"),
        ("reasoning_tokens", 0, "completion_tokens"),
        ("cost", Decimal("0.500000000001"), "cost"),
        ("cost_allocated", Decimal("0.4"), "cost_allocated of the ledger"),
    ],
)
def test_tables_that_contradict_each_other_are_not_committed(
    name: str, value: Any, expected: str, tmp_path: Path
) -> None:
    with pytest.raises(CommitError, match=expected):
        commit_shard(RunLayout(str(tmp_path)), "run", "s0", tables([ROW], [{**LINE, name: value}]))
    assert read_commit(RunLayout(str(tmp_path)), "s0") is None


def test_totals_count_rows_tokens_and_reasons() -> None:
    reject = {**ROW, "custom_id": "b", "status": "rejected", "error_type": "not_json"}
    group = {
        **dict.fromkeys(ROW),
        "status": "rejected",
        "error_type": "unreadable_row_group",
        "scope": "row_group",
        "num_rows": 7,
    }
    totals = sum_tables(
        tables([ROW, reject, group], [LINE, {**LINE, "cache_hit_tokens": None, "cache_miss_tokens": 10}])
    )
    assert (totals.num_results, totals.num_rejects, totals.num_unreadable, totals.num_unreadable_rows) == (1, 1, 1, 7)
    assert totals.cached_tokens is None
    assert totals.costs == {"USD": "1.000000000000"}
    assert totals.rejects_by_type == {"not_json": 1, "unreadable_row_group": 1}


def test_a_ledger_alone_says_what_was_paid_and_nothing_of_rows() -> None:
    unpriced = {**LINE, "cost": None, "currency": None, "cache_hit_tokens": None, "cost_basis": "upper_bound"}
    alone = ledger_totals(tables([ROW], [LINE, unpriced])["ledger"])
    assert (alone.num_attempts, alone.num_unpriced, alone.num_upper_bound) == (2, 1, 1)
    assert alone.costs == {"USD": "0.500000000000"}
    assert alone.cached_tokens is None
    assert (alone.num_results, alone.num_rejects) == (0, 0)


def test_totals_add_up_with_unknown_staying_unknown() -> None:
    known = Totals(prompt_tokens=5, cached_tokens=2, costs={"USD": "0.1"}, rejects_by_type={"a": 1})
    unknown = Totals(prompt_tokens=1, cached_tokens=None, costs={"CNY": "2", "USD": "0.2"}, rejects_by_type={"a": 2})
    added = known + unknown
    assert (added.prompt_tokens, added.cached_tokens) == (6, None)
    assert added.costs == {"CNY": "2", "USD": "0.3"}
    assert added.rejects_by_type == {"a": 3}


def test_a_damaged_commit_record_is_named(tmp_path: Path) -> None:
    layout = RunLayout(str(tmp_path))
    Path(layout.commits).mkdir(parents=True)
    Path(layout.shard_commit("s0")).write_text("{")
    with pytest.raises(CommitError, match=r"commits/s0\.json: is damaged: expected a commit record"):
        read_commit(layout, "s0")
