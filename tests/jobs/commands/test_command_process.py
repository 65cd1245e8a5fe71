"""The command in a process of its own: what it imports, what it prints where, and how signals end it."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.support.jobs.run_summaries import SNAPSHOT, summary
from tests.support.paths import ROOT

HEAVY = ("apache_beam", "torch", "transformers", "pyarrow", "pandas")


def start(script: str, *args: str, **environment: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script), *args],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_help_imports_no_heavy_library():
    script = f"""
        import sys
        from moebeam.jobs.commands.cli import run_command
        code = run_command(["--help"]) or run_command(["run", "--help"])
        loaded = [name for name in {HEAVY!r} if name in sys.modules]
        sys.exit(f"{{code}} {{loaded}}" if code or loaded else 0)
    """
    process = start(script)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert "validate" in out


def test_a_broken_job_file_is_told_without_a_heavy_library(tmp_path: Path):
    script = f"""
        import sys
        from moebeam.jobs.commands.cli import run_command
        code = run_command(["run", "missing.toml"])
        loaded = [name for name in {HEAVY!r} if name in sys.modules]
        sys.exit(f"{{loaded}}" if loaded else code)
    """
    process = start(script)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (2, "", "error: missing.toml: there is no such job file\n")


def start_run(job_file: str, behaviour: str, *options: str) -> "subprocess.Popen[str]":
    """The command in a process of its own, with a launch that does one thing; returns once the launch has begun."""
    script = f"""
        import os, sys, threading, time, types
        from dataclasses import replace
        from decimal import Decimal
        from moebeam.jobs.commands.cli import main
        from moebeam.jobs.console.summary import ProgressSnapshot, RunSummary

        def launch(job, *, limit, beam_args, stop, progress, reuse):
            os.system("echo a child process says hello")
            stop.is_awaited = True
            if "{behaviour}" == "hang":
                # A thread like Beam's workers, which a normal exit would wait for.
                threading.Thread(target=threading.Event().wait, args=(120,)).start()
            print("started", file=sys.stderr, flush=True)
            summary = {summary()!r}
            if "{behaviour}" == "drain":
                while not stop.is_set():  # as launch does: a wait holds the lock that the handler needs
                    time.sleep(0.01)
                progress({SNAPSHOT!r})
                return replace(summary, status="incomplete", exit_code=4)
            if "{behaviour}" == "hang":
                threading.Event().wait(120)
            return summary

        sys.modules["moebeam.jobs.run.launch"] = types.SimpleNamespace(launch=launch)
        main()
    """
    process = start(script, "run", job_file, "--json", *options)
    assert process.stderr is not None
    for line in process.stderr:
        if line == "started\n":
            return process
    raise AssertionError(f"exited with {process.wait()} before the launch")


def test_a_process_keeps_standard_output_clean_of_child_processes(job_file: str):
    out, _ = (process := start_run(job_file, "finish")).communicate(timeout=60)
    assert process.returncode == 0
    assert json.loads(out) == summary().to_json()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_drains_and_exits_with_4(job_file: str, number: signal.Signals):
    process = start_run(job_file, "drain")
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 4
    assert json.loads(out)["status"] == "incomplete"
    assert "no new request leaves; answers on their way are awaited for 5 s; a second signal ends at once" in err
    assert "Traceback" not in err


def test_the_second_signal_stops_at_once_although_threads_are_at_work(job_file: str):
    process = start_run(job_file, "hang")
    assert process.stderr is not None
    process.send_signal(signal.SIGTERM)
    while "second signal" not in process.stderr.readline():
        pass
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 4
    assert json.loads(out) == {"status": "incomplete", "exit_code": 4, "error": "stopped at once by a signal"}
    assert "error: stopped at once" in err
    assert "Traceback" not in err


def test_a_stop_drains_although_nobody_reads_standard_error_any_more(job_file: str):
    # As in `moebeam run job.toml 2>&1 | tee log`, where Ctrl-C ends tee first.
    process = start_run(job_file, "drain")
    assert process.stderr is not None and process.stdout is not None
    process.stderr.close()
    process.send_signal(signal.SIGINT)
    with process.stdout as out:
        answer = json.loads(out.read())
    assert (process.wait(timeout=60), answer["status"], answer["num_results"]) == (4, "incomplete", 10)


@pytest.mark.parametrize(
    ("redirection", "code", "told"),
    [(">&-", 2, ""), (">/dev/full", 2, "standard output: the JSON line cannot be written"), (">&- 2>&-", 2, "")],
)
def test_a_standard_output_that_takes_nothing_is_no_traceback(redirection: str, code: int, told: str) -> None:
    command = f"exec {sys.executable} -c 'from moebeam.jobs.commands.cli import main; main()' run no.toml --json"
    ended = subprocess.run(f"{command} {redirection}", shell=True, capture_output=True, text=True, cwd=ROOT)
    assert ended.returncode == code
    assert told in ended.stderr
    assert "Traceback" not in ended.stderr
