"""Price records: a price book's lines, and the charge of one attempt with the line that set it."""

from dataclasses import dataclass
from datetime import datetime
from decimal import Context, Decimal, Inexact, InvalidOperation, Overflow
from typing import Literal, TypeAlias, get_args

CostBasis: TypeAlias = Literal["exact", "upper_bound"]
PriceMode: TypeAlias = Literal["online", "batch", "flex", "priority"]
"""At which of a provider's prices requests are answered: one at a time, as a batch file that the provider answers
later, or one at a time in a service tier with a price of its own."""

PRICE_MODES: tuple[PriceMode, ...] = get_args(PriceMode)


def find_tier_mode(service_tier: str | None) -> PriceMode:
    """The mode at which a service tier is priced; all but `flex` and `priority` have the ordinary price."""
    match service_tier:
        case "flex":
            return "flex"
        case "priority":
            return "priority"
        case _:
            return "online"


@dataclass(frozen=True, slots=True)
class DayRule:
    """The days on which a price applies.

    Attributes:
        weekdays: Monday is 0.
        utc_offset_minutes: the time zone that defines the days.
        calendar: the price does not apply on this calendar's holidays; empty for none.
    """

    weekdays: frozenset[int]
    utc_offset_minutes: int = 0
    calendar: str = ""


@dataclass(frozen=True, slots=True)
class PriceLine:
    """One dated line of a price book; prices are per 1,000,000 tokens.

    The interval is half-open, `[effective_from, effective_to)`, in UTC. `windows` are half-open minutes of the UTC
    day, `(start, end)`, and may wrap midnight; empty means all day. A line with windows or days takes
    precedence over one without. It applies to prompts of `min_prompt_tokens` to `max_prompt_tokens`, inclusive.
    """

    line_id: str
    provider: str
    model: str
    effective_from: datetime
    effective_to: datetime | None
    windows: tuple[tuple[int, int], ...]
    currency: str
    cache_hit: Decimal | None
    cache_miss: Decimal
    output: Decimal
    days: DayRule | None = None
    mode: PriceMode = "online"
    min_prompt_tokens: int = 0
    max_prompt_tokens: int | None = None
    evidence: str = ""

    @property
    def is_restricted(self) -> bool:
        """Whether the line applies to only part of its interval."""
        return bool(self.windows) or self.days is not None


@dataclass(frozen=True, slots=True)
class Charge:
    """The cost of one attempt. All amounts are exact to 12 decimal places."""

    cache_hit_tokens: int | None
    cache_miss_tokens: int
    visible_output_tokens: int
    reasoning_tokens: int
    line: PriceLine
    input_cost: Decimal
    output_cost: Decimal
    basis: CostBasis

    @property
    def cost(self) -> Decimal:
        return self.input_cost + self.output_cost


EXACT = Context(prec=38, traps=[Inexact, InvalidOperation, Overflow])
"""A context that raises on rounding; the default one, of 28 digits, rounds silently."""
