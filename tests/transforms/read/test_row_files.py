"""CSV, JSON lines and Arrow files: every row comes out once, as a row or as a reject that names its line."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import feather

from moebeam.schemas.errors import InputPatternError
from moebeam.schemas.job.input_section import InputSection
from moebeam.transforms.read.input_rows import JSONL_INPUT_FIELDS, ReadColumns, read_unit
from moebeam.transforms.read.input_scan import InputScan, scan_input

CSV = b'\xef\xbb\xbfid,text,zip\r\n1,"x, ""y""\nz",007\r\n\n2,only\r\n3,5" s,4,9\n4,"",08\n 5,t\xff,1\n'


def scan(path: Path, **keys: Any) -> InputScan:
    return scan_input(InputSection(path=str(path), **keys))


def read(found: InputScan) -> list[dict[str, Any]]:
    id_column = "id" if "id" in found.schema.names else None
    columns = ReadColumns(tuple(found.schema), (), id_column=id_column)
    return [row for unit in found.units for batch in read_unit(unit, columns) for row in batch.to_pylist()]


def write_packed(path: Path, content: bytes) -> None:
    packing = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix)
    with pa.CompressedOutputStream(str(path), packing) if packing else path.open("wb") as sink:
        sink.write(content)


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_batch_lines_may_be_packed(tmp_path: Path, suffix: str) -> None:
    body = {"messages": [{"role": "user", "content": "Hello"}]}
    line = json.dumps({"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body})
    write_packed(tmp_path / f"requests.jsonl{suffix}", f"{line}\n\nnot JSON\n".encode())
    found = scan(tmp_path / f"requests.jsonl{suffix}")
    assert found.format == "jsonl"
    columns = ReadColumns(input_fields=JSONL_INPUT_FIELDS, passthrough=(), tenant="acme")
    rows = [row for unit in found.units for batch in read_unit(unit, columns) for row in batch.to_pylist()]
    assert (rows[0]["custom_id"], rows[0]["error_type"]) == ("a", None)
    assert [row["error_type"] for row in rows[1:]] == ["invalid_id"]
    assert {row["tenant"] for row in rows} == {"acme"}


@pytest.mark.parametrize("name", ["rows.csv", "rows.csv.gz", "rows.csv.zst"])
def test_csv_rows_keep_quotes_line_breaks_and_leading_zeros(tmp_path: Path, name: str) -> None:
    write_packed(tmp_path / name, CSV)
    found = scan(tmp_path / name)
    assert (found.format, [str(field.type) for field in found.schema]) == ("csv", ["int64", "string", "string"])
    rows = read(found)
    assert rows[0]["input"] == {"id": 1, "text": 'x, "y"\nz', "zip": "007"}
    assert rows[3]["input"] == {"id": 4, "text": "", "zip": "08"}
    assert [row["error_message"] for row in rows[1:3]] == [
        "line 5: expected 3 fields, found 2",
        "line 6: expected 3 fields, found 4",
    ]
    assert "expected valid UTF-8" in rows[4]["error_message"]


def test_csv_pieces_add_up_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows.csv").write_bytes(CSV)
    whole = read(scan(tmp_path / "rows.csv"))
    monkeypatch.setattr("moebeam.transforms.read.rows.scan_rows.PIECE_BYTES", 8)
    cut = scan(tmp_path / "rows.csv")
    assert len(cut.units) > 3
    kept = ("custom_id", "source_row", "error_message", "input")
    assert [[row[key] for key in kept] for row in read(cut)] == [[row[key] for key in kept] for row in whole]


def test_a_declared_type_that_a_value_breaks_costs_that_row(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("id;price\n1;2.5\n2;many\n")
    rows = read(scan(tmp_path / "rows.csv", types={"price": "double"}))
    assert rows[0]["input"]["price"] == 2.5
    assert rows[1]["error_type"] == "invalid_value"
    with pytest.raises(InputPatternError, match="types: price: expected a type of pyarrow"):
        scan(tmp_path / "rows.csv", types={"price": "money"})
    with pytest.raises(InputPatternError, match="has no column 'cost'; its columns are id, price"):
        scan(tmp_path / "rows.csv", types={"cost": "double"})


@pytest.mark.parametrize(
    ("content", "expected"),
    [(b"", "expected a header"), ("id\n1\n".encode("utf-16"), "found UTF-16"), (b"a,a\n1,2\n", "found twice: 'a'")],
)
def test_a_csv_file_without_a_usable_header_is_one_reject(tmp_path: Path, content: bytes, expected: str) -> None:
    (tmp_path / "rows.csv").write_bytes(content)
    (unit,) = scan(tmp_path / "rows.csv").units
    assert unit.error is not None
    assert expected in unit.error


def test_json_lines_are_rows_and_mixed_columns_text(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"id": 1, "n": 1}\nnope\n{"id": 2, "n": 2.5, "m": {"q": 1}}\n{"id": "x"}\n')
    found = scan(tmp_path / "rows.jsonl")
    assert (found.format, found.names) == ("jsonl_rows", ("id", "n", "m"))
    rows = read(found)
    assert [row["custom_id"] for row in rows] == ["1", "rows.jsonl:1", "2", "x"]
    assert rows[1]["error_message"].startswith("line 2: expected a JSON object")
    assert rows[2]["input"] == {"id": "2", "n": 2.5, "m": {"q": 1}}


@pytest.mark.parametrize("name", ["rows.arrow", "rows.arrows"])
def test_arrow_files_and_streams_keep_nested_columns(tmp_path: Path, name: str) -> None:
    table = pa.table({"id": [1, 2, 3], "tags": [["a"], [], None]})
    if name == "rows.arrow":
        feather.write_feather(table, str(tmp_path / name), compression="zstd", chunksize=2)
    else:
        with pa.OSFile(str(tmp_path / name), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    found = scan(tmp_path / name)
    assert (found.format, found.num_rows, len(found.units)) == ("arrow", 3, 2 if name == "rows.arrow" else 1)
    assert [row["custom_id"] for row in read(found)] == ["1", "2", "3"]
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    (unit,) = scan(tmp_path / name).units
    assert unit.error is not None
