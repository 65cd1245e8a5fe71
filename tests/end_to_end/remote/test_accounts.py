"""The accounts of whole runs: engine, ledger, rows and manifest agree, and a damaged table stops the manifest."""

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moebeam.jobs.run.launch import launch
from moebeam.schemas.answers import StagedFile
from moebeam.schemas.errors import PipelineFailed
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.schemas.tables import Table
from moebeam.transforms.durable import commit
from tests.support.jobs.jobs_for_tests import fake_job, priced, write_parquet

NUM_ROWS = 24


@pytest.fixture
def source(tmp_path: Path) -> Path:
    numbers = range(NUM_ROWS)
    return write_parquet(
        tmp_path / "in" / "tickets.parquet",
        {
            "text": [f"the shared beginning of ticket {number % 5}" for number in numbers],
            "tenant": [f"tenant {number % 2}" for number in numbers],
            "unit": [f"unit {number % 3}" for number in numbers],
            "team": [None if number % 4 == 0 else f"team {number % 4}" for number in numbers],
        },
    )


def sections(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    return {
        "input": {"tenant_column": "tenant", "cost_center_column": "unit"},
        "accounting": {**priced(tmp_path), "tag_columns": ["team"]},
        "plan": {"max_shard_rows": 8},
        **changes,
    }


def manifest_of(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((output / "manifest.json").read_text())
    return found


def test_the_torch_engine_counts_what_the_ledger_says(tmp_path: Path, source: Path, tiny_checkpoint: Path) -> None:
    prices = {**priced(tmp_path), "provider": "fake", "model": "tiny"}
    accounting = {"accounting": {**prices, "tag_columns": ["team"]}}
    model = {"model": {"engine": "torch"}, "sampling": {"max_tokens": 6}}
    launch(fake_job(source, tmp_path / "out", tiny_checkpoint, **sections(tmp_path, **accounting, **model)))
    manifest = manifest_of(tmp_path / "out")
    assert set(manifest["checks"].values()) == {"equal"}
    ledger = pq.read_table(tmp_path / "out" / "ledger").to_pylist()
    seconds = sum(line["accelerator_s"] for line in ledger)
    assert seconds == pytest.approx(
        sum(manifest["engine"][f"{phase}_s"] for phase in ("plan", "extend", "sample", "retire"))
    )


@pytest.mark.parametrize("max_tokens", [1, 3, 5, 40])
def test_accounts_agree_where_answers_are_cut_in_text_that_the_schema_forces(
    tmp_path: Path, source: Path, tiny_checkpoint: Path, max_tokens: int
) -> None:
    """Tokens that are forced right before the cut are paid for, though the engine never computes them."""
    schema = {"type": "object", "properties": {"category": {"type": "string"}}, "required": ["category"]}
    (tmp_path / "schema.json").write_text(json.dumps({**schema, "additionalProperties": False}))
    changes = sections(
        tmp_path,
        accounting={**priced(tmp_path), "provider": "fake", "model": "tiny"},
        model={"engine": "torch"},
        sampling={"max_tokens": max_tokens},
        output={"schema": str(tmp_path / "schema.json"), "max_reject_share": 1.0},
    )
    summary = launch(fake_job(source.parent, tmp_path / "out", tiny_checkpoint, **changes))
    assert summary.num_results + summary.num_rejects == NUM_ROWS
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["checks"]["ledger_and_engine"] == "equal"


def test_the_manifest_holds_the_sums_by_tenant_cost_center_and_day(
    tmp_path: Path, source: Path, tiny_checkpoint: Path
) -> None:
    launch(fake_job(source, tmp_path / "out", tiny_checkpoint, **sections(tmp_path)))
    manifest = manifest_of(tmp_path / "out")
    rollup = manifest["rollup"]
    assert rollup["by"] == ["tenant", "cost_center", "day"]
    assert {(group["tenant"], group["cost_center"]) for group in rollup["groups"]} == {
        (f"tenant {number % 2}", f"unit {number % 3}") for number in range(6)
    }
    total = sum(Decimal(group["cost"]) for group in rollup["groups"])
    assert total == Decimal(manifest["totals"]["costs"]["USD"]) > 0
    # The `fake` engine counts nothing.
    assert manifest["checks"]["ledger_and_engine"] == "the engine does not count"


def test_tags_reach_the_ledger_and_keep_rows_apart(tmp_path: Path, source: Path, tiny_checkpoint: Path) -> None:
    launch(fake_job(source, tmp_path / "out", tiny_checkpoint, **sections(tmp_path)))
    ledger = pq.read_table(tmp_path / "out" / "ledger").to_pylist()
    assert len(ledger) == NUM_ROWS
    assert sorted({line["tags"][0][1] if line["tags"] else "" for line in ledger}) == ["", "team 1", "team 2", "team 3"]
    rows = pq.read_table(tmp_path / "out" / "results").to_pylist()
    assert {row["custom_id"]: row["team"] for row in rows} == {
        line["custom_id"]: dict(line["tags"]).get("team") for line in ledger
    }


def test_the_shipped_views_add_up_in_duckdb_and_find_nothing_broken(
    tmp_path: Path, source: Path, tiny_checkpoint: Path
) -> None:
    output = tmp_path / "out"
    launch(fake_job(source, output, tiny_checkpoint, **sections(tmp_path)))
    total = Decimal(manifest_of(output)["totals"]["costs"]["USD"])
    connection = duckdb.connect()
    connection.execute(f"SET VARIABLE moebeam_run = '{output}'")
    connection.execute((output / "views.sql").read_text())
    views = ["cost_by_tenant", "cost_by_cost_center", "cost_by_day", "cost_by_model", "cost_by_outcome"]
    for view in views:
        assert connection.sql(f"SELECT sum(cost) FROM {view}").fetchall() == [(total,)], view
    assert connection.sql("SELECT sum(amount) FROM token_classes").fetchall() == [(total,)]
    assert connection.sql("SELECT * FROM broken_invariants").fetchall() == []
    assert connection.sql("SELECT sum(cost), count(*) FROM ledger_by('team')").fetchall() == [(total, 4)]
    assert connection.sql("SELECT count(*) FROM results").fetchall() == [(NUM_ROWS,)]
    damage(output / "ledger", "cache_miss_cost", Decimal("0.5"))
    broken = connection.sql("SELECT what, count(*) FROM broken_invariants GROUP BY ALL ORDER BY 1").fetchall()
    assert [what for what, _ in broken] == [
        "an amount is not tokens x price",
        "token classes do not add up to the cost",
    ]


def damage(folder: Path, column: str, value: Any) -> None:
    """Change one value of the first file of a table."""
    path = sorted(folder.glob("*.parquet"))[0]
    pq.write_table(change_first(pq.read_table(path), column, value), path)


def change_first(table: pa.Table, column: str, value: Any) -> pa.Table:
    place = table.schema.get_field_index(column)
    values = [value, *table.column(column).to_pylist()[1:]]
    return table.set_column(place, table.schema.field(place), pa.array(values, table.schema.field(place).type))


@pytest.mark.parametrize(
    ("table", "column", "value", "expected"),
    [
        ("ledger", "cost", Decimal("0.5"), "cost: expected the ledger and the rows to agree"),
        ("ledger", "cache_miss_tokens", 10_000, "prompt_tokens: expected the ledger and the rows to agree"),
        ("ledger", "cache_hit_cost", Decimal("0.5"), "cost: expected the ledger and its token classes to agree"),
        ("results", "cost", Decimal("0.5"), "cost: expected the ledger and the rows to agree"),
        ("results", "completion_tokens", 9_999, "completion_tokens: expected the ledger and the rows to agree"),
        ("results", "cost_allocated", Decimal("0.5"), "cost_allocated: expected the ledger and the rows to agree"),
    ],
)
def test_a_table_that_was_changed_together_with_its_digest_stops_the_manifest(
    table: str,
    column: str,
    value: Any,
    expected: str,
    tmp_path: Path,
    source: Path,
    tiny_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The commit has the digest of what was changed: only the accounts can tell."""
    output = tmp_path / "out"
    real = commit._stage

    def change_and_stage(layout: RunLayout, shard: str, attempt: str, name: Table, rows: pa.Table) -> StagedFile:
        is_changed = (shard, name) == ("s000000", table)
        return real(layout, shard, attempt, name, change_first(rows, column, value) if is_changed else rows)

    monkeypatch.setattr(commit, "_stage", change_and_stage)
    with pytest.raises(PipelineFailed, match=expected):
        launch(fake_job(source, output, tiny_checkpoint, **sections(tmp_path)))
    assert not Path(RunLayout(str(output)).manifest).exists()
