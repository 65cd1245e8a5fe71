"""Finished runs in Iceberg and Delta tables, by real catalogs and the formats' own readers."""

import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import write_deltalake
from pyiceberg.partitioning import PartitionField, PartitionSpec
from pyiceberg.transforms import IdentityTransform

from moebeam.schemas.errors import FileDamaged, TableCommitFailed
from moebeam.schemas.lakehouse.table_url import parse_table_url
from moebeam.transforms.publish.lakehouse import commit_run as commit_module
from moebeam.transforms.publish.lakehouse.commit_run import ORDER, open_table
from tests.support.jobs.published_runs import (
    PublishedRun,
    count_runs,
    make_catalog,
    make_url,
    publish_run,
    read_lakehouse,
)


@pytest.fixture(params=["iceberg", "delta"])
def url(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "iceberg":
        make_catalog(tmp_path / "catalog", monkeypatch)
    return make_url(request.param, tmp_path)


def _run(tmp_path: Path, run_id: str, tenants: tuple[str | None, ...] = ("a", "b"), **columns: Any) -> PublishedRun:
    return publish_run(tmp_path / run_id, run_id, {"tenant": pa.array(tenants, pa.string()), **columns})


def test_a_run_is_in_all_three_tables_and_committing_it_again_adds_nothing(url: str, tmp_path: Path) -> None:
    run = _run(tmp_path, "r1")
    receipt = run.commit(url)
    assert run.commit(url) == receipt
    run.forget_receipts()
    assert run.commit(url).commits == receipt.commits
    assert {table: count_runs(url, table) for table in ORDER} == {
        "results": {"r1": 4},
        "rejects": {"r1": 2},
        "ledger": {"r1": 4},
    }
    published = sorted(read_lakehouse(url)["custom_id"].to_pylist())
    assert published == ["r1-0-0", "r1-0-1", "r1-1-0", "r1-1-1"]


@pytest.mark.parametrize("table", ORDER)
@pytest.mark.parametrize("is_after", [False, True])
def test_who_is_stopped_at_any_of_the_three_commits_leaves_a_run_that_can_be_committed_whole(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, table: str, is_after: bool
) -> None:
    run = _run(tmp_path, "r1")

    class Stopping:
        def __init__(self, inner: Any) -> None:
            self._inner = inner
            self.name = inner.name

        def commit(self, rows: Any) -> str:
            if is_after:
                self._inner.commit(rows)
            raise KeyboardInterrupt

    real = open_table
    broken = parse_table_url(url).of_table(table)  # type: ignore[arg-type]
    monkeypatch.setattr(commit_module, "open_table", lambda u: Stopping(real(u)) if u == broken else real(u))
    with pytest.raises(KeyboardInterrupt):
        run.commit(url)
    # A run that is among the results is in the other two tables.
    if count_runs(url):
        assert count_runs(url, "rejects") == {"r1": 2} and count_runs(url, "ledger") == {"r1": 4}
    monkeypatch.setattr(commit_module, "open_table", real)
    run.commit(url)
    assert [count_runs(url, each) for each in ORDER] == [{"r1": 4}, {"r1": 2}, {"r1": 4}]


def test_runs_that_commit_at_once_are_all_there_and_each_only_once(url: str, tmp_path: Path) -> None:
    runs = [_run(tmp_path, f"r{number}") for number in range(3)]
    _run(tmp_path, "first").commit(url)
    failures: list[BaseException] = []

    def commit(run: PublishedRun) -> None:
        try:
            open_table(parse_table_url(url)).commit(_rows(run, url))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=commit, args=(run,)) for run in runs for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert count_runs(url) == {"first": 4, "r0": 4, "r1": 4, "r2": 4}


def _rows(run: PublishedRun, url: str) -> Any:
    return commit_module._list_rows(run.layout, run.manifest, run.schema, parse_table_url(url))["results"]  # type: ignore[attr-defined]


def test_a_new_column_is_added_and_earlier_rows_are_null_there(url: str, tmp_path: Path) -> None:
    answer = pa.array([{"mood": "good"}] * 2)
    _run(tmp_path, "r1", output=answer).commit(url)
    more = pa.array([{"mood": "bad", "score": 3}] * 2)
    _run(tmp_path, "r2", output=more, language=["de", "en"]).commit(url)
    _run(tmp_path, "r3").commit(url)
    rows = {row["custom_id"]: row for row in read_lakehouse(url).to_pylist()}
    assert len(rows) == 12
    assert (rows["r1-0-0"]["output"], rows["r1-0-0"]["language"]) == ({"mood": "good", "score": None}, None)
    assert (rows["r2-0-1"]["output"], rows["r2-0-1"]["language"]) == ({"mood": "bad", "score": 3}, "en")
    assert (rows["r3-0-1"]["output"], rows["r3-0-1"]["tenant"]) == (None, "b")


def test_a_changed_type_is_refused_and_leaves_the_tables_as_they_were(url: str, tmp_path: Path) -> None:
    _run(tmp_path, "r1", score=[1, 2]).commit(url)
    with pytest.raises(TableCommitFailed, match=r"r2.*score.*moebeam resume"):
        _run(tmp_path, "r2", score=["1", "2"]).commit(url)
    assert count_runs(url) == {"r1": 4}


def test_replacing_takes_out_what_earlier_runs_said_of_the_same_values_but_no_ledger_line(
    url: str, tmp_path: Path
) -> None:
    _run(tmp_path, "r1", ("a", "it's")).commit(url, "tenant")
    _run(tmp_path, "r2", ("c", None)).commit(url, "tenant")
    _run(tmp_path, "r3", ("it's", "it's")).commit(url, "tenant")
    found = read_lakehouse(url)
    tenants = sorted(zip(found["run_id"].to_pylist(), map(str, found["tenant"].to_pylist()), strict=True))
    assert (
        tenants == [("r1", "a")] * 2 + [("r2", "None"), ("r2", "None"), ("r2", "c"), ("r2", "c")] + [("r3", "it's")] * 4
    )
    # The rejects stand for unreadable files: each run's replace those of the run before.
    assert count_runs(url, "rejects") == {"r3": 2}
    assert count_runs(url, "ledger") == {"r1": 4, "r2": 4, "r3": 4}


def test_a_retry_only_adds_rows(url: str, tmp_path: Path) -> None:
    _run(tmp_path, "r1").commit(url, "tenant")
    retry = _run(tmp_path, "r2")
    PublishedRun(retry.layout, {**retry.manifest, "retry_of": {"run_id": "r1"}}, retry.schema).commit(url, "tenant")
    assert count_runs(url) == {"r1": 4, "r2": 4}


def test_a_partitioned_table_takes_a_run(url: str, tmp_path: Path) -> None:
    run, parsed = _run(tmp_path, "r1"), parse_table_url(url)
    if url.startswith("delta"):
        write_deltalake(url.removeprefix("delta://"), run.schema.empty_table(), partition_by=["tenant"])
    else:
        catalog = make_catalog(tmp_path / "catalog")
        table = catalog.create_table("db.reviews", run.schema)
        columns = table.schema()
        place = columns.find_field("tenant").field_id
        catalog.drop_table("db.reviews")
        spec = PartitionSpec(PartitionField(place, 1000, IdentityTransform(), "tenant"))
        catalog.create_table("db.reviews", columns, partition_spec=spec)
    run.commit(str(parsed))
    _run(tmp_path, "r2", ("b", "b")).commit(str(parsed), "tenant")
    found = read_lakehouse(url).group_by(["run_id", "tenant"]).aggregate([([], "count_all")]).to_pylist()
    assert sorted(tuple(row.values()) for row in found) == [("r1", "a", 2), ("r2", "b", 4)]


def test_columns_of_types_that_tables_lack_are_stored_in_the_next_best(url: str, tmp_path: Path) -> None:
    instant = pa.array([1_700_000_000_000_000_123, None], pa.timestamp("ns", tz="Europe/Berlin"))
    run = _run(
        tmp_path,
        "r1",
        small=pa.array([1, 200], pa.uint8()),
        large=pa.array([2**64 - 1, 0], pa.uint64()),
        at=instant,
        words=pa.array(["x", "y"]).dictionary_encode(),
        vector=pa.array([[1.0, 2.0], [3.0, 4.0]], pa.list_(pa.float32(), 2)),
        empty=pa.nulls(2),
        code=pa.array([b"ab", b"cd"], pa.binary(2)),
    )
    run.commit(url)
    found = {row["custom_id"]: row for row in read_lakehouse(url).to_pylist()}["r1-0-0"]
    assert "empty" not in found
    assert (found["small"], int(found["large"]), found["words"]) == (1, 2**64 - 1, "x")
    assert (found["vector"], found["code"], found["at"].microsecond) == ([1.0, 2.0], b"ab", 0)


def test_a_damaged_file_is_never_committed(url: str, tmp_path: Path) -> None:
    run = _run(tmp_path, "r1")
    path = Path(run.layout.output) / run.manifest["files"]["results"][0]["path"]
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(FileDamaged):
        run.commit(url)
    assert not count_runs(url)
