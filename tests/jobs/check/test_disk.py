"""Free space against what a run will write."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from moebeam.jobs.check.disk import check_disk, estimate_disk
from moebeam.jobs.console.formats import format_bytes
from moebeam.schemas.errors import OutputError
from moebeam.transforms.read.input_rows import ReadColumns
from moebeam.transforms.read.input_scan import InputScan, scan_input
from tests.support.jobs.jobs_for_tests import fake_job, write_parquet


@pytest.fixture
def scanned(tmp_path: Path) -> tuple[Any, InputScan, ReadColumns]:
    source = tmp_path / "in" / "a.parquet"
    write_parquet(source, {"text": ["x" * 100 + str(row) for row in range(500)], "blob": ["y" * 10_000] * 500})
    job = fake_job(source, tmp_path / "out", tmp_path / "checkpoint")
    scan = scan_input(job.input)
    return job, scan, ReadColumns(input_fields=(scan.schema.field("text"),), passthrough=())


def set_free(monkeypatch: pytest.MonkeyPatch, num_bytes: float) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=1 << 40, free=int(num_bytes)))


def expected_bytes(scan: InputScan, needed: int) -> int:
    return estimate_disk(
        num_rows=scan.num_rows, input_bytes=needed, template_chars=30, max_tokens=64, is_planned=False
    ).num_bytes


def test_a_full_disk_is_told_before_the_run_with_the_numbers(
    scanned: tuple[Any, InputScan, ReadColumns], monkeypatch: pytest.MonkeyPatch
) -> None:
    set_free(monkeypatch, 20_000)
    with pytest.raises(OutputError, match=r"about \d+ KB for 500 rows \(plan .*, tables .*\), 20 KB free"):
        check_disk(*scanned)


def test_a_disk_that_may_get_full_is_a_warning_and_an_empty_one_is_nothing(
    scanned: tuple[Any, InputScan, ReadColumns], monkeypatch: pytest.MonkeyPatch
) -> None:
    job, scan, columns = scanned
    expected = expected_bytes(scan, 500 * 110)
    set_free(monkeypatch, expected / 2)
    assert "may get close" in (check_disk(job, scan, columns) or "")
    set_free(monkeypatch, 2 * expected)
    assert check_disk(job, scan, columns) is None


def test_columns_that_are_not_read_take_no_space(
    scanned: tuple[Any, InputScan, ReadColumns], monkeypatch: pytest.MonkeyPatch
) -> None:
    job, scan, columns = scanned
    set_free(monkeypatch, expected_bytes(scan, 500 * 120))
    assert check_disk(job, scan, columns) is None


def test_an_output_in_a_store_is_not_looked_at(scanned: tuple[Any, InputScan, ReadColumns]) -> None:
    job, scan, columns = scanned
    away = job.model_copy(update={"output": job.output.model_copy(update={"path": "s3://bucket/out"})})
    assert check_disk(away, scan, columns) is None


@pytest.mark.parametrize(("num", "told"), [(0, "0 bytes"), (999, "999 bytes"), (1500, "1.5 KB"), (2e9, "2 GB")])
def test_bytes_are_spelled(num: float, told: str) -> None:
    assert format_bytes(num) == told
