from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime
from itertools import islice
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.answer_schema import AnswerSchema
from schemas.errors import (
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
from schemas.records import Completion, Usage
from transforms.validate import validate

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


def outcome(made: Completion, schema: AnswerSchema | None) -> tuple[str | None, type[RowError] | None]:
    (answer,) = validate([made], schema)
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
        ("  ", "length", (None, EmptyAnswer)),
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
    (answer,) = validate([completion("1", finish_reason, error)], schema)
    assert (answer.error, answer.output_json) == (error, None)


def test_output_json_is_what_the_model_wrote() -> None:
    text = '{"b": 1.50,\n "a": "\\u00e9"}'
    anything = AnswerSchema.from_json(True, formats="assert", source="any")
    assert outcome(completion(f"\n{text} "), anything) == (text, None)


def test_truncated_answer_says_how_long_it_was_and_what_to_do() -> None:
    (answer,) = validate([completion('{"a": ', "length")], NUMBER)
    assert str(answer.error).startswith("max_tokens cut the answer after 7 tokens, before its JSON was complete: ")
    assert str(answer.error).endswith("; raise [sampling] max_tokens")


def test_completions_are_pulled_one_at_a_time() -> None:
    def endless() -> Iterator[Completion]:
        while True:
            yield completion()

    assert len(list(islice(validate(endless(), NUMBER), 3))) == 3


@settings(deadline=None)
@given(st.text(), st.sampled_from(FINISH_REASONS), st.booleans())
def test_every_completion_comes_out_once_as_json_or_error(text: str, finish_reason: str, has_schema: bool) -> None:
    made = [completion(text, finish_reason), replace(completion("1"), request_id="next")]
    answers = list(validate(made, NUMBER if has_schema else None))
    assert [answer.completion for answer in answers] == made
    for answer in answers:
        assert answer.output_json is None or answer.error is None
        assert not has_schema or (answer.output_json is None) != (answer.error is None)
