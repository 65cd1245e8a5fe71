"""A read that fails for a moment costs no row; what is wrong with a file itself becomes a reject."""

import errno
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from moebeam.schemas.errors import InputPatternError
from moebeam.schemas.job.sections import InputSection
from moebeam.schemas.store import storage
from moebeam.schemas.store.object_store import StoreError
from moebeam.transforms.read import transient_errors as patience
from moebeam.transforms.read.input_rows import ReadColumns, read_unit
from moebeam.transforms.read.input_scan import scan_input
from moebeam.transforms.read.transient_errors import retry_transient
from tests.support.jobs.jobs_for_tests import write_parquet

PASSING = [TimeoutError("slow"), ConnectionResetError(errno.ECONNRESET, "reset"), OSError(errno.EIO, "moment")]
STAYING = [TimeoutError("slow"), OSError(errno.EMFILE, "too many open files"), StoreError(errno.EIO, "503")]


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience.time, "sleep", lambda seconds: None)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_parquet(tmp_path / "in.parquet", {"text": [str(row) for row in range(3000)]}, row_group_size=3000)


def failing_open(monkeypatch: pytest.MonkeyPatch, error: OSError, num_failures: int) -> None:
    real = storage.open_input
    calls: list[str] = []

    def open_input(path: str) -> BinaryIO:
        calls.append(path)
        if len(calls) <= num_failures:
            raise error
        return real(path)

    monkeypatch.setattr(storage, "open_input", open_input)


def texts(source: Path, unit: Any, columns: ReadColumns) -> list[str]:
    return [row["input"]["text"] for batch in read_unit(unit, columns) for row in batch.to_pylist()]


@pytest.mark.parametrize("error", PASSING, ids=repr)
def test_an_error_that_passes_costs_nothing(source: Path, error: OSError, monkeypatch: pytest.MonkeyPatch) -> None:
    failing_open(monkeypatch, error, 2)
    scan = scan_input(InputSection(path=str(source)))
    assert scan.num_rows == 3000
    monkeypatch.undo()
    failing_open(monkeypatch, error, 1)
    monkeypatch.setattr(patience.time, "sleep", lambda seconds: None)
    assert texts(source, scan.units[0], ReadColumns(tuple(scan.schema), ())) == [str(row) for row in range(3000)]


def test_rows_that_were_read_before_an_error_come_out_once(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scan = scan_input(InputSection(path=str(source)))
    from moebeam.transforms.read import input_rows as read_module

    real = read_module._read_row_group
    calls: list[int] = []

    def breaks_in_the_middle(unit: Any, columns: ReadColumns) -> Any:
        calls.append(1)
        for number, batch in enumerate(real(unit, columns)):
            if len(calls) == 1 and number == 1:
                raise OSError(errno.EIO, "moment")
            yield batch

    monkeypatch.setattr(read_module, "_read_row_group", breaks_in_the_middle)
    assert texts(source, scan.units[0], ReadColumns(tuple(scan.schema), ())) == [str(row) for row in range(3000)]
    assert len(calls) == 2


@pytest.mark.parametrize("error", STAYING, ids=repr)
def test_what_stays_but_says_nothing_of_the_file_stops_the_job(
    source: Path, error: OSError, monkeypatch: pytest.MonkeyPatch
) -> None:
    scan = scan_input(InputSection(path=str(source)))
    failing_open(monkeypatch, error, 1000)
    with pytest.raises(type(error)):
        list(read_unit(scan.units[0], ReadColumns(tuple(scan.schema), ())))
    with pytest.raises(InputPatternError, match=r"in\.parquet: cannot be read now"):
        scan_input(InputSection(path=str(source)))


def test_a_bad_sector_that_stays_is_a_reject(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scan = scan_input(InputSection(path=str(source)))
    failing_open(monkeypatch, OSError(errno.EIO, "bad sector"), 1000)
    (batch,) = read_unit(scan.units[0], ReadColumns(tuple(scan.schema), ()))
    (row,) = batch.to_pylist()
    assert (row["error_type"], row["scope"], row["num_rows"]) == ("unreadable_row_group", "row_group", 3000)


def test_a_missing_file_is_not_waited_for() -> None:
    looks: list[int] = []

    def look() -> None:
        looks.append(1)
        raise FileNotFoundError(errno.ENOENT, "gone")

    with pytest.raises(FileNotFoundError):
        retry_transient(look)
    assert len(looks) == 1
