"""Two launchers on one output: the rows are right, and nothing is paid twice while the first one lives.

The second one works along: it waits for shards that the first is at, takes over those of a dead one at once, and both
end with the same tables.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.disturbances.disturbed_runs import Work, problems_of
from tests.support.disturbances.killed_runs import RUN_TIMEOUT_S, undisturbed_run
from tests.support.paths import ROOT

pytestmark = pytest.mark.integration

COUNTED = """
import os, sys
from moebeam.model_runner.fake_engine.runner import FakeRunner
real, log = FakeRunner._answer, sys.argv.pop()
def counted(self, request, num_shared):
    answer = real(self, request, num_shared)
    with open(log, "a") as sink:
        sink.write(f"{os.getpid()}\\n")
    return answer
FakeRunner._answer = counted
from moebeam.jobs.commands.cli import main
main()
"""


@pytest.fixture
def work(tmp_path: Path, tiny_checkpoint: Path) -> Work:
    return Work(tmp_path, tiny_checkpoint, 160, latency_ms=10).write()


def launched(work: Work, output: Path) -> subprocess.Popen[bytes]:
    """A run in a process of its own that notes each request it pays for in `paid`."""
    job_file = work.write_job_file(output)
    command = [sys.executable, "-c", COUNTED, "run", str(job_file), "--quiet", str(work.folder / "paid")]
    with (work.folder / "log").open("ab") as log:
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)


def num_paid(work: Work) -> int:
    return len((work.folder / "paid").read_text().splitlines())


def wait_for_commits(output: Path, process: subprocess.Popen[bytes], num: int) -> None:
    commits = output / "_moebeam" / "commits"
    deadline = time.monotonic() + RUN_TIMEOUT_S
    while len(list(commits.glob("*.json"))) < num:
        assert process.poll() is None, "the run ended too early for this test"
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("num_commits", [0, 2])
def test_of_two_launchers_none_pays_for_what_the_other_does(work: Work, num_commits: int) -> None:
    undisturbed, _ = undisturbed_run(work)
    output = work.folder / "out"
    first = launched(work, output)
    wait_for_commits(output, first, num_commits)
    second = launched(work, output)
    assert (first.wait(RUN_TIMEOUT_S), second.wait(RUN_TIMEOUT_S)) == (3, 3), (work.folder / "log").read_text()[-3000:]
    assert problems_of(output, work, undisturbed) == []
    assert num_paid(work) == len(undisturbed["ledger"])


def test_the_second_launcher_goes_on_when_the_first_is_killed(work: Work) -> None:
    undisturbed, _ = undisturbed_run(work)
    output = work.folder / "out"
    first = launched(work, output)
    wait_for_commits(output, first, 1)
    second = launched(work, output)
    wait_for_commits(output, first, 3)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    assert second.wait(RUN_TIMEOUT_S) == 3, (work.folder / "log").read_text()[-3000:]
    assert problems_of(output, work, undisturbed) == []
    # The shard that the killed one was at is paid again, and no other.
    assert num_paid(work) <= len(undisturbed["ledger"]) + 2 * work.max_shard_rows
