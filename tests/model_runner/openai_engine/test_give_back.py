"""Requests are given back at once, whatever they wait for; what a provider may bill is named."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from moebeam.model_runner.admission import Unlimited
from moebeam.model_runner.openai_engine.runner import OpenAIRunner
from moebeam.model_runner.protocol import StoppableRunner
from moebeam.schemas.errors import RequestGivenUp
from moebeam.schemas.records import Completion, Request
from tests.support.engines.remote_engines import ask_rows, brief, keep_limits_apart, load_engine
from tests.support.servers.fake_endpoint import Call, FakeEndpoint, Reply, deepseek, error
from tests.support.servers.local_servers import free_port

LATE = Reply(deepseek("late"), delay_s=600)


@pytest.fixture(autouse=True)
def _folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    keep_limits_apart(monkeypatch, tmp_path)


class Settled(Unlimited):
    """Admits all, and notes what was settled."""

    def __init__(self) -> None:
        self.completions: list[Completion] = []

    def settle(self, completion: Completion) -> None:
        self.completions.append(completion)


def given_back(
    asking: OpenAIRunner, is_ready: Callable[[], bool], rows: Iterator[Request] | list[Request]
) -> tuple[list[Completion], Settled]:
    """What comes out of a run that is given back once it is ready."""
    found, settled = list[Completion](), Settled()
    run = threading.Thread(target=lambda: found.extend(asking.generate_admitted(rows, settled)))  # pyright: ignore[reportArgumentType]
    run.start()
    while not is_ready():
        threading.Event().wait(0.002)
    assert isinstance(asking, StoppableRunner)
    asking.give_back()
    run.join(10)
    assert not run.is_alive()
    return found, settled


def test_what_is_in_flight_comes_out_as_given_up_with_the_call_that_may_be_billed() -> None:
    def reply(call: Call) -> Reply:
        return Reply(deepseek("early")) if call.number < 5 else LATE

    with FakeEndpoint(reply) as served:
        asking = load_engine(served.base_url, max_concurrency=4)
        found, settled = given_back(asking, lambda: served.num_in_flight == 4 and len(served.calls) == 9, ask_rows(50))
        assert len(served.calls) == 9
    answered = [one for one in found if one.error is None]
    given_up = [one for one in found if isinstance(one.error, RequestGivenUp)]
    assert (len(answered), len(given_up), len(found)) == (5, 4, 9)
    assert [call.error_type for one in given_up for call in one.lost_calls] == ["given_up"] * 4
    assert {id(one) for one in settled.completions} == {id(one) for one in found}


def test_a_slow_first_byte_of_a_stream_holds_nothing_up() -> None:
    def reply(call: Call) -> Reply:
        return Reply(events=["data: {}"], delay_s=600)

    with FakeEndpoint(reply) as served:
        asking = load_engine(served.base_url, mode="stream")
        found, _ = given_back(asking, lambda: served.num_in_flight > 0, ask_rows(1))
    assert [type(one.error) for one in found] == [RequestGivenUp]


def test_who_waits_for_a_provider_that_is_out_leaves_without_a_completion() -> None:
    asking = load_engine(f"http://127.0.0.1:{free_port()}/v1", brief(600, first_wait_s=600.0), max_concurrency=1)
    found, settled = given_back(asking, lambda: asking.find_outage() is not None, ask_rows(50))
    assert found == settled.completions == []


@pytest.mark.parametrize("num_answered", [0, 1], ids=["all are refused", "one gets through"])
def test_who_waits_out_a_refusal_with_a_long_retry_after_leaves_without_a_completion(num_answered: int) -> None:
    def reply(call: Call) -> Reply:
        return Reply(deepseek("x")) if call.number < num_answered else error(429, retry_after="500")

    with FakeEndpoint(reply) as served:
        asking = load_engine(served.base_url, brief(600, overload_s=300.0), max_concurrency=3)
        found, _ = given_back(asking, lambda: asking.counters().get("num_engine_overloaded", 0) >= 3, ask_rows(9))
        assert len(served.calls) == 3 + num_answered
    assert [one.error for one in found] == [None] * num_answered


def test_a_lost_call_before_the_wait_is_named_though_nothing_is_in_flight() -> None:
    with FakeEndpoint(lambda call: Reply(b"<html>")) as served:
        asking = load_engine(served.base_url, brief(600, first_wait_s=600.0), max_concurrency=1)
        found, _ = given_back(asking, lambda: asking.find_outage() is not None, ask_rows(1))
    assert [call.error_type for one in found for call in one.lost_calls] == ["malformed_response"] * 3
    assert [type(one.error) for one in found] == [RequestGivenUp]


def test_refused_rows_whose_verdict_is_out_leave_without_a_completion() -> None:
    def reply(call: Call) -> Reply:
        return error(400, "no") if call.number < 3 else LATE

    with FakeEndpoint(reply) as served:
        asking = load_engine(served.base_url, max_concurrency=1)
        found, _ = given_back(asking, lambda: len(served.calls) == 4 and served.num_in_flight == 1, ask_rows(9))
    assert [(one.request_id, type(one.error)) for one in found] == [("3", RequestGivenUp)]


def test_nothing_is_asked_once_all_was_given_back() -> None:
    with FakeEndpoint(lambda call: LATE) as served:
        asking = load_engine(served.base_url)
        asking.give_back()
        assert list(asking.generate(ask_rows(5))) == []
        assert served.calls == []


def test_calls_of_several_threads_end_together() -> None:
    with FakeEndpoint(lambda call: LATE) as served:
        asking = load_engine(served.base_url, max_concurrency=8)
        ended: list[list[Completion]] = []
        others = [threading.Thread(target=lambda: ended.append(list(asking.generate(ask_rows(2))))) for _ in range(3)]
        for other in others:
            other.start()
        given_back(asking, lambda: served.num_in_flight == 8, ask_rows(2))
        for other in others:
            other.join(10)
    assert [len(found) for found in ended] == [2, 2, 2]
