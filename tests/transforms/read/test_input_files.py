"""The files of an input: of several paths, of partition folders, of an earlier run."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from moebeam.schemas.errors import InputPatternError
from moebeam.schemas.job.input_section import InputSection
from moebeam.transforms.read.input_files import identify_files, list_input_files
from moebeam.transforms.read.input_rows import ReadColumns, read_unit
from moebeam.transforms.read.input_scan import InputScan, scan_input
from tests.support.jobs.jobs_for_tests import write_parquet


def read_texts(scan: InputScan) -> list[dict[str, Any]]:
    columns = ReadColumns(tuple(scan.schema), tuple(scan.schema))
    return [
        row["passthrough"] for unit in scan.units for batch in read_unit(unit, columns) for row in batch.to_pylist()
    ]


def test_several_paths_are_one_input_with_each_file_once(tmp_path: Path) -> None:
    for name in ("a/x", "b/y", "b/z"):
        write_parquet(tmp_path / f"{name}.parquet", {"text": [name]})
    paths = [f"{tmp_path}/b", f"{tmp_path}/a/x.parquet", f"{tmp_path}/*/y.parquet"]
    scan = scan_input(InputSection(path=tuple(paths)))
    assert [unit.label for unit in scan.units] == ["a/x.parquet", "b/y.parquet", "b/z.parquet"]
    assert scan.fingerprint == scan_input(InputSection(path=tuple(reversed(paths)))).fingerprint
    with pytest.raises(InputPatternError, match=r"nothing.*expected at least one file, found none"):
        identify_files(InputSection(path=(*paths, f"{tmp_path}/nothing")))


def test_partition_folders_are_typed_columns_of_every_row(tmp_path: Path) -> None:
    for folder, text in (("year=2026/month=01", "a"), ("year=2026/month=__HIVE_DEFAULT_PARTITION__", "b"), ("", "c")):
        write_parquet(tmp_path / "in" / folder / "x.parquet", {"text": [text]})
    scan = scan_input(InputSection(path=f"{tmp_path}/in"))
    assert scan.names == ("text", "year", "month")
    assert scan.schema.field("year").type == pa.int64()
    assert read_texts(scan) == [
        {"text": "c", "year": None, "month": None},
        {"text": "a", "year": 2026, "month": 1},
        {"text": "b", "year": 2026, "month": None},
    ]
    assert scan_input(InputSection(path=f"{tmp_path}/in"), needed={"text"}).schema.names == ["text"]


def test_the_folder_wins_over_a_column_of_its_name_as_other_readers_have_it(tmp_path: Path) -> None:
    write_parquet(tmp_path / "k=01" / "x.parquet", {"text": ["a"], "k": ["in the file"]})
    assert read_texts(scan_input(InputSection(path=f"{tmp_path}"))) == [{"text": "a", "k": "01"}]


def test_partitions_name_tenants_and_ids(tmp_path: Path) -> None:
    write_parquet(tmp_path / "shop=07" / "x.parquet", {"text": ["a"]})
    scan = scan_input(InputSection(path=f"{tmp_path}"))
    columns = ReadColumns((scan.schema.field("text"),), (), id_column="shop", tenant_column="shop")
    (batch,) = read_unit(scan.units[0], columns)
    assert (batch.column("custom_id").to_pylist(), batch.column("tenant").to_pylist()) == (["7"], ["7"])


def write_run(output: Path, status: str | None) -> Path:
    write_parquet(output / "results" / "s000000.parquet", {"custom_id": ["a"]})
    write_parquet(output / "rejects" / "s000000.parquet", {"custom_id": ["b"]})
    (output / "_moebeam").mkdir()
    (output / "_moebeam" / "job.json").write_text("{}")
    if status is not None:
        (output / "manifest.json").write_text(json.dumps({"status": status}))
    return output


def test_a_finished_runs_output_stands_for_its_results(tmp_path: Path) -> None:
    output = write_run(tmp_path / "out", "complete")
    for path in (output, output / "results", f"{output}/results/", output / "results" / "*.parquet"):
        files = list_input_files(InputSection(path=str(path)))
        assert [file.path for file in files] == [f"{output}/results/s000000.parquet"]


@pytest.mark.parametrize("status", [None, "incomplete"])
def test_an_unfinished_run_is_no_input(tmp_path: Path, status: str | None) -> None:
    output = write_run(tmp_path / "out", status)
    for path in (output, output / "results"):
        with pytest.raises(InputPatternError, match=rf"found one with rows left; moebeam resume {output} first"):
            list_input_files(InputSection(path=str(path)))
