"""Signals to a process of its own: the first one asks, the second one ends it, whatever the process does."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import psutil
import pytest

from moebeam.schemas.store.run_layout import RunLayout
from moebeam.transforms.durable.stop import SIGNAL, StopReason, read_stop
from tests.support.paths import ROOT

TIMEOUT_S = 60
START = """
import sys, threading, time
from moebeam.jobs.console.signals import draining_signals
from moebeam.schemas.errors import JobInterrupted

def say(*words):
    # In one piece: two threads speak.
    print(" ".join(map(str, words)) + "\\n", end="", flush=True)

def hold_the_interpreter():
    # Powers of whole numbers are C code that never lets go; a template's filter may do the same.
    threading.Thread(target=pow, args=(3, 10**9), daemon=True).start()

def watch(**options):
    return draining_signals(lambda line: say("told:", line), is_process_ours=True, **options)
"""


@pytest.fixture
def start() -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []

    def begin(code: str) -> subprocess.Popen[str]:
        """Run code after `START`, until it says that it is ready."""
        process = subprocess.Popen(
            [sys.executable, "-c", START + code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process

    yield begin
    for process in started:
        left = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
        for one in (process, *left):
            one.kill()
        process.communicate(timeout=TIMEOUT_S)


def rest_of(process: subprocess.Popen[str]) -> list[str]:
    """What it still says, to its end."""
    said, _ = process.communicate(timeout=TIMEOUT_S)
    return said.splitlines()


Start = Callable[[str], "subprocess.Popen[str]"]
Found = TypeVar("Found")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_the_first_signal_is_told_once_and_leaves_the_work_its_time(start: Start, number: signal.Signals) -> None:
    process = start("""
with watch(drain_s=2.5) as stop:
    stop.is_awaited = True
    say("ready")
    stop.wait()
    time.sleep(0.3)
say("ended after", stop.name)
""")
    process.send_signal(number)
    line = (
        f"told: stopping ({number.name}): no new request leaves; answers on their way are awaited for 2.5 s; "
        "a second signal ends at once"
    )
    assert rest_of(process) == [line, f"ended after {number.name}"]
    assert process.returncode == 0


def test_the_first_signal_interrupts_what_does_not_look_for_it(start: Start) -> None:
    process = start("""
try:
    with watch():
        say("ready")
        time.sleep(600)
except JobInterrupted as error:
    say(error)
""")
    process.send_signal(signal.SIGTERM)
    assert rest_of(process)[-1] == "stopped by SIGTERM before anything was run"


def test_the_second_signal_interrupts_but_a_second_hang_up_does_not(start: Start) -> None:
    process = start("""
try:
    with watch() as stop:
        stop.is_awaited = True
        say("ready")
        while not stop.is_set():
            time.sleep(0.01)
        say("first")
        time.sleep(600)
except KeyboardInterrupt:
    say("interrupted")
""")
    process.send_signal(signal.SIGHUP)
    assert process.stdout is not None
    assert {process.stdout.readline() for _ in range(2)} > {"first\n"}
    process.send_signal(signal.SIGHUP)
    time.sleep(0.2)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert rest_of(process) == ["interrupted"]


def test_the_second_signal_ends_a_process_whose_interpreter_is_held_and_says_so(start: Start, tmp_path: Path) -> None:
    layout = RunLayout(str(tmp_path))
    Path(layout.state).mkdir()
    Path(layout.job).write_text("{}")
    process = start(f"""
with watch(output={layout.output!r}) as stop:
    stop.is_awaited = True
    say("ready")
    hold_the_interpreter()
    time.sleep(600)
""")
    time.sleep(0.5)
    for _ in range(2):
        process.send_signal(signal.SIGTERM)
        time.sleep(0.1)
    assert process.wait(TIMEOUT_S) == -signal.SIGKILL
    reason = StopReason(SIGNAL, "stopped by SIGTERM; a second signal ended it at once")
    assert wait_for(lambda: read_stop(layout)) == reason


def test_the_first_signal_ends_a_process_whose_interpreter_is_held_with_its_workers(start: Start) -> None:
    process = start("""
import subprocess
with watch(drain_s=0) as stop:
    stop.is_awaited = True
    worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    say("ready")
    hold_the_interpreter()
    time.sleep(600)
""")
    parent = psutil.Process(process.pid)
    # Between fork and exec it has its parent's command line.
    worker = wait_for(
        lambda: next(
            (child for child in parent.children() if child.cmdline()[-1:] == ["import time; time.sleep(600)"]), None
        )
    )
    assert worker is not None
    process.send_signal(signal.SIGINT)
    assert process.wait(TIMEOUT_S) == -signal.SIGKILL
    assert wait_for(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE)


def test_the_watchdog_goes_with_its_process_and_holds_no_pipe_of_it(start: Start) -> None:
    process = start("""
with watch() as stop:
    say("ready")
    time.sleep(600)
""")
    (watchdog,) = psutil.Process(process.pid).children()
    assert "stop_watchdog.py" in " ".join(watchdog.cmdline())
    process.kill()
    # Reads to the end of the pipe: whoever still holds it would make this wait.
    assert rest_of(process) == []
    assert wait_for(lambda: not watchdog.is_running())


def wait_for(find: Callable[[], Found]) -> Found:
    deadline = time.monotonic() + TIMEOUT_S
    while not (found := find()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found
