"""The demo's tokenizer: what the exported files do, since they are what a user loads."""

# ruff: noqa: RUF001 - the bars of DeepSeek's special tokens are full-width on purpose

import pytest
from transformers import PreTrainedTokenizerFast

from moebeam.jobs.demo.tickets import SYSTEM_PROMPT, generate_tickets
from training.tokenizer import BOS, EOS, SPECIAL_TOKENS, render_prompt


def test_special_tokens_are_single_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    for expected, token in enumerate(SPECIAL_TOKENS):
        assert tokenizer.encode(token, add_special_tokens=False) == [expected]
    assert (tokenizer.bos_token, tokenizer.eos_token) == (BOS, EOS)


def test_text_comes_back_unchanged(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = [ticket.answer_json for ticket in generate_tickets(50, seed=11, split="held_out")]
    texts += [ticket.user_text for ticket in generate_tickets(50, seed=11, split="held_out")]
    texts += ["naïve café, 12 ½ %", "深度求索", "  two  spaces\n\n\tand a tab ", "🙂"]
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_every_digit_is_a_token(tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = tokenizer.tokenize('{"amount":1250.75,"due_date":"2026-03-14"} EUR 48213')
    assert all(sum(character.isdigit() for character in token) <= 1 for token in tokens)
    assert all(len(token) == 1 for token in tokens if token[0].isdigit())


def test_chat_template_without_thinking(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == "<｜begin▁of▁sentence｜>S<｜User｜>U<｜Assistant｜></think>"


def test_chat_template_with_thinking(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [{"role": "user", "content": "U"}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=True)
    assert rendered == "<｜begin▁of▁sentence｜><｜User｜>U<｜Assistant｜><think>"


@pytest.mark.parametrize(
    ("add_generation_prompt", "last_turn"), [(False, "<｜User｜>U2"), (True, "<｜User｜>U2<｜Assistant｜></think>")]
)
def test_chat_template_with_a_past_answer(
    tokenizer: PreTrainedTokenizerFast, add_generation_prompt: bool, last_turn: str
) -> None:
    messages = [
        {"role": "user", "content": "U1"},
        {"role": "assistant", "content": "A1"},
        {"role": "user", "content": "U2"},
    ]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    first = "<｜begin▁of▁sentence｜><｜User｜>U1<｜Assistant｜></think>A1<｜end▁of▁sentence｜>"
    assert rendered == first + last_turn


def test_training_prompt_is_what_the_chat_template_gives(tokenizer: PreTrainedTokenizerFast) -> None:
    ticket = generate_tickets(1, seed=12, split="held_out")[0]
    messages = [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": ticket.user_text}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == render_prompt(ticket.user_text)
