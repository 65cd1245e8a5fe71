"""SQL as input: fenced, in one order, executed once."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from moebeam.schemas.errors import InputPatternError
from moebeam.schemas.job.input_section import InputSection
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.transforms.read.sources import run_query as query_module
from moebeam.transforms.read.sources.staged_input import keep_staged, scan_staged


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "a.csv").write_text("x,y\n1,2\n3,4\n")
    (tmp_path / "b.csv").write_text("x,y\n1,9\n")
    return tmp_path


def section(folder: Path, query: str) -> InputSection:
    return InputSection(query=query).in_folder(str(folder))


def test_a_query_runs_once_and_its_rows_stay_with_the_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = RunLayout(str(folder / "out"))
    source = section(folder, "SELECT sum(x) AS s, y FROM '[ab].csv' GROUP BY y ORDER BY s DESC, y")
    first = scan_staged(source, layout)
    assert first.staged is not None
    assert pq.read_table(first.staged.path).to_pylist()[0] == {"s": 3, "y": 4}
    keep_staged(layout, first.staged)
    monkeypatch.setattr(query_module, "run_query", None)
    again = scan_staged(source, layout)
    assert (again.staged, again.fingerprint, again.num_rows) == (None, first.fingerprint, 3)
    assert again.units[0].path.startswith(layout.frames)
    (folder / "b.csv").write_text("x,y\n1,10\n")
    with pytest.raises(TypeError):  # another file, another input
        scan_staged(source, layout)


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("SELECT foo\nFROM 'a.csv'", 'line 1: Binder Error: Referenced column "foo" not found'),
        ("SELECT x, FROM\n 'a.csv' wher x", "line 2, column 15"),
        ("SELECT 1; SELECT 2", "expected one SELECT statement, found 2"),
        ("COPY (SELECT 1) TO 'x.csv'", "found another kind of statement"),
        ("ATTACH 'x.db'", "found another kind of statement"),
        ("SELECT * FROM 'none.csv'", "none.csv', found none"),
        ("SELECT * FROM reviews", "in single quotes"),
        ("SELECT * FROM query('FROM read_text(''/etc/hostname'')')", "Permission Error"),
        ("SELECT * FROM glob('/etc/*')", "Permission Error"),
        ("SELECT a.x, b.x FROM 'a.csv' a, 'b.csv' b", "name them with AS"),
    ],
)
def test_what_a_query_may_not_is_refused_with_the_place(folder: Path, query: str, expected: str) -> None:
    with pytest.raises(InputPatternError) as e:
        scan_staged(section(folder, query), RunLayout(str(folder / "out")))
    assert expected in str(e.value)
    assert not (folder / "out").exists()
