"""Plays a script: its server, its runs of the command line, their stops, and resumes until the table is complete."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal, TypeAlias

from benchmarks.endpoint_chaos.certificates import write_certificates
from benchmarks.endpoint_chaos.command_line import NAME_UNKNOWN_VARIABLE
from benchmarks.endpoint_chaos.job_files import write_job_file, write_questions
from benchmarks.endpoint_chaos.questions import find_cost
from benchmarks.endpoint_chaos.script import MAX_SAME_REFUSALS, Script, StoppedRun
from benchmarks.endpoint_chaos.server import NAME_UNKNOWN, SCRIPT, certificates_in
from benchmarks.endpoint_chaos.server_log import ServerLog, served
from benchmarks.endpoint_chaos.views import Account, find_differences, read_status_account, read_views
from tests.support.disturbances.killed_runs import kill
from tests.support.jobs.remote_jobs import KEY, KEY_VARIABLE
from tests.support.paths import ROOT

HANG_S = 240.0
"""Beyond the outages of a script, after which a run counts as hung."""

MAX_STOP_S = 60.0
MAX_RUNS = 25
MAX_IDLE_RUNS = 3
_LOOK_S = 0.005


ProblemKind: TypeAlias = Literal["rejects", "payments", "views", "tables", "stops", "limits", "ends"]
"""Of what must hold: no row is rejected for the provider's fault, none is paid twice unseen, the views agree, tables
equal those of an undisturbed run, a signal stops, a limit holds, and every run ends as it should."""


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that did not hold."""

    kind: ProblemKind
    text: str


@dataclass(slots=True)
class PlayedRun:
    """A run of the command line; instants are of the machine's monotonic clock, in seconds.

    Attributes:
        stopped: how it was to be stopped; None for one that was left alone.
        signalled_at: when a signal was sent; None without one, or where the run had ended before.
        during: the phase of the server at that instant.
        limit: the whole limit of a budget; earlier runs count.
        answer: its JSON line; empty for one that was killed.
        account: what the run's folder said once it had ended.
    """

    stopped: StoppedRun | None
    started_at: float
    ended_at: float = 0.0
    exit_code: int = 0
    signalled_at: float | None = None
    during: str = ""
    limit: str = ""
    answer: Mapping[str, Any] = field(default_factory=dict[str, Any])
    account: Account | None = None
    num_views: int = 0
    problems: list[Problem] = field(default_factory=list[Problem])

    @property
    def name(self) -> str:
        """What happened to it, for messages."""
        return self.stopped.stop if self.stopped is not None else "undisturbed"


@dataclass(slots=True)
class Play:
    """A script that was played."""

    folder: Path
    script: Script
    log: ServerLog
    runs: list[PlayedRun] = field(default_factory=list[PlayedRun])
    problems: list[Problem] = field(default_factory=list[Problem])
    elapsed_s: float = 0.0

    @property
    def output(self) -> Path:
        """The folder of its tables."""
        return self.folder / "out"


def play(folder: Path, script: Script) -> Play:
    """Play a script in an empty folder, and compare the views after each run; `checks.py` judges the rest."""
    folder.mkdir(parents=True)
    write_questions(folder, script.num_rows)
    if script.is_tls:
        write_certificates(folder)
    script.write(folder / SCRIPT)
    port = _find_port(script.seed)
    host = "localhost" if script.by_name else "127.0.0.1"
    job_file = write_job_file(
        folder,
        f"{'https' if script.is_tls else 'http'}://{host}:{port}/v1",
        model={
            "mode": script.mode,
            "max_concurrency": script.max_concurrency,
            "max_retries": script.max_retries,
            "timeout_s": script.timeout_s,
        },
        failures={
            "max_outage_s": script.max_outage_s,
            "max_same_refusals": MAX_SAME_REFUSALS,
            "drain_s": script.drain_s,
        },
    )
    started = time.monotonic()
    with served(folder, port) as log:
        played = Play(folder, script, log)
        _play_runs(played, job_file)
    played.elapsed_s = time.monotonic() - started
    return played


def _play_runs(played: Play, job_file: Path) -> None:
    dice = random.Random(played.script.seed)
    waiting = list(played.script.stopped_runs)
    while len(played.runs) < MAX_RUNS:
        run = _play_run(played, job_file, waiting.pop(0) if waiting else None)
        played.runs.append(run)
        run.problems += _compare_views(played, run)
        if run.exit_code in (0, 3):
            return
        if run.exit_code not in (1, 4, -signal.SIGKILL):
            played.problems.append(Problem("ends", f"exit code {run.exit_code}, expected 0, 1, 3 or 4"))
            return
        if not waiting and _count_idle_runs(played) >= MAX_IDLE_RUNS:
            played.problems.append(Problem("ends", f"no run asks anything any more; the last one said {run.answer}"))
            return
        # A person mends what the message says, in most cases before the run is started again.
        if not waiting and dice.random() < 0.7:
            _wait_for_end_of_phase(played)
    played.problems.append(
        Problem("ends", f"not complete after {MAX_RUNS} runs; the last one said {played.runs[-1].answer}")
    )


def _count_idle_runs(played: Play) -> int:
    """The last runs that ended on their own while nothing was wrong, and asked nothing."""
    count = 0
    for run in reversed(played.runs):
        is_asked = any(run.started_at < call.arrived_at < run.ended_at for call in played.log.calls.values())
        if is_asked or run.signalled_at is not None or played.log.phase is not None:
            break
        count += 1
    return count


def _play_run(played: Play, job_file: Path, stopped: StoppedRun | None) -> PlayedRun:
    limits, limit = _find_limits(played, stopped)
    run = PlayedRun(stopped, time.monotonic(), limit=limit)
    process = _start(played, job_file, limits)
    hang_s = HANG_S + sum(phase.lasts_s for phase in played.script.phases)
    deadline = run.started_at + hang_s
    number = stopped.signal_number if stopped is not None else None
    if stopped is not None and number is not None and _wait_for_instant(played, process, stopped, deadline):
        played.log.read_on()
        run.signalled_at = time.monotonic()
        run.during = played.log.phase_at(run.signalled_at)
        if number == signal.SIGKILL:
            kill(process, "group")
        else:
            process.send_signal(number)
            deadline = run.signalled_at + MAX_STOP_S
    try:
        run.exit_code = process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        if run.signalled_at is not None:
            run.problems.append(Problem("stops", f"the run did not end within {MAX_STOP_S:.0f} s after a signal"))
        else:
            run.problems.append(Problem("ends", f"the run did not end within {hang_s:.0f} s"))
        kill(process, "group")
        run.signalled_at = run.signalled_at or time.monotonic()
        run.exit_code = -signal.SIGKILL
    run.ended_at = time.monotonic()
    played.log.read_on()
    text = (played.folder / "stdout").read_text()
    run.answer = json.loads(text) if text.strip() else {}
    return run


def _find_limits(played: Play, stopped: StoppedRun | None) -> tuple[Sequence[str], str]:
    if stopped is None or stopped.signal_number is not None:
        return (), ""
    account = read_status_account(played.output) if (played.output / "_moebeam" / "job.json").exists() else None
    if stopped.stop == "max_requests":
        limit = str(int(stopped.limit) + ((account.num_attempts or 0) if account is not None else 0))
    else:
        whole = sum((find_cost(row) for row in range(played.script.num_rows)), Decimal(0))
        spent = account.cost if account is not None and account.cost is not None else Decimal(0)
        limit = f"{spent + Decimal(stopped.limit) * whole:.9f}"
    return ("--set", f"limits.{stopped.stop}={limit}"), limit


def _start(played: Play, job_file: Path, args: Sequence[str]) -> subprocess.Popen[bytes]:
    environment = {**os.environ, KEY_VARIABLE: KEY, NAME_UNKNOWN_VARIABLE: str(played.folder / NAME_UNKNOWN)}
    if played.script.is_tls:
        environment["SSL_CERT_FILE"] = str(certificates_in(played.folder).authority)
    command = [sys.executable, "-m", "benchmarks.endpoint_chaos.command_line", "run", str(job_file), "--json", *args]
    with (played.folder / "stdout").open("wb") as stdout, (played.folder / "stderr").open("ab") as stderr:
        return subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
        )


def _wait_for_instant(played: Play, process: subprocess.Popen[bytes], stopped: StoppedRun, deadline: float) -> bool:
    """Wait for the instant of a signal; False if the run ended before."""
    signal_at: float | None = None
    while process.poll() is None and time.monotonic() < deadline:
        now = time.monotonic()
        played.log.read_on()
        if signal_at is None and _is_instant(played.log, stopped):
            signal_at = now + stopped.delay_s
        if signal_at is not None and now >= signal_at and _catches_signals(process.pid):
            return True
        time.sleep(_LOOK_S)
    return False


def _is_instant(log: ServerLog, stopped: StoppedRun) -> bool:
    return (
        stopped.phase in log.begun if stopped.num_answers_before < 0 else log.num_answers >= stopped.num_answers_before
    )


def _catches_signals(pid: int) -> bool:
    """Whether the run is so far that it handles SIGTERM itself."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return False
    caught = next(int(line.split()[1], 16) for line in lines if line.startswith("SigCgt"))
    return bool(caught >> (signal.SIGTERM - 1) & 1)


def _has_begun(played: Play) -> bool:
    return (played.output / "_moebeam" / "job.json").exists()


def _wait_for_end_of_phase(played: Play) -> None:
    played.log.read_on()
    if (phase := played.log.phase) is None or not played.script.phases[phase].is_outage:
        return
    deadline = time.monotonic() + played.script.phases[phase].lasts_s + 5
    while phase not in played.log.ended and time.monotonic() < deadline:
        time.sleep(0.1)
        played.log.read_on()


def _compare_views(played: Play, run: PlayedRun) -> list[Problem]:
    if not _has_begun(played):
        return []
    try:
        views = read_views(played.folder, played.output, run.answer)
    except Exception as error:  # a view that cannot be read is a finding, not the end of all scripts
        return [Problem("views", f"a view cannot be read: {type(error).__name__}: {error}")]
    run.account, run.num_views = views["status"], len(views)
    return [Problem("views", difference) for difference in find_differences(views)]


def _find_port(seed: int) -> int:
    """A free port outside of those that the system gives to clients, which would take it while it is closed."""
    dice = random.Random(f"{seed} {os.getpid()} {time.monotonic()}")
    while True:
        port = dice.randrange(15_000, 32_000)
        with socket.socket() as tried:
            if tried.connect_ex(("127.0.0.1", port)) != 0:
                return port
