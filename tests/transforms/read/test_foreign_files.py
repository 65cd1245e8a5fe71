"""Inputs in other formats are refused with the file, the reason and the mend."""

import gzip
import json
import re
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from moebeam.schemas.errors import InputPatternError
from moebeam.schemas.job.sections import InputSection
from moebeam.transforms.read.input_scan import scan_input
from tests.support.jobs.jobs_for_tests import write_parquet

BATCH_LINE = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": []}}


def refusal(path: Path) -> str:
    with pytest.raises(InputPatternError) as e:
        scan_input(InputSection(path=str(path)))
    return str(e.value)


def convert_as_told(told: str, folder: Path) -> list[object]:
    """Do what the message says; returns the rows of the Parquet file that it makes."""
    found = re.search(r'python -c "(.*)"$', told)
    assert found is not None, told
    subprocess.run([sys.executable, "-c", found[1]], check=True, cwd=folder)
    (made,) = folder.glob("*.parquet")
    return pq.read_table(made).to_pylist()


def test_csv_is_refused_with_the_command_that_converts_it(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    source = tmp_path / "in" / "rows.csv"
    source.write_text("a,b\n1,x\n")
    told = refusal(tmp_path / "in")
    assert f"{source}: CSV is not read" in told
    assert convert_as_told(told, tmp_path) == [{"a": 1, "b": "x"}]


def test_plain_jsonl_is_refused_with_the_command_that_converts_it(tmp_path: Path) -> None:
    source = tmp_path / "rows.jsonl"
    source.write_text('\n{"text": "one", "url": "x"}\n{"text": "two", "url": "y"}\n')
    told = refusal(source)
    assert f"{source}: not an OpenAI batch line: expected custom_id, method, url and body, found text, url" in told
    assert convert_as_told(told, tmp_path) == [{"text": "one", "url": "x"}, {"text": "two", "url": "y"}]


@pytest.mark.parametrize("name", ["requests.jsonl.gz", "rows.parquet.gz"])
def test_compressed_files_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(gzip.compress(json.dumps(BATCH_LINE).encode()))
    assert f"{name}: compressed files are not read" in refusal(tmp_path / name)


@pytest.mark.parametrize("line", [json.dumps(BATCH_LINE), '{"custom_id": "a"}', "[]", "no json", "", '"text"'])
def test_lines_that_may_be_of_a_batch_file_are_left_to_the_rows(tmp_path: Path, line: str) -> None:
    (tmp_path / "in.jsonl").write_text(f"{line}\n")
    assert scan_input(InputSection(path=str(tmp_path / "in.jsonl"))).format == "jsonl"


def test_a_stray_file_among_others_stays_a_reject(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", {"text": ["one"]})
    (tmp_path / "notes.csv").write_text("a,b\n")
    scan = scan_input(InputSection(path=str(tmp_path)))
    assert (scan.num_rows, scan.num_unreadable_files) == (1, 1)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("rows.parquet", b"a,b\n1,x\n", "text is not read; if it is CSV, convert it: python -c"),
        ("rows", b"a\tb\n1\tx\n", "delimiter='\\t'"),
        ("rows.json", b'{"a": 1}\n', "JSON is not read; convert it: python -c"),
        ("rows.json", b'[{"a": 1}]', "JSON is not read; convert it to Parquet"),
        ("rows.json", b'{"custom_id": "a", "body": {}}', 'write [input] format = "jsonl"'),
        ("rows.parquet", b"", "expected a Parquet file, found an empty one"),
        ("rows.parquet", b"\x1f\x8b" + bytes(20), "compressed files are not read"),
        ("rows.xlsx", b"PK\x03\x04" + bytes(20), "a zip archive or an Office document"),
        ("rows.feather", b"ARROW1" + bytes(20), "Arrow's IPC files are not read; convert it: python -c"),
        ("rows.orc", b"ORC" + bytes(20), "ORC is not read; convert it: python -c"),
        ("rows.avro", b"Obj\x01" + bytes(20), "Avro is not read"),
        ("rows.bin", bytes(20), "expected a Parquet file, which ends in b'PAR1'"),
        ("rows.jsonl", b"\x1f\x8b" + bytes(20), "compressed files are not read"),
        (
            "rows.jsonl",
            b"PAR1" + bytes(20),
            'is a Parquet file; give it another suffix, or write [input] format = "parquet"',
        ),
    ],
)
def test_a_foreign_file_is_told_by_its_first_bytes(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    (tmp_path / name).write_bytes(content)
    told = refusal(tmp_path / name)
    assert f"{tmp_path / name}: " in told
    assert expected in told


def test_a_conversion_never_names_the_file_itself(tmp_path: Path) -> None:
    source = tmp_path / "rows.parquet"
    source.write_bytes(b"a,b\n1,x\n")
    told = refusal(source)
    assert "'converted-rows.parquet'" in told


def test_the_first_of_many_foreign_files_are_named(tmp_path: Path) -> None:
    for number in range(5):
        (tmp_path / f"{number}.csv").write_text("a\n")
    told = refusal(tmp_path)
    assert told.count("CSV is not read") == 3
    assert told.endswith("; and 2 more")


def test_plain_lines_beside_batch_lines_are_rejects_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "plain"}\n')
    (tmp_path / "b.jsonl").write_text(f"{json.dumps(BATCH_LINE)}\n")
    assert scan_input(InputSection(path=str(tmp_path))).num_rows == 2
