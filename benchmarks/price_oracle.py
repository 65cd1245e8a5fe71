"""Our costs against PyPI's `genai-prices` on random requests: `python -m benchmarks.price_oracle [--requests N]`.

Current prices of DeepSeek, on working days in Beijing (the other list knows neither weekends nor holidays), half of
the instants within a second of a peak's edge. Prints one line of JSON.
"""

import argparse
import json
import random
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import genai_prices

from moebeam.jobs.prices.shipped import SHIPPED_BOOK
from moebeam.jobs.reports.price_cross_check import TOLERANCE, cost_elsewhere
from moebeam.schemas.records import Usage
from moebeam.transforms.money.account import charge
from moebeam.transforms.money.price_book import PriceBook

MODELS = ("deepseek-v4-flash", "deepseek-v4-pro", "deepseek-flash")
_EDGES_MINUTES = (60, 240, 360, 600)


def compare(num_requests: int, seed: int = 0) -> dict[str, Any]:
    """Price random requests both ways; the largest difference, and how many differ."""
    book, draw = PriceBook.load(str(SHIPPED_BOOK)), random.Random(seed)
    worst, num_different = Decimal(0), 0
    for _ in range(num_requests):
        model, at = draw.choice(MODELS), _instant(draw)
        prompt = draw.randrange(1_000_000)
        usage = Usage(
            prompt_tokens=prompt, completion_tokens=draw.randrange(400_000), cached_tokens=draw.randint(0, prompt)
        )
        line = book.find("deepseek", model, at)
        assert line is not None
        difference = abs(charge(usage, line).cost - cost_elsewhere(usage, "deepseek", model, at))
        worst, num_different = max(worst, difference), num_different + (difference > TOLERANCE)
    return {
        "genai_prices": genai_prices.__version__,
        "price_book": book.version,
        "requests": num_requests,
        "num_different": num_different,
        "largest_difference_usd": format(worst, "f"),
    }


def _instant(draw: random.Random) -> datetime:
    """An instant of the working days from Tuesday, 24 November 2026."""
    day = datetime(2026, 11, 24, tzinfo=UTC) + timedelta(days=draw.randrange(3))
    if draw.random() < 0.5:
        return day + timedelta(minutes=draw.choice(_EDGES_MINUTES), seconds=draw.choice((-1, 0, 1)))
    return day + timedelta(seconds=draw.randrange(86_400))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=20_000)
    print(json.dumps(compare(parser.parse_args().requests)))


if __name__ == "__main__":
    main()
