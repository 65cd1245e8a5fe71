"""Batch mode of the `openai` engine: one outcome a request, and no request submitted twice, whatever breaks when."""

import gc
import json
import logging
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moebeam.model_runner.openai_engine.batch import lines as batch_lines
from moebeam.model_runner.openai_engine.batch import runner as batches
from moebeam.model_runner.openai_engine.batch.lines import BatchWindow, may_hold, request_line
from moebeam.model_runner.openai_engine.options import FallbackSection
from moebeam.model_runner.openai_engine.profiles import find_profile
from moebeam.schemas.errors import EngineLoadError
from moebeam.schemas.records import Message, Request, Sampling, ToolCall, Usage
from tests.support.engines.batch_calls import (
    KEY,
    Make,
    answered,
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
from tests.support.servers.batch_endpoint import BatchEndpoint
from tests.support.servers.fake_endpoint import deepseek, with_usage


def test_connections_are_closed_with_the_engine_even_in_a_cycle(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = threading.Event()

    async def close(client: openai.AsyncOpenAI) -> None:
        closed.set()

    monkeypatch.setattr(openai.AsyncOpenAI, "close", close)
    with BatchEndpoint(echo) as endpoint:
        cycle: list[Any] = [make(endpoint)]
        cycle.append(cycle)
        gc.collect()
        assert not closed.is_set()
        del cycle
        gc.collect()
        assert closed.wait(30)


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


def test_a_body_that_comes_as_text_is_read(make: Make) -> None:
    reply = {"response": {"status_code": 200, "body": json.dumps(deepseek("fine"))}, "error": None}
    with BatchEndpoint(lambda body: reply) as endpoint:
        (found,) = make(endpoint).generate(requests(1))
    assert (found.text, found.error) == ("fine", None)


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
