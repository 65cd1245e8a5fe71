"""The value chain of a run as tables, from `[value_chain]`, the ledger and the parties' price books.

Part of `moebeam report`. The arithmetic is in `schemas/value_chain.py`.
"""

import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pyarrow as pa
from pydantic import ValidationError

from moebeam.jobs.console.report_table import Column, ReportTable
from moebeam.jobs.prices.shipped import BUILTIN, load_named_book
from moebeam.schemas.arrow import list_values
from moebeam.schemas.errors import JobFileError
from moebeam.schemas.job.sections import PartySection, ValueChainSection
from moebeam.schemas.providers import name_provider
from moebeam.schemas.records import Usage
from moebeam.schemas.store import storage
from moebeam.schemas.value_chain import (
    Attempt,
    Money,
    PriceOf,
    Rates,
    Seller,
    ValueChain,
    make_group_order,
    parse_markup,
)
from moebeam.transforms.money.account import charge

_COLUMNS = (
    "tenant",
    "started_at",
    "provider",
    "model",
    "outcome",
    "cache_hit_tokens",
    "cache_miss_tokens",
    "visible_output_tokens",
    "reasoning_tokens",
    "cost",
    "currency",
)


@dataclass(frozen=True, slots=True)
class PricedModel:
    """The model that prices a party without its own: the job's `[accounting] model`, else the ledger's."""

    model: str | None = None


def load_chain(path: str) -> ValueChainSection:
    """Load a value chain from a TOML file, to replace the job's.

    The file holds `[[parties]]` and optionally `currency` and `[rates]`; price book paths are relative to it.

    Raises:
        JobFileError: names what is wrong.
    """
    try:
        found: dict[str, Any] = tomllib.loads(storage.read_bytes(path).decode("utf-8-sig"), parse_float=str)
    except FileNotFoundError as error:
        raise JobFileError(f"{path}: expected a value chain in TOML, found no such file") from error
    except (OSError, ValueError) as error:
        raise JobFileError(f"{path}: expected a value chain in TOML, found: {error}") from error
    found = found.get("value_chain", found)
    folder = path.rpartition("/")[0]
    for party in found.get("parties", ()):
        book = party.get("price_book") if isinstance(party, dict) else None
        if not isinstance(book, str) or book == BUILTIN:
            continue
        if folder and not book.startswith("/") and "://" not in book:
            party["price_book"] = storage.join(folder, book)
    try:
        section = ValueChainSection.model_validate(found)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise JobFileError(f"{path}: {place}: {first['msg']}") from error
    if not section.parties:
        raise JobFileError(f"{path}: expected [[parties]], found none")
    return section


def charge_chain(section: ValueChainSection, ledgers: Iterable[pa.Table], priced: PricedModel) -> ValueChain | None:
    """Charge a run's ledger through its parties; None if the job names none.

    Args:
        ledgers: rows of `moebeam.schemas.tables.LEDGER_SCHEMA`, file by file.
    Raises:
        JobFileError: a price book cannot be read, or a rate is missing.
    """
    if not section.parties:
        return None
    *sellers, customer = section.parties
    made = tuple(_seller(party, priced) for party in sellers)
    chain: ValueChain | None = None
    for ledger in ledgers:
        if chain is None:
            chain = ValueChain(made, customer.name, Rates(_currency(section, ledger), section.rates))
        for attempt in read_attempts(ledger):
            chain.add(attempt)
    chain = chain or ValueChain(made, customer.name, Rates(section.currency or "USD", section.rates))
    assert chain.difference == 0, f"margins and the first seller's revenue miss {chain.difference}"
    return chain


def _currency(section: ValueChainSection, ledger: pa.Table) -> str:
    if section.currency is not None:
        return section.currency
    found = sorted({currency for currency in list_values(ledger, "currency") if currency is not None})
    if len(found) > 1:
        raise JobFileError(f"[value_chain] currency: expected one, as the ledger has several: {', '.join(found)}")
    return found[0] if found else "USD"


def _seller(party: PartySection, priced: PricedModel) -> Seller:
    return Seller(
        name=party.name,
        price_of=None if party.markup_percent is not None else _make_price_lookup(party, priced),
        markup=parse_markup(party.markup_percent or Decimal(0)),
        recognition=party.recognition,
        charges_failed=party.charges == "all",
    )


def _make_price_lookup(party: PartySection, priced: PricedModel) -> PriceOf:
    if party.price_book is None:
        return lambda attempt: attempt.cost
    book = load_named_book(party.price_book)
    provider = name_provider(party.provider or party.name)
    providers = sorted({line.provider for line in book.lines})
    if provider not in providers:
        raise JobFileError(
            f"[value_chain] party {party.name!r}: expected prices of provider {provider!r} in {party.price_book}, "
            f"found {', '.join(providers)}"
        )

    def price_of(attempt: Attempt) -> Money | None:
        if not attempt.usage.is_known:
            return None
        line = book.find(
            provider,
            party.model or priced.model or attempt.model,
            attempt.started_at,
            prompt_tokens=attempt.usage.classes.num_prompt_tokens,
        )
        if line is None:
            return None
        if party.currency is not None and line.currency != party.currency:
            raise JobFileError(
                f"[value_chain] party {party.name!r}: expected prices in {party.currency}, "
                f"found {line.currency} on line {line.line_id} of {party.price_book}"
            )
        return Money(charge(attempt.usage, line).cost, line.currency)

    return price_of


def read_attempts(ledger: pa.Table) -> Iterator[Attempt]:
    """Yield the ledger lines in the form that pricing needs."""
    for values in zip(*(list_values(ledger, name) for name in _COLUMNS), strict=True):
        line = dict(zip(_COLUMNS, values, strict=True))
        started: datetime = line["started_at"].astimezone(UTC)
        hits: int | None = line["cache_hit_tokens"]
        misses: int | None = line["cache_miss_tokens"]
        visible: int | None = line["visible_output_tokens"]
        reasoning: int = line["reasoning_tokens"] or 0
        yield Attempt(
            tenant=line["tenant"],
            day=started.date().isoformat(),
            started_at=started,
            provider=line["provider"],
            model=line["model"],
            is_answered=line["outcome"] == "answered",
            usage=Usage(
                prompt_tokens=None if misses is None else (hits or 0) + misses,
                completion_tokens=None if visible is None else visible + reasoning,
                cached_tokens=hits,
                reasoning_tokens=reasoning,
            ),
            cost=None if line["cost"] is None else Money(line["cost"], line["currency"]),
        )


def chain_tables(chain: ValueChain) -> tuple[ReportTable, ReportTable]:
    """Build two tables: sums by party, and by party, tenant and day."""
    money = tuple(Column(name, "money") for name in ("charged", "paid", "margin", "recognised"))
    currency = chain.rates.currency
    head = (Column("party", "text"), Column("attempts", "count"), Column("currency", "text"), *money)
    parties = tuple(
        (name, sums.num_attempts, currency, *_amounts(chain, name, sums), _format_billed(sums.billed))
        for name in chain.names
        for sums in (chain.of_party(name),)
    )
    unpriced = ", ".join(f"{count} by {name}" for name, count in sorted(chain.num_unpriced.items()))
    note = f"Lines without a price, which are in no sum: {unpriced}." if unpriced else None
    days = tuple(
        (party, tenant, day, sums.num_attempts, currency, *_amounts(chain, party, sums))
        for party, tenant, day in sorted(chain.sums, key=make_group_order(chain.names))
        for sums in (chain.sums[party, tenant, day],)
    )
    by_day = (Column("party", "text"), Column("tenant", "text"), Column("day", "text"), *head[1:])
    return (
        ReportTable("value_chain", "Value chain", (*head, Column("billed_as", "text")), parties, note),
        ReportTable("value_chain_by_day", "Value chain by tenant and day", by_day, days, note),
    )


def _amounts(chain: ValueChain, name: str, sums: Any) -> tuple[Decimal | None, ...]:
    """Charged, paid, margin and recognised revenue; the customer only pays."""
    if name == chain.customer:
        return None, sums.paid, None, None
    recognition = next(seller.recognition for seller in chain.sellers if seller.name == name)
    return sums.charged, sums.paid, sums.margin, sums.recognise_revenue(recognition)


def _format_billed(billed: Mapping[str, Decimal]) -> str | None:
    return ", ".join(f"{amount:f} {currency}" for currency, amount in billed.items()) or None
