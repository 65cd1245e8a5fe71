"""Batches, lines and looks at them that fail: what goes out again, what stops the run, and what is a reject."""

import re
import threading
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest

from moebeam.schemas.errors import EngineUnavailable
from moebeam.schemas.records import Completion
from tests.support.engines.batch_calls import (
    KEY,
    Make,
    asked_once,
    by_text,
    echo,
    ended,
    ids,
    once,
    refused,
    requests,
    text_of,
)
from tests.support.servers.batch_endpoint import BatchEndpoint, Fault


@pytest.mark.parametrize("num_half", [1, 2])
def test_a_download_that_breaks_off_is_begun_again(make: Make, num_half: int) -> None:
    faults: list[Fault] = ["half_body"] * num_half

    def fault(method: str, path: str) -> Fault:
        return faults.pop() if path.endswith("/content") and faults else "none"

    with BatchEndpoint(echo, fault=fault) as endpoint:
        (found,) = make(endpoint).generate(requests(1))
        assert found.text == "echo text 0"


def test_looks_may_fail_for_a_while(make: Make) -> None:
    down = [True] * 3

    def fault(method: str, path: str) -> Fault:
        return "refused" if re.fullmatch("/v1/batches/.+", path) and down and down.pop() else "none"

    with BatchEndpoint(echo, fault=fault) as endpoint:
        assert ids(list(make(endpoint).generate(requests(2)))) == once(requests(2))
        assert not down


def test_a_provider_that_stays_silent_stops_the_run_which_goes_on_later_without_paying_twice(make: Make) -> None:
    with BatchEndpoint(echo) as endpoint:
        endpoint.fault = lambda method, path: "refused" if re.fullmatch("/v1/batches/.+", path) else "none"
        with pytest.raises(EngineUnavailable, match=r"cannot be looked at: alibaba: no answer since .*HTTP 500"):
            list(make(endpoint, max_outage_s=0.05).generate(requests(2)))
        endpoint.fault = lambda method, path: "none"
        assert ids(list(make(endpoint).generate(requests(2)))) == once(requests(2))
        assert asked_once(endpoint, requests(2))


@pytest.mark.parametrize("place", ["/v1/files", "/v1/batches"])
def test_a_key_that_is_not_taken_stops_the_run(make: Make, place: str) -> None:
    with BatchEndpoint(echo) as endpoint:
        real = endpoint.respond

        def closed(method: str, path: str, content: bytes, kind: str) -> tuple[int, Any]:
            is_there = method == "POST" and path == place
            return (401, {"error": {"message": f"bad key {KEY}"}}) if is_there else real(method, path, content, kind)

        endpoint.respond = closed  # type: ignore[method-assign]
        with pytest.raises(EngineUnavailable, match=r"HTTP 401: bad key \[key\]") as found:
            list(make(endpoint).generate(requests(2)))
        assert KEY not in str(found.value)


def test_a_cancelled_batch_stops_the_run_after_its_answers_and_resuming_submits_the_rest(make: Make) -> None:
    cut = {f"text {n}": ended("batch_cancelled") for n in range(4, 10)}
    with BatchEndpoint(by_text(cut), endings=["cancelled"]) as endpoint:
        stream, found = make(endpoint).generate(requests(10)), list[Completion]()
        with pytest.raises(EngineUnavailable, match="was cancelled; resume the run to submit the 6 requests"):
            found.extend(stream)
        assert ids(found) == once(requests(4))
        endpoint.answer = echo
        rest = list(make(endpoint).generate(requests(6, first=4)))
        assert ids([*found, *rest]) == once(requests(10))
        assert len(endpoint.asked) == 16, "the six that were cancelled are asked again, and nothing else"


def test_what_no_batch_ran_before_it_expired_fails_as_a_timeout(make: Make) -> None:
    late = {f"text {n}": ended("batch_expired") for n in range(4, 10)}
    with BatchEndpoint(by_text(late), endings=["expired"]) as endpoint:
        found = list(make(endpoint).generate(requests(10)))
    assert ids(found) == once(requests(10))
    errors = [one.error for one in found if one.error is not None]
    assert len(errors) == 6 and all(error.error_type == "engine_timeout" and error.retryable for error in errors)


FAILURES: dict[str, Mapping[str, Any] | None] = {
    "HTTP 500": refused(500),
    "HTTP 503": refused(503),
    "HTTP 429": refused(429),
    "HTTP 408": refused(408),
    "status 0": {"response": {"status_code": 0, "request_id": "", "body": {}}, "error": None},
    "no reason": {"response": None, "error": None},
    "server_error": ended("server_error"),
    "expired": ended("batch_expired"),
    "no line": None,
    "half an answer": {"response": {"status_code": 200, "body": {"choices": []}}, "error": None},
}


@pytest.mark.parametrize("failure", FAILURES.values(), ids=FAILURES)
@pytest.mark.parametrize("num_failed", [1, 3], ids=["one line", "all lines"])
def test_a_line_on_which_the_provider_failed_goes_out_again(
    make: Make, failure: Mapping[str, Any] | None, num_failed: int
) -> None:
    times_asked: Counter[str] = Counter()

    def answer(body: Mapping[str, Any]) -> Mapping[str, Any] | None:
        times_asked[text_of(body)] += 1
        is_failed = int(text_of(body).removeprefix("text ")) < num_failed and times_asked[text_of(body)] == 1
        return failure if is_failed else echo(body)

    with BatchEndpoint(answer) as endpoint:
        found = list(make(endpoint, max_retries=1).generate(requests(3)))
        assert ids(found) == once(requests(3)) and all(one.error is None for one in found)
        assert len(endpoint.batches) == 2


def test_a_line_that_fails_alone_is_told_by_a_canary_whose_cost_is_named(make: Make) -> None:
    with BatchEndpoint(by_text({"text 1": refused(500)})) as endpoint:
        found = {one.request_id: one for one in make(endpoint, max_retries=3).generate(requests(3))}
        assert len(endpoint.batches) == 4
        canaries = [body for body in endpoint.asked if body["max_tokens"] == 1]
    error = found["row-1"].error
    assert error is not None and error.error_type == "engine_failed"
    assert len(canaries) == 3 and {text_of(body) for body in canaries} <= {"text 0", "text 2"}
    lost = [call for one in found.values() for call in one.lost_calls]
    assert [(call.error_type, call.price_mode, call.max_output_tokens) for call in lost] == [("canary", "batch", 1)] * 3


@pytest.mark.parametrize("num_before", [0, 2])
def test_a_provider_that_fails_on_all_lines_of_its_last_batch_rejects_none(make: Make, num_before: int) -> None:
    begun: list[int] = []

    def answer(body: Mapping[str, Any]) -> Mapping[str, Any] | None:
        begun.append(1)
        return echo(body) if len(begun) <= num_before else refused(500)

    found: list[Completion] = []
    with BatchEndpoint(answer) as endpoint:
        stream = make(endpoint, max_retries=2).generate(requests(5))
        with pytest.raises(EngineUnavailable, match=r"answered none of its \d requests \(alibaba: HTTP 500"):
            found.extend(stream)
        assert len(endpoint.batches) == 3
    assert len(found) == num_before and all(one.error is None for one in found)


def test_lines_that_are_all_refused_alike_stop_the_run_and_few_of_them_are_rejects(make: Make) -> None:
    with BatchEndpoint(lambda body: refused(400, message="no such model")) as endpoint:
        found: list[Completion] = []
        with pytest.raises(EngineUnavailable, match=r"refused all 30 requests of batch .*no such model"):
            found.extend(make(endpoint).generate(requests(30)))
        assert found == [] and len(endpoint.batches) == 1
        few = list(make(endpoint).generate(requests(5, first=50)))
    assert [one.error.error_type for one in few if one.error is not None] == ["request_refused"] * 5


def test_refused_lines_beside_answered_ones_are_rejects_however_many(make: Make) -> None:
    with BatchEndpoint(by_text({f"text {n}": refused(400) for n in range(40)})) as endpoint:
        found = list(make(endpoint).generate(requests(41)))
    assert sum(one.error is not None for one in found) == 40 and ids(found) == once(requests(41))


def test_an_outage_while_a_batch_is_waited_for_is_told_and_outlived(make: Make) -> None:
    is_down = threading.Event()
    is_down.set()
    with BatchEndpoint(echo) as endpoint:
        endpoint.fault = lambda method, path: (
            "refused" if re.fullmatch("/v1/batches/.+", path) and is_down.is_set() else "none"
        )
        asking, found = make(endpoint), list[Completion]()
        run = threading.Thread(target=lambda: found.extend(asking.generate(requests(3))))
        run.start()
        while (outage := asking.find_outage()) is None:
            time.sleep(0.001)
        assert outage.provider == "alibaba" and "HTTP 500" in outage.message
        is_down.clear()
        run.join(20)
        assert ids(found) == once(requests(3)) and asked_once(endpoint, requests(3))
        assert asking.find_outage() is None and asking.counters()["num_outages"] == 1


def test_a_batch_that_did_not_begin_says_why_and_is_forgotten(make: Make) -> None:
    failure = {"code": "invalid_json_line", "message": f"line 3, key {KEY}", "line": 3}
    with BatchEndpoint(echo, endings=["failed"], failure=failure) as endpoint:
        with pytest.raises(EngineUnavailable, match=r"did not begin batch .*invalid_json_line: line 3") as found:
            list(make(endpoint).generate(requests(3)))
        assert KEY not in str(found.value)
        second = make(endpoint)
        assert ids(list(second.generate(requests(3)))) == once(requests(3))
        assert "num_batches_taken_up" not in second.counters()


def test_too_much_in_the_queue_is_waited_for(make: Make) -> None:
    waited: list[float] = []
    failure = {"code": "token_limit_exceeded", "message": "later"}
    with BatchEndpoint(echo, endings=["failed", "failed"], failure=failure, num_looks=0) as endpoint:
        found = list(make(endpoint, sleep=waited.append).generate(requests(3)))
        assert ids(found) == once(requests(3)) and asked_once(endpoint, requests(3))
        assert [wait_s for wait_s in waited if wait_s in (0.001, 0.002)].count(0.002) >= 1
    with (
        BatchEndpoint(echo, endings=["failed"] * 9, failure=failure) as endpoint,
        pytest.raises(EngineUnavailable, match="token_limit_exceeded"),
    ):
        list(make(endpoint).generate(requests(3)))


def test_an_account_that_is_closed_stops_the_run_and_rejects_nothing(make: Make) -> None:
    closed = by_text({f"text {n}": refused(402) for n in range(2, 6)})
    with BatchEndpoint(closed) as endpoint:
        stream, found = make(endpoint).generate(requests(6)), list[Completion]()
        with pytest.raises(EngineUnavailable, match="no provider can answer: alibaba: HTTP 402"):
            found.extend(stream)
    assert ids(found) == once(requests(2))
