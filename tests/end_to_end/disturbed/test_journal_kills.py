"""kill -9 while a provider answers: what had arrived is not paid again, and the tables are those of an undisturbed run.

`MOEBEAM_KILLS` says how many kills.
"""

import json
import os
import random
import time
from decimal import Decimal
from pathlib import Path

import pytest

from tests.support.disturbances.disturbed_runs import tables_of
from tests.support.disturbances.killed_runs import RUN_TIMEOUT_S, kill, run_to_end, start
from tests.support.jobs.jobs_for_tests import read_table, write_job_file
from tests.support.jobs.remote_jobs import KEY, KEY_VARIABLE, Answers, remote_job, write_tickets
from tests.support.servers.fake_endpoint import FakeEndpoint

pytestmark = pytest.mark.integration

NUM_ROWS = 150
MAX_IN_FLIGHT = 6
BROKEN, REFUSED = frozenset(range(0, NUM_ROWS, 10)), frozenset(range(5, NUM_ROWS, 40))
NUM_CALLS = NUM_ROWS + len(BROKEN)


def check_killed_runs(folder: Path, num_kills: int, seed: int) -> None:
    dice = random.Random(seed)
    write_tickets(folder, NUM_ROWS)
    answers = Answers(BROKEN, REFUSED, delay_s=0.03)
    with FakeEndpoint(answers) as endpoint:

        def job_file(output: Path) -> Path:
            sizes = {"plan": {"max_shard_rows": 60}, "model": {"max_concurrency": MAX_IN_FLIGHT}}
            return write_job_file(remote_job(folder, output, endpoint, **sizes), folder / f"{output.name}.toml")

        assert run_to_end(job_file(folder / "undisturbed")) == 0
        undisturbed = tables_of(folder / "undisturbed")
        assert len(endpoint.calls) == NUM_CALLS
        left, number = num_kills, 0
        while left > 0:
            endpoint.calls.clear()
            output, number = folder / f"out-{number}", number + 1
            path, num_killed = job_file(output), 0
            for _ in range(min(left, 3)):
                process = start(path)
                # Some kills come before the first call of an attempt, most between two answers.
                num_before = len(endpoint.calls) + dice.randint(0, NUM_CALLS // 3)
                deadline = time.monotonic() + RUN_TIMEOUT_S
                while process.poll() is None and len(endpoint.calls) < num_before and time.monotonic() < deadline:
                    time.sleep(0.002)
                time.sleep(dice.uniform(0, 0.1))
                if process.poll() is not None:
                    break
                kill(process, "group")
                num_killed += 1
            left -= max(1, num_killed)
            assert run_to_end(path) == 0, path.with_suffix(".log").read_text()[-2000:]
            num_again = len(endpoint.calls) - NUM_CALLS
            assert 0 <= num_again <= num_killed * MAX_IN_FLIGHT, f"{num_again} calls again after {num_killed} kills"
            tables = tables_of(output)
            assert tables == undisturbed
            ledger = read_table(output, "ledger")
            manifest = json.loads((output / "manifest.json").read_text())
            total = sum((line["cost"] for line in ledger if line["outcome"] != "wasted"), Decimal(0))
            assert total == Decimal(manifest["totals"]["costs"]["USD"])
            references = [line["journal"] for line in ledger]
            assert None not in references and len({*references}) == len(references)


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)


def test_many_killed_runs_ask_again_at_most_what_was_in_flight(tmp_path: Path) -> None:
    check_killed_runs(tmp_path, num_kills=int(os.environ.get("MOEBEAM_KILLS", "9")), seed=11)
