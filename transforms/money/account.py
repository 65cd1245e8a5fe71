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
from moebeam.schemas.prices import EXACT, Charge, PriceLine, PriceMode
from moebeam.schemas.records import Completion, Usage
from moebeam.transforms.money.price_book import PriceBook


@dataclass(frozen=True, slots=True)
class Accounting:
    """Prices that a run's attempts are charged at, and what every line of its ledger repeats.

    Attributes:
        book: None leaves every charge None.
        provider, model: whose prices apply; None means what each completion names.
        tag_columns: names of the tags of ledger lines.
        tag_fields: the passthrough columns that hold them; empty where they have the tags' names.
    """

    run_id: str
    book: PriceBook | None = None
    provider: str | None = None
    model: str | None = None
    tag_columns: tuple[str, ...] = ()
    tag_fields: tuple[str, ...] = ()

    @property
    def fields_of_tags(self) -> dict[str, str]:
        """Tag -> the passthrough column that holds it."""
        return dict(zip(self.tag_columns, self.tag_fields or self.tag_columns, strict=True))

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
        """What a completion cost; None without a price, or if its provider did not count the tokens."""
        usage = completion.usage
        if not usage.is_known:
            return None
        line = self.find_price(
            completion.provider,
            completion.model,
            completion.started_at,
            prompt_tokens=usage.classes.num_prompt_tokens,
            mode=completion.price_mode,
        )
        return line and charge(usage, line)


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
        num_input = max(call.prompt_tokens, completion.usage.prompt_tokens or 0)
        # A call that was sent in a tier may have been served in the ordinary one.
        asked, *ordinary = (
            accounting.find_price(call.provider, call.model, call.started_at, prompt_tokens=num_input, mode=mode)
            for mode in dict.fromkeys((call.price_mode, "online"))
        )
        lines = [line for line in (asked, *ordinary) if line is not None and line.currency == currency]
        if asked is None or asked not in lines:
            return None
        used = Usage(num_input, call.max_output_tokens, None)
        total = EXACT.add(total or Decimal(0), max(charge(used, line).cost for line in lines))
    return total


def charge(usage: Usage, line: PriceLine) -> Charge:
    """Price one attempt by disjoint token classes.

    If the number of cached tokens is unknown, or cached tokens have no price of their own, all input is charged at the
    miss price and the basis is `upper_bound`. Token counts stay as reported: cached tokens remain `cache_hit_tokens`
    even if charged like the others. A contradictory usage is charged by its `classes`, which bound what any reading of
    it costs.

    Raises:
        ValueError: the tokens of the prompt or of the output are unknown.
    """
    classes = usage.classes
    hits, misses, visible, reasoning = (
        classes.cache_hit,
        classes.cache_miss,
        classes.visible_output,
        classes.reasoning,
    )
    if misses is None or visible is None or reasoning is None:
        raise ValueError(f"expected a usage with prompt and completion tokens, found {usage}")
    hit_price = line.cache_miss if line.cache_hit is None else line.cache_hit
    is_bound = hits is None or (hits and line.cache_hit is None) or usage.status == "contradictory"
    return Charge(
        cache_hit_tokens=hits,
        cache_miss_tokens=misses,
        visible_output_tokens=visible,
        reasoning_tokens=reasoning,
        line=line,
        input_cost=EXACT.add(price_tokens(hits or 0, hit_price), price_tokens(misses, line.cache_miss)),
        output_cost=price_tokens(visible + reasoning, line.output),
        basis="upper_bound" if is_bound else "exact",
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
