"""Prices as records: what one attempt's tokens cost, and by which line of which book."""

from dataclasses import dataclass
from datetime import datetime
from decimal import Context, Decimal, Inexact, InvalidOperation, Overflow
from typing import Literal, TypeAlias

CostBasis: TypeAlias = Literal["exact", "upper_bound"]
PriceMode: TypeAlias = Literal["online", "batch"]
"""How requests are sent: one by one, or as a file that the provider answers when it suits it."""


@dataclass(frozen=True, slots=True)
class DayRule:
    """On which days a price holds.

    Attributes:
        weekdays: Monday is 0.
        utc_offset_minutes: of the place whose days these are.
        calendar: on the holidays of this calendar the price does not hold; empty for none.
    """

    weekdays: frozenset[int]
    utc_offset_minutes: int = 0
    calendar: str = ""


@dataclass(frozen=True, slots=True)
class PriceLine:
    """One dated line of a price book; prices are per 1,000,000 tokens.

    The interval is half-open, `[effective_from, effective_to)`, in UTC. `windows` are half-open minutes of the UTC
    day, `(start, end)`, and may wrap midnight; empty means all day. A line with windows or days beats one without.
    It holds for prompts of `min_prompt_tokens` to `max_prompt_tokens`, both included.
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
        """Whether the line holds at some times of its interval only."""
        return bool(self.windows) or self.days is not None


@dataclass(frozen=True, slots=True)
class Charge:
    """What one attempt cost. All amounts are exact to 12 decimal places."""

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
"""Arithmetic that raises where the default context, of 28 digits, would round in silence."""
