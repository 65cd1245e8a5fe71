"""Batch mode of the `openai` engine: one outcome a request, and no request submitted twice, whatever breaks when."""

import gc
import json
import logging
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moebeam.model_runner.openai_engine.batch import lines as batch_lines
from moebeam.model_runner.openai_engine.batch import runner as batches
from moebeam.model_runner.openai_engine.batch.lines import BatchWindow, may_hold, request_line
from moebeam.model_runner.openai_engine.batch.runner import BatchRunner
from moebeam.model_runner.openai_engine.batch.service import BatchPolling, BatchService
from moebeam.model_runner.openai_engine.client import EndpointSpec
from moebeam.model_runner.openai_engine.options import FallbackSection
from moebeam.model_runner.openai_engine.profiles import find_profile
from moebeam.schemas.errors import EngineLoadError, EngineUnavailable
from moebeam.schemas.records import Completion, Message, Request, Sampling, ToolCall, Usage
from tests.support.batch_endpoint import BatchEndpoint, Fault
from tests.support.engine_configs import engine_config
from tests.support.fake_endpoint import deepseek, with_usage

KEY = "sk-test-0123456789"


@pytest.fixture(autouse=True)
def nothing_is_left_open(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("OPENAI_ORG_ID", "foreign")
    yield
    gc.collect()


def answered(text: str = "fine", **values: Any) -> Mapping[str, Any]:
    return {"response": {"status_code": 200, "request_id": "r", "body": deepseek(text, **values)}, "error": None}


def refused(status: int, code: str | None = None, message: str = "no") -> Mapping[str, Any]:
    body = {"error": {"message": message, "code": code, "type": "error", "param": None}}
    return {"response": {"status_code": status, "request_id": "r", "body": body}, "error": None}


def ended(code: str) -> Mapping[str, Any]:
    return {"response": None, "error": {"code": code, "message": "not run"}}


def text_of(body: Mapping[str, Any]) -> str:
    return body["messages"][-1]["content"]


def echo(body: Mapping[str, Any]) -> Mapping[str, Any]:
    return answered(f"echo {text_of(body)}")


def by_text(outcomes: Mapping[str, Mapping[str, Any] | None]) -> Callable[[Mapping[str, Any]], Any]:
    return lambda body: outcomes[text_of(body)] if text_of(body) in outcomes else echo(body)


def requests(num: int, *, first: int = 0, **values: Any) -> list[Request]:
    sampling = values.pop("sampling", Sampling(max_tokens=16))
    prompt = np.array([1, 2, 3], np.int32)
    return [
        Request(f"row-{n}", prompt, (Message("user", f"text {n}"),), sampling, **values)
        for n in range(first, first + num)
    ]


Make = Callable[..., BatchRunner]


@pytest.fixture
def make() -> Make:
    def runner(endpoint: BatchEndpoint, provider: str = "alibaba", **values: Any) -> BatchRunner:
        spec = EndpointSpec(
            profile=find_profile(provider),
            model="deepseek-v4-flash",
            base_url=endpoint.base_url,
            max_concurrency=1,
            timeout_s=20.0,
            is_stream=False,
            max_retries=values.pop("max_retries", 2),
        )
        config = engine_config(
            engine="openai", path="", name="deepseek-v4-flash", revision="", **values.pop("config", {})
        )
        polling = BatchPolling(first_poll_s=0.001, max_poll_s=0.002, max_failed_polls=3, queue_wait_s=0.001)
        max_outage_s = values.pop("max_outage_s", 20.0)
        service = BatchService(spec, KEY, polling, values.pop("sleep", time.sleep), max_outage_s)
        return BatchRunner(config, service, **values)

    return runner


def test_connections_are_closed_with_the_engine_even_in_a_cycle(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[bool] = []
    monkeypatch.setattr(openai.OpenAI, "close", lambda client: closed.append(True))
    with BatchEndpoint(echo) as endpoint:
        cycle: list[Any] = [make(endpoint)]
        cycle.append(cycle)
        gc.collect()
        assert closed == []
        del cycle
        gc.collect()
        assert closed == [True]


def ids(completions: Sequence[Completion]) -> Counter[str]:
    return Counter(completion.request_id for completion in completions)


def once(wanted: Sequence[Request]) -> Counter[str]:
    return Counter(request.request_id for request in wanted)


def asked_once(endpoint: BatchEndpoint, wanted: Sequence[Request]) -> bool:
    return Counter(map(text_of, endpoint.asked)) == Counter(request.messages[-1].content for request in wanted)


def test_every_request_gets_the_answer_to_its_own_line(make: Make) -> None:
    with BatchEndpoint(echo, num_looks=3) as endpoint:
        wanted = requests(50)
        found = list(make(endpoint).generate(iter(wanted)))
        assert ids(found) == once(wanted)
        assert all(one.text == f"echo text {one.request_id.removeprefix('row-')}" for one in found)
        (batch,) = endpoint.batches.values()
        assert asked_once(endpoint, wanted)
        lines = endpoint.lines(batch.fields["input_file_id"])
        assert {line["url"] for line in lines} == {"/v1/chat/completions"}
        assert not any("row-" in line["custom_id"] or len(line["custom_id"]) > 64 for line in lines)
        assert len(batch.fields["metadata"]) <= 16
        assert all(len(key) <= 64 and len(value) <= 512 for key, value in batch.fields["metadata"].items())


def test_answers_carry_usage_calls_and_the_times_of_their_batch(make: Make) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    reply = answered("", finish_reason="tool_calls", tool_calls=[call], reasoning_content="hm", reasoning=4)
    with BatchEndpoint(lambda body: reply) as endpoint:
        before = datetime.now(UTC)
        (found,) = make(endpoint).generate(requests(1))
        assert (found.provider, found.model, found.model_revision) == ("alibaba", "deepseek-v4-flash", "fp_deep")
        assert found.tool_calls == (ToolCall("c1", "f", "{}"),) and found.reasoning_content == "hm"
        usage = found.usage
        assert (usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens, usage.reasoning_tokens) == (
            100,
            64,
            10,
            4,
        )
        assert abs((found.started_at - before).total_seconds()) < 30 and found.latency_ms == 90_000.0


def test_no_key_or_account_of_others_goes_to_a_provider(make: Make) -> None:
    with BatchEndpoint(echo) as endpoint:
        list(make(endpoint).generate(requests(1)))
        assert {headers["authorization"] for headers in endpoint.headers} == {f"Bearer {KEY}"}
        assert not any("openai-organization" in headers for headers in endpoint.headers)
    with BatchEndpoint(echo) as endpoint:
        list(make(endpoint, "openai").generate(requests(1)))
        assert endpoint.headers[0]["openai-organization"] == "foreign"


def test_failed_lines_are_typed_by_status_and_code_and_leave_their_neighbours(make: Make) -> None:
    outcomes = {
        "text 0": refused(400, "data_inspection_failed"),
        "text 1": refused(422),
        "text 2": refused(429),
        "text 3": refused(500, message=f"broke with {KEY}"),
        "text 4": ended("batch_expired"),
        "text 5": None,
        "text 6": {"response": {"status_code": 200, "body": {"choices": []}}, "error": None},
        "text 7": {"response": None, "error": None},
    }
    with BatchEndpoint(by_text(outcomes)) as endpoint:
        found = {one.request_id: one for one in make(endpoint).generate(requests(10))}
        assert len(endpoint.batches) == 3, "what may pass went out twice more"
    kinds = {row: one.error.error_type for row, one in found.items() if one.error is not None}
    assert kinds == {
        "row-0": "refused",
        "row-1": "request_refused",
        "row-2": "engine_overloaded",
        "row-3": "engine_failed",
        "row-4": "engine_timeout",
        "row-5": "malformed_response",
        "row-6": "malformed_response",
        "row-7": "engine_failed",
    }
    assert found["row-8"].text == "echo text 8" and found["row-9"].text == "echo text 9"
    assert KEY not in str(found["row-3"].error)
    assert all(one.usage.prompt_tokens == 0 for one in found.values() if one.error is not None)


def test_a_request_that_the_provider_is_known_to_refuse_is_not_sent(make: Make) -> None:
    strange = Sampling(max_tokens=4, stop=tuple("abcde"))
    with BatchEndpoint(echo) as endpoint:
        wanted = [*requests(1), *requests(1, first=1, sampling=strange)]
        found = {one.request_id: one for one in make(endpoint, "openai").generate(wanted)}
        assert asked_once(endpoint, wanted[:1])
    error = found["row-1"].error
    assert error is not None and error.error_type == "request_refused"
    with BatchEndpoint(echo) as endpoint:
        (only,) = make(endpoint, "openai").generate(wanted[1:])
        assert only.error is not None and endpoint.calls == []


def test_nothing_is_sent_for_no_requests(make: Make) -> None:
    with BatchEndpoint(echo) as endpoint:
        assert list(make(endpoint).generate(())) == []
        assert endpoint.calls == []


def test_long_streams_go_out_in_several_batches_and_are_pulled_no_further_than_needed(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_lines, "MAX_LINES", 10)
    pulled: list[str] = []

    def source() -> Iterator[Request]:
        for request in requests(95):
            pulled.append(request.request_id)
            yield request

    with BatchEndpoint(echo) as endpoint:
        stream = make(endpoint).generate(source())
        first = next(stream)
        assert len(pulled) == 41, "four batches are away, and one more request was looked at"
        found = [first, *stream]
        assert ids(found) == once(requests(95)) and len(endpoint.batches) == 10
        assert asked_once(endpoint, requests(95))


def test_a_batch_is_no_longer_than_its_bytes_allow(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_lines, "MAX_BYTES", 600)
    with BatchEndpoint(echo) as endpoint:
        found = list(make(endpoint).generate(requests(9)))
        assert ids(found) == once(requests(9)) and len(endpoint.batches) > 1
        sizes = [len(endpoint.files[batch.fields["input_file_id"]]) for batch in endpoint.batches.values()]
        assert max(sizes) <= 600


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


def test_a_body_that_comes_as_text_is_read(make: Make) -> None:
    reply = {"response": {"status_code": 200, "body": json.dumps(deepseek("fine"))}, "error": None}
    with BatchEndpoint(lambda body: reply) as endpoint:
        (found,) = make(endpoint).generate(requests(1))
    assert (found.text, found.error) == ("fine", None)


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


def test_lines_that_cannot_be_read_and_lines_of_others_are_passed_over(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    with BatchEndpoint(echo) as endpoint:
        real = endpoint._finish

        def finish(batch: Any) -> None:
            real(batch)
            stranger = {"custom_id": "stranger", **echo({"messages": [{"content": "x"}]})}
            garbage = b"\n".join([b"{broken", b"", json.dumps(stranger).encode(), b""])
            endpoint.files[batch.fields["output_file_id"]] += garbage

        endpoint._finish = finish  # type: ignore[method-assign]
        with caplog.at_level(logging.WARNING):
            assert ids(list(make(endpoint).generate(requests(3)))) == once(requests(3))
    assert "line 4 of a batch's file is passed over" in caplog.text


def test_text_with_any_line_break_comes_through(make: Make) -> None:
    text = "one\u2028two\u0085three\x0bfour"
    with BatchEndpoint(lambda body: answered(text)) as endpoint:
        assert [one.text for one in make(endpoint).generate(requests(2))] == [text, text]


def test_a_provider_without_metadata_is_told_about(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    with BatchEndpoint(echo, keeps_metadata=False) as endpoint, caplog.at_level(logging.WARNING):
        assert ids(list(make(endpoint).generate(requests(2)))) == once(requests(2))
    assert "keeps no metadata" in caplog.text


def test_batches_are_found_on_every_page_of_the_list(make: Make) -> None:
    with BatchEndpoint(echo, page_size=2) as endpoint:
        for first in range(0, 14, 2):
            list(make(endpoint).generate(requests(2, first=first)))
        num_batches = len(endpoint.batches)
        list(make(endpoint).generate(requests(14)))
        assert len(endpoint.batches) == num_batches == 7


def test_answers_without_a_usage_are_answers_with_estimates(make: Make) -> None:
    def uncounted(body: Mapping[str, Any]) -> Mapping[str, Any]:
        response = echo(body)["response"]
        return {"response": {**response, "body": with_usage(response["body"], None)}, "error": None}

    with BatchEndpoint(uncounted) as endpoint:
        found = list(make(endpoint).generate(requests(2)))
    assert {(each.error, each.text) for each in found} == {(None, "echo text 0"), (None, "echo text 1")}
    assert {each.usage for each in found} == {Usage(None, None).with_estimates(3, 3)}


def test_providers_without_batches_and_fallbacks_are_refused(make: Make) -> None:
    with BatchEndpoint(echo) as endpoint:
        with pytest.raises(EngineLoadError, match=r"model\.mode: expected a provider with batches, found deepseek"):
            make(endpoint, "deepseek")
        with pytest.raises(EngineLoadError, match=r"model\.fallbacks: expected none"):
            make(endpoint, config={"fallbacks": (FallbackSection(provider="openai"),)})
    gc.collect()


def window_of(line_ids: Sequence[str]) -> BatchWindow:
    window = BatchWindow()
    for line_id in line_ids:
        window.add(line_id, line_id, json.dumps({"custom_id": line_id}).encode() + b"\n")
    return window


LINE_IDS = st.lists(st.text("0123456789abcdef", min_size=40, max_size=40), min_size=1, max_size=60, unique=True)


@given(LINE_IDS, st.data())
def test_any_rest_of_a_batch_finds_it_and_strangers_do_not(line_ids: list[str], data: st.DataObject) -> None:
    rest = data.draw(st.lists(st.sampled_from(line_ids), min_size=1, unique=True))
    whole, part = window_of(line_ids), window_of(rest)
    stranger = window_of([line_id[::-1] + "-" for line_id in ("g" * 40, "h" * 40)])
    try:
        assert may_hold(whole.metadata, part) and may_hold(whole.metadata, whole)
        assert not may_hold(whole.metadata, stranger)
        assert not may_hold({}, whole) and not may_hold(None, whole) and not may_hold({"purpose": "x"}, whole)
    finally:
        for window in (whole, part, stranger):
            window.file.close()


def test_a_large_batch_s_metadata_still_fits() -> None:
    window = window_of([f"{n:040x}" for n in range(5000)])
    metadata = window.metadata
    window.file.close()
    assert len(metadata) <= 16 and all(len(value) <= 512 for value in metadata.values())


def test_the_remaining_window_has_the_waiting_lines_only() -> None:
    window = window_of(["a" * 40, "b" * 40, "c" * 40])
    del window.waiting["b" * 40]
    rest = window.remaining()
    rest.file.seek(0)
    assert [json.loads(line)["custom_id"][0] for line in rest.file] == ["a", "c"]
    rest.file.close()
    assert window.file.closed


def test_a_line_id_depends_on_all_that_is_sent_and_nothing_else() -> None:
    (request,) = requests(1)
    profile = find_profile("alibaba")
    assert request_line(request, profile, "m", scope="s") == request_line(request, profile, "m", scope="s")
    others = [
        request_line(request, profile, "other", scope="s"),
        request_line(request, profile, "m", scope="t"),
        request_line(requests(1, sampling=Sampling(max_tokens=17))[0], profile, "m", scope="s"),
    ]
    assert len({line_id for line_id, _ in [*others, request_line(request, profile, "m", scope="s")]}) == 4


def test_half_a_surrogate_pair_in_a_chat_is_sent_as_it_is(make: Make) -> None:
    (request,) = requests(1)
    odd = Request("odd", request.prompt_token_ids, (Message("user", "half \ud83d"),), request.sampling)
    with BatchEndpoint(lambda body: answered("fine")) as endpoint:
        found = list(make(endpoint).generate([request, odd]))
        assert ids(found) == Counter(["row-0", "odd"])
        assert "half \ud83d" in map(text_of, endpoint.asked)


def test_at_most_four_batches_are_away(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_lines, "MAX_LINES", 2)
    monkeypatch.setattr(batches, "_MAX_WINDOWS_IN_FLIGHT", 4)
    with BatchEndpoint(echo) as endpoint:
        stream = make(endpoint).generate(requests(20))
        next(stream)
        assert len(endpoint.batches) == 4
        stream.close()
