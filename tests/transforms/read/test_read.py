"""Reading: every promised row comes out once, with its identity."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import apache_beam as beam
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from apache_beam.runners.portability.fn_api_runner import FnApiRunner
from apache_beam.testing.util import assert_that, equal_to

from moebeam.schemas.errors import InputPatternError
from moebeam.schemas.job.sections import InputSection
from moebeam.transforms.read import expansion, input_scan
from moebeam.transforms.read.input_rows import MAX_BATCH_ROWS, ReadColumns, read_unit
from moebeam.transforms.read.input_scan import InputScan, scan_input
from moebeam.transforms.read.step import ReadPrompts
from tests.support.jobs.jobs_for_tests import write_parquet
from tests.support.jobs.odd_columns import UUID, extend
from tests.support.paths import SHARED

CONFORMANCE = SHARED / "conformance" / "parquet_bad_data"


def scan(path: Path, **section: Any) -> InputScan:
    return scan_input(InputSection(path=str(path)), **section)


def read_all(found: InputScan, **columns: Any) -> list[dict[str, Any]]:
    read = ReadColumns(tuple(found.schema), (), **columns)
    return [row for unit in found.units for batch in read_unit(unit, read) for row in batch.to_pylist()]


def test_units_are_row_groups_in_name_order_and_ids_are_paths_below_the_shared_folder(tmp_path: Path) -> None:
    write_parquet(tmp_path / "in" / "b" / "x.parquet", {"text": list("abc")}, row_group_size=2)
    write_parquet(tmp_path / "in" / "a" / "x.parquet", {"text": list("d")})
    found = scan(tmp_path / "in")
    assert [(unit.label, unit.row_group, unit.first_row, unit.num_rows) for unit in found.units] == [
        ("a/x.parquet", 0, 0, 1),
        ("b/x.parquet", 0, 0, 2),
        ("b/x.parquet", 1, 2, 1),
    ]
    rows = read_all(found)
    assert [row["custom_id"] for row in rows] == ["a/x.parquet:0", "b/x.parquet:0", "b/x.parquet:1", "b/x.parquet:2"]
    assert [row["input"]["text"] for row in rows] == list("dabc")


def test_globs_and_folders_skip_hidden_files(tmp_path: Path) -> None:
    for name in ("a.parquet", "_SUCCESS.parquet", ".hidden.parquet"):
        write_parquet(tmp_path / "in" / name, {"text": ["x"]})
    assert scan(tmp_path / "in").num_rows == 1
    assert scan(tmp_path / "in" / "a*.parquet").num_rows == 1


def test_batches_are_bounded_in_rows_and_bytes(tmp_path: Path) -> None:
    many = scan(write_parquet(tmp_path / "many.parquet", {"text": ["x"] * 3000}, row_group_size=3000))
    sizes = [batch.num_rows for batch in read_unit(many.units[0], ReadColumns(tuple(many.schema), ()))]
    assert sizes == [MAX_BATCH_ROWS, MAX_BATCH_ROWS, 3000 - 2 * MAX_BATCH_ROWS]
    large = [f"{row:07d}" * (1 << 17) for row in range(20)]
    big = scan(write_parquet(tmp_path / "big.parquet", {"text": large}))
    sizes = [batch.num_rows for batch in read_unit(big.units[0], ReadColumns(tuple(big.schema), ()))]
    assert sum(sizes) == 20
    assert max(sizes) <= 12


def test_a_changed_file_changes_the_fingerprint(tmp_path: Path) -> None:
    source = write_parquet(tmp_path / "a.parquet", {"text": ["x"]})
    before = scan(source).fingerprint
    assert scan(source).fingerprint == before
    write_parquet(source, {"text": ["changed"]})
    assert scan(source).fingerprint != before


def test_parquet_and_jsonl_do_not_mix(tmp_path: Path) -> None:
    write_parquet(tmp_path / "in" / "a.parquet", {"text": ["x"]})
    (tmp_path / "in" / "b.jsonl").write_text("{}\n")
    with pytest.raises(InputPatternError, match="files of one format, found Parquet and JSONL"):
        scan(tmp_path / "in")


def test_column_names_that_differ_only_in_case_are_refused(tmp_path: Path) -> None:
    source = write_parquet(tmp_path / "a.parquet", {"Text": ["x"], "text": ["y"]})
    with pytest.raises(InputPatternError, match="differ by more than case, found Text, text"):
        scan(source)


def test_a_row_group_with_fewer_rows_than_promised_loses_none_in_silence(tmp_path: Path) -> None:
    source = write_parquet(tmp_path / "a.parquet", {"text": list("abcd")})
    found = scan(source)
    rows = read_all(replace(found, units=(replace(found.units[0], num_rows=6),)))
    assert [row["error_type"] for row in rows] == [None] * 4 + ["row_count_mismatch"]
    assert (rows[-1]["num_rows"], rows[-1]["scope"]) == (2, "row_group")


def test_large_jsonl_files_are_cut_at_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moebeam.transforms.read.rows.scan_rows.PIECE_BYTES", 40)
    source = tmp_path / "a.jsonl"
    source.write_bytes(b'{"custom_id": "one"}\n\n{"custom_id": "two"}\r\n{"custom_id": "three"}')
    found = scan(source)
    assert [(unit.first_row, unit.num_rows) for unit in found.units] == [(0, 2), (2, 1)]
    assert [row["custom_id"] for row in read_all_jsonl(found)] == ["one", "two", "three"]


def read_all_jsonl(found: InputScan) -> list[dict[str, Any]]:
    from moebeam.transforms.read.input_rows import JSONL_INPUT_FIELDS

    columns = ReadColumns(JSONL_INPUT_FIELDS, ())
    return [row for unit in found.units for batch in read_unit(unit, columns) for row in batch.to_pylist()]


def test_read_prompts_gives_record_batches_on_a_runner(tmp_path: Path) -> None:
    source = write_parquet(tmp_path / "a.parquet", {"text": list("abcdef")}, row_group_size=2)
    found = scan(source)
    with beam.Pipeline(runner=FnApiRunner()) as pipeline:
        rows: Any = pipeline | ReadPrompts(found, ReadColumns(tuple(found.schema), ()))
        assert rows.element_type is pa.RecordBatch
        texts = rows | beam.FlatMap(lambda batch: [row["text"] for row in batch.column("input").to_pylist()])
        assert_that(texts, equal_to(list("abcdef")))


@pytest.mark.conformance
@pytest.mark.skipif(not CONFORMANCE.is_dir(), reason="the shared cases are not here")
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ARROW-GH-41317", {None: 2, "row_count_mismatch": 3}),
        ("ARROW-GH-41321", {"unreadable_row_group": 5}),
        ("ARROW-GH-43605", {None: 21186}),
        ("ARROW-GH-45185", {"unreadable_row_group": 5}),
        ("ARROW-GH-47662", {"unreadable_row_group": 1000}),
        ("ARROW-RS-GH-6229-DICTHEADER", {"unreadable_row_group": 25}),
        ("ARROW-RS-GH-6229-LEVELS", {"unreadable_row_group": 1}),
        ("PARQUET-1481", {"unreadable_file": None}),
    ],
)
def test_bad_parquet_data_is_read_or_named(name: str, expected: dict[str | None, int | None]) -> None:
    path = CONFORMANCE / f"{name}.parquet"
    found: dict[str | None, int | None] = {}
    for row in read_all(scan(path)):
        total = found.get(row["error_type"], 0)
        found[row["error_type"]] = None if row["num_rows"] is None or total is None else total + row["num_rows"]
        assert row["error_type"] is None or str(path) in row["error_message"]
    assert found == expected


@pytest.mark.conformance
@pytest.mark.skipif(not CONFORMANCE.is_dir(), reason="the shared cases are not here")
def test_every_shared_bad_file_has_a_case() -> None:
    names = {path.stem for path in CONFORMANCE.glob("*.parquet")}
    (mark,) = [m for m in test_bad_parquet_data_is_read_or_named.pytestmark if m.name == "parametrize"]  # type: ignore[attr-defined]
    assert names <= {case[0] for case in mark.args[1]}


def test_links_are_followed_and_broken_ones_are_named(tmp_path: Path) -> None:
    real = tmp_path / "real"
    write_parquet(real / "sub" / "b.parquet", {"text": ["b"]})
    write_parquet(real / "a.parquet", {"text": ["a"]})
    source = tmp_path / "in"
    source.mkdir()
    (source / "a.parquet").symlink_to(real / "a.parquet")
    (source / "folder").symlink_to(real / "sub")
    (source / "folder2").symlink_to(source)
    (source / "gone.parquet").symlink_to(tmp_path / "nothing")
    found = scan(source)
    assert [(unit.label, unit.num_rows) for unit in found.units] == [
        ("a.parquet", 1),
        ("folder/b.parquet", 1),
        ("gone.parquet", None),
    ]
    assert scan(source / "*.parquet").num_rows == 1


def test_a_name_that_looks_like_a_glob_is_read_as_a_file(tmp_path: Path) -> None:
    assert scan(write_parquet(tmp_path / "in[1].parquet", {"text": ["a"]})).num_rows == 1


def test_file_urls_skip_hidden_files_as_paths_do(tmp_path: Path) -> None:
    write_parquet(tmp_path / ".below" / "in" / "a.parquet", {"text": ["a"]})
    write_parquet(tmp_path / ".below" / "in" / "_temporary" / "b.parquet", {"text": ["b"]})
    assert scan_input(InputSection(path=f"file://{tmp_path}/.below/in")).num_rows == 1


def test_a_value_that_does_not_fit_the_unified_type_rejects_its_row_alone(tmp_path: Path) -> None:
    write_parquet(tmp_path / "in" / "a.parquet", {"n": pa.array([1, 2**53 + 1, 3], pa.int64())})
    write_parquet(tmp_path / "in" / "b.parquet", {"n": pa.array([0.5])})
    rows = read_all(scan(tmp_path / "in"))
    assert [row["error_type"] for row in rows] == [None, "invalid_value", None, None]
    assert [row["input"]["n"] for row in rows] == [1.0, None, 3.0, 0.5]


def test_columns_that_are_not_needed_may_contradict_each_other(tmp_path: Path) -> None:
    write_parquet(tmp_path / "in" / "a.parquet", {"text": ["a"], "other": pa.array([[1]])})
    write_parquet(tmp_path / "in" / "b.parquet", {"text": ["b"], "other": ["x"]})
    with pytest.raises(InputPatternError, match="its columns contradict"):
        scan(tmp_path / "in")
    found = scan(tmp_path / "in", needed={"text"})
    assert (found.schema.names, found.names) == (["text"], ("text", "other"))


def test_small_units_are_grouped_by_size_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moebeam.transforms.read.input_scan.GROUP_ROWS", 5)
    found = scan(write_parquet(tmp_path / "a.parquet", {"text": list("abcdefgh")}, row_group_size=2))
    assert [[unit.ordinal for unit in group.units] for group in found.groups] == [[0, 1], [2, 3]]


def test_a_column_that_unpacks_to_more_than_memory_is_one_reject_and_other_columns_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(expansion, "SUSPECT_COLUMN_BYTES", 1 << 20)
    table = pa.table({"text": ["x" * 4_000_000] * 3, "small": ["a", "b", "c"]})
    pq.write_table(table, tmp_path / "bomb.parquet", compression="zstd", use_dictionary=False)
    (reject,) = read_all(scan(tmp_path / "bomb.parquet"))
    assert (reject["error_type"], reject["scope"], reject["num_rows"]) == ("unreadable_row_group", "row_group", 3)
    assert "column text: expected to unpack to at most 1,000 times" in reject["error_message"]
    assert "found 12,0" in reject["error_message"]
    assert len(read_all(scan(tmp_path / "bomb.parquet", needed={"small"}))) == 3
    monkeypatch.setattr(expansion, "SUSPECT_COLUMN_BYTES", 1 << 30)
    monkeypatch.setattr(expansion, "MAX_COLUMN_BYTES", 1 << 20)
    (reject,) = read_all(scan(tmp_path / "bomb.parquet"))
    assert "at most 1,048,576 bytes, found 12,0" in reject["error_message"]


def test_a_file_of_too_many_columns_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(input_scan, "MAX_COLUMNS", 5)
    write_parquet(tmp_path / "in" / "a.parquet", {"text": ["x"]})
    write_parquet(tmp_path / "in" / "wide.parquet", {f"c{column}": [1] for column in range(6)})
    found = scan(tmp_path / "in")
    assert [unit.error for unit in found.units] == [None, "expected at most 5 columns, found 6"]


def write_table(path: Path, columns: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def test_ids_labels_and_prompts_print_a_column_alike(tmp_path: Path) -> None:
    ids = extend(pa.uuid(), [UUID.bytes, None])
    path = write_table(tmp_path / "a.parquet", {"id": ids, "score": pa.array([0.1, float("nan")], pa.float32())})
    rows = read_all(scan(path), id_column="id", tenant_column="score", cost_center_column="id")
    assert [(row["custom_id"], row["tenant"], row["cost_center"]) for row in rows] == [
        (str(UUID), "0.1", str(UUID)),
        ("a.parquet:1", "", ""),
    ]
    assert rows[0]["input"] == {"id": str(UUID), "score": 0.1}
    assert (rows[1]["input"], rows[1]["error_type"]) == ({"id": None, "score": None}, "invalid_id")


@pytest.mark.parametrize("use", ["id_column", "tenant_column", "cost_center_column", "tag_columns"])
def test_a_value_that_has_no_text_rejects_its_row_before_it_is_asked(tmp_path: Path, use: str) -> None:
    years = pa.array([379_638_835_200_000_000, 0], pa.timestamp("us"))
    found = scan(write_table(tmp_path / "a.parquet", {"at": years}))
    read = ReadColumns((), tuple(found.schema), **{use: ("at",) if use == "tag_columns" else "at"})
    ((batch,),) = ([*read_unit(unit, read)] for unit in found.units)
    assert batch.column("error_type").to_pylist() == ["invalid_id" if use == "id_column" else "invalid_value", None]
    assert "column at: expected a value that Python can hold" in batch.column("error_message")[0].as_py()
    assert batch.column("passthrough").field(0).equals(years)


def test_files_that_encode_a_column_differently_are_one_input(tmp_path: Path) -> None:
    texts = pa.array(["x", None])
    for name, column in (("a", texts.dictionary_encode()), ("b", texts.cast(pa.string_view())), ("c", pa.nulls(2))):
        write_table(tmp_path / "in" / f"{name}.parquet", {"text": column})
    found = scan(tmp_path / "in")
    assert found.schema == pa.schema([pa.field("text", pa.large_string())])
    assert [row["input"]["text"] for row in read_all(found)] == ["x", None, "x", None, None, None]
