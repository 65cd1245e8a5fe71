"""Copying drills for the first part of `train`: short tasks that teach a fresh model to repeat what it has read.

A ticket's answer holds some forty copied tokens, but a model that cannot copy at all sees no way to begin from them:
without drills the loss fell only from 0.35 to 0.30 between steps 400 and 700, every copied token guessed. A drill row
packs several small turns; half of the rows repeat random tokens, half a customer block as the answer's customer object.
"""

import random

from transformers import PreTrainedTokenizerFast

from jobs.demo.tickets import draw_customer, draw_ticket
from jobs.demo.tokenizer import ASSISTANT, END_THINK, EOS, SPECIAL_TOKENS, USER, token_id
from jobs.demo.wordings import TRAIN

Turn = tuple[list[int], list[int]]


def draw_drill(tokenizer: PreTrainedTokenizerFast, rng: random.Random, *, num_columns: int) -> list[Turn]:
    """One row of drills: as many turns, each a prompt and an answer that ends with the end token, as fit."""
    draw = _draw_repetition if rng.random() < 0.5 else _draw_customer_turn
    row: list[Turn] = []
    num_tokens = 0
    while True:
        prompt, answer = draw(tokenizer, rng)
        num_tokens += len(prompt) + len(answer)
        if num_tokens > num_columns:
            return row
        row.append((prompt, answer))


def _draw_repetition(tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> Turn:
    """Random tokens, half of the time digits only, to be said again."""
    digits = [token_id(tokenizer, digit) for digit in "0123456789"]
    pool = digits if rng.random() < 0.5 else range(len(SPECIAL_TOKENS), len(tokenizer))
    tokens = [rng.choice(pool) for _ in range(rng.randrange(4, 17))]
    return _turn(tokenizer, tokens, tokens)


def _draw_customer_turn(tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> Turn:
    """A customer block, to be answered as every ticket's answer begins."""
    ticket = draw_ticket("drill", draw_customer(rng), TRAIN, rng)
    customer_json, _, _ = ticket.answer_json.partition(',"product"')
    return _turn(
        tokenizer,
        tokenizer.encode(ticket.customer_context, add_special_tokens=False),
        tokenizer.encode(customer_json, add_special_tokens=False),
    )


def _turn(tokenizer: PreTrainedTokenizerFast, question: list[int], answer: list[int]) -> Turn:
    user, assistant, end_think, eos = (token_id(tokenizer, token) for token in (USER, ASSISTANT, END_THINK, EOS))
    return [user, *question, assistant, end_think], [*answer, eos]
