"""The quote: what a job will take and cost, with bounds, computed from a survey of its prompts.

Pure arithmetic over `PromptSurvey` and price lines; money is Decimal and never rounded.

The bounds hold for a run that asks the model for every request and loses no attempt to a crash. *Low*: every token that
a cache can serve is a hit and answers are empty. *High*: nothing is a hit, every answer takes all of its `max_tokens`,
and every answer that can be asked again is, each time with as long a prompt as the context allows;
`high_without_repair` leaves these repairs out. With a sample, the bounds hold with probability `CONFIDENCE`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal

import numpy as np

from moebeam.schemas.prices import PriceLine
from moebeam.transforms.money.account import price_tokens
from moebeam.transforms.quote.cache_rules import CacheRule, estimate_hits
from moebeam.transforms.quote.prompt_survey import Counts, PromptSurvey

CONFIDENCE = 0.999
_Z = 3.2905
"""The normal distribution's quantile for `CONFIDENCE`, two-sided."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """A count of tokens or requests with its bounds, which are equal if everything was counted."""

    low: int
    expected: int
    high: int


@dataclass(frozen=True, slots=True)
class TokenForecast:
    """Totals of a job's requests.

    Attributes:
        requests: rows that the model is asked, without merged and rejected ones.
        prompt_tokens: N, of these requests, each asked once.
        tree_tokens: T, of their prefix tree.
        max_output_tokens: the sum of their `max_tokens`.
        merged_rows: rows that take another row's answer.
    """

    requests: Forecast
    prompt_tokens: Forecast
    tree_tokens: Forecast
    max_output_tokens: Forecast
    merged_rows: Forecast

    @property
    def max_hit_rate(self) -> float:
        """h*: the share of prompt tokens that a perfect cache serves."""
        num_tokens = self.prompt_tokens.expected
        return 1 - self.tree_tokens.expected / num_tokens if num_tokens else 0.0


@dataclass(frozen=True, slots=True)
class OutputForecast:
    """What answers are expected to take, an attempt and its repairs together.

    Attributes:
        tokens_a_request: mean output tokens; None if unknown, and `max_tokens` stands in.
        extra_prompt_tokens_a_request: mean prompt tokens of later attempts.
        extra_hit_rate: share of those that is expected from cache.
        basis: source of the figures, in words.
    """

    tokens_a_request: float | None = None
    extra_prompt_tokens_a_request: float = 0.0
    extra_hit_rate: float = 0.0
    basis: str = "max_tokens of every request (an upper bound)"


@dataclass(frozen=True, slots=True)
class RepairTerms:
    """Whether and how often answers may be asked again.

    Attributes:
        context_length: most tokens of prompt and answer together; None if unknown.
    """

    max_attempts: int
    can_fail: bool
    context_length: int | None


@dataclass(frozen=True, slots=True)
class TierDemand:
    """Tokens of the requests in one price tier.

    `longest_prompts` and `repeat_outputs` bound what all later attempts take together.
    """

    min_prompt_tokens: int
    prompt_tokens: Forecast
    max_hits: int
    expected_hits: int
    expected_output: int
    max_output: int
    longest_prompts: int | None
    repeat_outputs: int


@dataclass(frozen=True, slots=True)
class CostRange:
    """What the job costs at one provider if every request starts at one instant.

    Attributes:
        high: None if later attempts have no bound.
    """

    low: Decimal
    expected: Decimal
    high: Decimal | None
    high_without_repair: Decimal


def forecast_tokens(survey: PromptSurvey) -> TokenForecast:
    """Extrapolate the surveyed totals to the whole input.

    With a sample, a further row is taken to add what each sampled row adds to the others. Requests, prompt and tree
    tokens are covering functions, to which each further row adds less, so this mean errs on the high side, and the
    sample's own totals are the low bounds.
    """
    is_single = survey.is_single
    requests = np.ones(survey.num_requests, dtype=np.int64)
    added_tokens = survey.num_prompt_tokens - survey.num_nearest_tokens
    count = _extrapolate(survey, requests, requests * is_single)
    prompts = _extrapolate(survey, survey.num_prompt_tokens, survey.num_prompt_tokens * is_single)
    tree = _extrapolate(survey, survey.num_prompt_tokens - survey.num_shared_tokens, added_tokens * is_single)
    outputs = _extrapolate(survey, survey.max_output_tokens, survey.max_output_tokens * is_single)
    answered = _extrapolate(survey, survey.num_group_rows, survey.num_group_rows)
    merged = Forecast(
        int((survey.num_group_rows - 1).sum()),
        max(0, answered.expected - count.expected),
        max(0, answered.high - count.low) if survey.is_sample else answered.high - count.high,
    )
    return TokenForecast(count, prompts, tree, outputs, merged)


def _extrapolate(survey: PromptSurvey, counted: Counts, added: Counts) -> Forecast:
    """Total over all rows, from the sample's total and what each of its rows adds; exact without a sample."""
    total = int(counted.sum())
    if not survey.is_sample:
        return Forecast(total, total, total)
    num_rows = survey.num_surveyed_rows
    num_others = survey.num_rows - num_rows
    if num_rows == 0:
        return Forecast(0, 0, 0)
    # Rows without a request of their own add nothing; they are the zeros of the mean.
    mean = float(added.sum()) / num_rows
    by_row = np.add.reduceat(added, survey.row_starts) if len(survey.row_starts) else added
    squares = float((by_row.astype(np.float64) ** 2).sum())
    variance = max(0.0, squares / num_rows - mean * mean) * num_rows / max(1, num_rows - 1)
    error = _count_standard_errors(num_rows) * math.sqrt(variance / num_rows)
    expected = total + round(num_others * mean)
    return Forecast(total, expected, total + math.ceil(num_others * (mean + error)))


def _count_standard_errors(num_rows: int) -> float:
    """Standard errors between a sample's mean and its bound, by Student's t as a series around the normal quantile.

    Within 1% from 20 rows on; too low with fewer than ten.
    """
    freedom = max(1, num_rows - 1)
    return _Z + (_Z**3 + _Z) / (4 * freedom) + (5 * _Z**5 + 16 * _Z**3 + 3 * _Z) / (96 * freedom**2)


def demand(
    survey: PromptSurvey,
    tokens: TokenForecast,
    rule: CacheRule,
    output: OutputForecast,
    repair: RepairTerms,
    *,
    tier_starts: Sequence[int] = (0,),
) -> list[TierDemand]:
    """Tokens by price tier, each tier from one of `tier_starts` to the next."""
    hits = estimate_hits(survey, rule)
    outputs = _estimate_outputs(survey, output)
    found: list[TierDemand] = []
    for start, end in zip(tier_starts, (*tier_starts[1:], None), strict=True):
        is_in = survey.num_prompt_tokens >= start
        if end is not None:
            is_in &= survey.num_prompt_tokens < end
        prompts = _share(tokens.prompt_tokens, survey.num_prompt_tokens, is_in)
        num_requests = _share(tokens.requests, np.ones(survey.num_requests, dtype=np.int64), is_in)
        max_output = _share(tokens.max_output_tokens, survey.max_output_tokens, is_in)
        shared = _shared(survey, tokens, is_in)
        own_shared = int(survey.num_shared_tokens[is_in].sum())
        scale = tokens.requests.expected / survey.num_requests if survey.num_requests else 0.0
        expected = round(float(outputs[is_in].sum()) * scale)
        extra = round(output.extra_prompt_tokens_a_request * num_requests.expected)
        expected_hit = round(int(hits[is_in].sum()) / own_shared * shared) if own_shared else 0
        times = repair.max_attempts - 1 if repair.can_fail else 0
        longest = None
        if times == 0:
            longest = 0
        elif repair.context_length is not None:
            longest = times * max(0, num_requests.high * repair.context_length - max_output.high)
        found.append(
            TierDemand(
                min_prompt_tokens=start,
                prompt_tokens=Forecast(prompts.low, prompts.expected + extra, prompts.high),
                max_hits={"prefix_tree": max(0, prompts.low - int(_own_tree(survey, is_in))), "none": 0}.get(
                    rule.name, prompts.low
                ),
                expected_hits=expected_hit + round(extra * output.extra_hit_rate),
                expected_output=expected,
                max_output=max_output.high,
                longest_prompts=longest,
                repeat_outputs=times * max_output.high,
            )
        )
    return found


def _estimate_outputs(survey: PromptSurvey, output: OutputForecast) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
    """Output tokens of each request."""
    if output.tokens_a_request is None:
        return survey.max_output_tokens.astype(np.float64)
    return np.full(survey.num_requests, output.tokens_a_request)


def _share(total: Forecast, values: Counts, is_in: "np.ndarray[tuple[int], np.dtype[np.bool_]]") -> Forecast:
    """The part of a total that falls to some requests; with a sample, in proportion to the sampled ones."""
    own, whole = int(values[is_in].sum()), int(values.sum())
    if own == whole:
        return total
    return Forecast(own, total.expected * own // whole, -(-total.high * own // whole))


def _shared(survey: PromptSurvey, tokens: TokenForecast, is_in: "np.ndarray[tuple[int], np.dtype[np.bool_]]") -> int:
    """Tokens expected to be shared with another request."""
    whole = int(survey.num_shared_tokens.sum())
    own = int(survey.num_shared_tokens[is_in].sum())
    return max(0, tokens.prompt_tokens.expected - tokens.tree_tokens.expected) * own // whole if whole else 0


def _own_tree(survey: PromptSurvey, is_in: "np.ndarray[tuple[int], np.dtype[np.bool_]]") -> int:
    return int((survey.num_prompt_tokens - survey.num_shared_tokens)[is_in].sum())


def cost_range(tiers: Sequence[TierDemand], lines: Sequence[PriceLine]) -> CostRange:
    """Cost of the demand, each tier at its own line."""
    low = expected = high_once = Decimal(0)
    repairs: Decimal | None = Decimal(0)
    dearest_input = max((_dearest(line) for line in lines), default=Decimal(0))
    dearest_output = max((line.output for line in lines), default=Decimal(0))
    for tier, line in zip(tiers, lines, strict=True):
        hit = line.cache_miss if line.cache_hit is None else line.cache_hit
        num_misses = tier.prompt_tokens.low - tier.max_hits
        low += price_tokens(num_misses, line.cache_miss)
        low += price_tokens(tier.max_hits, min(hit, line.cache_miss))
        expected += price_tokens(tier.prompt_tokens.expected - tier.expected_hits, line.cache_miss)
        expected += price_tokens(tier.expected_hits, hit) + price_tokens(tier.expected_output, line.output)
        high_once += price_tokens(tier.prompt_tokens.high, _dearest(line)) + price_tokens(tier.max_output, line.output)
        # A later attempt is longer and may fall into another tier.
        if tier.longest_prompts is None:
            repairs = None
        elif repairs is not None:
            repairs += price_tokens(tier.longest_prompts, dearest_input)
            repairs += price_tokens(tier.repeat_outputs, dearest_output)
    return CostRange(low, expected, None if repairs is None else high_once + repairs, high_once)


def _dearest(line: PriceLine) -> Decimal:
    return line.cache_miss if line.cache_hit is None else max(line.cache_hit, line.cache_miss)
