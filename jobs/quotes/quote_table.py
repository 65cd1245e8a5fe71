"""Prints a quote on standard error."""

from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import datetime
from decimal import Decimal

from rich.console import Console
from rich.text import Text

from moebeam.jobs.console.facts_table import facts_table
from moebeam.jobs.console.formats import format_duration, format_money
from moebeam.jobs.console.report_table import Cell, Column, ReportTable, print_table
from moebeam.jobs.quotes.quote_job import Quote, QuotedOffer
from moebeam.transforms.quote.quote import CONFIDENCE, Forecast


def print_quote(console: Console, quote: Quote) -> None:
    """Print what a job will take and cost."""
    console.print(Text("a quote; no model was asked", style="bold green"))
    console.print(facts_table(_list_facts(quote)))
    print_table(console, offers_table(quote))
    for rule in dict.fromkeys(quoted.rule for quoted in quote.offers):
        console.print(Text(f"hits by rule {rule.name}: {rule.meaning}"), soft_wrap=True)
    if quote.plan is not None:
        plan = quote.plan
        took = "" if plan.offer.duration_s is None else f", done after {format_duration(plan.offer.duration_s)}"
        start = f"cheapest: {plan.offer.name}, start {_format_instant(plan.at)}{took}"
        console.print(Text(f"{start}: {format_money(plan.cost, plan.currency)}", style="bold"), soft_wrap=True)
    for note in quote.notes:
        console.print(Text(f"note: {note}", style="yellow"), soft_wrap=True)


def _list_facts(quote: Quote) -> Iterator[tuple[str, str]]:
    survey, tokens = quote.survey, quote.tokens
    sampled = f", quoted from {survey.num_surveyed_rows:,} of them" if survey.is_sample else ""
    yield "rows", f"{survey.num_rows:,}{sampled}"
    if survey.rejects:
        by_type = ", ".join(f"{count:,} {name}" for name, count in sorted(survey.rejects.items()))
        yield "rejects", f"{by_type} before the model is asked"
    copies = f"; {_format_range(tokens.merged_rows)} more answers are those of equal requests"
    yield "requests", f"{_format_range(tokens.requests)}{copies if tokens.merged_rows.high else ''}"
    about = "about " if quote.is_estimated else ""
    yield (
        "prompt",
        f"{about}{_format_range(tokens.prompt_tokens)} tokens, {_format_range(tokens.tree_tokens)} of them unique",
    )
    yield "h*", f"{tokens.max_hit_rate:.1%} of prompt tokens are all that a perfect cache can serve"
    yield "output", f"{quote.expected_output_tokens:,} tokens by {quote.output_basis}"
    if survey.is_sample:
        yield "bounds", f"hold with a probability of {CONFIDENCE:.1%}"
    yield "prices", f"of {quote.model} in {quote.price_book}, for a start at {_format_instant(quote.terms.at)}"
    if (duration_s := quote.own.offer.duration_s) is not None:
        yield "time", f"{format_duration(duration_s)} on one engine as fast as the earlier run's"
    else:
        yield "time", "unknown; --like OUTPUT takes it from an earlier run with the same engine"


def offers_table(quote: Quote) -> ReportTable:
    """The job as written and every other offer in one table, the cheapest first.

    Offers in a currency that cannot be compared stand below those that can, and those without a price last.
    """
    currencies = Counter(found.currency for found in quote.offers if found.currency is not None)
    into = quote.terms.currency or quote.own.currency or next((name for name, _ in currencies.most_common(1)), None)
    columns = (
        Column("offer", "text"),
        Column("expected", "money"),
        Column("at least", "money"),
        Column("at most", "money"),
        Column("at most, asked once", "money"),
        Column("currency", "text"),
        Column("hits", "share"),
        Column("by hour of start, UTC", "text"),
    )
    offers = sorted(quote.offers, key=lambda quoted: _rank(quoted, quote, into))
    apart = sorted(
        {found.currency for found in offers if found.currency is not None and _convert(found, quote, into) is None}
    )
    return ReportTable(
        name="offers",
        title="offers, the cheapest first",
        columns=columns,
        rows=tuple(tuple(_offer_cells(quoted)) for quoted in offers),
        note=f"not compared for want of a rate into {into}: {', '.join(apart)}; --rates names a file"
        if apart
        else None,
    )


def _rank(quoted: QuotedOffer, quote: Quote, into: str | None) -> tuple[bool, bool, str, Decimal, bool]:
    """Priced before unpriced, comparable before others, then by price; the job's own offer first among equals."""
    converted = _convert(quoted, quote, into)
    cost = converted if converted is not None or quoted.cost is None else quoted.cost.expected
    currency = "" if converted is not None else quoted.currency or ""
    return quoted.cost is None, converted is None, currency, cost or Decimal(0), not quoted.is_job


def _convert(quoted: QuotedOffer, quote: Quote, into: str | None) -> Decimal | None:
    """An offer's expected cost in the currency of comparison; None without a price or a rate."""
    if quoted.cost is None or quoted.currency is None or into is None:
        return None
    if quoted.currency == into:
        return quoted.cost.expected
    found = quote.terms.rates and quote.terms.rates.convert(quoted.cost.expected, quoted.currency, into, quote.terms.at)
    return found.amount if found else None


def _offer_cells(quoted: QuotedOffer) -> Iterator[Cell]:
    yield f"{quoted.offer.name} (this job)" if quoted.is_job else quoted.offer.name
    cost = quoted.cost
    if cost is None:
        yield from (None, None, None, None, "no price")
    else:
        yield from (cost.expected, cost.low, cost.high)
        yield None if cost.high == cost.high_without_repair else cost.high_without_repair
        yield quoted.currency
    num_tokens = sum(tier.prompt_tokens.expected for tier in quoted.offer.tiers)
    yield quoted.expected_hits / num_tokens if num_tokens else 0.0
    yield _format_hours(quoted.hours) if len({hour for _, hour in quoted.hours}) > 1 else None


def _format_hours(hours: Sequence[tuple[datetime, Decimal | None]]) -> str:
    """Format costs by hour, merging adjacent hours of equal cost."""
    spans: list[str] = []
    first = 0
    for index in range(1, len(hours) + 1):
        if index < len(hours) and hours[index][1] == hours[first][1]:
            continue
        at, cost = hours[first]
        end = (hours[index - 1][0].hour + 1) % 24
        spans.append(f"{at:%H}-{end:02d} {'no price' if cost is None else format_money(cost, None)}")
        first = index
    return "; ".join(spans)


def _format_range(found: Forecast) -> str:
    if found.low == found.high:
        return f"{found.expected:,}"
    return f"{found.expected:,} ({found.low:,} to {found.high:,})"


def _format_instant(at: datetime) -> str:
    return at.isoformat(timespec="minutes").replace("+00:00", "Z")
