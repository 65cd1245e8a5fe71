"""Runs that are killed, or stopped for longer than their lease beside another one: every call that a provider saw is
in the ledger, as paid, wasted or possibly billed, and every row is as in an undisturbed run.

`MOEBEAM_KILLS` and `MOEBEAM_SIGSTOPS` say how many, in each place.
"""

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from moebeam.jobs.output.current_run import read_current_run
from moebeam.schemas.store import storage
from moebeam.schemas.store.run_layout import RunLayout
from tests.support.disturbances.disturbed_runs import Tables, tables_of
from tests.support.disturbances.forked_runs import RUN_TIMEOUT_S, SHORT_LEASE, ForkedRun, start_run
from tests.support.jobs.jobs_for_tests import write_job_file
from tests.support.jobs.remote_jobs import KEY, KEY_VARIABLE, Answers, remote_job, write_tickets
from tests.support.servers.fake_endpoint import FakeEndpoint
from tests.support.servers.s3_server import S3Server

pytestmark = pytest.mark.integration

NUM_ROWS = 40
MAX_IN_FLIGHT = 4
BROKEN = frozenset(range(0, NUM_ROWS, 10))


@dataclass
class Place:
    """A provider, a job that asks it, and where its outputs lie."""

    folder: Path
    endpoint: FakeEndpoint
    url: str
    path_of: Callable[[str], Path]
    environment: dict[str, str]
    undisturbed: Tables = field(default_factory=dict)

    def start(self, name: str) -> ForkedRun:
        job = remote_job(
            self.folder,
            Path("unused"),
            self.endpoint,
            plan={"max_shard_rows": 20},
            model={"max_concurrency": MAX_IN_FLIGHT},
            output={"path": f"{self.url}/{name}"},
        )
        return start_run(write_job_file(job, self.folder / f"{name}.toml"), self.environment)

    def finish(self, name: str) -> None:
        assert self.start(name).wait() == 0, (self.folder / f"{name}.log").read_text()[-2000:]

    def wait_for_calls(self, run: ForkedRun, num_calls: int) -> bool:
        """Whether so many calls were seen before the run was over."""
        deadline = time.monotonic() + RUN_TIMEOUT_S
        while len(self.endpoint.calls) < num_calls:
            assert time.monotonic() < deadline
            if run.is_over:
                return False
            time.sleep(0.002)
        return True

    def check(self, name: str, num_calls: int, num_stops: int) -> int:
        """Hold a finished run against the calls that the provider saw; returns how many were told in vain."""
        assert tables_of(self.path_of(f"{self.url}/{name}")) == self.undisturbed
        current = read_current_run(RunLayout(f"{self.url}/{name}"))
        assert current.manifest is not None and current.manifest["status"] == "complete" and current.is_published
        lines = [line for ledger in current.read_ledgers() for line in ledger.to_pylist()]
        assert len({(line["journal"], line["custom_id"]) for line in lines}) == len(lines)
        num_told = sum((line["error_type"] != "given_up") + (line["num_lost_calls"] or 0) for line in lines)
        # A call may be told, and its process end before a byte of it leaves.
        assert num_calls <= num_told <= num_calls + num_stops * MAX_IN_FLIGHT
        return num_told - num_calls


@pytest.fixture(params=["disk", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    write_tickets(tmp_path, NUM_ROWS)
    environment, url, path_of = {KEY_VARIABLE: KEY}, str(tmp_path), Path
    if request.param == "s3":
        s3: S3Server = request.getfixturevalue("s3")
        url, path_of = request.getfixturevalue("bucket"), s3.path
        environment |= s3.environment
    with FakeEndpoint(Answers(BROKEN, frozenset(), delay_s=0.05)) as endpoint:
        place = Place(tmp_path, endpoint, url, path_of, environment)
        place.finish("undisturbed")
        place.undisturbed = tables_of(place.path_of(f"{place.url}/undisturbed"))
        yield place


def test_after_kills_every_call_is_told(place: Place) -> None:
    dice, num_kills, number, told_in_vain = random.Random(3), int(os.environ.get("MOEBEAM_KILLS", "4")), 0, 0
    while num_kills > 0:
        name, num_before, num_here = f"killed-{number}", len(place.endpoint.calls), 0
        for _ in range(min(num_kills, dice.randint(1, 3))):
            run = place.start(name)
            if not place.wait_for_calls(run, len(place.endpoint.calls) + dice.randint(1, 14)):
                break
            time.sleep(dice.uniform(0, 0.06))
            run.signal(signal.SIGKILL)
            run.wait()
            num_here += 1
        place.finish(name)
        told_in_vain += place.check(name, len(place.endpoint.calls) - num_before, num_here)
        num_kills -= max(1, num_here)
        number += 1
        print(f"{number} outputs, {num_kills} kills left, {told_in_vain} calls told that never left", flush=True)


def test_a_run_that_wakes_up_beside_its_successor_asks_nothing_more(place: Place) -> None:
    dice, num_late = random.Random(5), 0
    for number in range(int(os.environ.get("MOEBEAM_SIGSTOPS", "1"))):
        name, num_before = f"stopped-{number}", len(place.endpoint.calls)
        sleeper = place.start(name)
        assert place.wait_for_calls(sleeper, num_before + dice.randint(2, 12))
        time.sleep(dice.uniform(0, 0.06))
        sleeper.signal(signal.SIGSTOP)
        stopped_at = time.monotonic()
        following = place.start(name)
        if dice.random() < 0.5:
            # Wakes up while its successor is at work, or else once all is done.
            num_seen = len(place.endpoint.calls)
            assert place.wait_for_calls(following, num_seen + dice.randint(1, 9))
        else:
            assert following.wait() == 0
        assert time.monotonic() - stopped_at > SHORT_LEASE["LEASE_S"]
        sleeper.signal(signal.SIGCONT)
        assert following.wait() == 0
        assert sleeper.wait() == 0, (place.folder / f"{name}.log").read_text()[-2000:]
        num_calls = len(place.endpoint.calls) - num_before
        # What the first one had in flight, or answered and not yet in an object of the store, is paid twice; no more.
        most_twice = (1 if storage.is_local(place.url) else 6) * MAX_IN_FLIGHT
        assert num_calls <= NUM_ROWS + len(BROKEN) + most_twice
        num_late += place.check(name, num_calls, 1)
        print(f"{number + 1} stops, {num_late} calls told that never left", flush=True)
