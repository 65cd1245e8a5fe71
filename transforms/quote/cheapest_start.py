"""When and where a job is cheapest: cost by provider and hour, and the cheapest start that meets a deadline.

Part of the quote. A request costs the price at its start, so a job that takes hours pays the prices of those hours; its
requests are assumed to spread evenly over its duration.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from itertools import pairwise

from moebeam.schemas.prices import PriceLine, PriceMode
from moebeam.transforms.money.price_book import PriceBook
from moebeam.transforms.money.price_file import MINUTES_A_DAY
from moebeam.transforms.quote.quote import CostRange, TierDemand, cost_range


@dataclass(frozen=True, slots=True)
class Offer:
    """A provider's prices for the job's tokens.

    Attributes:
        duration_s: expected duration of the job there; None if unknown.
    """

    provider: str
    model: str
    mode: PriceMode
    tiers: tuple[TierDemand, ...]
    duration_s: float | None = None

    @property
    def name(self) -> str:
        return self.provider if self.mode == "online" else f"{self.provider} {self.mode}"


@dataclass(frozen=True, slots=True)
class Start:
    """A start of the job at an offer, with its expected cost in the offer's currency."""

    offer: Offer
    at: datetime
    cost: Decimal
    currency: str


def tier_starts(book: PriceBook, provider: str, model: str) -> tuple[int, ...]:
    """Prompt lengths at which the tiers of a model's prices begin, from 0."""
    own = (line for line in book.lines if (line.provider, line.model) == (provider, model))
    ends = {0}
    for line in own:
        ends.add(line.min_prompt_tokens)
        if line.max_prompt_tokens is not None:
            ends.add(line.max_prompt_tokens + 1)
    return tuple(sorted(ends))


def lines_at(book: PriceBook, offer: Offer, at: datetime) -> list[PriceLine] | None:
    """The line of each tier at an instant; None if a tier with requests has none, or currencies differ."""
    found: list[PriceLine] = []
    for tier in offer.tiers:
        line = book.find(offer.provider, offer.model, at, prompt_tokens=tier.min_prompt_tokens, mode=offer.mode)
        if line is None and tier.prompt_tokens.high == 0 and found:
            line = found[-1]
        if line is None:
            return None
        found.append(line)
    return found if len({line.currency for line in found}) == 1 else None


def cost_at(book: PriceBook, offer: Offer, at: datetime) -> tuple[CostRange, str] | None:
    """Cost and currency if the whole job starts at one instant; None without a price."""
    lines = lines_at(book, offer, at)
    return None if lines is None else (cost_range(offer.tiers, lines), lines[0].currency)


def hourly_costs(
    book: PriceBook, offer: Offer, at: datetime, num_hours: int = 24
) -> list[tuple[datetime, Decimal | None]]:
    """Expected cost of a start at each full hour, beginning with the hour of `at`."""
    first = at.astimezone(UTC).replace(minute=0, second=0, microsecond=0)
    hours = [first + timedelta(hours=hour) for hour in range(num_hours)]
    costs = [cost_at(book, offer, hour) for hour in hours]
    return [(hour, cost and cost[0].expected) for hour, cost in zip(hours, costs, strict=True)]


def starts(book: PriceBook, offer: Offer, at: datetime, deadline: datetime) -> Iterator[Start]:
    """Starts that meet a deadline: now, and whenever a price of the offer may change.

    If the job's duration is unknown, every start before the deadline counts.
    """
    last = deadline - timedelta(seconds=offer.duration_s or 0)
    for start in (at, *price_changes(book, offer, at, last)):
        if start > last or start >= deadline:
            return
        spread = spread_cost(book, offer, start)
        if spread is not None:
            yield Start(offer, start, *spread)


def spread_cost(book: PriceBook, offer: Offer, start: datetime) -> tuple[Decimal, str] | None:
    """Expected cost and currency of a job that spreads evenly over its duration; None without a price."""
    first = cost_at(book, offer, start)
    if first is None or not offer.duration_s:
        return first and (first[0].expected, first[1])
    end = start + timedelta(seconds=offer.duration_s)
    edges = [start, *price_changes(book, offer, start, end), end]
    total = Decimal(0)
    for begin, until in pairwise(edges):
        found = cost_at(book, offer, begin)
        if found is None or found[1] != first[1]:
            return None
        # Whole microseconds, so that the shares add up to the whole.
        share = _share(found[0].expected, (until - begin) // _TICK, (end - start) // _TICK)
        total += share
    return total, first[1]


_TICK = timedelta(microseconds=1)


def _share(amount: Decimal, part: int, whole: int) -> Decimal:
    """A share of an amount, to 12 places; a forecast, not a charge."""
    return (amount * part / whole).quantize(Decimal("1e-12")) if whole else amount


def price_changes(book: PriceBook, offer: Offer, start: datetime, end: datetime) -> list[datetime]:
    """Instants between `start` and `end` at which the offer's price may change, in order."""
    own = [line for line in book.lines if (line.provider, line.model) == (offer.provider, offer.model)]
    minutes: set[int] = set()
    for line in own:
        minutes |= {edge % MINUTES_A_DAY for window in line.windows for edge in window}
        if line.days is not None:
            minutes.add(-line.days.utc_offset_minutes % MINUTES_A_DAY)
    found = {edge for edge in book.edges(offer.provider, offer.model) if start < edge < end}
    day = start.astimezone(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    while minutes and day < end:
        found |= {edge for minute in minutes if start < (edge := day + timedelta(minutes=minute)) < end}
        day += timedelta(days=1)
    return sorted(found)


def cheapest(found: Sequence[Start], into_common: Callable[[Decimal, str], Decimal | None]) -> Start | None:
    """The cheapest start, the earliest of equal ones; those whose currency cannot be compared are left out."""
    priced = [(into_common(start.cost, start.currency), start) for start in found]
    comparable = [(cost, start) for cost, start in priced if cost is not None]
    return min(comparable, key=lambda pair: (pair[0], pair[1].at), default=(None, None))[1]
