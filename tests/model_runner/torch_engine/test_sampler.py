"""The sampler against float64 arithmetic, and what a row's neighbours must not change."""

import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from moebeam.model_runner.seeds import derive_seed
from moebeam.model_runner.torch_engine import sampler
from moebeam.model_runner.torch_engine.sampler import MAX_VOCAB_SIZE, Draw, multiply_share, sample
from tests.support.engines.tiny_requests import request_of

vocab_sizes = st.sampled_from([1, 2, 31, 32, 33, 100])
draws = st.builds(
    Draw,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    top_p=st.sampled_from([1.0, 0.9, 0.5, 0.01]),
    min_p=st.sampled_from([0.0, 0.05, 0.5]),
    seed=st.integers(-(2**70), 2**70),
    position=st.integers(0, 5_000),
    wants_logprob=st.booleans(),
)


@st.composite
def batches(draw: st.DrawFn, max_rows: int = 6) -> tuple[Tensor, list[Draw], Tensor | None]:
    """Logits with ties, one `Draw` a row, and sometimes masks that leave each row a token."""
    settings = draw(st.lists(draws, min_size=1, max_size=max_rows))
    vocab_size = draw(vocab_sizes)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    logits = (torch.randn(len(settings), vocab_size, generator=generator) * 8).round() / 4
    if draw(st.booleans()):
        logits = logits.bfloat16()
    if draw(st.booleans()):
        return logits, settings, None
    is_allowed = torch.rand(len(settings), vocab_size, generator=generator) < 0.5
    is_allowed[torch.arange(len(settings)), torch.randint(vocab_size, (len(settings),), generator=generator)] = True
    return logits, settings, pack_mask(is_allowed)


def pack_mask(is_allowed: Tensor) -> Tensor:
    """llguidance's layout, by numpy: bit `i` of word `w` is token `32 * w + i`."""
    num_bits = -(-is_allowed.shape[1] // 32) * 32
    bits = np.zeros((is_allowed.shape[0], num_bits), dtype=bool)
    bits[:, : is_allowed.shape[1]] = is_allowed.numpy()
    return torch.from_numpy(np.packbits(bits, axis=1, bitorder="little").view("<i4").copy())


def unpack_mask(allowed: Tensor | None, shape: torch.Size) -> np.ndarray:
    if allowed is None:
        return np.ones(shape, dtype=bool)
    return np.unpackbits(allowed.numpy().view(np.uint8), axis=1, bitorder="little")[:, : shape[1]].astype(bool)


def kept_probabilities(logits: Tensor, draw: Draw, is_allowed: np.ndarray) -> np.ndarray:
    """What a row may draw, each token's probability, by sorting in float64; shape (vocab_size,)."""
    scaled = np.where(is_allowed, logits.double().numpy() / draw.temperature, -np.inf)
    probabilities = np.exp(scaled - scaled.max())
    probabilities /= probabilities.sum()
    kept = np.zeros_like(probabilities)
    reached = 0.0
    for token_id in np.argsort(-probabilities, kind="stable"):
        if reached >= draw.top_p - 1e-9:
            break
        reached += probabilities[token_id]
        kept[token_id] = probabilities[token_id]
    kept[probabilities < draw.min_p * probabilities.max() - 1e-9] = 0.0
    return kept / kept.sum()


@given(batches())
def test_greedy_rows_take_the_first_of_the_likeliest_allowed_tokens(batch: tuple[Tensor, list[Draw], Tensor | None]):
    logits, settings, allowed = batch
    scores = np.where(unpack_mask(allowed, logits.shape), logits.double().numpy(), -np.inf)
    found = sample(logits, [replace(draw, temperature=0.0) for draw in settings], allowed)
    assert [drawn.token_id for drawn in found] == scores.argmax(axis=1).tolist()
    assert not any(drawn.is_broken for drawn in found)


@given(batches())
def test_sampled_rows_agree_with_float64(batch: tuple[Tensor, list[Draw], Tensor | None]):
    logits, settings, allowed = batch
    is_allowed = unpack_mask(allowed, logits.shape)
    for row, (draw, drawn) in enumerate(zip(settings, sample(logits, settings, allowed), strict=True)):
        if draw.temperature == 0.0:
            continue
        kept = kept_probabilities(logits[row], draw, is_allowed[row])
        assert kept[drawn.token_id] > 0.0
        uniform = (int(np.random.Philox(key=draw.seed % 2**128, counter=draw.position).random_raw()) >> 32) / 2**32
        above = kept.cumsum()[drawn.token_id]
        assert above - kept[drawn.token_id] - 1e-6 <= uniform <= above + 1e-6


@given(batches(), st.randoms(use_true_random=False))
def test_a_row_is_drawn_alone_as_in_any_batch(batch: tuple[Tensor, list[Draw], Tensor | None], random):
    logits, settings, allowed = batch
    together = sample(logits, settings, allowed)
    order = list(range(len(settings)))
    random.shuffle(order)
    shuffled = sample(logits[order], [settings[row] for row in order], None if allowed is None else allowed[order])
    for position, row in enumerate(order):
        mask = None if allowed is None else allowed[row : row + 1]
        (alone,) = sample(logits[row : row + 1], settings[row : row + 1], mask)
        assert shuffled[position].token_id == together[row].token_id == alone.token_id
        assert shuffled[position].logprob == pytest.approx(alone.logprob)


def test_neither_top_p_nor_min_p_of_a_neighbour_changes_a_row():
    logits = torch.randn(1, 5_000, generator=torch.Generator().manual_seed(1))
    for position in range(50):
        own = Draw(temperature=1.0, seed=3, position=position)
        (alone,) = sample(logits, [own])
        beside, _, _ = sample(logits.repeat(3, 1), [own, replace(own, top_p=0.3), replace(own, min_p=0.9)])
        assert beside == alone


def test_shares_of_a_share_follow_the_distribution():
    logits = torch.tensor([[0.0, 1.0, 2.0, -torch.inf, 0.5]])
    draw = Draw(temperature=0.7, seed=11)
    num_draws = 4_000
    found = sample(logits.repeat(num_draws, 1), [replace(draw, position=position) for position in range(num_draws)])
    counts = Counter(drawn.token_id for drawn in found)
    for token_id, probability in enumerate(torch.softmax(logits[0].double() / 0.7, dim=0).tolist()):
        deviation = math.sqrt(num_draws * probability * (1 - probability))
        assert abs(counts[token_id] - num_draws * probability) <= 4 * deviation


def test_seeds_and_positions_draw_independent_numbers():
    logits = torch.zeros(64, 1_000)
    same_seed = sample(logits, [Draw(temperature=1.0, seed=5, position=position) for position in range(64)])
    same_position = sample(logits, [Draw(temperature=1.0, seed=seed, position=5) for seed in range(-32, 32)])
    assert len({drawn.token_id for drawn in same_seed}) > 50
    assert len({drawn.token_id for drawn in same_position}) > 50


def test_a_negative_seed_draws_again_what_it_drew():
    draw = [Draw(temperature=1.0, seed=-1)]
    logits = torch.zeros(1, 100_000)
    assert sample(logits, draw) == sample(logits, draw)
    assert sample(logits, draw) != sample(logits, [replace(draw[0], seed=1)])


def test_equals_enter_the_nucleus_in_order_of_token_id():
    logits = torch.zeros(200, 10)
    found = sample(logits, [Draw(temperature=1.0, top_p=0.3, position=position) for position in range(200)])
    assert {drawn.token_id for drawn in found} == {0, 1, 2}


@pytest.mark.parametrize(("uniform", "expected"), [(0, 1), (2**32 - 1, 3)])
def test_the_first_and_last_random_numbers_draw_allowed_tokens(
    monkeypatch: pytest.MonkeyPatch, uniform: int, expected: int
):
    monkeypatch.setattr(sampler, "_draw_uniform", lambda draw: uniform)
    allowed = torch.tensor([[0b01010]], dtype=torch.int32)
    (drawn,) = sample(torch.zeros(1, 5), [Draw(temperature=1.0)], allowed)
    assert drawn.token_id == expected


@pytest.mark.parametrize("settings", [{"top_p": 1e-12}, {"min_p": 1.0}, {"temperature": 1e-300}])
def test_the_narrowest_settings_leave_the_likeliest_token(settings: dict[str, float]):
    logits = torch.randn(20, 33, generator=torch.Generator().manual_seed(2))
    found = sample(logits, [Draw(**({"temperature": 1.0, "seed": seed} | settings)) for seed in range(20)])
    assert [drawn.token_id for drawn in found] == logits.argmax(dim=1).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("has_mask", [False, True])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("token_id", [0, 17, 39])
def test_one_bad_logit_breaks_its_row_only(
    dtype: torch.dtype, temperature: float, has_mask: bool, value: float, token_id: int
):
    logits = torch.randn(3, 40, generator=torch.Generator().manual_seed(3)).to(dtype)
    is_allowed = torch.ones(3, 40, dtype=torch.bool)
    is_allowed[:, 17] = False
    allowed = pack_mask(is_allowed) if has_mask else None
    settings = [Draw(temperature=temperature, top_p=0.9, seed=row, wants_logprob=True) for row in range(3)]
    expected = sample(logits, settings, allowed)
    logits[1, token_id] = value
    found = sample(logits, settings, allowed)
    assert (found[1].token_id, found[1].logprob, found[1].is_broken) == (-1, None, True)
    assert [found[0], found[2]] == [expected[0], expected[2]]
    assert not (found[0].is_broken or found[2].is_broken)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_without_an_allowed_token_is_broken(temperature: float):
    logits = torch.zeros(3, 40)
    logits[2] = -torch.inf
    is_allowed = torch.ones(3, 40, dtype=torch.bool)
    is_allowed[1] = False
    found = sample(logits, [Draw(temperature=temperature)] * 3, pack_mask(is_allowed))
    assert [drawn.is_broken for drawn in found] == [False, True, True]


def test_bits_past_the_vocabulary_allow_nothing():
    allowed = torch.tensor([[0, -1 << 8]], dtype=torch.int32)  # tokens 40 and on
    (drawn,) = sample(torch.zeros(1, 40), [Draw()], allowed)
    assert drawn.is_broken


@given(batches())
def test_log_probabilities_are_those_of_the_raw_logits(batch: tuple[Tensor, list[Draw], Tensor | None]):
    logits, settings, allowed = batch
    before = logits.clone()
    expected = torch.log_softmax(logits.double(), dim=-1)
    for row, (draw, drawn) in enumerate(zip(settings, sample(logits, settings, allowed), strict=True)):
        if draw.wants_logprob:
            assert drawn.logprob == pytest.approx(expected[row, drawn.token_id].item(), abs=1e-5)
        else:
            assert drawn.logprob is None
    assert torch.equal(logits, before)


def test_token_ids_of_the_largest_vocabulary_come_back_exactly():
    logits = torch.zeros(2, MAX_VOCAB_SIZE)
    logits[:, -1] = 50.0
    found = sample(logits, [Draw(), Draw(temperature=1.0, top_p=0.9)])
    assert [drawn.token_id for drawn in found] == [MAX_VOCAB_SIZE - 1] * 2


@given(st.integers(0, 2**32), st.integers(0, 2**58))
def test_shares_of_totals_are_exact(share: int, total: int):
    found = multiply_share(torch.tensor([share]), torch.tensor([total]))
    assert found.tolist() == [share * total >> 32]


def test_no_rows_draw_nothing():
    assert sample(torch.zeros(0, 10), []) == []


@pytest.mark.parametrize(
    ("logits", "num_draws", "allowed"),
    [
        (torch.zeros(2, 10), 1, None),
        (torch.zeros(10), 1, None),
        (torch.zeros(1, MAX_VOCAB_SIZE + 1), 1, None),
        (torch.zeros(1, 33), 1, torch.zeros(1, 1, dtype=torch.int32)),
        (torch.zeros(1, 33), 1, torch.zeros(1, 2, dtype=torch.int64)),
    ],
)
def test_shapes_that_do_not_fit_are_refused(logits: Tensor, num_draws: int, allowed: Tensor | None):
    with pytest.raises(ValueError, match="expected"):
        sample(logits, [Draw()] * num_draws, allowed)


counts = st.dictionaries(st.integers(0, 40), st.integers(1, 9), max_size=6)
penalties = st.sampled_from([0.0, 0.25, 1.5, -2.0])


@given(st.integers(0, 2**32), counts, penalties, penalties)
def test_penalties_are_subtracted_as_vllm_defines_them(
    seed: int, found: dict[int, int], frequency: float, presence: float
) -> None:
    logits = (torch.randn(2, 41, generator=torch.Generator().manual_seed(seed)) * 8).round() / 4
    draw = Draw(wants_logprob=True, frequency_penalty=frequency, presence_penalty=presence, counts=found)
    expected = logits[0].double().numpy().copy()
    for token_id, count in found.items():
        expected[token_id] -= frequency * count + presence
    first, other = sample(logits, [draw, Draw()])
    assert first.token_id == int(expected.argmax())
    assert other == sample(logits[1:], [Draw()])[0]
    # What is reported is the model's own probability.
    raw = logits[0].double().log_softmax(dim=-1)[first.token_id].item()
    assert first.logprob == pytest.approx(raw, abs=1e-5)


def test_penalties_leave_the_logits_as_they_were() -> None:
    logits = torch.tensor([[2.0, 1.0]])
    (drawn,) = sample(logits, [Draw(presence_penalty=1.5, counts={0: 1})])
    assert drawn.token_id == 1
    assert logits.tolist() == [[2.0, 1.0]]


def chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


NUM_DRAWS = 10_000
WEIGHTS = np.array([8, 4, 4, 2, 2, 2, 1, 1]) / 24


def draw_rows(*, sample_number: int = 0, position: int = 0) -> np.ndarray:
    """The token of each of 10,000 rows of one prompt and one seed; shape (NUM_DRAWS,)."""
    asked = request_of("row", [70], temperature=1.0, seed=7, sample=sample_number)
    draws = [
        Draw(temperature=1.0, seed=derive_seed(replace(asked, row_id=f"in.parquet:{row}")), position=position)
        for row in range(NUM_DRAWS)
    ]
    logits = torch.tensor(np.log(WEIGHTS), dtype=torch.float32).expand(NUM_DRAWS, -1)
    return np.array([drawn.token_id for drawn in sample(logits, draws)])


def test_rows_of_one_prompt_and_one_seed_are_drawn_by_the_models_probabilities_and_independently() -> None:
    first = draw_rows()
    # Critical values at 0.1%, of 7 and 63 degrees of freedom; the seed is fixed, so that chance plays no part.
    assert chi_square(np.bincount(first, minlength=8), NUM_DRAWS * WEIGHTS) < 24.32
    others = {
        "the next row": np.roll(first, 1),
        "another sample": draw_rows(sample_number=1),
        "the next token": draw_rows(position=1),
    }
    for what, other in others.items():
        pairs = np.bincount(first * 8 + other, minlength=64)
        assert chi_square(pairs, NUM_DRAWS * np.outer(WEIGHTS, WEIGHTS).ravel()) < 103.4, what
