"""How many requests an endpoint gets at a time, and how processes divide it."""

import asyncio
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moebeam.model_runner.openai_engine.concurrency import START, AdaptiveLimit, MachineShare


async def work(limit: AdaptiveLimit, outcomes: list[bool], num_tasks: int) -> None:
    """Tasks that take a place each, and report the next outcomes."""

    async def one() -> None:
        await limit.acquire()
        try:
            assert limit.num_in_flight <= most_ever
            await asyncio.sleep(0)
            if outcomes:
                limit.record_outcome(is_refused=outcomes.pop())
        finally:
            limit.release()

    most_ever = 4096
    await asyncio.gather(*(one() for _ in range(num_tasks)))


def test_no_more_are_admitted_than_the_limit() -> None:
    async def check() -> int:
        limit = AdaptiveLimit(8, start=8)
        await work(limit, [], 100)
        assert limit.num_in_flight == 0
        return limit.peak_in_flight

    assert asyncio.run(check()) == 8


def test_limit_grows_to_its_end_while_all_goes_well() -> None:
    async def check() -> AdaptiveLimit:
        limit = AdaptiveLimit(500)
        await work(limit, [False] * 3000, 3000)
        return limit

    limit = asyncio.run(check())
    assert limit.limit == limit.peak_in_flight == 500


def test_limit_that_is_not_used_does_not_grow() -> None:
    async def check() -> int:
        limit = AdaptiveLimit(500)
        for _ in range(300):
            await work(limit, [False], 1)
        return limit.limit

    assert asyncio.run(check()) == START


def test_refusals_of_an_overloaded_endpoint_shrink_the_limit() -> None:
    async def check() -> int:
        limit = AdaptiveLimit(100, start=100)
        await work(limit, [True] * 110, 110)
        return limit.limit

    assert asyncio.run(check()) == 75


def test_outcomes_sent_before_the_limit_shrank_do_not_shrink_it_again() -> None:
    async def check() -> int:
        limit = AdaptiveLimit(100, start=100)
        for _ in range(100):
            await limit.acquire()
        for _ in range(200):
            limit.record_outcome(is_refused=True)
        return limit.limit

    assert asyncio.run(check()) == 75


def test_some_refusals_by_chance_do_not_keep_the_limit_down() -> None:
    async def check() -> int:
        draw = random.Random(0).random
        limit = AdaptiveLimit(400)
        await work(limit, [draw() < 0.05 for _ in range(30_000)], 30_000)
        return limit.limit

    assert asyncio.run(check()) > 300


def test_cancelled_waiting_gives_its_place_back() -> None:
    async def check() -> None:
        limit = AdaptiveLimit(1)
        await limit.acquire()
        waiting = [asyncio.create_task(limit.acquire()) for _ in range(3)]
        await asyncio.sleep(0)
        waiting[0].cancel()
        limit.release()
        # The place has been given to the second one, who is cancelled before it wakes up.
        waiting[1].cancel()
        await asyncio.gather(*waiting[:2], return_exceptions=True)
        await asyncio.wait_for(waiting[2], 5)
        assert limit.num_in_flight == 1

    asyncio.run(check())


@given(
    most=st.integers(1, 300),
    outcomes=st.lists(st.booleans(), max_size=400),
    caps=st.lists(st.integers(-3, 300), max_size=5),
)
def test_limit_stays_between_one_and_its_end(most: int, outcomes: list[bool], caps: list[int]) -> None:
    async def check() -> None:
        limit = AdaptiveLimit(most)
        await work(limit, outcomes, 200)
        assert 1 <= limit.limit <= most
        for cap in caps:
            limit.cap(cap)
            assert 1 <= limit.limit <= max(1, cap)

    asyncio.run(check())


def test_limit_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="expected at least 1, found 0"):
        AdaptiveLimit(0)


HOLDER = """
import sys
from pathlib import Path
from moebeam.model_runner.openai_engine.concurrency import MachineShare
share = MachineShare(sys.argv[1], Path(sys.argv[2]))
print(share.num_processes(), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every look counts anew."""
    monkeypatch.setattr(MachineShare, "_MAX_AGE_S", 0.0)


def test_processes_divide_an_endpoint_and_a_killed_one_leaves_its_part(tmp_path: Path, now: None) -> None:
    share = MachineShare("there", tmp_path)
    assert share.divide(100) == 100
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, "there", str(tmp_path)], stdin=-1, stdout=-1, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "2\n"
        assert share.divide(100) == 50
        assert share.divide(1) == 1
        other.kill()
        other.wait()
    assert share.divide(100) == 100
    share.close()
    assert list((tmp_path / "endpoints").glob("*/*")) == []


def test_processes_at_other_endpoints_do_not_count(tmp_path: Path, now: None) -> None:
    one, other = MachineShare("one", tmp_path), MachineShare("other", tmp_path)
    assert (one.num_processes(), other.num_processes()) == (1, 1)
    one.close()
    other.close()


def test_machine_without_a_writable_folder_counts_this_process_alone(tmp_path: Path) -> None:
    (tmp_path / "endpoints").write_text("in the way")
    assert MachineShare("there", tmp_path).num_processes() == 1
