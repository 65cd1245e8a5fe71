"""A provider's failure is never a row's: outages are waited for, and rows that fail alone are told by evidence."""

import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from moebeam.model_runner.openai_engine.options import FallbackSection
from moebeam.model_runner.openai_engine.runner import OpenAIRunner
from moebeam.model_runner.protocol import OutageReporter
from moebeam.schemas.errors import (
    EngineFailed,
    EngineOverloaded,
    EngineTimeout,
    EngineUnavailable,
    MalformedResponse,
    RequestGivenUp,
)
from moebeam.schemas.records import Completion, Request
from tests.support.engines.remote_engines import ask_rows, brief, keep_limits_apart, load_engine
from tests.support.servers.fake_endpoint import Call, FakeEndpoint, Reply, deepseek, error
from tests.support.servers.local_servers import free_port

GOOD = Reply(deepseek("fine"))
Answering = Callable[[Call], Reply]


@pytest.fixture(autouse=True)
def _folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    keep_limits_apart(monkeypatch, tmp_path)


def row_of(call: Call) -> int:
    return int(call.last_user_text.removeprefix("question "))


def is_canary(call: Call) -> bool:
    return call.body["max_tokens"] == 1


def poisoned(row: int, trouble: Reply) -> Answering:
    """One row always meets trouble, the others never do."""
    return lambda call: trouble if row_of(call) == row else Reply(deepseek("fine"), delay_s=0.002)


def errors_of(found: list[Completion]) -> dict[str, type[Exception]]:
    return {one.request_id: type(one.error) for one in found if one.error is not None}


def rows_of(found: list[Completion]) -> Counter[str]:
    return Counter(one.request_id for one in found)


TROUBLES = {
    "500": error(500),
    "502": error(502),
    "503": error(503),
    "529": error(529),
    "429": error(429, retry_after="0"),
    "404": error(404),
    "401": error(401),
    "reset": Reply(fault="disconnect"),
    "half": Reply(deepseek("x" * 500), fault="half_body"),
    "no json": Reply(b"<html>bad gateway</html>"),
}


@pytest.mark.parametrize("trouble", TROUBLES.values(), ids=TROUBLES)
@pytest.mark.parametrize(("first", "num_in_flight"), [(20, 4), (59, 1)], ids=["in mid-run", "at the tail, alone"])
def test_no_row_is_lost_by_an_outage(trouble: Reply, first: int, num_in_flight: int) -> None:
    """From the call `first` on, the next 40 fail; no row is asked so seldom that it could be rejected by a count."""

    def reply(call: Call) -> Reply:
        return trouble if first <= call.number < first + 40 else GOOD

    with FakeEndpoint(reply) as served:
        asking = load_engine(
            served.base_url, brief(first_wait_s=0.002, max_wait_s=0.005), max_concurrency=num_in_flight
        )
        found = list(asking.generate(ask_rows(60)))
        assert len(served.calls) >= 100
    assert rows_of(found) == rows_of_asked(60) and errors_of(found) == {}
    assert asking.find_outage() is None


def rows_of_asked(num: int) -> Counter[str]:
    return Counter(map(str, range(num)))


def test_a_port_that_is_closed_for_a_while_is_waited_for_and_told_about() -> None:
    port = free_port()
    asking = load_engine(f"http://127.0.0.1:{port}/v1", max_concurrency=4)
    found: list[Completion] = []
    run = threading.Thread(target=lambda: found.extend(asking.generate(ask_rows(60))))
    run.start()
    assert isinstance(asking, OutageReporter)
    outage = wait_for_outage(asking)
    assert outage.provider == "vllm" and "no connection" in outage.message
    assert outage.since <= outage.next_try_at
    with FakeEndpoint(lambda call: GOOD, port=port):
        run.join(30)
    assert rows_of(found) == rows_of_asked(60) and errors_of(found) == {}
    counters = asking.counters()
    assert counters["num_outages"] == 1 and counters["outage_s"] > 0


def wait_for_outage(asking: OpenAIRunner) -> Any:
    while (outage := asking.find_outage()) is None:
        threading.Event().wait(0.001)
    return outage


@pytest.mark.parametrize("num_rows", [1, 60])
def test_an_outage_that_is_too_long_ends_the_run_and_books_nothing_on_rows(num_rows: int) -> None:
    asking = load_engine(f"http://127.0.0.1:{free_port()}/v1", brief(0.1))
    found: list[Completion] = []
    with pytest.raises(EngineUnavailable, match=r"vllm: no answer since \d\d:\d\d UTC for \d+ s \(vllm: no connection"):
        found.extend(asking.generate(ask_rows(num_rows)))
    assert found == []
    with pytest.raises(EngineUnavailable, match="no answer since"):
        list(asking.generate(ask_rows(1)))


def test_no_outage_is_waited_for_where_the_job_says_so() -> None:
    asking = load_engine(f"http://127.0.0.1:{free_port()}/v1", brief(0.0))
    with pytest.raises(EngineUnavailable, match="no connection"):
        list(asking.generate(ask_rows(5)))
    assert asking.counters()["num_calls"] <= 5


@pytest.mark.parametrize("trouble", [error(500), Reply(b"<html>"), error(429), Reply(fault="disconnect")])
def test_answers_before_an_outage_come_out_and_lost_calls_are_named(trouble: Reply) -> None:
    with FakeEndpoint(lambda call: GOOD if call.number < 5 else trouble) as served:
        asking, found = load_engine(served.base_url, brief(0.2), max_concurrency=2), list[Completion]()
        with pytest.raises(EngineUnavailable, match="no answer since"):
            found.extend(asking.generate(ask_rows(30)))
    answered = [one for one in found if one.error is None]
    given_up = [one for one in found if isinstance(one.error, RequestGivenUp)]
    assert len(answered) == 5 and len(answered) + len(given_up) == len(found)
    lost = [call for one in found for call in one.lost_calls]
    assert all(one.lost_calls for one in given_up)
    assert len(lost) == asking.counters().get("num_lost_calls", 0)
    assert bool(lost) == (trouble not in (error(500), error(429)))


@pytest.mark.parametrize(
    ("trouble", "kind"),
    [
        (error(500), EngineFailed),
        (error(404), EngineFailed),
        (Reply(fault="disconnect"), EngineFailed),
        (Reply(b"{"), MalformedResponse),
        (Reply(fault="silence"), EngineTimeout),
        (error(429), EngineOverloaded),
    ],
)
@pytest.mark.parametrize("row", [30, 59], ids=["in mid-run", "at the tail"])
def test_a_row_on_which_the_provider_fails_alone_becomes_a_reject(
    row: int, trouble: Reply, kind: type[Exception]
) -> None:
    with FakeEndpoint(poisoned(row, trouble)) as served:
        outages = brief(0.5 if kind is EngineOverloaded else 20.0)
        asking = load_engine(served.base_url, outages, max_concurrency=4, timeout_s=0.2)
        found = list(asking.generate(ask_rows(60)))
    assert rows_of(found) == rows_of_asked(60) and errors_of(found) == {str(row): kind}


def test_a_poison_row_costs_little_more_than_its_retries_among_others() -> None:
    with FakeEndpoint(poisoned(3, error(500))) as served:
        list(load_engine(served.base_url, max_retries=6, max_concurrency=8).generate(ask_rows(400)))
        assert 7 <= sum(row_of(call) == 3 for call in served.calls) <= 14
        assert not any(map(is_canary, served.calls))


def test_at_the_tail_a_canary_tells_a_poison_row_from_an_outage() -> None:
    with FakeEndpoint(poisoned(9, error(502))) as served:
        (bad,) = [one for one in load_engine(served.base_url).generate(ask_rows(10)) if one.error is not None]
        canaries = [call for call in served.calls if is_canary(call)]
    assert canaries and all(call.body["messages"][0]["content"] != "question 9" for call in canaries)
    kinds = Counter(call.error_type for call in bad.lost_calls)
    assert kinds == Counter(canary=len(canaries), engine_failed=len(bad.lost_calls) - len(canaries))
    assert {call.max_output_tokens for call in bad.lost_calls if call.error_type == "canary"} == {1}


def test_without_an_answer_before_there_is_no_canary_and_a_row_that_fails_alone_is_an_outage() -> None:
    with FakeEndpoint(lambda call: error(500)) as served:
        with pytest.raises(EngineUnavailable, match="HTTP 500"):
            list(load_engine(served.base_url, brief(0.2)).generate(ask_rows(1)))
        assert not any(map(is_canary, served.calls))


@pytest.mark.parametrize("num_in_flight", [1, 16])
def test_no_row_is_lost_to_a_provider_that_fails_on_every_second_call(num_in_flight: int) -> None:
    draw = random.Random(5)
    troubles = [error(500), error(503), Reply(fault="disconnect"), Reply(b'{"choices": [{"mess'), error(504)]

    def reply(call: Call) -> Reply:
        return draw.choice(troubles) if draw.random() < 0.5 else GOOD

    with FakeEndpoint(reply) as served:
        asking = load_engine(served.base_url, max_retries=2, max_concurrency=num_in_flight)
        found = list(asking.generate(ask_rows(120)))
    assert rows_of(found) == rows_of_asked(120) and errors_of(found) == {}


def test_a_storm_of_refusals_is_told_in_the_providers_words_and_outlived() -> None:
    is_over = threading.Event()

    def reply(call: Call) -> Reply:
        return GOOD if call.number < 10 or is_over.is_set() else error(429, "slow down", retry_after="0.01")

    with FakeEndpoint(reply) as served:
        asking, found = load_engine(served.base_url, max_concurrency=8), list[Completion]()
        run = threading.Thread(target=lambda: found.extend(asking.generate(ask_rows(60))))
        run.start()
        assert "HTTP 429: slow down" in wait_for_outage(asking).message
        is_over.set()
        run.join(30)
    assert rows_of(found) == rows_of_asked(60) and errors_of(found) == {}


@pytest.mark.parametrize("status", [401, 402, 403, 404])
def test_a_closed_door_behind_which_there_were_answers_may_open_again(status: int) -> None:
    def reply(call: Call) -> Reply:
        return error(status, "no balance") if 10 <= call.number < 50 else GOOD

    with FakeEndpoint(reply) as served:
        found = list(load_engine(served.base_url, max_concurrency=2).generate(ask_rows(40)))
    assert rows_of(found) == rows_of_asked(40) and errors_of(found) == {}


def test_while_the_first_provider_is_out_the_next_one_answers_and_the_first_is_asked_again() -> None:
    is_out = threading.Event()
    is_out.set()
    found: list[Completion] = []

    def rows() -> Iterator[Request]:
        yield from ask_rows(200)
        is_out.clear()
        for row in ask_rows(100_000, first=200):
            if any(one.provider == "vllm" for one in found):
                return
            yield row

    def reply(call: Call) -> Reply:
        return error(500) if is_out.is_set() else GOOD

    with FakeEndpoint(reply) as first, FakeEndpoint(lambda call: GOOD) as second:
        fallback = FallbackSection(provider="sglang", base_url=second.base_url)
        asking = load_engine(first.base_url, fallbacks=(fallback,))
        for one in asking.generate(rows()):
            found.append(one)
            assert asking.find_outage() is None, "somebody answers"
        num_first = len(first.calls)
    assert errors_of(found) == {} and {one.provider for one in found} == {"vllm", "sglang"}
    assert num_first < 100, "not every request tried the first one"


def test_the_run_waits_only_where_all_providers_are_out_and_ends_where_all_are_down() -> None:
    addresses = [f"http://127.0.0.1:{free_port()}/v1" for _ in range(2)]
    asking = load_engine(
        addresses[0], brief(0.3), fallbacks=(FallbackSection(provider="sglang", base_url=addresses[1]),)
    )
    caught: list[BaseException] = []

    def run() -> None:
        try:
            list(asking.generate(ask_rows(10)))
        except EngineUnavailable as failure:
            caught.append(failure)

    thread = threading.Thread(target=run)
    thread.start()
    assert wait_for_outage(asking).provider in ("vllm", "sglang")
    thread.join(30)
    assert "vllm: no answer" in str(caught[0]) and "sglang: no answer" in str(caught[0])
