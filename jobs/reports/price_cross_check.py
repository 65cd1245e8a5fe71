"""A price book held against PyPI's `genai-prices`, a price list that others keep.

Both are asked for the cost of the same tokens at the same instants. It knows neither weekends nor public holidays, so
only working days are compared where a line of ours has days. Nothing is fetched: the prices are those of the
installed package.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal

from moebeam.schemas.errors import JobFileError
from moebeam.schemas.prices import PriceLine
from moebeam.schemas.records import Usage
from moebeam.transforms.money.account import charge
from moebeam.transforms.money.price_book import PriceBook
from moebeam.transforms.money.price_calendar import is_on_days

PACKAGE = "genai-prices"
TOLERANCE = Decimal("1e-9")
"""Most by which two costs may differ and still count as equal."""

_HOURS_COMPARED = 24 * 7
_PROBES = {
    "cache hit": Usage(prompt_tokens=1_000_000, completion_tokens=0, cached_tokens=1_000_000),
    "cache miss": Usage(prompt_tokens=1_000_000, completion_tokens=0, cached_tokens=0),
    "output": Usage(prompt_tokens=0, completion_tokens=1_000_000, cached_tokens=0),
}


@dataclass(frozen=True, slots=True)
class Difference:
    """A price that the two lists give differently, at the first instant at which they do."""

    provider: str
    model: str
    token_class: str
    at: datetime
    ours: Decimal
    theirs: Decimal


@dataclass(frozen=True, slots=True)
class CrossCheck:
    """What a comparison found; `unknown` are models that the other list does not have."""

    version: str
    num_compared: int
    differences: tuple[Difference, ...]
    unknown: tuple[tuple[str, str], ...]


def cross_check(book: PriceBook, at: datetime) -> CrossCheck:
    """Compare all prices in United States dollars that hold in the week from an instant on, hour by hour.

    Raises:
        JobFileError: the package is not installed.
    """
    try:
        import genai_prices
    except ImportError as error:
        raise JobFileError(
            f"--against {PACKAGE}: the package is not installed; pip install 'moebeam[prices]'"
        ) from error
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
    """What a request costs by `genai-prices`, in United States dollars.

    Raises:
        LookupError: it does not know the provider or the model.
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
    """Whether a rule of days keeps a line of the model from holding on the whole of this day."""
    rules = {
        line.days for line in book.lines if (line.provider, line.model) == (provider, model) and line.days is not None
    }
    return any(not is_on_days(rule, at, book.holidays) for rule in rules)
