"""Inputs in other formats are refused with the file, the reason and the mend."""

import gzip
import json
from pathlib import Path

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


def test_packed_parquet_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.parquet.gz").write_bytes(gzip.compress(b"any"))
    assert "rows.parquet.gz: files so compressed are not read" in refusal(tmp_path / "rows.parquet.gz")


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
        ("rows.parquet", b"a,b\n1,x\n", 'is text; if it is CSV, write [input] format = "csv"'),
        ("rows.json", b'{"a": 1}\n', "FROM read_json("),
        ("rows.json", b'[{"a": 1}]', "a JSON array is not read; write [input] query = "),
        ("rows.json", b'{"custom_id": "a", "body": {}}', 'write [input] format = "jsonl"'),
        ("rows.parquet", b"", "expected a Parquet file, found an empty one"),
        ("rows.parquet", b"\x1f\x8b" + bytes(20), "files so compressed are not read"),
        ("rows.xlsx", b"PK\x03\x04" + bytes(20), "a zip archive or an Office document"),
        ("rows.bin", b"ARROW1" + bytes(20), 'is an Arrow file; write [input] format = "arrow"'),
        ("rows.orc", b"ORC" + bytes(20), "ORC is not read; convert it: python -c"),
        ("rows.avro", b"Obj\x01" + bytes(20), "Avro is not read"),
        ("rows.bin", bytes(20), "expected a Parquet file, which ends in b'PAR1'"),
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


def test_the_first_of_many_foreign_files_are_named(tmp_path: Path) -> None:
    for number in range(5):
        (tmp_path / f"{number}.orc").write_bytes(b"ORC" + bytes(20))
    told = refusal(tmp_path)
    assert told.count("ORC is not read") == 3
    assert told.endswith("; and 2 more")


def test_plain_lines_beside_batch_lines_are_rejects_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "plain"}\n')
    (tmp_path / "b.jsonl").write_text(f"{json.dumps(BATCH_LINE)}\n")
    assert scan_input(InputSection(path=str(tmp_path))).num_rows == 2
