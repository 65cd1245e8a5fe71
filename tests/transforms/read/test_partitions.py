"""Columns that folders give."""

from typing import Any

import pyarrow as pa
import pytest

from moebeam.schemas.errors import InputPatternError
from moebeam.transforms.read.partitions import read_partitions, unify_partitions

NONE = pa.schema([])


@pytest.mark.parametrize(
    ("path", "root", "expected"),
    [
        ("/in/year=2026/month=01/a.parquet", "/in", {"year": "2026", "month": "01"}),
        ("/in/year=2026/month=01/a.parquet", "/in/year=2026", {"year": "2026", "month": "01"}),
        ("/in/year=2026/month=01/a.parquet", "/in/year=2026/month=01", {"year": "2026", "month": "01"}),
        ("/exp=1/in/k=v/a.parquet", "/exp=1/in", {"k": "v"}),
        ("/in/k=v/part/l=w/a.parquet", "/in", {"k": "v", "l": "w"}),
        ("/in/k=__HIVE_DEFAULT_PARTITION__/a=b.parquet", "/in", {"k": None}),
        ("/in/a%20b=x%2Fy%3D1/a.parquet", "/in", {"a b": "x/y=1"}),
        ("/in/k=100%25/l=5%/m=%ff/a.parquet", "/in", {"k": "100%", "l": "5%", "m": "%ff"}),
        ("/in/k=/=v/a.parquet", "/in", {"k": ""}),
        ("s3://bucket/in/k=v/a.parquet", "s3://bucket/in", {"k": "v"}),
        ("/in/a.parquet", "/in", {}),
    ],
)
def test_folders_name_columns_below_the_root_and_right_above_it(path: str, root: str, expected: Any) -> None:
    assert read_partitions(path, root) == expected


@pytest.mark.parametrize(
    ("texts", "own", "expected"),
    [
        (["01", "2", None], NONE, (pa.int64(), ["1", "2", None])),
        (["01", "x"], NONE, (pa.string(), ["01", "x"])),
        (["1", str(2**63)], NONE, (pa.string(), ["1", str(2**63)])),
        (["1.5"], NONE, (pa.string(), ["1.5"])),
        ([None], NONE, (pa.string(), [None])),
        (["\u0661"], NONE, (pa.string(), ["\u0661"])),
        (["01", "2"], pa.schema({"k": pa.string()}), (pa.string(), ["01", "2"])),
        (["2026-01-02"], pa.schema({"k": pa.date32()}), (pa.date32(), ["2026-01-02"])),
        (["1"], pa.schema({"k": pa.null()}), (pa.int64(), ["1"])),
    ],
)
def test_values_have_one_type_for_all_files(texts: list[str | None], own: pa.Schema, expected: Any) -> None:
    fields, partitions = unify_partitions([{"k": text} for text in texts], own)
    assert ([field.name for field in fields], fields[0].type) == (["k"], expected[0])
    assert [dict(of_file)["k"] for of_file in partitions] == expected[1]


def test_a_folder_that_contradicts_the_files_own_column_is_refused() -> None:
    with pytest.raises(InputPatternError, match="own column 'k' is of type int32"):
        unify_partitions([{"k": "x"}], pa.schema({"k": pa.int32()}))


def test_files_may_have_other_folders_or_none() -> None:
    fields, partitions = unify_partitions([{"a": "1"}, {}, {"b": "x"}], NONE)
    assert [field.name for field in fields] == ["a", "b"]
    assert partitions == [(("a", "1"),), (), (("b", "x"),)]
