from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from itertools import count, islice
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moebeam.schemas.answers import ValidatedAnswer
from moebeam.schemas.chat_options import ChatOptions
from moebeam.schemas.contract.answer_schema import AnswerSchema
from moebeam.schemas.errors import (
    ContentRefused,
    EmptyAnswer,
    EngineFailed,
    EngineOverloaded,
    EngineTimeout,
    NotJson,
    RowError,
    SchemaViolation,
    TruncatedAnswer,
)
from moebeam.schemas.records import Completion, Message, Request, Sampling, ToolCall, Usage
from moebeam.transforms.answer.validate import answer_and_validate, validate_completion
from moebeam.transforms.render.answer_terms import AnswerTerms

NUMBER = AnswerSchema.from_json({"type": "integer"}, formats="assert", source="number.json")
FINISH_REASONS = ["stop", "length", "tool_calls", "content_filter", "insufficient_system_resource", "aborted", "error"]


def completion(text: str = "1", finish_reason: Any = "stop", error: RowError | None = None) -> Completion:
    return Completion(
        request_id="r",
        text=text,
        finish_reason=finish_reason,
        usage=Usage(prompt_tokens=10, completion_tokens=7),
        started_at=datetime(2026, 11, 1, tzinfo=UTC),
        latency_ms=1.0,
        provider="deepseek",
        model="deepseek-v4-flash",
        model_revision="r1",
        error=error,
    )


def validated(made: Completion, schema: AnswerSchema | None) -> ValidatedAnswer:
    return validate_completion(made, terms(schema))


def terms(schema: AnswerSchema | None) -> AnswerTerms:
    return AnswerTerms(ChatOptions(), schema, {})


def outcome(made: Completion, schema: AnswerSchema | None) -> tuple[str | None, type[RowError] | None]:
    answer = validated(made, schema)
    assert answer.completion is made
    return answer.output_json, type(answer.error) if answer.error else None


@pytest.mark.parametrize(
    ("text", "finish_reason", "expected"),
    [
        ("5", "stop", ("5", None)),
        (" \n 5\t", "stop", ("5", None)),
        ("5", "length", ("5", None)),
        ("5", "tool_calls", ("5", None)),
        ("5", "content_filter", (None, ContentRefused)),
        ("5", "insufficient_system_resource", (None, EngineOverloaded)),
        ("5", "aborted", (None, EngineFailed)),
        ("5", "error", (None, EngineFailed)),
        ("", "stop", (None, EmptyAnswer)),
        ("  ", "length", (None, TruncatedAnswer)),
        ("[5", "stop", (None, NotJson)),
        ("[5", "length", (None, TruncatedAnswer)),
        ("[5]", "stop", (None, SchemaViolation)),
        ("[5]", "length", (None, SchemaViolation)),
    ],
)
def test_with_a_schema_every_outcome_has_its_type(text: str, finish_reason: str, expected: Any) -> None:
    assert outcome(completion(text, finish_reason), NUMBER) == expected


@pytest.mark.parametrize(
    ("text", "finish_reason", "error"),
    [
        ("", "stop", None),
        ("free text", "stop", None),
        ("cut of", "length", None),
        ("", "tool_calls", None),
        ("x", "content_filter", ContentRefused),
        ("x", "insufficient_system_resource", EngineOverloaded),
        ("x", "aborted", EngineFailed),
        ("x", "error", EngineFailed),
    ],
)
def test_without_a_schema_any_text_is_an_answer_and_none_is_json(text: str, finish_reason: str, error: Any) -> None:
    assert outcome(completion(text, finish_reason), None) == (None, error)


@pytest.mark.parametrize("finish_reason", FINISH_REASONS)
@pytest.mark.parametrize("schema", [NUMBER, None])
def test_failed_completion_keeps_its_own_error(finish_reason: str, schema: AnswerSchema | None) -> None:
    error = EngineTimeout("no answer within 600 s")
    answer = validated(completion("1", finish_reason, error), schema)
    assert (answer.error, answer.output_json) == (error, None)


def test_output_json_is_what_the_model_wrote() -> None:
    text = '{"b": 1.50,\n "a": "\\u00e9"}'
    anything = AnswerSchema.from_json(True, formats="assert", source="any")
    assert outcome(completion(f"\n{text} "), anything) == (text, None)


def test_truncated_answer_says_how_long_it_was_and_what_to_do() -> None:
    answer = validated(completion('{"a": ', "length"), NUMBER)
    assert str(answer.error).startswith("max_tokens cut the answer after 7 tokens, before it was complete: ")
    assert str(answer.error).endswith("; raise [sampling] max_tokens")


ANYTHING = AnswerSchema.from_json(True, formats="assert", source="any")


@pytest.mark.parametrize(
    ("text", "inside"),
    [
        ("```json\n[7]\n```", "[7]"),
        ("```\n[7]\n```", "[7]"),
        ("  \n```JSON\r\n[7]\r\n```\n ", "[7]"),
        ("```[7]```", "[7]"),
        ("```json\n[7]", "[7]"),
        ('```json\n["```"]\n```', '["```"]'),
    ],
)
def test_json_inside_of_a_fence_is_the_answer_and_the_text_stays(text: str, inside: str) -> None:
    answer = validated(completion(text), ANYTHING)
    assert (answer.output_json, answer.error, answer.completion.text) == (inside, None, text)


@pytest.mark.parametrize("text", ["Here it is:\n```json\n7\n```", "```json\n7\n```\nDone.", "```", "```json\n7\n```7"])
def test_text_beside_a_fence_is_no_json(text: str) -> None:
    assert outcome(completion(text), ANYTHING) == (None, NotJson)


def test_a_repeated_key_counts_once_for_validation_output_and_its_text() -> None:
    schema = AnswerSchema.from_json(
        {"type": "object", "properties": {"a": {"type": "integer"}}}, formats="assert", source="schema"
    )
    answer = validated(completion('{"a": "x", "a": 2}'), schema)
    assert (answer.error, answer.value, answer.output_json) == (None, {"a": 2}, '{"a": 2}')
    assert isinstance(validated(completion('{"a": 2, "a": "x"}'), schema).error, SchemaViolation)


def test_fenced_json_still_has_to_keep_its_schema() -> None:
    assert outcome(completion("```json\n[5]\n```"), NUMBER) == (None, SchemaViolation)
    assert outcome(completion("```json\n[5", "length"), NUMBER) == (None, TruncatedAnswer)


def test_think_block_ahead_of_json_is_its_reasoning() -> None:
    answer = validated(completion("\n<think>\nfour\nfive\n</think>\n\n```json\n5\n```"), NUMBER)
    assert (answer.output_json, answer.value, answer.error) == ("5", 5, None)
    assert answer.completion.reasoning_content == "four\nfive"
    assert answer.completion.text == "```json\n5\n```"


def test_think_block_is_read_where_reasoning_is_asked_for_and_left_in_plain_text() -> None:
    made = completion("<think>hm</think>\nyes")
    asked = validate_completion(made, AnswerTerms(ChatOptions(thinking=True), None, {}))
    assert (asked.completion.text, asked.completion.reasoning_content) == ("yes", "hm")
    assert validated(made, None).completion is made
    of_its_own = replace(made, reasoning_content="the engine's")
    assert validate_completion(of_its_own, AnswerTerms(ChatOptions(thinking=True), None, {})).completion is of_its_own


def test_empty_think_block_leaves_no_reasoning() -> None:
    answer = validated(completion("<think>\n\n</think>\n5"), NUMBER)
    assert (answer.output_json, answer.completion.reasoning_content) == ("5", None)


def test_think_block_without_its_end_is_all_reasoning_only_if_the_answer_was_cut() -> None:
    assert outcome_of("<think>on and on", "length") == (None, TruncatedAnswer, "on and on", "")
    assert outcome_of("<think>on and on", "stop") == (None, NotJson, None, "<think>on and on")


def outcome_of(text: str, finish_reason: str) -> tuple[Any, ...]:
    answer = validated(completion(text, finish_reason), NUMBER)
    return answer.output_json, type(answer.error), answer.completion.reasoning_content, answer.completion.text


def test_call_of_a_tool_that_needs_no_arguments_has_an_empty_object() -> None:
    nothing = AnswerSchema.from_json({"type": "object", "properties": {}}, formats="assert", source="tool")
    made = replace(completion("", "tool_calls"), tool_calls=(ToolCall("c", "reload", ""),))
    answer = validate_completion(made, AnswerTerms(ChatOptions(), None, {"reload": nothing}))
    assert (answer.error, answer.completion.tool_calls) == (None, (ToolCall("c", "reload", "{}"),))


def test_truncated_answer_of_unknown_length_names_none() -> None:
    cut = replace(completion('{"a": ', "length"), usage=Usage(None, None))
    assert str(validated(cut, NUMBER).error).startswith("max_tokens cut the answer, before it was complete: ")


class Scripted:
    """An engine that answers by request and attempt, and pulls one request at a time."""

    def __init__(self, texts: Mapping[tuple[str, int], str]) -> None:
        self.texts = texts
        self.asked: list[tuple[str, int]] = []

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        for request in requests:
            self.asked.append((request.request_id, request.attempt))
            text = self.texts.get((request.request_id, request.attempt), "1")
            yield replace(completion(text), request_id=request.request_id)


def request(request_id: str) -> Request:
    return Request(request_id, np.array([1], np.int32), (Message("user", "?"),), Sampling(max_tokens=4))


def test_completions_are_pulled_one_at_a_time() -> None:
    endless = (request(str(number)) for number in count())
    runner = Scripted({})
    assert len(list(islice(answer_and_validate(endless, runner, lambda _: terms(NUMBER)), 3))) == 3
    assert len(runner.asked) == 3


def test_a_failed_answer_is_asked_again_after_the_others_until_there_is_no_other_request() -> None:
    runner = Scripted({("a", 1): "x", ("b", 1): "x", ("b", 2): "y", ("b", 3): "z"})

    def again(failed: Request, answer: ValidatedAnswer) -> Request | None:
        assert answer.completion.request_id == failed.request_id
        assert answer.error is not None
        return replace(failed, attempt=failed.attempt + 1) if failed.attempt < 3 else None

    answers = list(answer_and_validate([request(name) for name in "abc"], runner, lambda _: terms(NUMBER), again))
    assert runner.asked == [("a", 1), ("b", 1), ("c", 1), ("a", 2), ("b", 2), ("b", 3)]
    found = [(a.completion.request_id, a.attempt, a.is_last, a.error is None) for a in answers]
    assert found == [
        ("a", 1, False, False),
        ("b", 1, False, False),
        ("c", 1, True, True),
        ("a", 2, True, True),
        ("b", 2, False, False),
        ("b", 3, True, False),
    ]


@settings(deadline=None)
@given(st.text(), st.sampled_from(FINISH_REASONS), st.booleans())
def test_every_completion_is_json_or_error(text: str, finish_reason: str, has_schema: bool) -> None:
    answer = validated(completion(text, finish_reason), NUMBER if has_schema else None)
    assert answer.output_json is None or answer.error is None
    assert not has_schema or (answer.output_json is None) != (answer.error is None)
