"""Plays one case: its job runs as `moebeam run` in a process of its own, watched for time, memory and how it ends."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.hostile_content.case import KEY, KEY_VARIABLE, OUTPUT, HostileCase

HANG_S = 60.0
"""A job that takes longer is killed and counts as hanging, unless ordinary ones take long, too."""

SAMPLE_S = 0.1

_COMMAND_LINE = "from moebeam.jobs.commands.cli import main; main()"

ROOT = Path(__file__).resolve().parents[2]

Ending: TypeAlias = Literal["rejected", "refused", "answered", "stopped", "crash", "hang"]
"""How a job ended.

rejected: done, and a row is a typed reject. refused: an error for people, before there was a plan. answered: done
without a reject. stopped: an error for people later. crash: killed by a
signal, a traceback, an error that is not expected, or a success that left no manifest. hang: had to be killed.
"""


@dataclass(frozen=True, slots=True)
class Played:
    """What one job did.

    Attributes:
        cpu_s: of all processes of the job.
        peak_bytes: most resident memory of all its processes at a time.
        lost: ids of other rows that ended without an answer in a run that began.
        error_types: of the rejects.
        words: a reject's message, the error, or the end of what was printed.
    """

    ending: Ending
    wall_s: float
    cpu_s: float
    peak_bytes: int
    lost: tuple[str, ...] = ()
    error_types: tuple[str, ...] = ()
    words: str = ""

    def as_json(self) -> dict[str, Any]:
        """All values."""
        return asdict(self)


def play(case: HostileCase, folder: Path, *, hang_s: float) -> Played:
    """Run the case's job in an empty folder."""
    with case.prepare(folder) as job_file:
        started = time.monotonic()
        printed = folder / "printed.txt"
        command = [sys.executable, "-c", _COMMAND_LINE, "run", str(job_file), "--json"]
        with printed.open("wb") as stderr, (folder / "answer.json").open("wb") as stdout:
            process = subprocess.Popen(
                command,
                cwd=folder,
                env={**os.environ, "PYTHONPATH": str(ROOT), KEY_VARIABLE: KEY},
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
            )
            watch = _Watch(process.pid)
            is_hung, exit_code, cpu_s, own_peak_bytes = watch.wait(process, hang_s)
        wall_s = time.monotonic() - started
    text = printed.read_text(errors="replace")
    output = folder / OUTPUT
    answered = frozenset(_read_columns(output / "results", "custom_id").column(0).to_pylist())
    rejects = _read_columns(output / "rejects", "error_type", "error_message")
    error_types = tuple(sorted(set(rejects.column(0).to_pylist())))
    ending = judge_ending(
        is_hung=is_hung,
        exit_code=exit_code,
        text=text,
        is_done=(output / "manifest.json").exists(),
        has_answers=bool(answered),
        has_rejects=bool(error_types),
        has_begun=(output / "_moebeam" / "plan" / "plan.json").exists(),
    )
    return Played(
        ending=ending,
        wall_s=round(wall_s, 2),
        cpu_s=round(cpu_s, 2),
        peak_bytes=max(watch.peak_bytes, own_peak_bytes),
        lost=() if ending == "refused" else tuple(sorted(case.others - answered)),
        error_types=error_types,
        words=str(rejects.column(1)[0])[:400] if rejects.num_rows else _last_words(text),
    )


def judge_ending(
    *,
    is_hung: bool,
    exit_code: int,
    text: str,
    is_done: bool,
    has_answers: bool,
    has_rejects: bool,
    has_begun: bool,
) -> Ending:
    """How a job ended, by its exit code, what it printed and what it left."""
    if is_hung:
        return "hang"
    if exit_code < 0 or "Traceback (most recent call last)" in text or "This is not expected" in text:
        return "crash"
    if is_done:
        return "rejected" if has_rejects else "answered"
    if exit_code == 0:
        return "crash"
    return "stopped" if has_answers or has_begun else "refused"


class _Watch:
    """Samples a process and all below it until it ends."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._stop = threading.Event()
        self._seen: dict[int, psutil.Process] = {}
        self.peak_bytes = 0

    def wait(self, process: subprocess.Popen[bytes], hang_s: float) -> tuple[bool, int, float, int]:
        """Whether it hung, its exit code, CPU seconds of all processes, and the largest peak of one of them."""
        sampler = threading.Thread(target=self._sample_until_stopped, daemon=True)
        sampler.start()
        deadline = time.monotonic() + hang_s
        is_hung = False
        while True:
            # Of wait4 alone come the peak and the processor time of processes that ended between two samples.
            found, status, usage = os.wait4(self._pid, os.WNOHANG)
            if found:
                break
            if not is_hung and time.monotonic() > deadline:
                is_hung = True
                os.killpg(self._pid, signal.SIGKILL)
            time.sleep(0.01)
        process.returncode = os.waitstatus_to_exitcode(status)
        self._stop.set()
        sampler.join()
        for orphan in self._seen.values():
            if orphan.is_running():
                orphan.kill()
        return is_hung, process.returncode, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024

    def _sample_until_stopped(self) -> None:
        while not self._stop.wait(SAMPLE_S):
            try:
                root = psutil.Process(self._pid)
                family = [root, *root.children(recursive=True)]
            except psutil.Error:
                continue
            resident = 0
            for process in family:
                self._seen[process.pid] = process
                try:
                    resident += process.memory_info().rss
                except psutil.Error:
                    continue
            self.peak_bytes = max(self.peak_bytes, resident)


def _read_columns(folder: Path, *names: str) -> pa.Table:
    tables = [pq.read_table(path, columns=[*names]) for path in folder.glob("**/*.parquet")]
    return pa.concat_tables(tables) if tables else pa.table({name: [] for name in names})


def _last_words(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or [""])[-1][:400]


def read_names(cases: Collection[HostileCase]) -> list[str]:
    """The names of cases, which are unique.

    Raises:
        ValueError: one is there twice.
    """
    names = [case.name for case in cases]
    if len(set(names)) < len(names):
        raise ValueError(f"expected each name once, found {json.dumps(sorted(names))}")
    return names
