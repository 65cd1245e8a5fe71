"""What workers leave for the launcher: progress that may be lost, and the reason of a failure."""

import threading
from pathlib import Path

import pytest

from moebeam.schemas.errors import CommitError
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.transforms.durable.failure import WorkerWatch, read_failure, record_failure
from moebeam.transforms.durable.progress import ProgressWriter, ShardProgress, read_progress


def test_progress_comes_back_by_stage_and_name_and_the_last_one_counts(tmp_path: Path) -> None:
    layout = RunLayout(str(tmp_path))
    answering = ProgressWriter(layout, "answer")
    answering.write("s0", ShardProgress(rows_done=1))
    answering.write("s0", ShardProgress(rows_done=2, cost="0.5"))
    ProgressWriter(layout, "plan").write("u-1", ShardProgress(rows_done=9))
    assert read_progress(layout, "answer") == {"s0": ShardProgress(rows_done=2, cost="0.5")}
    assert read_progress(layout, "plan") == {"u-1": ShardProgress(rows_done=9)}


def test_a_torn_or_foreign_file_is_passed_over(tmp_path: Path) -> None:
    layout = RunLayout(str(tmp_path))
    ProgressWriter(layout, "answer").write("s0", ShardProgress(rows_done=1))
    Path(layout.progress_file("answer", "s1")).write_text("{")
    Path(layout.progress_file("answer", "s2")).write_text('{"rows_done": 3, "unknown": 1}')
    assert read_progress(layout, "answer") == {"s0": ShardProgress(rows_done=1), "s2": ShardProgress(rows_done=3)}


def test_progress_is_due_once_an_interval(tmp_path: Path) -> None:
    progress = ProgressWriter(RunLayout(str(tmp_path)), "answer")
    assert progress.is_due("s0")
    progress.write("s0", ShardProgress())
    assert not progress.is_due("s0")
    assert progress.is_due("s1")


def test_the_reason_of_a_failure_is_kept_and_the_error_goes_on(tmp_path: Path) -> None:
    layout = RunLayout(str(tmp_path))
    assert read_failure(layout) is None
    with pytest.raises(CommitError, match="they differ"), record_failure(layout, "answer"):
        raise CommitError("they differ")
    failure = read_failure(layout)
    assert failure is not None
    assert (failure.step, failure.error, failure.message) == ("answer", "CommitError", "they differ")


def test_a_failure_that_cannot_be_kept_still_goes_on(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="first"), record_failure(RunLayout(str(tmp_path / "file")), "plan"):
        raise ValueError("first")


def raise_in_a_thread(name: str, error: Exception) -> None:
    def fail() -> None:
        raise error

    thread = threading.Thread(target=fail, name=name)
    thread.start()
    thread.join()


def test_a_worker_process_that_dies_is_noticed_and_other_threads_errors_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    passed_on: list[type[BaseException]] = []
    monkeypatch.setattr(threading, "excepthook", lambda args: passed_on.append(args.exc_type))
    before = threading.excepthook
    with WorkerWatch() as watch:
        raise_in_a_thread("another", RuntimeError("not a worker"))
        assert not watch.has_lost_a_worker_for(0)
        raise_in_a_thread("run_worker", RuntimeError("Worker subprocess exited with return code 137"))
        assert watch.has_lost_a_worker_for(0)
        assert not watch.has_lost_a_worker_for(3600)
        assert "137" in watch.reason
    assert passed_on == [RuntimeError]
    assert threading.excepthook is before
