"""Batches that an earlier process left at the provider: found, taken up, and never submitted twice."""

import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from moebeam.schemas.records import Completion, Message, Request
from tests.support.engines.batch_calls import (
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


class Killed(BaseException):
    """The process ends here, whatever is caught around it."""


def killing_sleep(num_before: int) -> Callable[[float], None]:
    left = [num_before]

    def sleep(seconds: float) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Killed

    return sleep


@pytest.mark.parametrize("status", ["while it runs", "after it ended"])
def test_after_a_crash_the_batch_is_taken_up_and_not_submitted_again(make: Make, status: str) -> None:
    wanted = requests(30)
    with BatchEndpoint(echo, num_looks=5) as endpoint:
        with pytest.raises(Killed):
            list(make(endpoint, sleep=killing_sleep(2)).generate(wanted))
        if status == "after it ended":
            endpoint.end_now()
        second = make(endpoint)
        found = list(second.generate(wanted))
        assert ids(found) == once(wanted) and all(one.error is None for one in found)
        assert len(endpoint.batches) == 1 and asked_once(endpoint, wanted)
        assert second.counters()["num_batches_taken_up"] == 1
        assert "num_batches_submitted" not in second.counters()


@pytest.mark.parametrize("num_kept", [1, 29, 250, 299])
def test_a_crash_while_answers_are_handed_out_costs_nothing(make: Make, num_kept: int) -> None:
    wanted = requests(300)
    with BatchEndpoint(echo) as endpoint:
        stream = make(endpoint).generate(wanted)
        kept = [next(stream) for _ in range(num_kept)]
        stream.close()
        journaled = {one.request_id for one in kept}
        rest = [request for request in wanted if request.request_id not in journaled]
        found = [*kept, *make(endpoint).generate(rest)]
        assert ids(found) == once(wanted) and asked_once(endpoint, wanted)


def test_what_a_found_batch_did_not_answer_is_submitted_and_only_that(make: Make) -> None:
    wanted = requests(40)
    late = {f"text {n}": ended("batch_expired") for n in range(25, 39)} | {"text 39": refused(500)}
    with BatchEndpoint(by_text(late), endings=["expired"]) as endpoint:
        with pytest.raises(Killed):
            list(make(endpoint, sleep=killing_sleep(1)).generate(wanted))
        endpoint.end_now()
        endpoint.answer = echo
        found = list(make(endpoint).generate(wanted))
        assert ids(found) == once(wanted) and all(one.error is None for one in found)
        times_asked = Counter(map(text_of, endpoint.asked))
        assert all(times_asked[f"text {n}"] == (1 if n < 25 else 2) for n in range(40))


def test_requests_spread_over_two_earlier_batches_are_all_taken_up(make: Make) -> None:
    with BatchEndpoint(echo) as endpoint:
        list(make(endpoint).generate(requests(5)))
        list(make(endpoint).generate(requests(5, first=5)))
        found = list(make(endpoint).generate(requests(12)))
        assert ids(found) == once(requests(12))
        assert asked_once(endpoint, requests(12)) and len(endpoint.batches) == 3


@pytest.mark.parametrize("other", [{"scope": "another run"}, {"attempt": 2}, {"tenant": "b"}, {"text": "other"}])
def test_only_the_same_request_of_the_same_run_is_taken_up(make: Make, other: dict[str, Any]) -> None:
    with BatchEndpoint(echo) as endpoint:
        list(make(endpoint, scope="run").generate(requests(3, tenant="a")))
        wanted = requests(3, tenant=other.get("tenant", "a"), attempt=other.get("attempt", 1))
        if "text" in other:
            wanted = [
                Request(one.request_id, one.prompt_token_ids, (Message("user", "other"),), one.sampling, tenant="a")
                for one in wanted
            ]
        list(make(endpoint, scope=other.get("scope", "run")).generate(wanted))
        assert len(endpoint.asked) == 6


def test_a_response_that_was_lost_does_not_make_a_second_batch(make: Make) -> None:
    faults: list[Fault] = ["lost"]

    def fault(method: str, path: str) -> Fault:
        return faults.pop() if (method, path) == ("POST", "/v1/batches") and faults else "none"

    with BatchEndpoint(echo, fault=fault) as endpoint:
        found = list(make(endpoint).generate(requests(8)))
        assert ids(found) == once(requests(8)) and len(endpoint.batches) == 1


def test_a_batch_that_was_not_made_is_made_again_from_the_same_file(make: Make) -> None:
    faults: list[Fault] = ["refused", "refused"]

    def fault(method: str, path: str) -> Fault:
        return faults.pop() if (method, path) == ("POST", "/v1/batches") and faults else "none"

    with BatchEndpoint(echo, fault=fault) as endpoint:
        found = list(make(endpoint).generate(requests(8)))
        assert ids(found) == once(requests(8)) and asked_once(endpoint, requests(8))
        assert endpoint.calls.count(("POST", "/v1/files")) == 1


@pytest.mark.parametrize("is_down", [False, True])
def test_a_batch_that_is_given_back_stays_at_the_provider_and_is_taken_up(make: Make, is_down: bool) -> None:
    wanted = requests(4)
    with BatchEndpoint(echo, num_looks=10**9) as endpoint:
        endpoint.fault = lambda method, path: "refused" if is_down and re.fullmatch("/v1/batches/.+", path) else "none"
        asking, found = make(endpoint, sleep=None, max_outage_s=600.0), list[Completion]()
        run = threading.Thread(target=lambda: found.extend(asking.generate(wanted)))
        run.start()
        while asking.counters().get("num_looks", 0) < 2:
            time.sleep(0.001)
        asking.give_back()
        run.join(20)
        assert not run.is_alive() and found == []
        endpoint.end_now()
        endpoint.fault = lambda method, path: "none"
        assert ids(list(make(endpoint).generate(wanted))) == once(wanted)
        assert asked_once(endpoint, wanted)


def test_batches_are_found_on_every_page_of_the_list(make: Make) -> None:
    with BatchEndpoint(echo, page_size=2) as endpoint:
        for first in range(0, 14, 2):
            list(make(endpoint).generate(requests(2, first=first)))
        num_batches = len(endpoint.batches)
        list(make(endpoint).generate(requests(14)))
        assert len(endpoint.batches) == num_batches == 7
