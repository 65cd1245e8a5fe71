"""Responses of each provider's form, read into one."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moebeam.model_runner.openai_engine.profiles import find_profile
from moebeam.model_runner.openai_engine.responses import Answer, StreamedAnswer, read_answer
from moebeam.schemas.errors import AnswerInterrupted, EngineFailed, MalformedResponse
from moebeam.schemas.records import ToolCall, Usage
from tests.support.fake_endpoint import ALIBABA_USAGE, VLLM_USAGE, VOLCANO_USAGE, as_events, deepseek, with_usage

DEEPSEEK = find_profile("deepseek")
CALLS = [{"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"q": "über"}'}}]


def read(answer: Any, provider: str = "deepseek") -> Answer:
    return read_answer(json.dumps(answer).encode(), find_profile(provider))


def streamed(answer: Any, provider: str = "deepseek", **values: Any) -> Answer:
    reader = StreamedAnswer()
    for event in as_events(answer, **values):
        reader.add_line(event if isinstance(event, str) else f"data: {json.dumps(event)}")
        reader.add_line("")
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


@pytest.mark.parametrize("usage", [None, {}, {"prompt_tokens": 5}, {"prompt_tokens": "5", "completion_tokens": 1}])
def test_answer_that_does_not_say_what_it_cost_is_an_error(usage: Any) -> None:
    answer = read(with_usage(deepseek("yes"), usage))
    assert isinstance(answer.error, EngineFailed)
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


@pytest.mark.parametrize("reason", ["bored", None])
def test_unknown_finish_reason_is_an_error_that_names_it(reason: str | None) -> None:
    answer = read(deepseek(finish_reason=reason))
    assert isinstance(answer.error, EngineFailed)
    assert repr(reason) in str(answer.error)
    assert answer.usage.prompt_tokens == 100


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
        reader.add_line(f"data: {json.dumps(event)}")
    with pytest.raises(MalformedResponse, match="breaks off"):
        reader.answer(DEEPSEEK)


def test_stream_without_usage_at_its_end_does_not_say_what_it_cost() -> None:
    reader = StreamedAnswer()
    for event in as_events(deepseek("text"))[:-2]:
        reader.add_line(f"data: {json.dumps(event)}")
    assert isinstance(reader.answer(DEEPSEEK).error, EngineFailed)
