"""Drills teach parts of the task in the task's own form, and never show a held-out sentence."""

import json
import random

import jsonschema_rs
import pytest

from moebeam.jobs.demo.tickets import answer_schema, draw_customer, draw_ticket
from moebeam.jobs.demo.wordings import CATEGORY_PHRASES, HELD_OUT, PRIORITY_PHRASES, REFUND_PHRASES, TRAIN
from training.drills import draw_drill, scatter_wordings
from training.tokenizer import ASSISTANT, EOS, USER, get_token_id, train_tokenizer

TOKENIZER = train_tokenizer()


def test_a_row_fits_and_every_turn_is_framed_as_a_chat_turn() -> None:
    rng = random.Random(0)
    for _ in range(20):
        row = draw_drill(TOKENIZER, rng, num_columns=224)
        assert row
        assert sum(len(prompt) + len(answer) for prompt, answer in row) <= 224
        for prompt, answer in row:
            assert prompt[0] == get_token_id(TOKENIZER, USER)
            assert prompt[-2] == get_token_id(TOKENIZER, ASSISTANT)
            assert answer[-1] == get_token_id(TOKENIZER, EOS)


def test_drawing_is_deterministic() -> None:
    rows = [draw_drill(TOKENIZER, random.Random(4), num_columns=224) for _ in range(2)]
    assert rows[0] == rows[1]


def test_scattered_tickets_have_valid_answers() -> None:
    rng = random.Random(1)
    sentences = scatter_wordings(rng)
    validator = jsonschema_rs.Draft202012Validator(dict(answer_schema()), validate_formats=True)
    for _ in range(100):
        validator.validate(json.loads(draw_ticket("scattered", draw_customer(rng), sentences, rng).answer_json))


def test_scattered_wordings_contain_no_held_out_sentence() -> None:
    assert not set(filter(None, scatter_wordings(random.Random(2)).all())) & set(HELD_OUT.all())


@pytest.mark.parametrize(
    ("phrases", "wordings"),
    [
        (CATEGORY_PHRASES, TRAIN.problem),
        (PRIORITY_PHRASES, TRAIN.impact),
        (REFUND_PHRASES, TRAIN.ask),
    ],
)
def test_every_value_has_key_phrases_and_none_means_two_values(
    phrases: dict[object, tuple[str, ...]], wordings: dict[object, tuple[str, ...]]
) -> None:
    assert set(phrases) == set(wordings)
    every = [phrase for pool in phrases.values() for phrase in pool]
    assert len(every) == len(set(every))
