from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from moebeam.model_runner.encoding.prompt_encoder import PromptEncoder
from moebeam.schemas.answers import ValidatedAnswer
from moebeam.schemas.errors import (
    EmptyAnswer,
    EngineOverloaded,
    NotJson,
    RowError,
    ToolArgumentsInvalid,
    TruncatedAnswer,
)
from moebeam.schemas.job.sections import RepairSection
from moebeam.schemas.records import Completion, Message, Request, Sampling, ToolCall, Usage
from moebeam.transforms.answer.repair import Repair

ERROR = NotJson("expected one JSON value, found text at character 0")


@pytest.fixture(scope="module")
def encoder(tiny_checkpoint: Path) -> PromptEncoder:
    return PromptEncoder.load(str(tiny_checkpoint))


def request(encoder: PromptEncoder, *, max_tokens: int = 8) -> Request:
    messages = (Message("system", "be terse"), Message("user", "what is it?"))
    (token_ids,) = encoder.encode_batch([encoder.render(messages)])
    return Request("7", token_ids, messages, Sampling(max_tokens=max_tokens), tenant="t")


def failed(error: RowError, text: str = "no idea", calls: tuple[ToolCall, ...] = ()) -> ValidatedAnswer:
    started_at = datetime(2026, 11, 1, tzinfo=UTC)
    completion = Completion("7", text, "stop", Usage(10, 3, 0), started_at, 1.0, "p", "m", "r", tool_calls=calls)
    return ValidatedAnswer(completion, None, error)


def test_the_next_attempt_shows_the_answer_and_the_error(encoder: PromptEncoder) -> None:
    first = request(encoder)
    second = Repair(RepairSection(max_attempts=2), encoder)(first, failed(ERROR))
    assert second is not None
    assert (second.attempt, second.request_id, second.tenant) == (2, "7", "t")
    assert second.messages[:2] == first.messages
    assert second.messages[2] == Message("assistant", "no idea")
    assert str(ERROR) in second.messages[3].content
    (expected,) = encoder.encode_batch([encoder.render(second.messages)])
    assert np.array_equal(second.prompt_token_ids, expected)
    # What was asked first begins the prompt again, so that its prefix is shared.
    num_shared = first.num_prompt_tokens - 2
    assert np.array_equal(second.prompt_token_ids[:num_shared], first.prompt_token_ids[:num_shared])


def test_attempts_are_bounded(encoder: PromptEncoder) -> None:
    repair = Repair(RepairSection(max_attempts=3), encoder)
    found = [replace(request(encoder), attempt=attempt) for attempt in (1, 2, 3)]
    assert [repair(asked, failed(ERROR)) is not None for asked in found] == [True, True, False]
    assert Repair(RepairSection(max_attempts=1), encoder)(request(encoder), failed(ERROR)) is None


def test_what_an_engine_failed_over_is_not_asked_again(encoder: PromptEncoder) -> None:
    assert Repair(RepairSection(), encoder)(request(encoder), failed(EngineOverloaded("later"))) is None


@pytest.mark.parametrize("error", [EmptyAnswer("expected JSON"), TruncatedAnswer("max_tokens cut")])
def test_an_answer_without_an_end_is_not_shown_again(encoder: PromptEncoder, error: RowError) -> None:
    second = Repair(RepairSection(), encoder)(request(encoder), failed(error, "x" * 100))
    assert second is not None
    assert [message.role for message in second.messages] == ["system", "user", "user"]
    assert "x" * 100 not in second.messages[-1].content


def test_temperature_may_change_for_later_attempts(encoder: PromptEncoder) -> None:
    second = Repair(RepairSection(temperature=0.7), encoder)(request(encoder), failed(ERROR))
    assert second is not None
    assert second.sampling == Sampling(max_tokens=8, temperature=0.7)


def test_what_would_not_fit_is_not_asked_again(encoder: PromptEncoder) -> None:
    asked = request(encoder, max_tokens=encoder.context_length - request(encoder).num_prompt_tokens)
    assert Repair(RepairSection(), encoder)(asked, failed(ERROR)) is None


def test_a_chat_that_the_template_cannot_spell_is_not_asked_again(encoder: PromptEncoder) -> None:
    # The tiny model's template knows no tool role, and no turn after an assistant's prefix is possible.
    wrong_call = failed(ToolArgumentsInvalid("city"), calls=(ToolCall("call_0", "weather", "{}"),))
    assert Repair(RepairSection(), encoder)(request(encoder), wrong_call) is None
    asked = request(encoder)
    asked = replace(asked, messages=(*asked.messages, Message("assistant", "It is ", {"prefix": True})))
    assert Repair(RepairSection(), encoder)(asked, failed(ERROR)) is None
