"""The price book that ships with the program, and how a book is named: by its path, or the shipped one by a word."""

from pathlib import Path

from moebeam.transforms.money.price_book import PriceBook

SHIPPED_BOOK = Path(__file__).parent / "prices.csv"
"""Prices as they were published, each with its evidence; `holidays.csv` lies beside it."""

BUILTIN = "builtin"
"""What job files and commands call the shipped book; a file of this name is `./builtin`."""


def load_named_book(name: str | None) -> PriceBook:
    """A price book by its path; the shipped one by its word, or if none is named.

    Raises:
        JobFileError: as `PriceBook.load`.
    """
    return PriceBook.load(str(SHIPPED_BOOK) if name is None or name == BUILTIN else name)
