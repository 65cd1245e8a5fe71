"""What *publish* needs survives its launcher: a record that prices as the book did."""

from datetime import UTC, datetime
from decimal import Decimal

import pyarrow as pa
import pytest

from moebeam.schemas.store import storage
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.schemas.tables import result_schema
from moebeam.transforms.money.account import Accounting
from moebeam.transforms.money.price_book import PriceBook
from moebeam.transforms.publish.publish_spec import PublishSpec, read_spec, save_spec

BOOK = b"""\
provider,model,effective_from_utc,effective_to_utc,window_utc,currency,cache_hit_per_mtok,cache_miss_per_mtok,\
output_per_mtok,days,mode,prompt_tokens
p,m,2020-01-01T00:00:00Z,,,USD,0.028,0.14,0.28,,,
p,m,2020-01-01T00:00:00Z,,16:30-00:30,USD,,0.07,0.14,,,
p,m,2020-01-01T00:00:00Z,,,CNY,1,2,3,,batch,0-1000
"""


@pytest.fixture
def layout(tmp_path_factory: pytest.TempPathFactory) -> RunLayout:
    return RunLayout(str(tmp_path_factory.mktemp("out")))


def spec(layout: RunLayout, book: PriceBook | None) -> PublishSpec:
    schema = result_schema([pa.field("n", pa.int64())], pa.struct([pa.field("category", pa.string())]))
    described = {"model": {"name": "m", "engine": "fake"}, "warnings": ["ü"], "price_book": book and book.version}
    accounting = Accounting("r", book, "p", None, ("team",))
    return PublishSpec("r", layout, schema, 7, described, accounting, "SELECT 1;")


@pytest.mark.parametrize("has_prices", [True, False])
def test_a_spec_is_read_as_it_was_saved(layout: RunLayout, has_prices: bool) -> None:
    book = PriceBook.parse(BOOK, "prices.csv") if has_prices else None
    saved = spec(layout, book)
    save_spec(saved)
    assert read_spec(layout) == saved


def test_the_book_prices_as_before(layout: RunLayout) -> None:
    save_spec(spec(layout, PriceBook.parse(BOOK, "prices.csv")))
    found = read_spec(layout)
    assert found is not None and found.accounting is not None and found.accounting.book is not None
    book = found.accounting.book
    noon, night = (datetime(2026, 1, 5, hour, tzinfo=UTC) for hour in (12, 20))
    lines = [book.find("p", "m", noon), book.find("p", "m", night), book.find("p", "m", noon, mode="batch")]
    assert [line and line.output for line in lines] == [Decimal("0.28"), Decimal("0.14"), Decimal(3)]
    assert book.find("p", "m", noon, mode="batch", prompt_tokens=1001) is None


@pytest.mark.parametrize("content", [b"", b"{", b'{"run_id": "r"}'])
def test_a_record_that_nobody_can_read_is_as_none(layout: RunLayout, content: bytes) -> None:
    assert read_spec(layout) is None
    storage.write_whole(layout.publish_record, content)
    assert read_spec(layout) is None
