"""The demo's task: determinism, an honest split, and answers that its own rules and schema accept."""

import json
import random
import re
from pathlib import Path

import jinja2
import jsonschema_rs
import pyarrow as pa
import pytest

from moebeam.jobs.demo import tickets as subject
from moebeam.jobs.demo.tickets import SYSTEM_PROMPT, USER_TEMPLATE, Split, answer_schema, generate_tickets
from moebeam.jobs.demo.wordings import HELD_OUT, TRAIN, Wordings

SPLITS: tuple[Split, ...] = ("train", "held_out")


def _sentences(wordings: Wordings, num_draws: int = 200) -> set[str]:
    rng = random.Random(0)
    return {
        subject.expand_wording(wording, rng).casefold()
        for _ in range(num_draws)
        for wording in wordings.all()
        if wording
    }


def _words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+", text.casefold()))


@pytest.mark.parametrize("split", SPLITS)
def test_same_arguments_give_same_tickets(split: Split) -> None:
    assert generate_tickets(50, seed=3, split=split) == generate_tickets(50, seed=3, split=split)


@pytest.mark.parametrize("split", SPLITS)
def test_more_tickets_begin_with_the_same_ones(split: Split) -> None:
    assert generate_tickets(60, seed=3, split=split)[:20] == generate_tickets(20, seed=3, split=split)


def test_another_seed_gives_other_tickets() -> None:
    texts = {ticket.text for ticket in generate_tickets(200, seed=1, split="train")}
    assert not texts & {ticket.text for ticket in generate_tickets(200, seed=2, split="train")}


def test_global_random_state_is_left_alone() -> None:
    state = random.getstate()
    generate_tickets(5, seed=1, split="train")
    assert random.getstate() == state


def test_splits_share_no_wording() -> None:
    assert not {wording for wording in TRAIN.all() if wording} & set(HELD_OUT.all())
    assert not _sentences(TRAIN) & _sentences(HELD_OUT)


def test_held_out_wordings_use_words_known_from_training() -> None:
    assert not _words(" ".join(HELD_OUT.all())) - _words(" ".join(TRAIN.all()))


@pytest.mark.parametrize("split", SPLITS)
def test_every_answer_validates_and_is_compact(split: Split) -> None:
    validator = jsonschema_rs.Draft202012Validator(dict(answer_schema()), validate_formats=True)
    for ticket in generate_tickets(500, seed=5, split=split):
        answer = json.loads(ticket.answer_json)
        validator.validate(answer)
        assert json.dumps(answer, separators=(",", ":")) == ticket.answer_json


def test_answers_follow_from_the_prompt() -> None:
    for ticket in generate_tickets(500, seed=6, split="train"):
        answer = json.loads(ticket.answer_json)
        assert f"Account: {answer['customer']['account_id']}" in ticket.user_text
        assert re.findall(r"(?:eu|us|ap)-(?:west|north|east|south)", ticket.text) == answer["regions"]
        assert (answer["amount"] is None) == (answer["currency"] is None)
        if answer["amount"] is not None:
            # The JSON number repeats the ticket's digits, thousands separators apart.
            assert json.dumps(answer["amount"]) in ticket.text.replace(",", "")
            named = re.findall(r"\b(?:EUR|USD|GBP|CNY|JPY)\b", ticket.text)
            assert answer["currency"] == (named[0] if named else ticket.customer.currency)
        if answer["due_date"] is not None:
            year, _, day = answer["due_date"].split("-")
            assert year in ticket.text
            assert str(int(day)) in ticket.text


def test_every_value_of_the_task_occurs() -> None:
    answers = [json.loads(ticket.answer_json) for ticket in generate_tickets(500, seed=7, split="held_out")]
    assert {answer["category"] for answer in answers} == set(subject.CATEGORIES)
    assert {answer["priority"] for answer in answers} == set(subject.PRIORITIES)
    assert {answer["product"] for answer in answers} == set(subject.PRODUCTS)
    assert {answer["refund_requested"] for answer in answers} == {True, False}
    assert {len(answer["regions"]) for answer in answers} == {0, 1, 2, 3}
    assert {answer["amount"] is None for answer in answers} == {True, False}


def test_customers_come_back_where_a_customer_base_is_asked_for() -> None:
    tickets = generate_tickets(300, seed=8, split="held_out", num_customers=20)
    assert len({ticket.customer_context for ticket in tickets}) <= 20
    assert len({ticket.customer_context for ticket in generate_tickets(300, seed=8, split="held_out")}) > 290


def test_user_template_renders_what_training_saw() -> None:
    ticket = generate_tickets(1, seed=9, split="held_out")[0]
    row = subject.make_tickets_table([ticket]).to_pylist()[0]
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, autoescape=False)
    assert environment.from_string(USER_TEMPLATE).render(row) == ticket.user_text
    assert "json" in SYSTEM_PROMPT.casefold()


def test_table_has_text_columns_and_unique_ids() -> None:
    tickets = generate_tickets(40, seed=10, split="held_out", num_customers=5)
    table = subject.make_tickets_table(tickets)
    assert table.schema.names == ["ticket_id", "customer_id", "tenant", "customer_context", "ticket_text"]
    assert set(table.schema.types) == {pa.string()}
    assert set(subject.list_expected_answers(tickets)) == set(table["ticket_id"].to_pylist())
    assert table.num_rows == len(subject.list_expected_answers(tickets)) == 40


def test_committed_schema_is_the_generated_one(tmp_path: Path) -> None:
    subject.write_schema(tmp_path / "schema.json")
    assert subject.SCHEMA_PATH.read_text() == (tmp_path / "schema.json").read_text()


@pytest.mark.parametrize(("num_tickets", "num_customers"), [(0, None), (-1, None), (3, 0)])
def test_counts_must_be_positive(num_tickets: int, num_customers: int | None) -> None:
    with pytest.raises(ValueError, match="positive"):
        generate_tickets(num_tickets, seed=1, split="train", num_customers=num_customers)
