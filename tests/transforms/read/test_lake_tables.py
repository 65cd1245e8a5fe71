"""Iceberg and Delta tables as input, each at one version."""

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moebeam.schemas.errors import InputPatternError
from moebeam.schemas.job.input_section import InputSection
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.transforms.read.sources.lake_tables import pin_table
from moebeam.transforms.read.sources.staged_input import keep_staged, scan_staged
from tests.support.jobs.published_runs import make_catalog

Append = Callable[[pa.Table], None]


@pytest.fixture(params=["iceberg", "delta"])
def table(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Append]:
    """The URL of a table of three rows, and what appends others."""
    rows = make_rows(0, 3)
    if request.param == "delta":
        from deltalake import write_deltalake

        folder = str(tmp_path / "table")
        write_deltalake(folder, rows)
        return f"delta://{folder}", lambda more: write_deltalake(folder, more, mode="append")
    catalog = make_catalog(tmp_path, monkeypatch)
    made = catalog.create_table("db.reviews", rows.schema)
    made.append(rows)
    return f"iceberg://{catalog.name}/db.reviews", lambda more: catalog.load_table("db.reviews").append(more)


def make_rows(first: int, end: int) -> pa.Table:
    numbers = list(range(first, end))
    return pa.table({"id": [f"r{number}" for number in numbers], "n": pa.array(numbers, pa.int64()), "other": numbers})


def read_ids(url: str, folder: Path) -> list[str]:
    scan = scan_staged(InputSection(path=url), RunLayout(str(folder)), needed={"id", "n"})
    assert scan.staged is not None
    found = pq.read_table(scan.staged.path)
    assert found.schema.names == ["id", "n"]
    assert found["n"].to_pylist() == [int(name[1:]) for name in found["id"].to_pylist()]
    return sorted(found["id"].to_pylist())


def test_a_table_is_read_at_its_newest_version_or_at_the_one_that_is_named(
    table: tuple[str, Append], tmp_path: Path
) -> None:
    url, append = table
    first = pin_table(url)
    append(make_rows(3, 5))
    assert read_ids(first, tmp_path / "a") == ["r0", "r1", "r2"]
    assert read_ids(url, tmp_path / "b") == ["r0", "r1", "r2", "r3", "r4"]
    assert pin_table(url) != first == pin_table(first)


def test_a_run_goes_on_with_the_version_that_it_began_with(table: tuple[str, Append], tmp_path: Path) -> None:
    url, append = table
    pinned, layout = pin_table(url), RunLayout(str(tmp_path / "out"))
    first = scan_staged(InputSection(path=pinned), layout)
    assert first.staged is not None
    keep_staged(layout, first.staged)
    append(make_rows(3, 5))
    again = scan_staged(InputSection(path=pinned), layout)
    assert (again.staged, again.fingerprint, again.num_rows) == (None, first.fingerprint, 3)


@pytest.mark.parametrize("suffix", ["?version=99", "?snapshot=99", "x"])
def test_a_table_or_version_that_is_not_there_is_named(table: tuple[str, Append], tmp_path: Path, suffix: str) -> None:
    with pytest.raises(InputPatternError, match=r"^\[input\] path "):
        scan_staged(InputSection(path=table[0] + suffix), RunLayout(str(tmp_path / "out")))
