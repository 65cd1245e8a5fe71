"""Compares a price book with `genai-prices` from PyPI, a price list kept by others.

Both price the same tokens at the same instants. `genai-prices` knows neither weekends nor public holidays, so lines of
ours with days are compared on working days only. Nothing is fetched: prices come from the installed package.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal

from moebeam.schemas.extras import require_extra
from moebeam.schemas.prices import PriceLine
from moebeam.schemas.records import Usage
from moebeam.transforms.money.account import charge
from moebeam.transforms.money.price_book import PriceBook
from moebeam.transforms.money.price_calendar import is_on_days

PACKAGE = "genai-prices"
TOLERANCE = Decimal("1e-9")
"""Largest difference at which two costs count as equal."""

_HOURS_COMPARED = 24 * 7
_PROBES = {
    "cache hit": Usage(prompt_tokens=1_000_000, completion_tokens=0, cached_tokens=1_000_000),
    "cache miss": Usage(prompt_tokens=1_000_000, completion_tokens=0, cached_tokens=0),
    "output": Usage(prompt_tokens=0, completion_tokens=1_000_000, cached_tokens=0),
}


@dataclass(frozen=True, slots=True)
class Difference:
    """A price that differs between the two lists, at the first such instant."""

    provider: str
    model: str
    token_class: str
    at: datetime
    ours: Decimal
    theirs: Decimal


@dataclass(frozen=True, slots=True)
class CrossCheck:
    """The result of a comparison; `unknown` are models missing from the other list."""

    version: str
    num_compared: int
    differences: tuple[Difference, ...]
    unknown: tuple[tuple[str, str], ...]


def cross_check(book: PriceBook, at: datetime) -> CrossCheck:
    """Compare all prices in US dollars for the week from an instant on, hour by hour.

    Raises:
        MissingExtra: the package is not installed.
    """
    require_extra("prices", f"--against {PACKAGE}")
    import genai_prices

    differences: dict[tuple[str, str, str], Difference] = {}
    unknown: list[tuple[str, str]] = []
    num_compared = 0
    for provider, model in book.timelines:
        for instant, line in _lines_of_week(book, provider, model, at):
            try:
                found = {name: cost_elsewhere(usage, provider, model, instant) for name, usage in _PROBES.items()}
            except LookupError:
                unknown.append((provider, model))
                break
            for name, usage in _PROBES.items():
                if name == "cache hit" and line.cache_hit is None:
                    continue
                num_compared += 1
                ours = charge(usage, line).cost
                if abs(ours - found[name]) > TOLERANCE:
                    difference = Difference(provider, model, name, instant, ours, found[name])
                    differences.setdefault((provider, model, name), difference)
    return CrossCheck(genai_prices.__version__, num_compared, tuple(differences.values()), tuple(unknown))


def cost_elsewhere(usage: Usage, provider: str, model: str, at: datetime) -> Decimal:
    """Price a request by `genai-prices`, in US dollars.

    Raises:
        LookupError: unknown provider or model.
    """
    import genai_prices

    counted = genai_prices.Usage(
        input_tokens=usage.prompt_tokens,
        cache_read_tokens=usage.cached_tokens or 0,
        output_tokens=usage.completion_tokens,
    )
    return genai_prices.calc_price(counted, model, provider_id=provider, genai_request_timestamp=at).total_price


def _lines_of_week(book: PriceBook, provider: str, model: str, at: datetime) -> Iterator[tuple[datetime, PriceLine]]:
    has_days = any(line.days is not None for line in book.lines if (line.provider, line.model) == (provider, model))
    first = at.astimezone(UTC).replace(minute=0, second=0, microsecond=0)
    for hour in range(_HOURS_COMPARED):
        instant = first + timedelta(hours=hour)
        line = book.find(provider, model, instant)
        if line is None or line.currency != "USD" or (has_days and _is_day_off(book, provider, model, instant)):
            continue
        yield instant, line


def _is_day_off(book: PriceBook, provider: str, model: str, at: datetime) -> bool:
    """Whether a day rule excludes this whole day for a line of the model."""
    rules = {
        line.days for line in book.lines if (line.provider, line.model) == (provider, model) and line.days is not None
    }
    return any(not is_on_days(rule, at, book.holidays) for rule in rules)
