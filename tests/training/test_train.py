"""Training's parts that need no training."""

import torch

from moebeam.jobs.demo.tickets import generate_tickets
from training.muon import Muon, orthogonalize, orthogonalize_all
from training.tokenizer import train_tokenizer
from training.train import BUCKET_LENGTHS, IGNORED, collate, encode_ticket, learning_rate_factor, training_batches


def test_orthogonalize_brings_singular_values_near_one() -> None:
    stack = torch.randn(3, 48, 24, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalize(stack).float())
    assert values.min() > 0.5
    assert values.max() < 1.5


def test_muon_reduces_a_loss_over_stacked_matrices() -> None:
    weight = torch.nn.Parameter(torch.ones(2, 8, 4))
    target = torch.randn(2, 8, 4, generator=torch.Generator().manual_seed(0))
    optimizer = Muon([weight], 0.05)
    losses: list[float] = []
    for _ in range(200):
        loss = (weight - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]


def test_labels_cover_the_answer_and_nothing_else() -> None:
    tokenizer = train_tokenizer()
    prompt, answer = encode_ticket(generate_tickets(1, seed=1, split="train")[0], tokenizer)
    batch = collate([[(prompt, answer)]], 300, 2)
    assert batch.labels[batch.labels != IGNORED].tolist() == answer
    assert batch.labels[0, len(prompt) - 1] == answer[0]
    assert batch.input_ids[0, : len(prompt) + len(answer)].tolist() == prompt + answer


def test_a_step_has_the_same_batch_after_a_resume() -> None:
    tokenizer = train_tokenizer()
    straight = training_batches(tokenizer, first_step=0)
    batches = [next(straight) for _ in range(12)]
    resumed = next(training_batches(tokenizer, first_step=11))
    assert torch.equal(resumed.input_ids, batches[11].input_ids)
    assert {batch.input_ids.size(1) for batch in batches} <= set(BUCKET_LENGTHS)


def test_learning_rate_warms_up_holds_and_falls_to_zero() -> None:
    assert learning_rate_factor(0, 0.0) < 0.05
    assert learning_rate_factor(1_000, 0.2) == 1.0
    assert 0.0 < learning_rate_factor(1_000, 0.9) < 0.5
    assert learning_rate_factor(1_000, 1.0) == 0.0


def test_stacking_does_not_change_an_update() -> None:
    generator = torch.Generator().manual_seed(0)
    updates = [torch.randn(*shape, generator=generator) for shape in ((8, 4), (2, 8, 4), (4, 4), (8, 4))]
    for update, together in zip(updates, orthogonalize_all(updates), strict=True):
        assert torch.allclose(together.float(), orthogonalize(update).float(), atol=0.02)
