"""What the engine could not answer now is asked again, apart from what was answered wrongly."""

from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest

from moebeam.model_runner.encoding.prompt_encoder import PromptEncoder
from moebeam.schemas.answers import ValidatedAnswer
from moebeam.schemas.errors import ContentRefused, EngineCrashed, EngineOverloaded, EngineTimeout, NotJson, RowError
from moebeam.schemas.job.sections import FailuresSection, RepairSection
from moebeam.schemas.records import Completion, Message, Request, Sampling, Usage
from moebeam.transforms.answer.ask_again import MAX_WAIT_S, AttemptPolicy
from moebeam.transforms.answer.repair import Repair


@pytest.fixture(scope="module")
def encoder(tiny_checkpoint: Path) -> PromptEncoder:
    return PromptEncoder.load(str(tiny_checkpoint))


def request(encoder: PromptEncoder, request_id: str = "0") -> Request:
    messages = (Message("user", "hello"),)
    (token_ids,) = encoder.encode_batch([encoder.render(messages)])
    return Request(request_id, np.array(token_ids, dtype=np.int32), messages, Sampling(8))


def failed(error: RowError) -> ValidatedAnswer:
    completion = Completion("0", "x", "stop", Usage(1, 1, 0), datetime(2026, 4, 24, tzinfo=UTC), 1.0, "p", "m", "r")
    return ValidatedAnswer(completion, None, error)


def asker(encoder: PromptEncoder, waits: list[float], **values: float) -> AttemptPolicy:
    repair = Repair(RepairSection(max_attempts=2), encoder)
    return AttemptPolicy(FailuresSection.model_validate(values), repair, sleep=waits.append)


def test_a_failure_that_may_pass_is_retried_as_it_was_until_the_retries_are_used_up(encoder: PromptEncoder) -> None:
    again = asker(encoder, [], max_retries=2)
    first = request(encoder)
    second = again(first, failed(EngineOverloaded("later")))
    assert second is not None
    assert (second.attempt, second.messages, second.sampling) == (2, first.messages, first.sampling)
    third = again(second, failed(EngineTimeout("late")))
    assert third is not None and third.attempt == 3
    assert again(third, failed(EngineOverloaded("later"))) is None
    assert again(request(encoder, "other"), failed(EngineOverloaded("later"))) is not None, "each row has its own"


@pytest.mark.parametrize("error", [EngineCrashed("over this"), ContentRefused("no")])
def test_a_failure_that_will_not_pass_is_not_retried(encoder: PromptEncoder, error: RowError) -> None:
    assert asker(encoder, [])(request(encoder), failed(error)) is None


def test_retries_do_not_use_up_repairs_nor_repairs_retries(encoder: PromptEncoder) -> None:
    again = asker(encoder, [], max_retries=1)
    second = again(request(encoder), failed(EngineOverloaded("later")))
    assert second is not None
    third = again(second, failed(NotJson("what")))
    assert third is not None and (third.attempt, len(third.messages)) == (3, 3)
    assert again(third, failed(EngineOverloaded("later"))) is None
    assert again(third, failed(NotJson("what"))) is None, "the model was asked twice"


def test_each_pause_is_about_twice_as_long_and_none_is_made_for_repairs(encoder: PromptEncoder) -> None:
    again = asker(encoder, waits := [], max_retries=20, retry_wait_s=1.5)
    again.pause()
    again(request(encoder), failed(NotJson("what")))
    again.pause()
    assert waits == []
    for _ in range(10):
        again(request(encoder), failed(EngineOverloaded("later")))
        again.pause()
    most = [min(MAX_WAIT_S, 1.5 * 2**pause) for pause in range(10)]
    assert all(half / 2 <= wait <= half for wait, half in zip(waits, most, strict=True))
