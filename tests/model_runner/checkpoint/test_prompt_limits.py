"""Prompts that a model cannot take."""

import numpy as np
import pytest

from moebeam.model_runner.checkpoint.prompt_limits import why_not_runnable
from moebeam.schemas.errors import ContextOverflow, EngineFailed


def why_not(token_ids: list[int], max_tokens: int, context_length: int | None = 8) -> object:
    return why_not_runnable(
        np.array(token_ids, dtype=np.int32), max_tokens, vocab_size=10, context_length=context_length
    )


@pytest.mark.parametrize(
    ("token_ids", "max_tokens", "error", "words"),
    [
        ([], 1, EngineFailed, "at least one token, found none"),
        ([1], 0, EngineFailed, "max_tokens of at least 1, found 0"),
        ([3, 10, 4], 1, EngineFailed, "from 0 to 9, found 3 to 10: the prompt was encoded for another model"),
        ([3, -1], 1, EngineFailed, "from 0 to 9, found -1 to 3"),
        ([1] * 6, 3, ContextOverflow, "6 prompt tokens and max_tokens 3 exceed the context of 8 tokens"),
    ],
)
def test_a_prompt_that_cannot_run_says_what_was_expected_and_found(
    token_ids: list[int], max_tokens: int, error: type[Exception], words: str
) -> None:
    found = why_not(token_ids, max_tokens)
    assert type(found) is error
    assert words in str(found)


def test_the_whole_context_and_vocabulary_may_be_used() -> None:
    assert why_not([0, 9, 1, 2, 3, 4], 2) is None
    assert why_not([1] * 99, 99, context_length=None) is None
