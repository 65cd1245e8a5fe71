"""The watch over a shard: stops and outages are seen while no answer arrives."""

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from moebeam.model_runner.admission import Admission
from moebeam.model_runner.protocol import Outage
from moebeam.schemas.records import Completion, Request
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.transforms.answer.budget import ShardBudget, SpendingLimits
from moebeam.transforms.answer.watch import ShardWatch
from moebeam.transforms.durable.progress import read_outage
from moebeam.transforms.durable.stop import BY_SIGNAL, StopReason, announce_stop, forget_stop, request_stop

TIMEOUT_S = 30
SINCE = datetime(2026, 11, 30, 12, 3, tzinfo=UTC)


class Engine:
    """Does nothing; says when it is told to give back."""

    def __init__(self) -> None:
        self.is_given_back = threading.Event()
        self.outage: Outage | None = None

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        return iter(())

    def give_back(self) -> None:
        self.is_given_back.set()

    def find_outage(self) -> Outage | None:
        return self.outage


class RemoteEngine(Engine):
    def generate_admitted(self, requests: Iterable[Request], admission: Admission) -> Iterator[Completion]:
        return iter(())


@pytest.fixture
def layout(tmp_path: Path) -> Iterator[RunLayout]:
    layout = RunLayout(str(tmp_path))
    yield layout
    forget_stop(layout)


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not is_so():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.01)


@pytest.mark.parametrize("tell", [announce_stop, request_stop])
def test_a_signal_ends_the_budget_and_then_gives_back_what_is_in_flight(
    layout: RunLayout, tell: Callable[[RunLayout, StopReason], None]
) -> None:
    engine, budget = Engine(), ShardBudget()
    with ShardWatch(layout, "s0", engine, budget, drain_s=0.1):
        assert budget.may_ask()
        tell(layout, BY_SIGNAL)
        assert engine.is_given_back.wait(TIMEOUT_S)
        assert budget.stop == BY_SIGNAL


def test_a_stop_that_is_known_already_is_seen_at_once(layout: RunLayout) -> None:
    announce_stop(layout, BY_SIGNAL)
    engine, budget = Engine(), ShardBudget()
    with ShardWatch(layout, "s0", engine, budget, drain_s=0):
        assert engine.is_given_back.wait(TIMEOUT_S)


def test_a_limit_leaves_what_is_in_flight_to_be_answered(layout: RunLayout) -> None:
    engine, budget = Engine(), ShardBudget()
    with ShardWatch(layout, "s0", engine, budget, drain_s=0):
        request_stop(layout, StopReason("max_cost", "all is spent"))
        wait_until(lambda: budget.stop is not None)
        assert not engine.is_given_back.wait(0.2)


@pytest.mark.parametrize("engine", [Engine(), RemoteEngine()])
def test_after_a_deadline_what_is_in_flight_is_given_back(layout: RunLayout, engine: Engine) -> None:
    budget = ShardBudget(SpendingLimits(deadline_at=time.time() + 0.1))
    with ShardWatch(layout, "s0", engine, budget, drain_s=0.1):
        assert engine.is_given_back.wait(TIMEOUT_S)
        assert budget.stop is not None and budget.stop.kind == "deadline"


def test_an_outage_is_told_while_it_lasts(layout: RunLayout) -> None:
    engine = Engine()
    engine.outage = Outage("deepseek", SINCE, datetime.now(UTC) + timedelta(seconds=8), "connection refused")
    with ShardWatch(layout, "s0", engine, ShardBudget(), drain_s=5):
        wait_until(lambda: read_outage(layout) is not None)
        note = read_outage(layout)
        assert note is not None
        assert (note.provider, note.since, note.message) == ("deepseek", SINCE, "connection refused")
        engine.outage = None
        wait_until(lambda: read_outage(layout) is None)
        engine.outage = Outage("deepseek", SINCE, SINCE, "again")
        wait_until(lambda: read_outage(layout) is not None)
    assert read_outage(layout) is None, "a shard that ends waits for nobody"


def test_an_engine_that_cannot_say_what_it_waits_for_does_not_end_the_watch(
    layout: RunLayout, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(Engine):
        def find_outage(self) -> Outage | None:
            raise RuntimeError("broken")

    engine, budget = Broken(), ShardBudget()
    with ShardWatch(layout, "s0", engine, budget, drain_s=0):
        wait_until(lambda: "the watch over a shard failed" in caplog.text)
        announce_stop(layout, BY_SIGNAL)
        assert engine.is_given_back.wait(TIMEOUT_S)
