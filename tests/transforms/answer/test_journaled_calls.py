"""Calls that a journal tells of before they leave, and those that nothing ended."""

from collections import Counter

from moebeam.model_runner.admission import AdmittingRunner, Unlimited
from moebeam.model_runner.openai_engine.endpoint import RetryPolicy
from moebeam.model_runner.openai_engine.runner import load_openai_runner
from moebeam.schemas.records import LostCall, Request
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.transforms.answer.journal import JournaledRunner, ShardJournal, keeping_runner, request_key
from moebeam.transforms.durable.journal_file import JournalWriter, read_journal
from tests.support.engines.engine_configs import engine_config
from tests.support.engines.journaled_answers import NOW, Engine, answer, answers_of, request
from tests.support.servers.fake_endpoint import Call, FakeEndpoint, Reply, deepseek, error

CALL = LostCall("deepseek", "flash", "given_up", NOW, 10, 5, "batch")


def lost_rows(layout: RunLayout) -> list[str]:
    """The requests that have a call which may be billed, once for each."""
    entries = read_journal(layout, "s0").entries
    return [entry.completion.request_id for entry in entries for _ in entry.completion.lost_calls]


def test_a_call_that_nothing_ended_may_be_billed_and_is_asked_again(any_layout: RunLayout) -> None:
    journal = ShardJournal.open(any_layout, "s0", generation=7)
    for name in (0, 1, 1, 2, 3, 3):
        journal.replay(request(name))
        future = journal.announce(request(name), CALL)
        if future is not None:
            future.result(60)
    other = JournalWriter(any_layout, "s0", 8)
    other.append(request_key(request(0)), 1, answer(request(0)))
    other.close()
    journal.keep(answer(request(1)))
    journal.dismiss(request(2))
    journal.dismiss(request(3))
    journal.writer.close()
    # That of another writer ends nothing; an answer ends all of its own request's, a dismissal the last one.
    assert lost_rows(any_layout) == ["0", "3"]
    entry = next(each for each in read_journal(any_layout, "s0").entries if each.completion.lost_calls)
    assert entry.reference.startswith("000007.") and entry.completion.lost_calls == (CALL,)
    engine = Engine()
    answers_of(any_layout, engine, request(0), request(1), request(2), request(3))
    assert engine.asked == ["2", "3"]


def test_each_call_is_journaled_before_it_leaves(any_layout: RunLayout) -> None:
    """What a kill at any moment of a call leaves behind names that call; nothing is left once all are answered."""
    untold: list[str] = []

    def reply(call: Call) -> Reply:
        row = call.body["messages"][0]["content"]
        if row not in {f"row {name}" for name in lost_rows(any_layout)}:
            untold.append(row)
        num_tries[row] += 1
        return error(429, "slow down") if row == "row 3" and num_tries[row] == 1 else Reply(deepseek())

    num_tries: Counter[str] = Counter()
    with FakeEndpoint(reply) as served, ShardJournal.open(any_layout, "s0") as journal:
        config = engine_config("openai", "", "m", "r", base_url=served.base_url, max_concurrency=4)
        engine = load_openai_runner(config, RetryPolicy(0.01, 0.01, 0.01))
        runner = JournaledRunner(keeping_runner(engine, journal), journal)
        assert len([*runner.generate(request(name, f"row {name}") for name in range(12))]) == 12
    assert not untold and num_tries["row 3"] == 2
    assert lost_rows(any_layout) == [] and len(read_journal(any_layout, "s0").entries) == 12


def test_a_call_that_may_not_leave_is_not_told(layout: RunLayout) -> None:
    class Lost(Unlimited):
        async def depart(self, request: Request, call: LostCall) -> bool:
            return request.request_id != "1"

    with FakeEndpoint(lambda call: Reply(deepseek())) as served, ShardJournal.open(layout, "s0") as journal:
        asking = load_openai_runner(engine_config("openai", "", "m", "r", base_url=served.base_url, max_concurrency=1))
        engine = keeping_runner(asking, journal)
        assert isinstance(engine, AdmittingRunner)
        for each in map(request, range(3)):
            journal.replay(each)
        found = [*engine.generate_admitted(map(request, range(3)), Lost())]
        assert [each.request_id for each in found] == ["0"] and len(served.calls) == 1
    assert lost_rows(layout) == []
