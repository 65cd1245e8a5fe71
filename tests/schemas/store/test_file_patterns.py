"""Which files a path means."""

from pathlib import Path

import fsspec
import pytest

from moebeam.schemas.store.file_patterns import expand_braces, find_files

FILES = (
    "in[1]/a.parquet",
    "in[1]/b.parquet",
    "in[1]/_SUCCESS.parquet",
    "in[1]/.a.parquet.crc",
    "in1/c.parquet",
    "y=1/m=2/a.parquet",
    "y=2/_m=1/b.parquet",
    "y=2/_temporary/0/b.parquet",
    "y=2/.hidden/b.parquet",
    "{q,r}.parquet",
)


@pytest.fixture(params=["disk", "store"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "disk":
        for name in FILES:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_bytes(b"x")
        return str(tmp_path)
    store = fsspec.filesystem("memory")
    for name in FILES:
        store.pipe_file(f"{tmp_path}/{name}", b"x")
    return f"memory://{tmp_path}"


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("in[1]", {"in[1]/a.parquet": "in[1]", "in[1]/b.parquet": "in[1]"}),
        ("in[1]/", {"in[1]/a.parquet": "in[1]", "in[1]/b.parquet": "in[1]"}),
        ("in[1]/*.parquet", {"in[1]/a.parquet": "in[1]", "in[1]/b.parquet": "in[1]"}),
        ("in[1]/[a]*", {"in[1]/a.parquet": "in[1]"}),
        ("in[1]/_*", {"in[1]/_SUCCESS.parquet": "in[1]"}),
        ("in[1]/_SUCCESS.parquet", {"in[1]/_SUCCESS.parquet": "in[1]"}),
        ("in?/*.parquet", {"in1/c.parquet": ""}),
        ("y=*", {"y=1/m=2/a.parquet": "", "y=2/_m=1/b.parquet": ""}),
        ("y={1,2}/*/*.parquet", {"y=1/m=2/a.parquet": "y=1", "y=2/_m=1/b.parquet": "y=2"}),
        ("{in[1]/b,in1/c}.parquet", {"in1/c.parquet": "in1", "in[1]/b.parquet": "in[1]"}),
        ("{q,r}.parquet", {"{q,r}.parquet": ""}),
        ("*.parquet", {"{q,r}.parquet": ""}),
        ("y=2/**", {"y=2/_m=1/b.parquet": "y=2"}),
        ("nothing*", {}),
        ("nothing", {}),
    ],
)
def test_a_pattern_means_these_files(folder: str, pattern: str, expected: dict[str, str]) -> None:
    name = Path(folder).name
    found = {
        file.path.partition(f"{name}/")[2]: file.root.partition(name)[2].lstrip("/")
        for file in find_files(f"{folder}/{pattern}")
    }
    assert found == expected


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("a.{x,y{1,2}}.z", ["a.x.z", "a.y1.z", "a.y2.z"]),
        ("{a,b}/{c,d}", ["a/c", "a/d", "b/c", "b/d"]),
        ("{a,}b", ["ab", "b"]),
        ("{a}{b,c}", ["{a}b", "{a}c"]),
        ("{a{b,c}", ["{ab", "{ac"]),
        ("plain", ["plain"]),
    ],
)
def test_braces_stand_for_their_alternatives(pattern: str, expected: list[str]) -> None:
    assert expand_braces(pattern) == expected
