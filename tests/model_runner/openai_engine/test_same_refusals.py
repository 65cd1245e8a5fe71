"""The same refusal for everybody stops the run; refusals of single rows become their rejects."""

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from moebeam.model_runner.admission import Unlimited, Verdict
from moebeam.model_runner.openai_engine.options import FallbackSection
from moebeam.schemas.errors import EngineUnavailable, RequestRefused
from moebeam.schemas.records import Completion, Request
from tests.support.engines.remote_engines import ask_rows, keep_limits_apart, load_engine
from tests.support.servers.fake_endpoint import Call, FakeEndpoint, Reply, deepseek, error

Answering = Callable[[Call], Reply]


@pytest.fixture(autouse=True)
def _folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    keep_limits_apart(monkeypatch, tmp_path)


def row_of(call: Call) -> int:
    return int(call.last_user_text.removeprefix("question "))


def refusing(*rows: int, message: str = "text {row} is too long (request id a{row}b)") -> Answering:
    def reply(call: Call) -> Reply:
        row = row_of(call)
        return error(400, message.format(row=row)) if row in rows else Reply(deepseek("fine"))

    return reply


def refused_rows(found: list[Completion]) -> set[int]:
    assert all(one.error is None or isinstance(one.error, RequestRefused) for one in found)
    return {int(one.request_id) for one in found if one.error is not None}


@pytest.mark.parametrize("num_in_flight", [1, 8])
def test_a_model_that_nobody_knows_stops_the_run_after_a_few_calls_and_rejects_nothing(num_in_flight: int) -> None:
    def reply(call: Call) -> Reply:
        return error(400, f"the model `m` does not exist (request id {call.number}f)")

    found: list[Completion] = []
    with FakeEndpoint(reply) as served:
        asking = load_engine(served.base_url, max_same_refusals=20, max_concurrency=num_in_flight)
        with pytest.raises(EngineUnavailable, match=r"refused the first 20 requests alike: .*`m` does not exist"):
            found.extend(asking.generate(ask_rows(600)))
        assert len(served.calls) <= 20 + num_in_flight
    assert found == []


def test_a_model_that_vanishes_in_mid_run_stops_it_too_and_rejects_nothing() -> None:
    def reply(call: Call) -> Reply:
        return error(400, "no such model") if call.number >= 30 else Reply(deepseek("fine"), delay_s=0.005)

    found: list[Completion] = []
    with FakeEndpoint(reply) as served:
        asking = load_engine(served.base_url, max_same_refusals=10, max_concurrency=4)
        with pytest.raises(
            EngineUnavailable, match="refused 10 requests in a row alike: vllm: HTTP 400: no such model"
        ):
            found.extend(asking.generate(ask_rows(600)))
        assert len(served.calls) <= 30 + 10 + 4 + 1
    assert len(found) == 30 and refused_rows(found) == set()


@pytest.mark.parametrize("num_in_flight", [1, 4])
@pytest.mark.parametrize("first", [0, 100, 180])
def test_bad_rows_one_after_the_other_among_good_ones_become_rejects(first: int, num_in_flight: int) -> None:
    bad = range(first, first + 19)
    with FakeEndpoint(refusing(*bad)) as served:
        asking = load_engine(served.base_url, max_same_refusals=20, max_concurrency=num_in_flight)
        found = list(asking.generate(ask_rows(199)))
        assert len(served.calls) == 199
    assert refused_rows(found) == {*bad} and len(found) == 199


def test_more_bad_rows_than_the_limit_become_rejects_where_others_are_still_served() -> None:
    bad = range(50, 90)
    with FakeEndpoint(refusing(*bad)) as served:
        found = list(load_engine(served.base_url, max_same_refusals=10, max_concurrency=1).generate(ask_rows(100)))
        canaries = [call for call in served.calls if call.body["max_tokens"] == 1]
    assert refused_rows(found) == {*bad} and len(found) == 100
    assert len(canaries) == 4
    assert [call.error_type for one in found for call in one.lost_calls] == ["canary"] * 4


def test_refusals_for_different_reasons_stop_nothing() -> None:
    def reply(call: Call) -> Reply:
        return error(400, ("too long", "too short")[row_of(call) % 2])

    with FakeEndpoint(reply) as served:
        found = list(load_engine(served.base_url, max_same_refusals=3, max_concurrency=1).generate(ask_rows(30)))
    assert refused_rows(found) == {*range(30)}


def test_rows_below_the_limit_are_rejected_at_the_end_of_the_input_and_counted_on() -> None:
    with FakeEndpoint(refusing(*range(100), message="no such model")) as served:
        asking = load_engine(served.base_url, max_same_refusals=20)
        for first in (0, 8):
            found = list(asking.generate(ask_rows(8, first=first)))
            assert refused_rows(found) == {*range(first, first + 8)}
        with pytest.raises(EngineUnavailable, match="no such model"):
            list(asking.generate(ask_rows(8, first=16)))


def test_a_row_that_is_asked_again_is_one_row() -> None:
    with FakeEndpoint(refusing(0)) as served:
        asking = load_engine(served.base_url, max_same_refusals=2)
        for _ in range(5):
            assert refused_rows(list(asking.generate(ask_rows(1)))) == {0}


def test_rows_that_one_provider_refuses_alike_go_to_the_next() -> None:
    with (
        FakeEndpoint(refusing(*range(100), message="no such model")) as first,
        FakeEndpoint(lambda call: Reply(deepseek("fine"))) as second,
    ):
        fallback = FallbackSection(provider="sglang", base_url=second.base_url)
        asking = load_engine(first.base_url, max_same_refusals=10, max_concurrency=4, fallbacks=(fallback,))
        found = list(asking.generate(ask_rows(60)))
    assert Counter(one.provider for one in found) == {"sglang": 60} and refused_rows(found) == set()


def test_followers_of_a_shared_prefix_leave_though_the_verdict_on_their_leader_is_out() -> None:
    def rows() -> Iterator[Request]:
        for row in ask_rows(40):
            yield Request(row.request_id, ask_rows(1)[0].prompt_token_ids.repeat(300), row.messages, row.sampling)

    with FakeEndpoint(refusing(*range(40), message="no such model")) as served:
        with pytest.raises(EngineUnavailable, match="no such model"):
            list(load_engine(served.base_url, max_same_refusals=20, max_concurrency=4).generate(rows()))
        assert 20 <= len(served.calls) <= 24


def test_a_budget_that_waits_for_the_verdict_is_not_waited_for() -> None:
    class Narrow(Unlimited):
        """Lets two requests be on their way at a time."""

        def __init__(self) -> None:
            self.away: set[str] = set()
            self.lock = threading.Lock()

        def admit(self, request: Request) -> Verdict:
            with self.lock:
                if request.request_id not in self.away and len(self.away) == 2:
                    return "wait"
                self.away.add(request.request_id)
                return "send"

        def settle(self, completion: Completion) -> None:
            with self.lock:
                self.away.discard(completion.request_id)

    with FakeEndpoint(refusing(*range(9))) as served:
        asking = load_engine(served.base_url, max_same_refusals=20, max_concurrency=4)
        found = list(asking.generate_admitted(ask_rows(12), Narrow()))
    assert refused_rows(found) == {*range(9)} and len(found) == 12
