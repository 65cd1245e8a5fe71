"""Two runs of the scripted engine, in one process."""

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from moebeam.jobs.compare import joined_rows
from moebeam.jobs.compare.comparison import DIFFERENCE_SCHEMA, Comparison, compare_runs
from moebeam.jobs.output.run_record import read_record
from tests.support.jobs.jobs_for_tests import run_fake_job, write_parquet, write_script

NUM_ROWS = 12


def run(folder: Path, name: str, checkpoint: Path, rules: list[dict[str, Any]], num_rows: int = NUM_ROWS) -> Path:
    columns = {"custom_id": [f"r{row}" for row in range(num_rows)], "q": [f"say {row}." for row in range(num_rows)]}
    source = write_parquet(folder / f"{num_rows}.parquet", columns)
    script = write_script(folder / f"{name}.json", {"default": {"text": "fine"}, "rules": rules})
    sections: dict[str, dict[str, Any]] = {
        "input": {"id_column": "custom_id"},
        "model": {"script": str(script)},
        "prompt": {"template": "{{ q }}"},
        "output": {"max_reject_share": 1.0},
    }
    run_fake_job(source, folder / name, checkpoint, **sections)
    return folder / name


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("compared")
    rules = [{"contains": "say 3.", "text": "fine \u001b[31m"}, {"contains": "say 5.", "failure": "refused"}]
    return run(folder, "a", tiny_checkpoint, []), run(folder, "b", tiny_checkpoint, rules, NUM_ROWS + 1)


def compared(a: Path, b: Path, **options: Any) -> Comparison:
    return compare_runs(read_record(str(a)), read_record(str(b)), **options)


@pytest.mark.parametrize("max_part_rows", [1, 1000])
def test_rows_that_differ_are_found_whatever_the_number_of_parts(
    runs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, max_part_rows: int
) -> None:
    monkeypatch.setattr(joined_rows, "MAX_PART_ROWS", max_part_rows)
    found = compared(*runs, target=str(tmp_path / "d.parquet"))
    assert [(row.row.custom_id, [each.kind for each in row.differences]) for row in found.rows] == [
        ("r3", ["text"]),
        ("r5", ["status", "text"]),
        ("r12", ["only_b"]),
    ]
    assert (found.num_equal, found.num_different, found.num_alone) == (NUM_ROWS - 2, 2, 1)
    assert found.num_by_kind == {"status": 1, "text": 2, "only_b": 1}
    assert not found.is_same
    written = pq.read_table(tmp_path / "d.parquet")
    assert written.schema.equals(DIFFERENCE_SCHEMA)
    lines = {line["custom_id"]: line for line in written.to_pylist()}
    assert sorted(lines) == ["r12", "r3", "r5"] and found.num_written == 3
    assert lines["r12"]["status_a"] is None and lines["r12"]["status_b"] == "ok"
    assert (lines["r3"]["output_text_a"], lines["r3"]["place"]) == ("fine", "character 4")


def test_a_run_is_the_same_as_itself_and_promises_what_its_engine_does(runs: tuple[Path, Path]) -> None:
    found = compared(runs[0], runs[0])
    assert found.is_same and not found.rows and not found.jobs and found.num_equal == NUM_ROWS
    assert found.a.determinism is not None and found.a.determinism.promise == "bitwise"
    assert found.a == found.b and found.a.rows_per_s is not None
    json.dumps(found.to_json())


def test_the_jobs_differences_are_named_and_the_output_is_none(runs: tuple[Path, Path]) -> None:
    names = {each.name for each in compared(*runs).jobs}
    assert {"input.path", "model.script"} <= names and "output.path" not in names


def test_only_as_many_rows_are_held_as_are_shown(runs: tuple[Path, Path]) -> None:
    found = compared(*runs, num_shown=1)
    assert [row.row.custom_id for row in found.rows] == ["r3"] and found.num_different == 2
