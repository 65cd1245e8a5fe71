"""Account: what each attempt's tokens cost, by the dated price book.

Stands in the *answer* stage (run -> validate -> **account** -> commit): validated answers come from
`transforms/answer/validate.py`, accounted ones are committed. Failed answers are accounted like good ones: they were
paid.

Amounts are never rounded. A price has at most 6 decimal places per 1,000,000 tokens (the price book refuses more), so
tokens x price / 10^6 has at most 12, which is what decimal128(38, 12) holds.
"""

from collections.abc import Iterable, Iterator
from decimal import Decimal

from moebeam.schemas.answers import AccountedAnswer, ClassAmounts, ValidatedAnswer
from moebeam.schemas.prices import EXACT, Charge, CostBasis, PriceLine
from moebeam.schemas.records import Completion, Usage
from moebeam.transforms.money.price_book import PriceBook


def account(
    answers: Iterable[ValidatedAnswer], book: PriceBook | None, provider: str | None, model: str | None
) -> Iterator[AccountedAnswer]:
    """Price answers one by one, lazily and in the order in which they come.

    Args:
        book: None leaves every charge None.
        provider: whose prices; None means the completion's own.
        model: which model's prices; None means the completion's own.
    """
    for answer in answers:
        completion = answer.completion
        line = book and book.find(
            provider or completion.provider,
            model or completion.model,
            completion.started_at,
            prompt_tokens=completion.usage.prompt_tokens,
            mode=completion.price_mode,
        )
        if not line:
            yield AccountedAnswer(answer, None)
            continue
        lost = _lost_cost(completion, book, provider, model, line.currency)
        yield AccountedAnswer(answer, charge(completion.usage, line), lost_cost_at_most=lost)


def _lost_cost(
    completion: Completion, book: PriceBook | None, provider: str | None, model: str | None, currency: str
) -> Decimal | None:
    """What the calls before an answer may be billed at most: their prompts as misses, and all of `max_tokens`."""
    total: Decimal | None = None
    for call in completion.lost_calls:
        # The provider's own count of the prompt, where an answer brought one.
        num_input = max(call.prompt_tokens, completion.usage.prompt_tokens)
        line = book and book.find(
            provider or call.provider, model or call.model, call.started_at, prompt_tokens=num_input
        )
        if not line or line.currency != currency:
            return None
        total = EXACT.add(total or Decimal(0), charge(Usage(num_input, call.max_output_tokens, None), line).cost)
    return total


def charge(usage: Usage, line: PriceLine) -> Charge:
    """The price of one attempt, by disjoint token classes.

    Where the number of cached tokens is unknown, or cached tokens have no price of their own, all input is charged at
    the miss price, and the basis says that this is an upper bound. Token counts stay as they were reported: the
    cached ones remain `cache_hit_tokens` even where they are charged like the others.

    Raises:
        ValueError: token counts are negative, or a part exceeds its whole.
    """
    cached = usage.cached_tokens
    if not 0 <= (cached or 0) <= usage.prompt_tokens or not 0 <= usage.reasoning_tokens <= usage.completion_tokens:
        raise ValueError(f"expected 0 <= cached <= prompt and 0 <= reasoning <= completion tokens, found {usage}")
    hit_price = line.cache_miss if cached is None or line.cache_hit is None else line.cache_hit
    basis: CostBasis = "upper_bound" if cached is None or (cached and line.cache_hit is None) else "exact"
    num_misses = usage.prompt_tokens - (cached or 0)
    return Charge(
        cache_hit_tokens=cached,
        cache_miss_tokens=num_misses,
        visible_output_tokens=usage.completion_tokens - usage.reasoning_tokens,
        reasoning_tokens=usage.reasoning_tokens,
        line=line,
        input_cost=EXACT.add(_amount(cached or 0, hit_price), _amount(num_misses, line.cache_miss)),
        output_cost=_amount(usage.completion_tokens, line.output),
        basis=basis,
    )


def class_amounts(charge: Charge) -> ClassAmounts:
    """What each token class of an attempt cost; the hits of a book without a hit price cost as much as misses."""
    line = charge.line
    visible_output = _amount(charge.visible_output_tokens, line.output)
    hit_price = line.cache_miss if line.cache_hit is None else line.cache_hit
    cache_hit = _amount(charge.cache_hit_tokens or 0, hit_price)
    return ClassAmounts(
        cache_hit=cache_hit,
        cache_miss=EXACT.subtract(charge.input_cost, cache_hit),
        visible_output=visible_output,
        reasoning=EXACT.subtract(charge.output_cost, visible_output),
    )


def _amount(num_tokens: int, price: Decimal) -> Decimal:
    return EXACT.scaleb(EXACT.multiply(Decimal(num_tokens), price), -6)
