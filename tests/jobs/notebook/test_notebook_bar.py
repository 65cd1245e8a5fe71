"""Where `run_job` shows its progress."""

import builtins
import io
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from moebeam.jobs.notebook import notebook_bar
from moebeam.jobs.notebook.notebook_bar import show_run
from tests.support.jobs.progress_snapshots import answering_snapshot

SNAPSHOT = answering_snapshot(rows_done=3, rows_total=12, elapsed_s=1.0)


class Notebook:
    """A kernel's display: what the cell shows, one entry a call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.shown: list[str] = []
        shell = type("ZMQInteractiveShell", (), {})()
        monkeypatch.setattr(builtins, "get_ipython", lambda: shell, raising=False)
        module: Any = SimpleNamespace(HTML=str, display=self.display)
        monkeypatch.setitem(sys.modules, "IPython.display", module)

    def display(self, drawn: str, *, display_id: bool) -> "Notebook":
        assert display_id
        self.shown.append(drawn)
        return self

    def update(self, drawn: str) -> None:
        self.shown.append(drawn)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Console:
    console = Console(file=io.StringIO(), force_terminal=False)
    monkeypatch.setattr(notebook_bar, "stderr_console", lambda: console)
    return console


@pytest.mark.usefixtures("terminal")
def test_a_notebook_gets_a_bar_that_says_how_the_run_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = Notebook(monkeypatch)
    with show_run(None) as view:
        assert view is not None
        view.show(SNAPSHOT)
        view.show_end("done in 2 s & more")
    start, bar, end = notebook.shown
    assert "<progress " in start
    assert '<progress value="3" max="12"' in bar
    assert "answer: 3/12 rows" in bar
    assert end == "<div>done in 2 s &amp; more</div>"


@pytest.mark.usefixtures("terminal")
def test_a_bar_of_a_run_that_failed_does_not_stay_at_work(monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = Notebook(monkeypatch)
    with pytest.raises(KeyError), show_run(None):
        raise KeyError
    assert "not finished: KeyError" in notebook.shown[-1]


def test_a_program_without_a_terminal_shows_progress_only_on_request(terminal: Console) -> None:
    with show_run(None) as view:
        assert view is None
    with show_run(True) as view:
        assert view is not None
        view.show(SNAPSHOT)
    assert isinstance(terminal.file, io.StringIO)
    assert "answer: 3/12 rows" in terminal.file.getvalue()


@pytest.mark.usefixtures("terminal")
def test_progress_can_be_left_out_of_a_notebook(monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = Notebook(monkeypatch)
    with show_run(False) as view:
        assert view is None
    assert notebook.shown == []
