"""Where the shipped price book lies; alone here, so that commands can name it without reading it."""

from pathlib import Path

SHIPPED_BOOK = Path(__file__).parent / "prices.csv"
"""Prices as they were published, each with its evidence; `holidays.csv` lies beside it."""
