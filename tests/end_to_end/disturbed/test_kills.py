"""kill -9 at random instants of every phase: after another run the output is that of a run nobody disturbed.

`MOEBEAM_KILLS` says how many kills; `benchmarks/faults.py --kills` does hundreds.
"""

import os
from pathlib import Path

import pytest

from tests.support.disturbances.disturbed_runs import Work
from tests.support.disturbances.killed_runs import WORKERS, KillCount, Victim, kill_series, undisturbed_run

NUM_KILLS = int(os.environ.get("MOEBEAM_KILLS", "9"))


@pytest.mark.integration
@pytest.mark.parametrize(
    ("victims", "args", "share"),
    [(("group",), (), 0.7), (("group", "launcher", "worker"), WORKERS, 0.3)],
    ids=["one process", "worker processes"],
)
def test_killed_runs_lose_nothing_double_nothing_and_leave_nothing(
    tmp_path: Path, tiny_checkpoint: Path, victims: tuple[Victim, ...], args: tuple[str, ...], share: float
) -> None:
    work = Work(tmp_path, tiny_checkpoint, 400, latency_ms=2).write()
    undisturbed, run_s = undisturbed_run(work, args)
    count = KillCount()
    num_kills = max(1, round(NUM_KILLS * share))
    for count in kill_series(
        work, undisturbed, num_kills=num_kills, seed=NUM_KILLS, run_s=run_s, victims=victims, args=args
    ):
        assert count.problems == []
    assert count.num_kills >= num_kills
    assert count.num_looks > 0
