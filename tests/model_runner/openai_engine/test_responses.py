"""Responses of each provider's form, read into one."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moebeam.model_runner.openai_engine.profiles import find_profile
from moebeam.model_runner.openai_engine.responses import Answer, StreamedAnswer, read_answer
from moebeam.schemas.errors import AnswerInterrupted, MalformedResponse
from moebeam.schemas.records import TokenLogprob, ToolCall, Usage
from tests.support.servers.fake_endpoint import (
    ALIBABA_USAGE,
    VLLM_USAGE,
    VOLCANO_USAGE,
    as_events,
    deepseek,
    with_usage,
)

DEEPSEEK = find_profile("deepseek")
CALLS = [{"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"q": "über"}'}}]


def read(answer: Any, provider: str = "deepseek") -> Answer:
    return read_answer(json.dumps(answer).encode(), find_profile(provider))


def streamed(answer: Any, provider: str = "deepseek", **values: Any) -> Answer:
    reader = StreamedAnswer()
    for event in as_events(answer, **values):
        reader.add_line((event if isinstance(event, str) else f"data: {json.dumps(event)}").encode())
        reader.add_line(b"")
    return reader.answer(find_profile(provider))


@pytest.mark.parametrize(
    ("provider", "usage", "expected"),
    [
        ("deepseek", deepseek(reasoning=7)["usage"], Usage(100, 10, 64, 7)),
        ("alibaba", ALIBABA_USAGE, Usage(100, 10, 48, 4)),
        ("volcano", VOLCANO_USAGE, Usage(100, 10, 32, 3)),
        ("vllm", VLLM_USAGE, Usage(100, 10, None, 0)),
        ("sglang", {"prompt_tokens": 9, "completion_tokens": 2, "reasoning_tokens": 0}, Usage(9, 2, None, 0)),
        (
            "openai",
            {"prompt_tokens": 9, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 0}},
            Usage(9, 2, 0, 0),
        ),
    ],
)
def test_usage_of_each_provider_means_the_same(provider: str, usage: Any, expected: Usage) -> None:
    assert read(with_usage(deepseek(), usage), provider).usage == expected
    assert streamed(with_usage(deepseek(), usage), provider).usage == expected


def test_unknown_cached_tokens_are_none_and_never_zero() -> None:
    usage = {"prompt_tokens": 5, "completion_tokens": 1, "prompt_tokens_details": {"cached_tokens": None}}
    assert read(with_usage(deepseek(), usage)).usage.cached_tokens is None


@pytest.mark.parametrize("usage", [None, {}, [], "none", 7, {"total_tokens": 6}, {"prompt_tokens": True}])
def test_answer_without_a_usage_is_an_answer_whose_tokens_are_unknown(usage: Any) -> None:
    for answer in (read(with_usage(deepseek("yes"), usage)), streamed(with_usage(deepseek("yes"), usage))):
        assert (answer.text, answer.error) == ("yes", None)
        assert answer.usage == Usage(None, None, None, 0, "missing")


@pytest.mark.parametrize(
    ("usage", "expected"),
    [
        ({"prompt_tokens": 5}, Usage(5, None, status="missing")),
        ({"prompt_tokens": "5", "completion_tokens": 1}, Usage(None, 1, status="missing")),
        ({"prompt_tokens": 5.0, "completion_tokens": 1.5}, Usage(5, None, status="missing")),
        ({"prompt_tokens": 7, "completion_tokens": -2}, Usage(7, None, status="contradictory")),
        ({"prompt_tokens": 10**26 + 1, "completion_tokens": 2}, Usage(None, 2, status="contradictory")),
        ({"prompt_tokens": 2**63, "completion_tokens": 2}, Usage(None, 2, status="contradictory")),
        (
            {"prompt_tokens": 9, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 11}},
            Usage(9, 2, 11, status="contradictory"),
        ),
        (
            {"prompt_tokens": 9, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": -1}},
            Usage(9, 2, None, status="contradictory"),
        ),
        (
            {"prompt_tokens": 9, "completion_tokens": 2, "completion_tokens_details": {"reasoning_tokens": 40}},
            Usage(9, 2, None, 40, "contradictory"),
        ),
        (
            {"prompt_tokens": 9, "completion_tokens": 2, "completion_tokens_details": "none"},
            Usage(9, 2, None, 0, "reported"),
        ),
    ],
)
def test_usage_is_kept_as_it_was_reported_and_says_what_is_wrong_with_it(usage: Any, expected: Usage) -> None:
    answer = read(with_usage(deepseek("yes"), usage), "openai")
    assert (answer.usage, answer.error, answer.text) == (expected, None, "yes")


@pytest.mark.parametrize("figure", ["9" * 5000, "1e400", "-1e400"])
def test_a_figure_beyond_every_number_is_a_contradiction_and_not_a_crash(figure: str) -> None:
    content = json.dumps(with_usage(deepseek("yes"), {"prompt_tokens": 1, "completion_tokens": "FIGURE"}))
    answer = read_answer(content.replace('"FIGURE"', figure).encode(), DEEPSEEK)
    assert answer.usage == Usage(1, None, status="contradictory")
    assert answer.text == "yes"


def test_reasoning_stands_apart_from_the_text() -> None:
    answer = deepseek("4", reasoning_content="two and two", reasoning=3)
    assert read(answer).reasoning_content == streamed(answer).reasoning_content == "two and two"
    assert read(answer).text == "4"
    assert read(deepseek("4")).reasoning_content is None


def test_calls_come_whole_from_both_forms() -> None:
    answer = deepseek("", tool_calls=CALLS, finish_reason="tool_calls")
    expected = (ToolCall("c1", "look", '{"q": "über"}'),)
    assert read(answer).tool_calls == streamed(answer).tool_calls == expected
    assert read(answer).finish_reason == "tool_calls"


def test_arguments_given_as_an_object_become_json_text() -> None:
    answer = deepseek("", tool_calls=[{"function": {"name": "look", "arguments": {"q": "ü"}}}])
    assert read(answer).tool_calls == (ToolCall("call_0", "look", '{"q": "ü"}'),)


def test_null_content_is_an_empty_text() -> None:
    answer = deepseek()
    answer["choices"][0]["message"]["content"] = None
    assert read(answer).text == ""


def test_blank_content_of_deepseek_is_kept_for_validation() -> None:
    answer = read(deepseek("   \n  "))
    assert (answer.text, answer.finish_reason, answer.error) == ("   \n  ", "stop", None)


@pytest.mark.parametrize("reason", ["insufficient_system_resource", "aborted", "abort"])
def test_answer_that_the_provider_gave_up_keeps_its_usage(reason: str) -> None:
    answer = read(deepseek("half an", finish_reason=reason))
    assert isinstance(answer.error, AnswerInterrupted)
    assert answer.error.retryable
    assert (answer.text, answer.usage.completion_tokens) == ("half an", 10)


@pytest.mark.parametrize("reason", ["stop", "length", "content_filter", "tool_calls"])
def test_documented_finish_reasons_are_kept(reason: str) -> None:
    answer = read(deepseek(finish_reason=reason))
    assert (answer.finish_reason, answer.error) == (reason, None)


@pytest.mark.parametrize("reason", ["bored", "", None, "EOS", 3])
def test_any_word_ends_a_whole_answer_and_is_kept(reason: Any) -> None:
    answer = read(deepseek("all of it", finish_reason=reason))
    assert (answer.finish_reason, answer.error, answer.text) == ("stop", None, "all of it")
    assert answer.provider_finish_reason == (None if reason is None else str(reason))
    assert answer.has_known_reason == (reason not in ("bored", 3))


def test_calls_without_a_reason_are_calls() -> None:
    answer = read(deepseek("", tool_calls=CALLS, finish_reason=None))
    assert (answer.finish_reason, answer.provider_finish_reason) == ("tool_calls", None)


def test_stream_that_names_no_reason_is_whole_at_its_done() -> None:
    reader = StreamedAnswer()
    for event in as_events(deepseek("a text", finish_reason="")):
        reader.add_line((event if isinstance(event, str) else f"data: {json.dumps(event)}").encode())
    answer = reader.answer(DEEPSEEK)
    assert (answer.text, answer.finish_reason, answer.error) == ("a text", "stop", None)


@pytest.mark.parametrize("lines", [["data: [DONE]"], [": keep-alive", ""]])
def test_stream_without_any_piece_is_malformed(lines: list[str]) -> None:
    reader = StreamedAnswer()
    for line in lines:
        reader.add_line(line.encode())
    with pytest.raises(MalformedResponse, match="breaks off"):
        reader.answer(DEEPSEEK)


def test_surrogate_pair_split_over_pieces_is_one_character() -> None:
    reader = StreamedAnswer()
    for text in ("ol\\ud83e", "\\udd51!"):
        escaped = f'{{"choices": [{{"delta": {{"content": "{text}", "reasoning_content": "{text}"}}}}]}}'
        reader.add_line(f"data: {escaped}".encode())
    reader.add_line(b"data: [DONE]")
    answer = reader.answer(DEEPSEEK)
    assert answer.text == answer.reasoning_content == "ol\U0001f951!"


def test_half_of_a_surrogate_pair_stays_what_it_is() -> None:
    content = json.dumps(deepseek("cut \ud83e")).encode()
    assert b"ud83e" in content
    assert read_answer(content, DEEPSEEK).text == "cut \ud83e"


def test_number_for_an_id_is_taken_as_its_text() -> None:
    answer = deepseek("", tool_calls=[{"id": 7, "function": {"name": "look", "arguments": "{}"}}])
    assert read(answer).tool_calls == (ToolCall("7", "look", "{}"),)


def test_served_model_and_fingerprint_are_read() -> None:
    answer = read(deepseek(model="deepseek-v4-flash-0731", system_fingerprint=None))
    assert (answer.model, answer.fingerprint) == ("deepseek-v4-flash-0731", "")


def test_log_probabilities_are_read() -> None:
    answer = deepseek()
    answer["choices"][0]["logprobs"] = {"content": [{"token": "a", "logprob": -0.5}, {"token": "b", "logprob": -1}]}
    assert read(answer).logprobs == (-0.5, -1.0)
    assert read(deepseek()).logprobs is None


def test_blank_lines_ahead_of_an_answer_mean_nothing() -> None:
    assert read_answer(b"\n\n \n" + json.dumps(deepseek("x")).encode(), DEEPSEEK).text == "x"


@pytest.mark.parametrize("content", [b"", b"<html>", b"[]", b'{"choices": 3}', b'{"choices": []}', b"null", b"\xff"])
def test_what_is_no_chat_completion_is_malformed(content: bytes) -> None:
    with pytest.raises(MalformedResponse):
        read_answer(content, DEEPSEEK)


@given(st.data())
def test_answer_cut_anywhere_is_malformed(data: st.DataObject) -> None:
    content = json.dumps(deepseek("a text", reasoning_content="b")).encode()
    with pytest.raises(MalformedResponse):
        read_answer(content[: data.draw(st.integers(0, len(content) - 1))], DEEPSEEK)


@given(st.binary(max_size=60))
def test_no_bytes_raise_anything_else(content: bytes) -> None:
    with pytest.raises(MalformedResponse):
        read_answer(content, DEEPSEEK)


@given(text=st.text(max_size=60), reasoning=st.text(max_size=30), piece=st.integers(1, 9))
def test_stream_in_any_pieces_is_the_same_answer(text: str, reasoning: str, piece: int) -> None:
    answer = deepseek(text, reasoning_content=reasoning, tool_calls=CALLS, finish_reason="tool_calls")
    assert streamed(answer, piece=piece, keep_alives=2) == read(answer)


def test_stream_that_breaks_off_is_malformed() -> None:
    reader = StreamedAnswer()
    for event in as_events(deepseek("a long text"))[:2]:
        reader.add_line(f"data: {json.dumps(event)}".encode())
    with pytest.raises(MalformedResponse, match="breaks off"):
        reader.answer(DEEPSEEK)


def test_stream_without_usage_at_its_end_does_not_say_what_it_cost() -> None:
    reader = StreamedAnswer()
    for event in as_events(deepseek("text"))[:-2]:
        reader.add_line(f"data: {json.dumps(event)}".encode())
    assert reader.answer(DEEPSEEK).usage.status == "missing"


def test_likely_tokens_and_the_tier_that_served_are_read_whole_and_in_pieces() -> None:
    answer = deepseek("yes") | {"service_tier": "flex"}
    places = [
        {
            "token": "y",
            "logprob": -0.1,
            "top_logprobs": [{"token": "y", "logprob": -0.1}, {"token": "n", "logprob": -3}],
        },
        {"token": "es", "logprob": -0.2, "top_logprobs": [{"token": "es", "logprob": -0.2}]},
    ]
    answer["choices"][0]["logprobs"] = {"content": places}
    pieces = StreamedAnswer()
    choice = answer["choices"][0]
    for place, text in zip(places, ("y", "es"), strict=True):
        piece = {"index": 0, "delta": {"content": text}, "logprobs": {"content": [place]}}
        pieces.add_line(b"data: " + json.dumps({**answer, "choices": [piece]}).encode())
    last = {"delta": {}, "finish_reason": choice["finish_reason"]}
    pieces.add_line(b"data: " + json.dumps({**answer, "choices": [last]}).encode())
    for found in (read(answer, "openai"), pieces.answer(find_profile("openai"))):
        assert (found.text, found.service_tier, found.logprobs) == ("yes", "flex", (-0.1, -0.2))
        assert found.top_logprobs == (
            (TokenLogprob("y", -0.1), TokenLogprob("n", -3.0)),
            (TokenLogprob("es", -0.2),),
        )
    assert read(deepseek("yes")).top_logprobs is None
