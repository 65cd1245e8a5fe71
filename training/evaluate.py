"""Measure the demo checkpoint: `python -m training.evaluate --checkpoint jobs/demo/checkpoint`.

Greedy `generate` in float32 without any constraint, on tickets worded as in training and on held-out wordings. Tickets
are decoded in groups of equal prompt length, because `transformers`' DeepSeek V4 is wrong under left padding.
Writes evaluation.json and, from it and training.json, the model card README.md into the checkpoint's folder.
"""

import argparse
import dataclasses
import json
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import jsonschema_rs
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DeepseekV4ForCausalLM, PreTrainedTokenizerFast

from moebeam.jobs.demo.tickets import Split, Ticket, answer_schema, generate_tickets
from training.card import write_card
from training.tokenizer import render_prompt

EVALUATION_SEED = 1_000_003
MAX_ANSWER_TOKENS = 128
MAX_GROUP_SIZE = 64

FIELDS: tuple[str, ...] = tuple(cast("Mapping[str, object]", answer_schema()["properties"]))


@dataclass(frozen=True, slots=True)
class Scores:
    """Shares from 0 to 1 over one set of tickets; a field of an answer that does not parse counts as wrong."""

    num_tickets: int
    finished: float
    schema_valid: float
    exact: float
    fields: Mapping[str, float]
    decoding_s: float


def load_checkpoint(folder: Path) -> tuple[DeepseekV4ForCausalLM, PreTrainedTokenizerFast]:
    """The model in float32 and its tokenizer, from local files only."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert isinstance(model, DeepseekV4ForCausalLM)
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    return model.eval(), tokenizer


def answer_tickets(
    model: DeepseekV4ForCausalLM, tokenizer: PreTrainedTokenizerFast, tickets: Sequence[Ticket]
) -> list[tuple[str, bool]]:
    """Decode greedily; for each ticket, in order, the text without its end token and whether that token came."""
    prompts = [tokenizer.encode(render_prompt(ticket.user_text), add_special_tokens=False) for ticket in tickets]
    answers: dict[int, tuple[str, bool]] = {}
    for group in _equal_length_groups(prompts):
        input_ids = torch.tensor([prompts[index] for index in group])
        with torch.inference_mode():
            sequences = cast(
                torch.Tensor,
                model.generate(  # pyright: ignore[reportAttributeAccessIssue]
                    input_ids,
                    attention_mask=torch.ones_like(input_ids),
                    do_sample=False,
                    max_new_tokens=MAX_ANSWER_TOKENS,
                ),
            )
        for index, row in zip(group, sequences[:, input_ids.size(1) :].tolist(), strict=True):
            is_finished = tokenizer.eos_token_id in row
            tokens = row[: row.index(tokenizer.eos_token_id)] if is_finished else row
            answers[index] = str(tokenizer.decode(tokens)), is_finished
    return [answers[index] for index in range(len(tickets))]


def score_answers(tickets: Sequence[Ticket], answers: Sequence[tuple[str, bool]], *, decoding_s: float) -> Scores:
    """Compare answers with what their tickets expect."""
    validator = jsonschema_rs.Draft202012Validator(dict(answer_schema()), validate_formats=True)
    num_valid = num_exact = 0
    num_right: dict[str, int] = dict.fromkeys(FIELDS, 0)
    for ticket, (text, _) in zip(tickets, answers, strict=True):
        num_exact += text == ticket.answer_json
        try:
            answer = json.loads(text)
        except ValueError:
            continue
        if not isinstance(answer, dict):
            continue
        num_valid += validator.is_valid(answer)
        expected = json.loads(ticket.answer_json)
        for field in FIELDS:
            num_right[field] += field in answer and answer[field] == expected[field]
    num_tickets = len(tickets)
    return Scores(
        num_tickets=num_tickets,
        finished=sum(is_finished for _, is_finished in answers) / num_tickets,
        schema_valid=num_valid / num_tickets,
        exact=num_exact / num_tickets,
        fields={field: count / num_tickets for field, count in num_right.items()},
        decoding_s=round(decoding_s, 1),
    )


def evaluate(folder: Path, num_tickets: int) -> dict[Split, Scores]:
    """Score the checkpoint in `folder` on fresh tickets of both splits."""
    model, tokenizer = load_checkpoint(folder)
    scores: dict[Split, Scores] = {}
    splits: tuple[Split, ...] = ("held_out", "train")
    for split in splits:
        tickets = generate_tickets(num_tickets, seed=EVALUATION_SEED, split=split)
        started_s = time.monotonic()
        answers = answer_tickets(model, tokenizer, tickets)
        scores[split] = score_answers(tickets, answers, decoding_s=time.monotonic() - started_s)
        for ticket, (text, _) in zip(tickets, answers, strict=True):
            if text != ticket.answer_json:
                print(f"{ticket.ticket_id}\n  {ticket.text}\n  expected {ticket.answer_json}\n  answered {text}")
        print(split, json.dumps(dataclasses.asdict(scores[split])))
    return scores


def _equal_length_groups(prompts: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """Indices of prompts of one length, at most `MAX_GROUP_SIZE` together."""
    by_length: defaultdict[int, list[int]] = defaultdict(list)
    for index, prompt in enumerate(prompts):
        by_length[len(prompt)].append(index)
    for length in sorted(by_length):
        indices = by_length[length]
        for start in range(0, len(indices), MAX_GROUP_SIZE):
            yield indices[start : start + MAX_GROUP_SIZE]


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the demo checkpoint and write its model card.")
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--num_tickets", type=int, default=512)
    parser.add_argument("--num_threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.num_threads)
    folder: Path = options.checkpoint
    scores = evaluate(folder, options.num_tickets)
    report = {split: dataclasses.asdict(score) for split, score in scores.items()}
    (folder / "evaluation.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    write_card(folder)


if __name__ == "__main__":
    main()
