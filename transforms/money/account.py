"""Account: prices each attempt's tokens by the dated price book.

Part of *answer* (run -> validate -> **account** -> commit), after `transforms/answer/validate.py`. Failed answers are
accounted like good ones: they were paid.

Amounts are never rounded. A price has at most 6 decimal places per 1,000,000 tokens (the price book refuses more), so
tokens x price / 10^6 has at most 12, which is what decimal128(38, 12) holds.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal

from moebeam.schemas.answers import AccountedAnswer, ClassAmounts, ValidatedAnswer
from moebeam.schemas.prices import EXACT, Charge, CostBasis, PriceLine, PriceMode
from moebeam.schemas.records import Completion, Usage
from moebeam.transforms.money.price_book import PriceBook


@dataclass(frozen=True, slots=True)
class Accounting:
    """Prices that a run's attempts are charged at, and what every line of its ledger repeats.

    Attributes:
        book: None leaves every charge None.
        provider, model: whose prices apply; None means what each completion names.
        tag_columns: passthrough columns that become tags of ledger lines.
    """

    run_id: str
    book: PriceBook | None = None
    provider: str | None = None
    model: str | None = None
    tag_columns: tuple[str, ...] = ()

    @property
    def book_version(self) -> str | None:
        return self.book and self.book.version

    def find_price(
        self, provider: str, model: str, started_at: datetime, *, prompt_tokens: int, mode: PriceMode = "online"
    ) -> PriceLine | None:
        """The price line of an attempt; None if there is none."""
        if self.book is None:
            return None
        provider, model = self.provider or provider, self.model or model
        return self.book.find(provider, model, started_at, prompt_tokens=prompt_tokens, mode=mode)

    def charge_completion(self, completion: Completion) -> Charge | None:
        """What a completion cost; None without a price."""
        line = self.find_price(
            completion.provider,
            completion.model,
            completion.started_at,
            prompt_tokens=completion.usage.prompt_tokens,
            mode=completion.price_mode,
        )
        return line and charge(completion.usage, line)


def account(answers: Iterable[ValidatedAnswer], accounting: Accounting) -> Iterator[AccountedAnswer]:
    """Price answers lazily and in order."""
    for answer in answers:
        charged = accounting.charge_completion(answer.completion)
        lost = charged and _lost_cost(answer.completion, accounting, charged.line.currency)
        yield AccountedAnswer(answer, charged, lost_cost_at_most=lost)


def _lost_cost(completion: Completion, accounting: Accounting, currency: str) -> Decimal | None:
    """Most that the lost calls before an answer may be billed: prompts as misses, and all of `max_tokens`."""
    total: Decimal | None = None
    for call in completion.lost_calls:
        # The provider's own count of the prompt, if an answer reported one.
        num_input = max(call.prompt_tokens, completion.usage.prompt_tokens)
        line = accounting.find_price(call.provider, call.model, call.started_at, prompt_tokens=num_input)
        if line is None or line.currency != currency:
            return None
        total = EXACT.add(total or Decimal(0), charge(Usage(num_input, call.max_output_tokens, None), line).cost)
    return total


def charge(usage: Usage, line: PriceLine) -> Charge:
    """Price one attempt by disjoint token classes.

    If the number of cached tokens is unknown, or cached tokens have no price of their own, all input is charged at the
    miss price and the basis is `upper_bound`. Token counts stay as reported: cached tokens remain `cache_hit_tokens`
    even if charged like the others.

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
        input_cost=EXACT.add(price_tokens(cached or 0, hit_price), price_tokens(num_misses, line.cache_miss)),
        output_cost=price_tokens(usage.completion_tokens, line.output),
        basis=basis,
    )


def class_amounts(charge: Charge) -> ClassAmounts:
    """Cost of each token class of an attempt; without a hit price, hits cost as much as misses."""
    line = charge.line
    visible_output = price_tokens(charge.visible_output_tokens, line.output)
    hit_price = line.cache_miss if line.cache_hit is None else line.cache_hit
    cache_hit = price_tokens(charge.cache_hit_tokens or 0, hit_price)
    return ClassAmounts(
        cache_hit=cache_hit,
        cache_miss=EXACT.subtract(charge.input_cost, cache_hit),
        visible_output=visible_output,
        reasoning=EXACT.subtract(charge.output_cost, visible_output),
    )


def price_tokens(num_tokens: int, price: Decimal) -> Decimal:
    """Exact cost of tokens; `price` is per 1,000,000."""
    return EXACT.scaleb(EXACT.multiply(Decimal(num_tokens), price), -6)
