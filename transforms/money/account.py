"""Account: what each attempt's tokens cost, by the dated price book.

Stands in the *answer* stage (run -> validate -> **account** -> commit): validated answers come from
`transforms/answer/validate.py`, accounted ones are committed. Failed answers are accounted like good ones: they were
paid.

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
    """Whose prices a run's attempts are charged at, and what every line of its ledger repeats.

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
        """The price line of an attempt by a provider's model; None if there is none."""
        if self.book is None:
            return None
        provider, model = self.provider or provider, self.model or model
        return self.book.find(provider, model, started_at, prompt_tokens=prompt_tokens, mode=mode)

    def charge_completion(self, completion: Completion) -> Charge | None:
        """What a completion cost; None where it has no price."""
        line = self.find_price(
            completion.provider,
            completion.model,
            completion.started_at,
            prompt_tokens=completion.usage.prompt_tokens,
            mode=completion.price_mode,
        )
        return line and charge(completion.usage, line)


def account(answers: Iterable[ValidatedAnswer], accounting: Accounting) -> Iterator[AccountedAnswer]:
    """Price answers one by one, lazily and in the order in which they come."""
    for answer in answers:
        charged = accounting.charge_completion(answer.completion)
        lost = charged and _lost_cost(answer.completion, accounting, charged.line.currency)
        yield AccountedAnswer(answer, charged, lost_cost_at_most=lost)


def _lost_cost(completion: Completion, accounting: Accounting, currency: str) -> Decimal | None:
    """What the calls before an answer may be billed at most: their prompts as misses, and all of `max_tokens`."""
    total: Decimal | None = None
    for call in completion.lost_calls:
        # The provider's own count of the prompt, where an answer brought one.
        num_input = max(call.prompt_tokens, completion.usage.prompt_tokens)
        line = accounting.find_price(call.provider, call.model, call.started_at, prompt_tokens=num_input)
        if line is None or line.currency != currency:
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
