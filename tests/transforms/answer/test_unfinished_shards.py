"""Shards that end before their last row: nothing that was answered is lost, and the next attempt asks the rest."""

import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from moebeam.jobs.check.preflight import check_job
from moebeam.jobs.run.launch import launch
from moebeam.jobs.run.main_job import make_main_job
from moebeam.model_runner.encoding.prompt_encoder import PromptEncoder
from moebeam.model_runner.fake_engine.runner import load_fake_runner
from moebeam.model_runner.protocol import EngineConfig, ModelRunner, load_runner
from moebeam.schemas.answers import ShardCommit
from moebeam.schemas.job.sections import FailuresSection
from moebeam.schemas.store import storage
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.transforms.answer.budget import ShardBudget, SpendingLimits
from moebeam.transforms.answer.expectation import Ceiling
from moebeam.transforms.answer.spending import RunSpending
from moebeam.transforms.answer.waste import find_used
from moebeam.transforms.durable.journal_file import read_journal
from moebeam.transforms.durable.lease import ShardLease
from moebeam.transforms.durable.stop import (
    BY_SIGNAL,
    LOST_LEASE,
    StopReason,
    announce_stop,
    forget_stop,
    read_stop,
    request_stop,
)
from moebeam.transforms.plan.plan_record import read_plan
from tests.support.disturbances.planned_shards import MAX_SHARD_ROWS, NUM_ROWS, Counted, Planned, Remote
from tests.support.engines.engine_configs import engine_config
from tests.support.jobs.jobs_for_tests import fake_job, priced, write_parquet


@pytest.fixture(scope="module")
def planned_once(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Planned:
    folder = tmp_path_factory.mktemp("planned")
    texts = [f"ticket {row % 7}, number {row}" for row in range(NUM_ROWS)]
    source = write_parquet(folder / "in.parquet", {"text": texts})
    job = fake_job(
        source,
        folder / "out",
        tiny_checkpoint,
        accounting=priced(folder),
        plan={"max_shard_rows": MAX_SHARD_ROWS},
        sampling={"max_tokens": 6},
    )
    launch(job)
    for name in ("results", "rejects", "ledger", "_moebeam/commits"):
        shutil.rmtree(folder / "out" / name)
    (folder / "out" / "manifest.json").unlink()
    main = make_main_job(check_job(job), read_plan(RunLayout(str(folder / "out"))))
    return Planned(main.answer, PromptEncoder.load(str(tiny_checkpoint), "auto"))


@pytest.fixture
def planned(planned_once: Planned, tmp_path: Path) -> Iterator[Planned]:
    output = str(tmp_path / "out")
    shutil.copytree(planned_once.layout.output, output)
    found = replace(planned_once, spec=replace(planned_once.spec, layout=RunLayout(output)))
    yield found
    forget_stop(found.layout)


def with_failures(planned: Planned, **values: Any) -> Planned:
    return replace(planned, spec=replace(planned.spec, failures=FailuresSection(**values)))


def fake(planned: Planned) -> Any:
    return load_fake_runner(planned.spec.engine)


def torch(planned: Planned) -> Any:
    return load_runner(
        EngineConfig(engine_config("torch", batch_size=4).options, planned.spec.engine.path, "tiny", "r")
    )


def transformers(planned: Planned) -> Any:
    options = engine_config("transformers", batch_size=2).options
    return load_runner(EngineConfig(options, planned.spec.engine.path, "tiny", "r"))


@pytest.mark.parametrize(("load", "is_journaled"), [(fake, True), (fake, False), (torch, False), (transformers, False)])
def test_a_limit_of_requests_is_kept_exactly_and_the_next_attempt_asks_the_rest(
    planned: Planned, load: Callable[[Planned], Any], is_journaled: bool
) -> None:
    planned = with_failures(planned, journal="always" if is_journaled else "never")
    shard, runner = planned.shards[0], load(planned)
    planned = replace(planned, spec=replace(planned.spec, engine=runner.config))
    engine = Counted(runner)
    undisturbed = undisturbed_texts(planned, runner)
    assert planned.answer(shard, engine, ShardBudget(SpendingLimits(max_requests=7), shard=shard)) is None
    assert len(engine.asked) == engine.num_answered == 7
    stop = read_stop(planned.layout)
    assert stop is not None and stop.kind == "max_requests"
    assert len(read_journal(planned.layout, shard).entries) == 7
    # Another limit counts what was asked before.
    start_again(planned)
    assert planned.answer(shard, engine, ShardBudget(SpendingLimits(max_requests=9), shard=shard)) is None
    assert engine.num_answered == 9
    start_again(planned)
    commit = expect(planned.answer(shard, engine))
    assert set(engine.asked.values()) == {1}
    assert planned.texts(commit) == undisturbed


def undisturbed_texts(planned: Planned, runner: ModelRunner) -> dict[str, str]:
    """The first shard's answers where nothing stops it, from a copy of the run."""
    output = f"{planned.layout.output}-undisturbed"
    shutil.copytree(planned.layout.output, output)
    copy = replace(planned, spec=replace(planned.spec, layout=RunLayout(output)))
    return copy.texts(expect(copy.answer(copy.shards[0], runner)))


def start_again(planned: Planned) -> None:
    """Take the stop away, as each launch does."""
    forget_stop(planned.layout)
    storage.remove_files([planned.layout.stop])


def expect(commit: ShardCommit | None) -> ShardCommit:
    assert commit is not None
    return commit


@pytest.mark.parametrize("load", [fake, torch, transformers])
def test_after_a_signal_what_is_answered_is_kept_and_only_the_rest_is_asked(
    planned: Planned, load: Callable[[Planned], Any]
) -> None:
    planned = with_failures(planned, drain_s=0)
    shard, runner = planned.shards[0], load(planned)
    planned = replace(planned, spec=replace(planned.spec, engine=runner.config))
    undisturbed = undisturbed_texts(planned, runner)

    def stop(num_answered: int) -> None:
        if num_answered == 5:
            announce_stop(planned.layout, BY_SIGNAL)
            is_given_back.wait(60)

    first = Counted(load(planned), on_answer=stop)
    is_given_back = given_back(first)
    assert planned.answer(shard, first) is None
    num_kept = len(read_journal(planned.layout, shard).entries)
    assert 5 <= num_kept == first.num_answered < MAX_SHARD_ROWS
    assert read_stop(planned.layout) == BY_SIGNAL
    start_again(planned)
    second = Counted(load(planned))
    commit = expect(planned.answer(shard, second))
    assert len(second.asked) == MAX_SHARD_ROWS - num_kept
    assert planned.texts(commit) == undisturbed
    assert commit.engine is not None and commit.engine["num_replayed_answers"] == num_kept
    assert len(find_used(planned.ledger(commit))) == num_kept
    assert planned.wasted(commit) is None


def given_back(engine: Counted) -> threading.Event:
    """Set once an engine was told to give back what it has."""
    event, real = threading.Event(), engine.runner.give_back

    class Told:
        generate = staticmethod(engine.runner.generate)

        @staticmethod
        def give_back() -> None:
            real()
            event.set()

    engine.runner = Told
    return event


def test_a_stop_on_the_store_ends_a_shard_as_well(planned: Planned) -> None:
    planned = with_failures(planned, drain_s=0)

    def stop(num_answered: int) -> None:
        if num_answered == 5:
            request_stop(planned.layout, BY_SIGNAL)
            is_given_back.wait(60)

    engine = Counted(fake(planned), on_answer=stop)
    is_given_back = given_back(engine)
    assert planned.answer(planned.shards[0], engine) is None
    assert engine.num_answered < MAX_SHARD_ROWS


def test_a_step_that_fails_keeps_what_it_answered(planned: Planned) -> None:
    class BrokeError(Exception):
        pass

    def break_at_five(num_answered: int) -> None:
        if num_answered == 5:
            raise BrokeError

    shard, engine = planned.shards[0], Counted(fake(planned), on_answer=break_at_five)
    with pytest.raises(BrokeError):
        planned.answer(shard, engine)
    assert len(read_journal(planned.layout, shard).entries) == 4
    engine.on_answer = lambda _: None
    expect(planned.answer(shard, engine))
    assert sum(engine.asked.values()) == MAX_SHARD_ROWS + 1, "the answer that broke the step is asked again"


@pytest.mark.parametrize(
    ("limits", "most"),
    [
        (SpendingLimits(max_output_tokens=30), 30 + 6),
        (SpendingLimits(max_input_tokens=300), 300 + 60),
        (SpendingLimits(max_cost=Decimal("0.00002")), Decimal("0.00002") + Decimal("0.000012")),
    ],
)
def test_tokens_and_money_pass_their_limit_by_no_more_than_one_answer(
    planned: Planned, limits: SpendingLimits, most: Decimal | int
) -> None:
    """With an engine that answers one by one, in one shard."""
    shard = planned.shards[0]
    ceiling = Ceiling.from_engine(planned.spec.accounting, planned.spec.engine)
    budget = ShardBudget(limits, shard=shard, ceiling=ceiling)
    assert planned.answer(shard, fake(planned), budget) is None
    taken = {"max_output_tokens": budget.own.output_tokens, "max_input_tokens": budget.own.input_tokens}
    found = taken | {"max_cost": budget.own.cost}
    (name,) = [name for name in found if getattr(limits, name) is not None]
    assert getattr(limits, name) <= found[name] <= most
    assert 0 < len(read_journal(planned.layout, shard).entries) < MAX_SHARD_ROWS


def test_a_shard_whose_journal_holds_all_is_finished_though_the_limit_is_reached(planned: Planned) -> None:
    planned = with_failures(planned, journal="always")
    shard, engine = planned.shards[0], Counted(fake(planned))
    assert planned.answer(shard, engine, ShardBudget(SpendingLimits(max_requests=MAX_SHARD_ROWS - 1))) is None
    start_again(planned)
    engine = Counted(fake(planned))
    assert planned.answer(shard, engine, ShardBudget(SpendingLimits(max_requests=MAX_SHARD_ROWS))) is not None
    assert len(engine.asked) == 1


@pytest.mark.parametrize("most", [1, 13, 33])
def test_two_shards_at_once_keep_one_limit_exactly(planned: Planned, most: int) -> None:
    spending = RunSpending(planned.layout, planned.spec.accounting)
    engines = [Counted(fake(planned)) for _ in planned.shards]

    def answer(shard: str, engine: Counted) -> ShardCommit | None:
        budget = ShardBudget(SpendingLimits(max_requests=most), spending, shard=shard)
        return planned.answer(shard, engine, budget)

    with ThreadPoolExecutor(len(engines)) as pool:
        commits = list(pool.map(answer, planned.shards, engines))
    assert None in commits
    assert sum(engine.num_answered for engine in engines) == most


@pytest.mark.parametrize("is_journaled", [True, False])
def test_requests_that_are_given_up_are_asked_again_and_their_lost_calls_are_waste(
    planned: Planned, is_journaled: bool
) -> None:
    planned = with_failures(planned, drain_s=0, journal="always" if is_journaled else "never")
    shard, remote = planned.shards[0], Remote(fake(planned), num_answers=3)
    threading.Timer(0.2, announce_stop, (planned.layout, BY_SIGNAL)).start()
    assert planned.answer(shard, remote) is None
    start_again(planned)
    entries = read_journal(planned.layout, shard).entries
    assert remote.num_sent == MAX_SHARD_ROWS
    assert [entry.is_answer for entry in entries].count(True) == 3
    assert [entry.is_answer for entry in entries].count(False) == MAX_SHARD_ROWS - 3

    engine = Counted(fake(planned))
    commit = expect(planned.answer(shard, engine))
    assert len(engine.asked) == MAX_SHARD_ROWS - 3
    assert (commit.totals.num_rejects, commit.totals.num_lost_calls) == (0, 0), "as if nothing had stopped it"
    wasted = planned.wasted(commit)
    assert wasted is not None and wasted.column("num_lost_calls").to_pylist() == [1] * (MAX_SHARD_ROWS - 3)


def test_a_holder_that_lost_its_lease_asks_nothing_more_and_leaves_what_it_has_to_its_successor(
    planned: Planned,
) -> None:
    """As a process does that wakes up beside the one which took its shard over."""
    shard = planned.shards[0]
    with ShardLease(planned.layout, shard).hold() as held:
        assert held is not None

        def fall_asleep(num_answered: int) -> None:
            if num_answered == 4:
                storage.write_whole(planned.layout.lease(shard, 1), b"the successor's")
                assert not held.ask().result(60)
                while budget.stop is None:
                    budget.sleep(60)

        engine, budget = Counted(fake(planned), on_answer=fall_asleep), ShardBudget(shard=shard, lease=held)
        assert planned.answer(shard, engine, budget) is None
        assert budget.stop is not None and budget.stop.kind == LOST_LEASE
    assert read_stop(planned.layout) is None, "the run goes on"
    kept = read_journal(planned.layout, shard).entries
    assert 4 <= len(kept) < MAX_SHARD_ROWS and all(entry.reference.startswith("000000.") for entry in kept)
    following = Counted(fake(planned))
    commit = expect(planned.answer(shard, following))
    assert len(following.asked) == MAX_SHARD_ROWS - len(kept)
    assert planned.wasted(commit) is None


def test_no_request_starts_after_the_deadline(planned: Planned) -> None:
    shard, engine = planned.shards[0], Counted(fake(planned))
    assert planned.answer(shard, engine, ShardBudget(SpendingLimits(deadline_at=1.0), shard=shard)) is None
    assert not engine.asked
    stop = read_stop(planned.layout)
    assert stop is not None and stop.kind == "deadline"


def test_the_reason_of_another_worker_stops_this_one(planned: Planned) -> None:
    reason = StopReason("max_cost", "another worker has spent it all")

    def stop(num_answered: int) -> None:
        if num_answered == 2:
            request_stop(planned.layout, reason)
            while budget.stop is None:
                budget.sleep(60)

    shard, budget = planned.shards[0], ShardBudget()
    assert planned.answer(shard, Counted(fake(planned), on_answer=stop), budget) is None
    assert budget.stop == reason
