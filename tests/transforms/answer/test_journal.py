"""The journal: what was kept comes back as it was, once, and nothing else does."""

import errno
import json
import time
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moebeam.model_runner.openai_engine.runner import load_openai_runner
from moebeam.schemas.errors import ContentRefused, EngineOverloaded, RequestGivenUp
from moebeam.schemas.records import Completion, LostCall, Message, Request, Sampling, Usage
from moebeam.schemas.store import storage
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.transforms.answer.journal import JournaledRunner, ShardJournal, keeping_runner, request_key
from moebeam.transforms.durable import journal_file
from moebeam.transforms.durable.journal_file import JournalWriter, read_journal
from moebeam.transforms.durable.journal_lines import is_paid
from tests.support.engines.engine_configs import engine_config
from tests.support.engines.journaled_answers import (
    COMPLETIONS,
    NOW,
    Engine,
    answer,
    answers_of,
    journaled,
    request,
    same,
)
from tests.support.servers.fake_endpoint import Call, FakeEndpoint, Reply, deepseek


@given(st.lists(st.tuples(st.integers(1, 3), COMPLETIONS), max_size=6))
def test_every_field_of_a_completion_survives(
    tmp_path_factory: pytest.TempPathFactory, kept: list[tuple[int, Completion]]
) -> None:
    layout = RunLayout(str(tmp_path_factory.mktemp("journal")))
    writer = JournalWriter(layout, "s0")
    references = [writer.append(f"key {number}", attempt, each) for number, (attempt, each) in enumerate(kept)]
    writer.close()
    found = {entry.reference: entry for entry in read_journal(layout, "s0").entries}
    assert list(found) == [] if not kept else {*found} == {*references}
    for number, (reference, (attempt, completion)) in enumerate(zip(references, kept, strict=True)):
        assert (found[reference].key, found[reference].attempt) == (f"key {number}", attempt)
        assert same(found[reference].completion, completion)


def test_a_line_without_what_later_versions_keep_is_read(layout: RunLayout) -> None:
    """As written before usage had a status."""
    values = {
        "key": "k",
        "attempt": 1,
        "request_id": "0",
        "text": "kept",
        "finish_reason": "stop",
        "usage": {"prompt_tokens": 7, "completion_tokens": 2, "cached_tokens": None, "reasoning_tokens": 0},
        "started_at": NOW.isoformat(),
        "latency_ms": 1.5,
        "provider": "p",
        "model": "m",
        "model_revision": "r",
        "reasoning_content": None,
        "tool_calls": [],
        "logprobs": None,
        "price_mode": "online",
        "error": None,
    }
    content = json.dumps(values).encode()
    storage.write_whole(f"{layout.shard_journal('s0')}/w-000000.jsonl", b"%08x %s\n" % (zlib.crc32(content), content))
    (entry,) = read_journal(layout, "s0").entries
    assert (entry.completion.text, entry.completion.usage) == ("kept", Usage(7, 2))
    assert entry.completion.provider_finish_reason is None


def test_a_second_attempt_asks_only_for_what_was_not_kept(any_layout: RunLayout) -> None:
    engine = Engine()
    first = answers_of(any_layout, engine, request(0), request(1))
    again = answers_of(any_layout, engine, request(0), request(1), request(2))
    assert engine.asked == ["0", "1", "2"]
    assert sorted(again, key=lambda each: each.request_id)[:2] == first
    answers_of(any_layout, engine, request(0), request(1), request(2))
    assert len(engine.asked) == 3


def test_an_answer_is_on_disk_before_anybody_sees_it(layout: RunLayout) -> None:
    with ShardJournal.open(layout, "s0") as journal:
        for number, _ in enumerate(journaled(Engine(), journal).generate(map(request, range(3)))):
            assert len(read_journal(layout, "s0").entries) == number + 1


def test_no_request_is_sent_before_the_answer_whose_place_it_takes_is_kept(layout: RunLayout) -> None:
    num_unkept: list[int] = []

    def reply(call: Call) -> Reply:
        num_unkept.append(len(served.calls) - sum(each.is_answer for each in read_journal(layout, "s0").entries))
        return Reply(deepseek())

    with FakeEndpoint(reply) as served, ShardJournal.open(layout, "s0") as journal:
        config = engine_config("openai", "", "m", "r", base_url=served.base_url, max_concurrency=3)
        engine = load_openai_runner(config)
        for _ in JournaledRunner(keeping_runner(engine, journal), journal).generate(map(request, range(40))):
            # Who takes the answers may be slow.
            time.sleep(0.005)
    assert len(num_unkept) == 40
    assert max(num_unkept) == 3


def test_a_provider_is_asked_no_more_once_an_answer_cannot_be_kept(
    layout: RunLayout, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*unused: object) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(journal_file.AppendedFile, "write", full)
    with FakeEndpoint(lambda call: Reply(deepseek(), delay_s=0.05)) as served:
        engine = load_openai_runner(engine_config("openai", "", "m", "r", base_url=served.base_url, max_concurrency=3))
        with pytest.raises(OSError, match="no space left"), ShardJournal.open(layout, "s0") as journal:
            list(JournaledRunner(keeping_runner(engine, journal), journal).generate(map(request, range(40))))
        assert len(served.calls) < 40


OTHER_SAMPLING = {
    "max_tokens": 6,
    "temperature": 0.5,
    "top_p": 0.5,
    "stop": ("x",),
    "seed": 3,
    "min_p": 0.1,
    "logprobs": True,
    "frequency_penalty": 0.5,
    "presence_penalty": 0.5,
    "top_logprobs": 2,
}


def test_every_field_of_sampling_is_tried() -> None:
    assert OTHER_SAMPLING.keys() == {each.name for each in fields(Sampling)}


def test_a_change_of_what_is_sent_or_of_the_tenant_is_another_request() -> None:
    base = request(0)
    others = [
        request(1),
        request(0, "ho"),
        request(0, tenant="acme"),
        *(replace(base, sampling=replace(base.sampling, **{name: value})) for name, value in OTHER_SAMPLING.items()),
        replace(base, options=replace(base.options, thinking=True)),
        replace(base, messages=(Message("user", "hi", {"name": "n"}),)),
    ]
    keys = [request_key(each) for each in (base, *others)]
    assert len({*keys}) == len(keys)
    assert request_key(request(0, attempt=2)) == keys[0], "a request that is sent again as it was is the same"


def test_answers_of_one_tenant_are_never_given_to_another(layout: RunLayout) -> None:
    engine = Engine()
    answers_of(layout, engine, request(0, tenant="acme"))
    answers_of(layout, engine, request(0, tenant="zeta"))
    assert engine.asked == ["0", "0"]


def test_a_kept_answer_is_used_once_and_in_the_order_of_attempts(layout: RunLayout) -> None:
    writer = JournalWriter(layout, "s0")
    key = request_key(request(0))
    for attempt, text in ((2, "second"), (1, "first")):
        writer.append(key, attempt, answer(request(0), text))
    writer.close()
    engine = Engine()
    found = [answers_of_one.text for answers_of_one in answers_of(layout, engine, request(0))]
    assert found == ["first"]
    with ShardJournal.open(layout, "s0") as journal:
        runner = journaled(engine, journal)
        texts = [each.text for attempt in (1, 2, 3) for each in runner.generate([request(0, attempt=attempt)])]
        assert texts == ["first", "second", "answer 1"]
        assert journal.replayed == {("0", 1), ("0", 2)}
        assert {*journal.references} == {("0", 1), ("0", 2), ("0", 3)}
        assert journal.counters == {"num_replayed_answers": 2, "num_damaged_journal_lines": 0}


def test_a_failure_whose_tokens_nobody_counted_may_have_cost_something() -> None:
    failed = answer(request(0), error=ContentRefused("no"), num_tokens=0)
    assert not is_paid(failed)
    assert is_paid(replace(failed, usage=Usage(None, None)))


def test_failures_that_cost_nothing_are_asked_again_and_those_that_cost_are_not(layout: RunLayout) -> None:
    free, paid = EngineOverloaded("busy"), ContentRefused("no")
    engine = Engine(("0", free, 0), ("1", paid, 7))
    answers_of(layout, engine, request(0), request(1))
    found = answers_of(layout, engine, request(0), request(1))
    assert engine.asked == ["0", "1", "0"]
    assert {(each.request_id, str(each.error), each.usage.prompt_tokens) for each in found} == {
        ("0", "busy", 0),
        ("1", "no", 7),
    }
    # Where a failed row stops the run, it could never go on if the failure came out of the journal.
    answers_of(layout, engine, request(1), takes_failures=False)
    assert engine.asked == ["0", "1", "0", "1"]


def given_up(to: Request) -> Completion:
    lost = LostCall("deepseek", "flash", "given_up", NOW, 10, 5)
    return Completion.from_error(to.request_id, RequestGivenUp("stopped"), lost_calls=(lost,))


def test_a_request_that_was_given_up_is_asked_again_and_its_lost_calls_stay_in_the_journal(layout: RunLayout) -> None:
    class GivesUp(Engine):
        def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
            yield from map(given_up, requests)

    (told,) = answers_of(layout, GivesUp(), request(0))
    (entry,) = read_journal(layout, "s0").entries
    assert not entry.is_answer and entry.completion.lost_calls == told.lost_calls
    engine = Engine()
    (first,) = answers_of(layout, engine, request(0))
    assert (engine.asked, first.text, first.lost_calls) == (["0"], "answer 1", ()), "as if it had not been stopped"
    assert sorted(len(each.completion.lost_calls) for each in read_journal(layout, "s0").entries) == [0, 1]


def test_answers_that_cost_only_time_are_journaled_when_their_shard_stops(layout: RunLayout) -> None:
    engine = Engine()
    with ShardJournal.open(layout, "s0", is_prompt=False) as journal:
        first = list(journaled(engine, journal).generate([request(0), request(1)]))
        again = list(journaled(engine, journal).generate([request(1, "again", attempt=2)]))
        assert not read_journal(layout, "s0").entries
        answers = [*((1, each) for each in first), *((2, each) for each in again)]
        journal.keep_late(answers, [request(0), request(1)])
        journal.keep_late(answers, [request(0), request(1)])
    assert len(read_journal(layout, "s0").entries) == 3
    asked = [request(0), request(1), request(1, "again", attempt=2)]
    with ShardJournal.open(layout, "s0", is_prompt=False) as journal:
        found = [each for one in asked for each in journaled(engine, journal).generate([one])]
    assert found == [*first, *again] and len(engine.asked) == 3


def test_without_a_stop_no_answer_that_costs_only_time_is_journaled(layout: RunLayout) -> None:
    with ShardJournal.open(layout, "s0", is_prompt=False) as journal:
        assert len(list(journaled(Engine(), journal).generate([request(0)]))) == 1
        assert not journal.references
    assert not read_journal(layout, "s0").entries


def test_no_prompt_is_kept(any_layout: RunLayout) -> None:
    answers_of(any_layout, Engine(), request(0, "a secret question"))
    folder = any_layout.shard_journal("s0")
    contents = [storage.read_bytes(storage.join(folder, name)) for name in storage.list_names(folder)]
    assert contents and not any(b"secret" in content for content in contents)


def test_answers_reach_a_store_in_few_objects_that_keep_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal_file, "STORE_GROUP", 10)
    layout = RunLayout("memory://groups/out")
    answers_of(layout, Engine(), *map(request, range(95)))
    assert 1 <= len(storage.list_names(layout.shard_journal("s0"))) <= 96
    assert len(read_journal(layout, "s0").entries) == 95
    references = {entry.reference for entry in read_journal(layout, "s0").entries}
    with ShardJournal.open(layout, "s0") as journal:
        list(journaled(Engine(), journal).generate(map(request, range(95))))
        assert {*journal.references.values()} == references


def test_an_answer_that_cannot_be_kept_stops_the_shard(any_layout: RunLayout, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*unused: object) -> None:
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(journal_file.AppendedFile, "write", full)
    monkeypatch.setattr(storage, "write_whole", full)
    with pytest.raises(OSError, match="no space left"):
        answers_of(any_layout, Engine(), request(0))


def test_what_cannot_be_made_durable_stops_the_shard(layout: RunLayout, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*unused: object) -> None:
        raise OSError(errno.EIO, "disk is broken")

    monkeypatch.setattr(journal_file.AppendedFile, "sync", broken)
    with pytest.raises(OSError, match="disk is broken"):
        answers_of(layout, Engine(), request(0))
