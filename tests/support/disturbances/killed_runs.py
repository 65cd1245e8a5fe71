"""Runs of the command line that are killed with SIGKILL at seeded instants, and run again until they are done."""

import contextlib
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import psutil
import pyarrow as pa
import pyarrow.parquet as pq

from tests.support.disturbances.disturbed_runs import Tables, Work, problems_of, tables_of
from tests.support.paths import ROOT

RUN_TIMEOUT_S = 240
NOTICE_TIMEOUT_S = 40
"""How long a launcher may take to end after one of its workers was killed."""

WORKERS = ("--direct_running_mode=multi_processing", "--direct_num_workers=2")

Victim = Literal["group", "launcher", "worker"]
Trigger = Literal["time", "plan", "lease", "staged", "commit", "publish", "cleanup", "manifest"]
TRIGGERS: tuple[Trigger, ...] = ("time", "plan", "lease", "staged", "commit", "publish", "cleanup", "manifest")
_PATTERNS: dict[Trigger, str] = {
    "plan": "_moebeam/plan/runs/*",
    "lease": "_moebeam/leases/*",
    "staged": "_moebeam/staging/*",
    "commit": "_moebeam/commits/*.json",
    "publish": "results/*.parquet",
    "manifest": "manifest.json",
}


@dataclass
class KillCount:
    """What happened in a series of kills.

    Attributes:
        num_looks: how often all Parquet files were looked at meanwhile.
        num_hung: launchers that did not notice the death of a worker.
    """

    num_kills: int = 0
    num_runs: int = 0
    num_outputs: int = 0
    num_looks: int = 0
    num_hung: int = 0
    by_trigger: Counter[str] = field(default_factory=Counter[str])
    by_victim: Counter[str] = field(default_factory=Counter[str])
    by_phase: Counter[str] = field(default_factory=Counter[str])
    problems: list[str] = field(default_factory=list[str])


class ParquetWatch(threading.Thread):
    """Reads every file that `**/*.parquet` finds below a folder, again and again, as an analyst might."""

    def __init__(self, output: Path) -> None:
        super().__init__(daemon=True)
        self._output = output
        self._stop_asked = threading.Event()
        self._whole: set[tuple[str, int, int]] = set()
        self.num_looks = 0
        self.torn: list[str] = []

    def __enter__(self) -> "ParquetWatch":
        self.start()
        return self

    def __exit__(self, *unused: object) -> None:
        self._stop_asked.set()
        self.join()

    def run(self) -> None:
        while not self._stop_asked.wait(0.02):
            self.num_looks += 1
            # The folder above a file may be removed while it is walked.
            with contextlib.suppress(FileNotFoundError):
                for path in self._output.glob("**/*.parquet"):
                    self._look(path)

    def _look(self, path: Path) -> None:
        try:
            found = path.stat()
            seen = (str(path), found.st_ino, found.st_size)
            if seen not in self._whole:
                pq.read_table(path)
                self._whole.add(seen)
        except FileNotFoundError:
            pass
        except (pa.ArrowException, OSError) as error:
            self.torn.append(f"{path}: {error}")


def command(job_file: Path, args: Sequence[str] = ()) -> list[str]:
    return [
        sys.executable,
        "-c",
        "from moebeam.jobs.commands.cli import main; main()",
        "run",
        str(job_file),
        "--quiet",
        *args,
    ]


def start(job_file: Path, args: Sequence[str] = ()) -> subprocess.Popen[bytes]:
    """Start a run in a process group of its own; its standard error goes to a file beside the job file."""
    with job_file.with_suffix(".log").open("ab") as log:
        return subprocess.Popen(
            command(job_file, args), cwd=ROOT, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
        )


def run_to_end(job_file: Path, args: Sequence[str] = ()) -> int:
    """Run undisturbed; the exit code.

    Raises:
        TimeoutError: it did not end.
    """
    process = start(job_file, args)
    try:
        return process.wait(RUN_TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        kill(process, "group")
        raise TimeoutError(f"{job_file}: expected an end within {RUN_TIMEOUT_S} s") from error


def kill(process: subprocess.Popen[bytes], victim: Victim, pick: random.Random | None = None) -> bool:
    """SIGKILL the launcher, all its processes, or one of its workers; False if that one is not there (yet)."""
    family = _family(process.pid)
    workers = [child for child in family if _is_worker(child)]
    if victim == "worker":
        if not workers:
            return False
        _kill(pick.choice(workers) if pick else workers[0])
        return True
    process.kill()
    process.wait()
    if victim == "group":
        for child in family:
            _kill(child)
    return True


def _kill(process: psutil.Process) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.kill()


def _family(pid: int) -> list[psutil.Process]:
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).children(recursive=True)
    return []


def _is_worker(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        words = process.cmdline()
        return "moebeam.jobs.run.local_worker" in words and "sh" not in Path(words[0]).name
    return False


def phase_of(output: Path) -> str:
    """How far a run had come, by what lies in its output."""
    state = output / "_moebeam"
    if (output / "manifest.json").exists():
        return "done"
    if any(output.glob("results/*.parquet")):
        return "publish"
    if any(state.glob("commits/*.json")):
        return "answer, some committed"
    if (state / "plan" / "plan.json").exists():
        return "answer, none committed"
    return "plan" if (state / "job.json").exists() else "before"


def wait_for(process: subprocess.Popen[bytes], trigger: Trigger, output: Path, delay_s: float) -> None:
    """Return `delay_s` after something new of the kind of `trigger` appeared, or when the process ended."""
    before = set(output.glob(_PATTERNS[trigger])) if trigger in _PATTERNS else set[Path]()
    staging = output / "_moebeam" / "staging"
    had_staging = staging.exists()
    while process.poll() is None and trigger != "time":
        if trigger == "cleanup":
            if had_staging and not staging.exists():
                break
            had_staging = had_staging or staging.exists()
        elif set(output.glob(_PATTERNS[trigger])) - before:
            break
        time.sleep(0.001)
    deadline = time.monotonic() + delay_s
    while process.poll() is None and (left := deadline - time.monotonic()) > 0:
        time.sleep(min(left, 0.01))


def kill_series(
    work: Work,
    undisturbed: Tables,
    *,
    num_kills: int,
    seed: int,
    run_s: float,
    victims: Sequence[Victim] = ("group",),
    args: Sequence[str] = (),
    max_kills_an_output: int = 5,
) -> Iterator[KillCount]:
    """Kill runs until there were `num_kills`; yields the running count after each output that was finished.

    Args:
        run_s: what an undisturbed run takes; instants by time are spread over it.
    """
    dice = random.Random(seed)
    count = KillCount()
    while count.num_kills < num_kills:
        output = work.folder / f"out-{seed}-{count.num_outputs}"
        job_file = work.write_job_file(output)
        with ParquetWatch(output) as watch:
            for _ in range(dice.randint(1, min(max_kills_an_output, num_kills - count.num_kills))):
                trigger = dice.choice(TRIGGERS)
                delay_s = dice.uniform(0, run_s) if trigger == "time" else dice.expovariate(1 / 0.02)
                victim = dice.choice(list(victims))
                is_killed = _killed_run(job_file, args, output, trigger, delay_s, victim, dice, count)
                if (output / "manifest.json").exists() and not is_killed:
                    break
            count.num_runs += 1
            code = run_to_end(job_file, args)
        count.num_looks += watch.num_looks
        problems = [*watch.torn]
        if code != 3:
            problems.append(f"exit code {code}, expected 3 (a file cannot be read)")
        else:
            problems += problems_of(output, work, undisturbed)
        count.problems += [f"{output.name}: {problem}" for problem in problems]
        count.num_outputs += 1
        yield count


def _killed_run(
    job_file: Path,
    args: Sequence[str],
    output: Path,
    trigger: Trigger,
    delay_s: float,
    victim: Victim,
    dice: random.Random,
    count: KillCount,
) -> bool:
    """One run and its kill; False if it ended before."""
    process = start(job_file, args)
    count.num_runs += 1
    wait_for(process, trigger, output, delay_s)
    phase = phase_of(output)
    if process.poll() is not None or not kill(process, victim, dice):
        process.wait(RUN_TIMEOUT_S)
        return False
    count.num_kills += 1
    count.by_trigger[trigger] += 1
    count.by_victim[victim] += 1
    count.by_phase[phase] += 1
    if victim == "worker":
        try:
            code = process.wait(NOTICE_TIMEOUT_S)
            if code not in (1, 3):
                count.problems.append(f"{output.name}: exit code {code} after a worker was killed")
        except subprocess.TimeoutExpired:
            # Beam's local runner may wait for ever for a worker that is gone; a person would end it then.
            count.num_hung += 1
            count.num_kills += 1
            count.by_victim["group"] += 1
            kill(process, "group")
    return True


def undisturbed_run(work: Work, args: Sequence[str] = ()) -> tuple[Tables, float]:
    """The tables of a run that nobody disturbs, and the seconds it took."""
    output = work.folder / "undisturbed"
    started = time.monotonic()
    code = run_to_end(work.write_job_file(output), args)
    run_s = time.monotonic() - started
    assert code == 3, f"exit code {code}: {(work.folder / 'undisturbed.log').read_text()[-2000:]}"
    return tables_of(output), run_s
