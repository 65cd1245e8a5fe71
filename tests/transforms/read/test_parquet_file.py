"""Parquet files that pyarrow does not write: read whole, or refused for a reason, and never the end of the process."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moebeam.schemas.job.input_section import InputSection
from moebeam.transforms.read.input_rows import ReadColumns, read_unit
from moebeam.transforms.read.input_scan import scan_input
from moebeam.transforms.read.parquet_file import open_parquet, sum_column_bytes
from tests.support.jobs.jobs_for_tests import write_parquet
from tests.support.jobs.parquet_bytes import Leaf, Node, write_parquet_bytes

ID = Node("id", kind="int32")
IDS = Leaf(("id",), "int32", [0, 1])
SECRET = Node("secret", kind="int32")


def read_rows(source: Path) -> list[dict[str, Any]]:
    """All rows; a row that stands for a file or a row group by its message alone."""
    scan = scan_input(InputSection(path=str(source)))
    columns = ReadColumns(tuple(scan.schema), tuple(scan.schema))
    rows = [row for unit in scan.units for batch in read_unit(unit, columns) for row in batch.to_pylist()]
    return [row["passthrough"] if row["error_type"] is None else {row["scope"]: row["error_message"]} for row in rows]


def find_reason(source: Path) -> str:
    """Why a file is a reject."""
    ((scope, reason),) = (reject for row in read_rows(source) for reject in row.items())
    assert scope == "file"
    return reason.removeprefix(f"{source}: ")


REPEATED: dict[str, tuple[list[Node], list[Leaf], list[Any]]] = {
    "a repeated group without annotation": (
        [
            Node("phones", "optional", num_children=1),
            Node("phone", "repeated", num_children=2),
            Node("number", kind="int64"),
            Node("kind", "optional", "binary", converted="utf8"),
        ],
        [
            Leaf(("phones", "phone", "number"), "int64", [5, 6], [2, 2, 0], [0, 1, 0]),
            Leaf(("phones", "phone", "kind"), "binary", ["home"], [3, 2, 0], [0, 1, 0]),
        ],
        [{"phone": [{"number": 5, "kind": "home"}, {"number": 6, "kind": None}]}, None],
    ),
    "a repeated value": (
        [Node("n", "repeated", "int32")],
        [Leaf(("n",), "int32", [1, 2], [1, 1, 0], [0, 1, 0])],
        [[1, 2], []],
    ),
    "a list of two levels": (
        [Node("l", "optional", num_children=1, converted="list"), Node("array", "repeated", "int32")],
        [Leaf(("l", "array"), "int32", [1, 2], [2, 2, 0], [0, 1, 0])],
        [[1, 2], None],
    ),
    "a map of keys alone": (
        [
            Node("m", "optional", num_children=1, converted="map"),
            Node("key_value", "repeated", num_children=1),
            Node("key", kind="binary", converted="utf8"),
        ],
        [Leaf(("m", "key_value", "key"), "binary", ["a", "b"], [2, 2, 0], [0, 1, 0])],
        [["a", "b"], None],
    ),
    "a map as Hive wrote it": (
        [
            Node("m", "optional", num_children=1, converted="map_key_value"),
            Node("map", "repeated", num_children=2),
            Node("key", kind="binary", converted="utf8"),
            Node("value", "optional", "int32"),
        ],
        [
            Leaf(("m", "map", "key"), "binary", ["a", "b"], [2, 2, 0], [0, 1, 0]),
            Leaf(("m", "map", "value"), "int32", [7], [3, 2, 0], [0, 1, 0]),
        ],
        [[("a", 7), ("b", None)], None],
    ),
    "binary that is no text": ([Node("b", kind="binary")], [Leaf(("b",), "binary", [b"a", b"\xff"])], [b"a", b"\xff"]),
}


@pytest.mark.parametrize("name", REPEATED)
def test_schemas_of_other_writers_are_read_as_pyarrow_reads_them(tmp_path: Path, name: str) -> None:
    nodes, leaves, expected = REPEATED[name]
    source = write_parquet_bytes(tmp_path / "a.parquet", [ID, *nodes], [IDS, *leaves], 2)
    rows = read_rows(source)
    assert [row[nodes[0].name] for row in rows] == expected
    assert rows == pq.ParquetFile(source).read().to_pylist()


@pytest.mark.parametrize("signature", [b"", bytes(28)])
def test_a_file_with_encrypted_columns_is_a_reject_whatever_is_asked_of_it(tmp_path: Path, signature: bytes) -> None:
    secret = Leaf(("secret",), "int32", [0, 1], is_encrypted=True)
    source = write_parquet_bytes(tmp_path / "a.parquet", [ID, SECRET], [IDS, secret], 2, after_footer=signature)
    assert find_reason(source).startswith("has encrypted columns; expected a Parquet file that needs no key")
    with pytest.raises(pa.ArrowInvalid, match="has encrypted columns"), open_parquet(str(source)):
        pass


def test_bytes_after_a_footer_are_no_encryption(tmp_path: Path) -> None:
    source = write_parquet_bytes(tmp_path / "a.parquet", [ID], [IDS], 2, after_footer=b"padding" * 4)
    assert read_rows(source) == [{"id": 0}, {"id": 1}]


def test_a_column_whose_name_only_looks_like_a_key_is_read(tmp_path: Path) -> None:
    name = "\x2c\x19\x18"
    assert read_rows(write_parquet(tmp_path / "a.parquet", {name: [1]})) == [{name: 1}]


BAD_FOOTERS: dict[str, tuple[list[Node], list[Leaf], str]] = {
    "a name that is not UTF-8": (
        [Node(b"t\xff", kind="int32")],
        [Leaf((b"t\xff",), "int32", [0, 1])],
        "in UTF-8, found b't",
    ),
    "a stored column's name that is not UTF-8": (
        [Node("t", kind="int32")],
        [Leaf((b"t\xff",), "int32", [0, 1])],
        "in UTF-8, found b't",
    ),
    "a column that is not stored": ([ID, SECRET], [IDS], "row group 0: expected 2 columns, found 1"),
    "a stored column too many": ([ID], [IDS, IDS], "row group 0: expected 1 columns, found 2"),
    "a name twice": ([ID, ID], [IDS, IDS], "expected every column name once, found twice: 'id'"),
    "a map whose keys may be null": (
        [
            Node("m", "optional", num_children=1, converted="map"),
            Node("map", "repeated", num_children=2),
            Node("key", "optional", "binary"),
            Node("value", "optional", "int32"),
        ],
        [
            Leaf(("m", "map", "key"), "binary", ["a", "b"], [3, 3], [0, 0]),
            Leaf(("m", "map", "value"), "int32", [1, 2], [3, 3], [0, 0]),
        ],
        "Map keys must be annotated as required",
    ),
    "columns nested without end": (
        [*[Node("g", "optional", num_children=1)] * 20_000, SECRET],
        [Leaf(("g",), "int32", [1, 1], [1, 1])],
        "its columns are nested too deeply to be read",
    ),
    "columns nested deeper than Python": (
        [*[Node("g", "optional", num_children=1)] * 900, SECRET],
        [Leaf(("g",), "int32", [1, 1], [1, 1])],
        "its columns are nested too deeply to be read",
    ),
}


@pytest.mark.parametrize("name", BAD_FOOTERS)
def test_a_bad_footer_is_its_files_reject_and_the_file_beside_it_is_read(tmp_path: Path, name: str) -> None:
    nodes, leaves, expected = BAD_FOOTERS[name]
    write_parquet_bytes(tmp_path / "bad.parquet", nodes, leaves, 2)
    write_parquet(tmp_path / "good.parquet", {"text": ["a"]})
    bad, good = read_rows(tmp_path)
    assert good == {"text": "a"}
    assert expected in bad["file"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"PAR1" + bytes(20), "ends in b'PAR1', found b'\\x00\\x00\\x00\\x00'; it may have been cut short"),
        (b"PAR1" + b"\xff\xff\xff\x7fPAR1", "expected a footer within the file's 12 bytes, found one of 2,147,483,647"),
        (b"PARE" + bytes(20) + b"PARE", "is encrypted; expected a Parquet file that needs no key"),
        (b"PAR1" + b"\x04\x00\x00\x00PAR1", "expected a footer within the file's 12 bytes, found one of 4 bytes"),
        (b"PAR1" + bytes(9) + b"\x09\x00\x00\x00PAR1", "Couldn't deserialize thrift"),
    ],
)
def test_what_is_no_footer_is_named(tmp_path: Path, content: bytes, expected: str) -> None:
    (tmp_path / "bad.parquet").write_bytes(content)
    assert expected in find_reason(tmp_path / "bad.parquet")


def test_columns_are_weighed_by_whole_names_dots_or_not(tmp_path: Path) -> None:
    long = ["x" * 1000]
    write_parquet(tmp_path / "a.parquet", {"a.b": long, "a": [{"b": 1}], "ab": long, "c": [{"d.e": long}]})
    with open_parquet(str(tmp_path / "a.parquet")) as parquet:
        assert sum_column_bytes(parquet, 0, {"a.b"}) > 1000
        assert sum_column_bytes(parquet, 0, {"c"}) > 1000
        assert sum_column_bytes(parquet, 0, {"b", "d.e"}) == 0
        everything = sum_column_bytes(parquet, 0, parquet.schema_arrow.names)
    assert everything == pq.ParquetFile(tmp_path / "a.parquet").metadata.row_group(0).total_byte_size


def test_a_footer_longer_than_its_first_read_is_read_whole(tmp_path: Path) -> None:
    table = pa.table({"text": ["a"]}, metadata={"note": "n" * 300_000})
    pq.write_table(table, tmp_path / "a.parquet")
    assert read_rows(tmp_path / "a.parquet") == [{"text": "a"}]
