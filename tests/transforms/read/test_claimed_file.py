"""A file of the input that is no longer what the scan saw ends the run, whatever was done to it."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from moebeam.schemas.errors import InputChanged
from moebeam.schemas.job.sections import InputSection
from moebeam.transforms.read.input_rows import JSONL_INPUT_FIELDS, ReadColumns, read_unit
from moebeam.transforms.read.input_scan import InputScan, scan_input
from tests.support.jobs.jobs_for_tests import write_parquet

LINE = b'{"custom_id": "%d", "body": {"model": "m", "messages": [{"role": "user", "content": "%s"}]}}\n'


def write_input(path: Path, text: str = "a") -> Path:
    if path.suffix == ".parquet":
        return write_parquet(path, {"text": [text] * 3000})
    path.write_bytes(b"".join(LINE % (row, text.encode()) for row in range(300)))
    return path


def replace_with(source: Path, text: str) -> None:
    write_input(source.with_name(f"new{source.suffix}"), text).replace(source)


def append(source: Path) -> None:
    with source.open("ab") as sink:
        sink.write(b"\n")


def set_time(source: Path, time_s: float = 1_000_000_000.5) -> None:
    os.utime(source, (time_s, time_s))


def write_in_place(source: Path) -> None:
    with source.open("r+b") as sink:
        sink.seek(100)
        sink.write(b"x")
    set_time(source, source.stat().st_mtime + 1)


def retarget(source: Path) -> None:
    other = write_input(source.with_name(f"other{source.suffix}"), "b")
    set_time(other)
    source.unlink()
    source.symlink_to(other)


CHANGES: dict[str, Callable[[Path], object]] = {
    "appended to": append,
    "replaced": lambda source: replace_with(source, "much longer than it was"),
    "deleted": Path.unlink,
    "cut short": lambda source: os.truncate(source, source.stat().st_size // 2),
    "written in place": write_in_place,
    "touched": set_time,
    "a link to another file": retarget,
}


def scan(source: Path) -> InputScan:
    return scan_input(InputSection(path=str(source)))


def columns(found: InputScan) -> ReadColumns:
    return ReadColumns(tuple(found.schema) if found.format == "parquet" else JSONL_INPUT_FIELDS, ())


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changes_before_it_is_read_is_refused(tmp_path: Path, change: str, suffix: str) -> None:
    source = write_input(tmp_path / f"in{suffix}")
    found = scan(source)
    size = source.stat().st_size
    CHANGES[change](source)
    with pytest.raises(InputChanged) as caught:
        list(read_unit(found.units[0], columns(found)))
    message = str(caught.value)
    assert message.startswith(f"{source}: changed")
    assert f"expected {size:,} bytes of 20" in message
    assert ("found no file" if change == "deleted" else f"found {source.stat().st_size:,} bytes of ") in message
    assert "run again" in message


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path, change: str) -> None:
    source = write_input(tmp_path / "in.parquet")
    found = scan(source)
    batches = read_unit(found.units[0], columns(found))
    assert next(batches).num_rows
    CHANGES[change](source)
    with pytest.raises(InputChanged, match=r"expected .* found"):
        list(batches)


def test_the_same_size_and_time_are_the_same_file(tmp_path: Path) -> None:
    source = write_input(tmp_path / "in.jsonl")
    found, time_ns = scan(source), source.stat().st_mtime_ns
    replace_with(source, "b")
    os.utime(source, ns=(time_ns, time_ns))
    assert sum(batch.num_rows for batch in read_unit(found.units[0], columns(found))) == 300


def test_a_touched_file_gets_its_time_back_as_the_message_says(tmp_path: Path) -> None:
    source = write_input(tmp_path / "in.parquet")
    set_time(source, 1_700_000_000.25)
    found = scan(source)
    set_time(source)
    with pytest.raises(InputChanged, match=r"touch -d @1700000000\.25 restores it"):
        list(read_unit(found.units[0], columns(found)))
    set_time(source, 1_700_000_000.25)
    assert list(read_unit(found.units[0], columns(found)))


def test_a_file_that_was_completed_after_the_scan_is_no_unreadable_file(tmp_path: Path) -> None:
    source = write_input(tmp_path / "in.parquet")
    whole = source.read_bytes()
    source.write_bytes(whole[:-4])
    write_input(tmp_path / "whole.parquet")
    found = scan(tmp_path)
    assert found.num_unreadable_files == 1
    source.write_bytes(whole)
    with pytest.raises(InputChanged, match=r"in\.parquet"):
        list(read_unit(found.units[0], columns(found)))


def test_a_link_that_leads_nowhere_stays_one_files_reject(tmp_path: Path) -> None:
    write_input(tmp_path / "in.parquet")
    (tmp_path / "gone.parquet").symlink_to(tmp_path / "nowhere")
    found = scan(tmp_path)
    (reject,) = read_unit(found.units[0], columns(found))
    assert reject.column("error_type").to_pylist() == ["unreadable_file"]


def test_a_file_that_changes_during_the_scan_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moebeam.transforms.read import input_scan

    source = write_input(tmp_path / "in.parquet")
    real = input_scan.list_input_files

    def list_then_append(section: InputSection) -> object:
        files = real(section)
        append(source)
        return files

    monkeypatch.setattr(input_scan, "list_input_files", list_then_append)
    with pytest.raises(InputChanged, match=r"in\.parquet: changed"):
        scan(source)
