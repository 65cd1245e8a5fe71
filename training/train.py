"""Train the demo checkpoint: `python -m training.train --out jobs/demo/checkpoint --max_minutes 90`.

Fresh tickets for every step (`tickets`), the layout of `layout`, Muon for matrices and AdamW for the rest, bfloat16
autocast over float32 weights, loss on the answer's tokens only. The learning rate falls to zero at the time limit.
The state that `--resume` needs lies outside the exported folder. `evaluate` measures what comes out.
"""

import argparse
import copy
import dataclasses
import json
import logging
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional
from transformers import DeepseekV4ForCausalLM, GenerationConfig, PreTrainedTokenizerFast

from moebeam.jobs.demo.tickets import Split, Ticket, draw_customer, draw_ticket, generate_tickets
from training.drills import Turn, draw_drill, scatter_wordings
from training.layout import build_model, demo_config
from training.muon import Muon
from training.tokenizer import EOS, PAD, get_token_id, render_prompt, save_tokenizer, train_tokenizer

_LOGGER = logging.getLogger(__name__)

SEED = 20
BATCH_SIZE = 16
BATCHES_A_CHUNK = 8
# Each length is compiled once; both are multiples of every compression rate.
BUCKET_LENGTHS: tuple[int, ...] = (224, 272)
MUON_LEARNING_RATE = 0.012
ADAMW_LEARNING_RATE = 2e-3
NUM_WARMUP_STEPS = 100
DECAY_FROM = 0.6  # share of the run at which the learning rate begins to fall
NUM_SHORT_DRILL_STEPS = 1_950
BALANCE_EVERY_STEPS = 16
BALANCE_SPEED = 0.01
LOG_EVERY_STEPS = 50
NUM_CHECK_TICKETS = 96

IGNORED = -100


@dataclass(frozen=True, slots=True)
class Batch:
    """Right-padded sequences: `input_ids` and `labels`, both int64 of shape (batch_size, num_tokens).

    `labels[:, i]` is the token that follows position i where it belongs to an answer, else `IGNORED`.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    num_real_tokens: int


@dataclass(slots=True)
class Progress:
    """What a run has done so far; travels in the resume state and into the model card."""

    num_steps: int = 0
    num_tokens: int = 0
    num_answer_tokens: int = 0
    trained_s: float = 0.0


def encode_ticket(ticket: Ticket, tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[int]]:
    """Token ids of the prompt, and of the answer with its end token."""
    prompt = tokenizer.encode(render_prompt(ticket.user_text), add_special_tokens=False)
    answer = tokenizer.encode(ticket.answer_json, add_special_tokens=False)
    return prompt, [*answer, get_token_id(tokenizer, EOS)]


def collate(rows: Sequence[Sequence[Turn]], num_columns: int, pad_token_id: int) -> Batch:
    """Lay out rows of turns, each turn a prompt and its answer; pad on the right, which a causal model never sees."""
    input_ids = torch.full((len(rows), num_columns), pad_token_id)
    labels = torch.full((len(rows), num_columns), IGNORED)
    num_real_tokens = 0
    for row, turns in enumerate(rows):
        start = 0
        for prompt, answer in turns:
            end = start + len(prompt) + len(answer)
            input_ids[row, start:end] = torch.tensor(prompt + answer)
            labels[row, start + len(prompt) - 1 : end - 1] = torch.tensor(answer)
            start = end
        num_real_tokens += start
    return Batch(input_ids, labels, num_real_tokens)


def drill_batch(tokenizer: PreTrainedTokenizerFast, *, step: int) -> Batch:
    """A step's batch of copying drills, in the shortest bucket."""
    rng = random.Random(f"drill:{step}")
    num_columns = BUCKET_LENGTHS[0]
    rows = [draw_drill(tokenizer, rng, num_columns=num_columns) for _ in range(BATCH_SIZE)]
    return collate(rows, num_columns, get_token_id(tokenizer, PAD))


def make_scattered_batch(tokenizer: PreTrainedTokenizerFast, *, step: int) -> Batch:
    """A step's batch of whole tickets with scattered wordings, in the longest bucket."""
    rng = random.Random(f"scattered:{step}")
    sentences = scatter_wordings(rng)
    rows: list[list[Turn]] = []
    while len(rows) < BATCH_SIZE:
        prompt, answer = encode_ticket(draw_ticket("scattered", draw_customer(rng), sentences, rng), tokenizer)
        if len(prompt) + len(answer) <= BUCKET_LENGTHS[-1]:
            rows.append([(prompt, answer)])
    return collate(rows, BUCKET_LENGTHS[-1], get_token_id(tokenizer, PAD))


def is_drill_step(step: int) -> bool:
    """Whether a step drills, with short turns at first and with scattered wordings later: every other one does."""
    return step % 2 != 0


def training_batches(tokenizer: PreTrainedTokenizerFast, *, first_step: int) -> Iterator[Batch]:
    """Batches from a step on, without end; a step's batch depends on nothing but its number.

    A chunk of batches is sorted by length before it is cut, so that short tickets meet short ones. The few sequences
    longer than the largest bucket are left out.
    """
    pad_token_id = get_token_id(tokenizer, PAD)
    chunk, skip = divmod(first_step, BATCHES_A_CHUNK)
    while True:
        tickets = generate_tickets(BATCH_SIZE * (BATCHES_A_CHUNK + 1), seed=chunk, split="train")
        pairs = [encode_ticket(ticket, tokenizer) for ticket in tickets]
        fitting = [pair for pair in pairs if len(pair[0]) + len(pair[1]) <= BUCKET_LENGTHS[-1]]
        fitting = sorted(fitting[: BATCH_SIZE * BATCHES_A_CHUNK], key=lambda pair: len(pair[0]) + len(pair[1]))
        groups = [fitting[start : start + BATCH_SIZE] for start in range(0, len(fitting), BATCH_SIZE)]
        random.Random(chunk).shuffle(groups)
        for group in groups[skip:]:
            longest = max(len(prompt) + len(answer) for prompt, answer in group)
            yield collate(
                [[pair] for pair in group], next(length for length in BUCKET_LENGTHS if length >= longest), pad_token_id
            )
        chunk, skip = chunk + 1, 0


def learning_rate_factor(step: int, progress: float) -> float:
    """Warm up by steps, hold, then fall linearly to zero; `progress` is the finished share of the run, 0 to 1."""
    warmup = min(1.0, (step + 1) / NUM_WARMUP_STEPS)
    decay = min(1.0, (1.0 - progress) / (1.0 - DECAY_FROM))
    return warmup * max(0.0, decay)


def build_optimizers(model: DeepseekV4ForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of attention, compressors and experts, AdamW for everything else."""
    matrices: list[torch.Tensor] = []
    others: list[torch.Tensor] = []
    for name, parameter in model.named_parameters():
        is_matrix = name.endswith(("proj", "proj.weight")) and "weights_proj" not in name
        (matrices if is_matrix else others).append(parameter)
    adamw = torch.optim.AdamW(others, ADAMW_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    return [Muon(matrices, MUON_LEARNING_RATE), adamw]


def answer_loss(model: DeepseekV4ForCausalLM, backbone: Callable[..., torch.Tensor], batch: Batch) -> torch.Tensor:
    """Mean cross entropy of the answers' tokens; the head runs on those positions only."""
    with torch.autocast("cpu", torch.bfloat16):
        hidden = backbone(batch.input_ids)  # (batch_size, num_tokens, hidden_size)
        is_answer = batch.labels != IGNORED
        logits = model.lm_head(hidden[is_answer])  # (num_answer_tokens, vocab_size)
    return functional.cross_entropy(logits.float(), batch.labels[is_answer])


@torch.no_grad()
def balance_experts(model: DeepseekV4ForCausalLM, batch: Batch, speed: float) -> None:
    """Move each router's selection bias towards equal load, as V3 and V4 do instead of a balancing loss."""
    chosen: dict[torch.nn.Module, torch.Tensor] = {}
    routers = [module for module in model.modules() if hasattr(module, "e_score_correction_bias")]
    handles = [
        router.register_forward_hook(lambda module, _args, output: chosen.__setitem__(module, output[2]))
        for router in routers
    ]
    model.model(input_ids=batch.input_ids[:4], use_cache=False)
    for handle in handles:
        handle.remove()
    for router in routers:
        bias = router.e_score_correction_bias
        assert isinstance(bias, torch.Tensor)
        load = torch.bincount(chosen[router].flatten(), minlength=bias.numel()).float()
        bias.add_(speed * torch.sign(load.mean() - load))


@torch.no_grad()
def check_exact(model: DeepseekV4ForCausalLM, tokenizer: PreTrainedTokenizerFast, split: Split) -> tuple[float, float]:
    """Share of answers, and of answer tokens, that greedy decoding gets right; float32.

    Read off one forward pass over the expected answer: greedy decoding reproduces it exactly when the likeliest token
    is the expected one at every position.
    """
    tickets = generate_tickets(NUM_CHECK_TICKETS, seed=999_999, split=split)
    num_exact = num_right = num_tokens = 0
    for start in range(0, len(tickets), 32):
        pairs = [encode_ticket(ticket, tokenizer) for ticket in tickets[start : start + 32]]
        longest = max(len(prompt) + len(answer) for prompt, answer in pairs)
        batch = collate([[pair] for pair in pairs], longest, model.config.pad_token_id or 0)
        predicted = model(input_ids=batch.input_ids, use_cache=False).logits.argmax(-1)
        is_answer = batch.labels != IGNORED
        is_right = (predicted == batch.labels) | ~is_answer
        num_exact += int(is_right.all(dim=1).sum())
        num_right += int((is_right & is_answer).sum())
        num_tokens += int(is_answer.sum())
    return num_exact / len(tickets), num_right / num_tokens


def export_checkpoint(
    model: DeepseekV4ForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path, progress: Progress
) -> None:
    """Write the checkpoint into `out`, weights in bfloat16; each file appears whole.

    Tensors keep the names of `transformers`' modules: its default, `save_original_format=True`, writes a mixture of
    those and DeepSeek's.
    """
    out.mkdir(parents=True, exist_ok=True)
    exported = DeepseekV4ForCausalLM(copy.deepcopy(model.config))
    exported.load_state_dict(model.state_dict())
    exported.to(torch.bfloat16)  # pyright: ignore[reportArgumentType]
    exported.generation_config = GenerationConfig(
        do_sample=False,
        bos_token_id=model.config.bos_token_id,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
        max_new_tokens=128,
    )
    with tempfile.TemporaryDirectory(dir=out.parent) as staging_name:
        staging = Path(staging_name)
        exported.save_pretrained(staging, save_original_format=False)
        save_tokenizer(tokenizer, staging)
        (staging / "training.json").write_text(json.dumps(dataclasses.asdict(progress), indent=2) + "\n")
        for file in sorted(staging.iterdir()):
            file.chmod(0o644)
            os.replace(file, out / file.name)


def train(out: Path, state_path: Path, *, max_minutes: float, max_steps: int, export_minutes: float) -> Progress:
    """Train until the time or the steps run out, resuming from `state_path` where it exists; export on the way.

    A resumed run keeps the tokenizer of the checkpoint it goes on from, whatever the wordings have become since.
    """
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out) if state_path.exists() else train_tokenizer()
    model = build_model(demo_config(tokenizer), seed=SEED)
    optimizers = build_optimizers(model)
    base_rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    progress = Progress()
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        progress = Progress(**state["progress"])
        _LOGGER.info("resumed at step %d", progress.num_steps)

    def run_backbone(input_ids: torch.Tensor) -> torch.Tensor:
        return model.model(input_ids=input_ids, use_cache=False).last_hidden_state

    backbone = torch.compile(run_backbone, dynamic=False)
    model.train()
    batches = training_batches(tokenizer, first_step=progress.num_steps)
    losses: dict[bool, list[float]] = {False: [], True: []}
    last_export_s = progress.trained_s
    while True:
        share = max(progress.trained_s / (60 * max_minutes), progress.num_steps / max_steps)
        if share >= 1:
            break
        started_s = time.monotonic()
        factor = learning_rate_factor(progress.num_steps, share)
        for optimizer, base_rate in zip(optimizers, base_rates, strict=True):
            optimizer.param_groups[0]["lr"] = base_rate * factor
        batch = next(batches)
        is_drill = is_drill_step(progress.num_steps)
        if is_drill:
            draw = drill_batch if progress.num_steps < NUM_SHORT_DRILL_STEPS else make_scattered_batch
            batch = draw(tokenizer, step=progress.num_steps)
        loss = answer_loss(model, backbone, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if progress.num_steps % BALANCE_EVERY_STEPS == 0:
            balance_experts(model, batch, BALANCE_SPEED * factor)

        progress.num_steps += 1
        progress.num_tokens += batch.num_real_tokens
        progress.num_answer_tokens += int((batch.labels != IGNORED).sum())
        progress.trained_s += time.monotonic() - started_s
        losses[is_drill].append(float(loss.detach()))
        if progress.num_steps % LOG_EVERY_STEPS == 0:
            rate = progress.num_tokens / progress.trained_s
            _LOGGER.info(
                "step %d loss %.4f drill %.4f rate %.2f tokens/s %.0f minutes %.1f",
                progress.num_steps, *(sum(part) / max(1, len(part)) for part in losses.values()),
                factor, rate, progress.trained_s / 60,
            )  # fmt: skip
            losses = {False: [], True: []}
        if progress.trained_s - last_export_s > 60 * export_minutes:
            last_export_s = progress.trained_s
            save_state(state_path, model, optimizers, progress)
            export_checkpoint(model, tokenizer, out, progress)
            for split in ("train", "held_out"):
                exact, token_share = check_exact(model, tokenizer, split)
                _LOGGER.info("step %d %s exact %.3f tokens %.4f", progress.num_steps, split, exact, token_share)
    save_state(state_path, model, optimizers, progress)
    export_checkpoint(model, tokenizer, out, progress)
    return progress


def save_state(
    path: Path, model: DeepseekV4ForCausalLM, optimizers: list[torch.optim.Optimizer], progress: Progress
) -> None:
    """Replace the resume state: weights and momenta in float32, and the progress."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    state = {
        "model": model.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "progress": dataclasses.asdict(progress),
    }
    torch.save(state, partial)
    os.replace(partial, path)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train and export the demo checkpoint.")
    parser.add_argument("--out", type=Path, required=True, help="folder to export to")
    parser.add_argument("--state", type=Path, help="resume state; default: <out>.state.pt")
    parser.add_argument("--max_minutes", type=float, default=90.0)
    parser.add_argument("--max_steps", type=int, default=1_000_000)
    parser.add_argument("--export_minutes", type=float, default=10.0)
    parser.add_argument("--resume", action="store_true", help="go on from the state; otherwise it must not exist")
    parser.add_argument("--num_threads", type=int, default=2)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(options.num_threads)
    state_path: Path = options.state or options.out.with_suffix(".state.pt")
    if state_path.exists() and not options.resume:
        parser.error(f"{state_path} exists: pass --resume to go on from it, or remove it")
    progress = train(
        options.out,
        state_path,
        max_minutes=options.max_minutes,
        max_steps=options.max_steps,
        export_minutes=options.export_minutes,
    )
    _LOGGER.info("done: %s", progress)


if __name__ == "__main__":
    main()
