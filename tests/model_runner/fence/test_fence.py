"""The fence: what runs behind it takes no more than it may, and only its own item suffers."""

import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from moebeam.model_runner.fence import fenced_process
from moebeam.model_runner.fence.child import FIRST_ITEM
from moebeam.model_runner.fence.fence import Program
from moebeam.model_runner.fence.fenced_process import FencedProcess
from moebeam.schemas.errors import EngineLoadError, InvalidMessages, PipelineFailed, RowError, TemplateBudgetExceeded
from tests.support.paths import ROOT

ENTRY = "tests.support.disturbances.fenced_programs:obey"


def make_program(source: str = "") -> Program:
    return Program(ENTRY, pickle.dumps(source), "the test", max_cpu_s=0.2, limit_key="max_test_s")


def describe(result: object) -> object:
    return f"{type(result).__name__}: {result}" if isinstance(result, RowError) else result


def test_results_come_in_order_and_only_the_item_that_takes_too_much_is_an_error() -> None:
    wanted: dict[int, str] = {0: "compute", 3: "allocate", 4: "crash", 150: "raise because", 299: "leave"}
    items = [wanted.get(index, str(index)) for index in range(300)]
    results = make_program().run(items)
    assert [result for index, result in enumerate(results) if index not in wanted] == [
        item for index, item in enumerate(items) if index not in wanted
    ]
    assert [describe(results[index]) for index in wanted] == [
        "TemplateBudgetExceeded: the test: expected at most 0.2 s of processor time for one row (max_test_s), "
        "found more",
        "TemplateBudgetExceeded: the test: expected at most 768 MiB of memory for one row, found more",
        "TemplateBudgetExceeded: the test: ended the process in which it ran with SIGSEGV",
        "InvalidMessages: because",
        "TemplateBudgetExceeded: the test: ended the process in which it ran with exit status 7",
    ]


def test_a_source_that_takes_too_much_to_compile_is_an_error_of_each_item() -> None:
    results = make_program("endless").run(["a", "b"])
    assert [type(result) for result in results] == [TemplateBudgetExceeded] * 2


def test_an_error_that_stops_the_job_is_raised() -> None:
    with pytest.raises(EngineLoadError, match="expected a program, found none"):
        make_program("no program").run(["a"])


def test_messages_of_errors_are_cut() -> None:
    (result,) = make_program().run(["raise " + "x" * 100_000])
    assert isinstance(result, InvalidMessages)
    assert len(str(result)) == 2000


@pytest.mark.parametrize("name", ["PipelineFailed", "Sequence", "no such error"])
def test_a_process_cannot_name_errors_that_rows_do_not_have(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(FencedProcess, "run", lambda *_, **__: iter([(name, "stop the job")]))
    (result,) = make_program().run(["a"])
    assert describe(result) == (
        f"TemplateBudgetExceeded: the test: expected an error that rows may have, found {name!r}"
    )


def test_large_results_come_back_in_pieces() -> None:
    items = ["x" * (1 << 20)] * 3 + ["y"]
    assert make_program().run(items) == items


def test_threads_have_processes_of_their_own() -> None:
    texts = [[f"{thread}-{index}" for index in range(50)] for thread in range(4)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(make_program().run, texts)) == texts


def test_neither_keys_nor_files_are_in_reach(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SOME_API_KEY", "secret")
    program = make_program()
    program.run(["leave"])  # the next process is started with the environment of now
    (names, written) = program.run(["environment", f"write {tmp_path / 'file'}"])
    assert isinstance(names, list)
    assert "PYTHONPATH" in names
    assert "SOME_API_KEY" not in names
    assert written == "OSError"


def test_a_signal_interrupts_the_wait_and_the_next_request_gets_its_own_answer() -> None:
    class _SignalledError(Exception):
        pass

    def interrupt(signum: int, frame: object) -> None:
        raise _SignalledError

    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with pytest.raises(_SignalledError):
            Program(ENTRY, pickle.dumps(""), "the test", max_cpu_s=600.0).run(["signal"])
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert make_program().run(["a"]) == ["a"]


def test_a_process_that_is_silent_is_ended_and_its_item_tried_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def wait_in_vain(process: FencedProcess, max_silence_s: float) -> None:
        while process.step < FIRST_ITEM:
            time.sleep(0.01)
        asked.append(process.step)
        process.was_silent = True
        process._popen.kill()  # pyright: ignore[reportPrivateUsage]
        raise EOFError

    monkeypatch.setattr(FencedProcess, "_wait", wait_in_vain)
    program = Program(ENTRY, pickle.dumps(""), "the test", max_cpu_s=600.0)
    assert [describe(result) for result in program.run(["compute", "compute"])] == [
        "TemplateBudgetExceeded: the test: ended the process in which it ran with SIGKILL"
    ] * 2
    assert len(asked) == 3  # the batch, its first item alone, and what is left of the batch


def test_data_that_would_call_something_is_refused(tmp_path: Path) -> None:
    class _Call:
        def __reduce__(self) -> tuple[object, ...]:
            return os.mkdir, (str(tmp_path / "called"),)

    with pytest.raises(EOFError):
        fenced_process._read_outcomes(pickle.dumps([_Call()]))  # pyright: ignore[reportPrivateUsage]
    assert not (tmp_path / "called").exists()


def test_a_process_that_cannot_start_is_told_with_its_own_words() -> None:
    program = Program("tests.support.no_such_module:obey", pickle.dumps(""), "the test")
    with pytest.raises(PipelineFailed, match="No module named 'tests"):
        program.run(["a"])


def test_an_idle_process_ends_by_itself_when_ours_is_gone() -> None:
    process = FencedProcess()
    process.close(grace_s=60.0)
    assert process.exit_cause == "exit status 0"


def test_a_process_at_work_ends_when_ours_is_killed(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    code = (
        "import pickle; from moebeam.model_runner.fence.fence import Program; "
        f"Program({ENTRY!r}, pickle.dumps(''), 'the test', max_cpu_s=600.0).run(['orphan {pid_file}'])"
    )
    with subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}) as parent:
        wait_for(pid_file.is_symlink)
        parent.kill()
    wait_for(lambda: has_ended(int(os.readlink(pid_file))))


def has_ended(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def wait_for(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60.0
    while not is_so():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.02)
