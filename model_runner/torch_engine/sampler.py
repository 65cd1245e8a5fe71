"""Draws the next token of every row from one batch of logits.

Stands in the engine's step between the model and the schedule: `plan -> extend -> sample -> retire`.

A row's token depends only on its own logits, `Draw` and mask: not on its neighbours, their order, or how often the
sampler ran before. Its random number is Philox's (Salmon et al., SC 2011), keyed by the request's seed and counted by
the token's position. On most accelerators the rounding of a float sum over the vocabulary changes with the batch's
shape, so probabilities become integers before they are summed, and every choice is exact arithmetic.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

MAX_VOCAB_SIZE = 1 << 18
"""Keeps sums of weights within 2**58, as `multiply_share` needs, and every token id exact in float32."""

_NUM_WEIGHT_BITS = 40
"""Precision of a token's weight: tokens up to 2**-41 times as likely as the likeliest can be drawn."""

_NUM_SHARE_BITS = 32
"""Precision of random numbers and of `top_p`."""

_NUM_LOW_BITS = 29

_MIN_TEMPERATURE = 1e-30
"""Lower temperatures become this one, at which logits that differ by 1e-28 are already as far apart as float32 goes."""


@dataclass(frozen=True, slots=True)
class Draw:
    """How the next token of one row is drawn.

    Attributes:
        temperature: 0 takes the likeliest token, the first of equals, and ignores the other settings.
        top_p: in (0, 1]; draws from the smallest set of likeliest tokens that reaches this probability.
        min_p: in [0, 1]; draws from tokens with at least this share of the likeliest one's probability.
        seed: the request's; any integer, taken modulo 2**128.
        position: index of the token within its answer, so that every token gets a random number of its own.
        wants_logprob: whether the token's log probability is computed.
        frequency_penalty: subtracted from a token's logit for each time that it occurs in `counts`.
        presence_penalty: subtracted once from the logit of each token of `counts`.
        counts: token id -> how often the answer holds it; not read without a penalty.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    position: int = 0
    wants_logprob: bool = False
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    counts: Mapping[int, int] = field(default_factory=dict[int, int])

    @property
    def has_penalty(self) -> bool:
        """Whether some token's logit changes."""
        return bool(self.counts) and (self.frequency_penalty != 0.0 or self.presence_penalty != 0.0)


@dataclass(frozen=True, slots=True)
class Drawn:
    """The token of one row.

    Attributes:
        token_id: -1 if the row is broken.
        logprob: natural log of the softmax of the raw logits (before penalties, temperature, mask, top-p) at the
            token; None if it was not asked for or the row is broken.
        is_broken: the row's logits held NaN or +inf, or no token was left to draw.
    """

    token_id: int
    logprob: float | None
    is_broken: bool


def sample(logits: Tensor, draws: Sequence[Draw], allowed: Tensor | None = None) -> list[Drawn]:
    """Draw one token for each row. Synchronises with the device once; does not change `logits`.

    Args:
        logits: float32, bfloat16 or float16, any device; shape (num_rows, vocab_size).
        draws: one for each row.
        allowed: int32 bit masks, any device; shape (num_rows, ceil(vocab_size / 32)). Bit `i` of word `w` allows token
            `32 * w + i` (llguidance's layout); bits past the vocabulary are ignored. None allows everything.
    Raises:
        ValueError: shapes do not fit together, or the vocabulary is larger than `MAX_VOCAB_SIZE`.
    """
    _check_shapes(logits, draws, allowed)
    if not draws:
        return []
    scores = _subtract_penalties(logits, draws)
    if allowed is not None:
        scores = scores + _make_bias(allowed, scores)
    # `max` propagates NaN and returns the first index of equals, so one pass both draws greedily and checks a row.
    best, token_ids = scores.max(dim=-1)  # (num_rows,), (num_rows,)
    sampled_rows = [row for row, draw in enumerate(draws) if draw.temperature > 0.0]
    if sampled_rows:
        rows = torch.tensor(sampled_rows).to(logits.device)
        drawn = _draw_tokens(scores[rows], best[rows], [draws[row] for row in sampled_rows])
        token_ids = token_ids.index_copy(0, rows, drawn)
    columns = [best.float(), token_ids.float()]
    logprob_rows = [row for row, draw in enumerate(draws) if draw.wants_logprob]
    if logprob_rows:
        rows = torch.tensor(logprob_rows).to(logits.device)
        columns.append(
            torch.zeros_like(columns[0]).index_copy(0, rows, _compute_logprobs(logits[rows], token_ids[rows]))
        )
    values: list[list[float]] = torch.stack(columns, dim=-1).tolist()  # (num_rows, 2 or 3)
    return [_make_drawn(draw, *row) for draw, row in zip(draws, values, strict=True)]


def _check_shapes(logits: Tensor, draws: Sequence[Draw], allowed: Tensor | None) -> None:
    if logits.dim() != 2 or logits.shape[0] != len(draws):
        raise ValueError(f"expected logits of shape ({len(draws)}, vocab_size), found {tuple(logits.shape)}")
    vocab_size = logits.shape[1]
    if not 0 < vocab_size <= MAX_VOCAB_SIZE:
        raise ValueError(f"expected a vocabulary of 1 to {MAX_VOCAB_SIZE} tokens, found {vocab_size}")
    shape = (len(draws), (vocab_size + 31) // 32)
    if allowed is not None and (allowed.dtype != torch.int32 or tuple(allowed.shape) != shape):
        raise ValueError(f"expected an int32 mask of shape {shape}, found {allowed.dtype} of {tuple(allowed.shape)}")


def _make_drawn(draw: Draw, best: float, token_id: float, logprob: float | None = None) -> Drawn:
    if not math.isfinite(best):
        return Drawn(-1, None, is_broken=True)
    return Drawn(int(token_id), logprob if draw.wants_logprob else None, is_broken=False)


def _subtract_penalties(logits: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Subtract what rows with penalties ask for, in float32 and in vLLM's order; shape (num_rows, vocab_size).

    Widening the other rows to float32 changes neither their values nor their order.
    """
    places = [(row, token_id) for row, draw in enumerate(draws) if draw.has_penalty for token_id in draw.counts]
    if not places:
        return logits
    amounts = [
        (draws[row].frequency_penalty, float(draws[row].counts[token_id]), draws[row].presence_penalty)
        for row, token_id in places
    ]
    rows, token_ids = torch.tensor(places).to(logits.device).unbind(dim=1)  # (num_places,) each
    frequency, counts, presence = torch.tensor(amounts).to(logits.device).unbind(dim=1)
    scores = logits.float().clone()
    scores[rows, token_ids] = scores[rows, token_ids] - frequency * counts - presence
    return scores


def _make_bias(allowed: Tensor, logits: Tensor) -> Tensor:
    """Make the bias of logits: 0 for allowed tokens, -inf for others; shape (num_rows, vocab_size), the logits' dtype.

    It is added, not filled in: NaN + -inf and +inf + -inf are NaN, so bad logits are found in forbidden tokens as well.
    """
    words = allowed.to(logits.device, non_blocking=True)
    bits = torch.tensor([1 << bit if bit < 31 else -(1 << 31) for bit in range(32)], dtype=torch.int32)
    is_allowed = words.unsqueeze(-1).bitwise_and(bits.to(logits.device)).ne(0)  # (num_rows, num_words, 32)
    zero = torch.zeros((), dtype=logits.dtype, device=logits.device)
    return torch.where(is_allowed.flatten(1)[:, : logits.shape[1]], zero, -torch.inf)


def _draw_tokens(scores: Tensor, best: Tensor, draws: Sequence[Draw]) -> Tensor:
    """Draw the tokens of rows with a temperature.

    Args:
        scores: masked logits; shape (num_rows, vocab_size).
        best: the largest of each row; shape (num_rows,).
    Returns:
        int64, shape (num_rows,); anything within the vocabulary where `best` is not finite.
    """
    settings = torch.tensor([(max(draw.temperature, _MIN_TEMPERATURE), draw.min_p) for draw in draws])
    temperatures, min_ps = settings.to(scores.device).unsqueeze(-1).unbind(dim=1)  # (num_rows, 1) each
    shares = torch.tensor([(_draw_uniform(draw), _quantize_share(draw.top_p)) for draw in draws])
    uniforms, top_ps = shares.to(scores.device).unsqueeze(-1).unbind(dim=1)  # (num_rows, 1) each, int64
    # Relative to the likeliest token. Subtracted first, so that its own is 1 at any temperature and none is +inf.
    ratios = ((scores.float() - best.float().unsqueeze(-1)) / temperatures).exp()  # (num_rows, vocab_size)
    weights = _quantize_weights(ratios)
    if any(draw.top_p < 1.0 for draw in draws):
        weights = weights * _find_nucleus(ratios, top_ps)
    if any(draw.min_p > 0.0 for draw in draws):
        weights = weights * (ratios >= min_ps)
    cumulative = weights.cumsum(dim=-1)
    targets = multiply_share(uniforms, cumulative[:, -1:])
    token_ids = torch.searchsorted(cumulative, targets, right=True).squeeze(-1)  # first whose sum exceeds the target
    return token_ids.clamp_(max=scores.shape[1] - 1)  # a broken row's sums may not ascend


def _quantize_weights(ratios: Tensor) -> Tensor:
    """Turn relative probabilities into integers, the likeliest token's into 2**40; same shape."""
    return (ratios * (1 << _NUM_WEIGHT_BITS)).round().long()


def _find_nucleus(ratios: Tensor, top_ps: Tensor) -> Tensor:
    """Find the smallest set of tokens that reaches `top_p`; equals enter in order of token id.

    Args:
        ratios: probabilities, relative to the likeliest token's; shape (num_rows, vocab_size).
        top_ps: in 2**-32; shape (num_rows, 1).
    Returns:
        bool, shape (num_rows, vocab_size).
    """
    ordered, order = ratios.sort(dim=-1, descending=True, stable=True)
    weights = _quantize_weights(ordered)
    cumulative = weights.cumsum(dim=-1)
    is_in = cumulative - weights < multiply_share(top_ps, cumulative[:, -1:])
    return torch.zeros_like(is_in).scatter(-1, order, is_in)


def _quantize_share(fraction: float) -> int:
    """Express a fraction of (0, 1] in 2**-32, at least 1; truncated, since 0.3 rounded up exceeds three tenths."""
    return max(1, int(fraction * (1 << _NUM_SHARE_BITS)))


def multiply_share(shares: Tensor, totals: Tensor) -> Tensor:
    """Compute `floor(shares * totals / 2**32)` exactly, although the product has up to 91 bits.

    Args:
        shares: int64, from 0 to 2**32.
        totals: int64, from 0 to 2**58.
    """
    low = totals & ((1 << _NUM_LOW_BITS) - 1)
    return (shares * (totals >> _NUM_LOW_BITS) + (shares * low >> _NUM_LOW_BITS)) >> (_NUM_SHARE_BITS - _NUM_LOW_BITS)


def _draw_uniform(draw: Draw) -> int:
    """Draw the random number of one token, in 2**-32: from 0 to 2**32 - 1."""
    generator = np.random.Philox(key=draw.seed % (1 << 128), counter=draw.position)
    return int(generator.random_raw()) >> (64 - _NUM_SHARE_BITS)


def _compute_logprobs(logits: Tensor, token_ids: Tensor) -> Tensor:
    """Compute the log probability of one token a row, at temperature 1; float32, shape (num_rows,)."""
    logits = logits.float()
    return logits.gather(-1, token_ids.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(dim=-1)
