"""Prints a quote on standard error."""

from collections.abc import Iterator, Sequence
from datetime import datetime
from decimal import Decimal

from rich.console import Console
from rich.text import Text

from moebeam.jobs.console.facts_table import facts_table
from moebeam.jobs.console.formats import format_duration, format_money
from moebeam.jobs.quotes.quote_job import Quote, QuotedOffer
from moebeam.transforms.quote.quote import CONFIDENCE, Forecast


def print_quote(console: Console, quote: Quote) -> None:
    """Print what a job will take and cost."""
    console.print(Text("a quote; no model was asked", style="bold green"))
    console.print(facts_table(_list_facts(quote)))
    for quoted in quote.offers:
        for index, line in enumerate(_format_offer(quoted)):
            console.print(Text(line, style="bold" if index == 0 else ""), soft_wrap=True)
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
    merged = f"; {_format_range(tokens.merged_rows)} rows take another one's answer" if tokens.merged_rows.high else ""
    yield "requests", f"{_format_range(tokens.requests)}{merged}"
    about = "about " if quote.is_estimated else ""
    yield (
        "prompt",
        f"{about}{_format_range(tokens.prompt_tokens)} tokens, {_format_range(tokens.tree_tokens)} of them unique",
    )
    yield "h*", f"{tokens.max_hit_rate:.1%} of prompt tokens are all that a perfect cache can serve"
    yield "output", f"{quote.expected_output_tokens:,} tokens by {quote.output_basis}"
    if survey.is_sample:
        yield "bounds", f"hold with a probability of {CONFIDENCE:.1%}"
    yield "prices", f"{quote.price_book}, a start at {_format_instant(quote.terms.at)}"
    if (duration_s := quote.own.offer.duration_s) is not None:
        yield "time", f"{format_duration(duration_s)} on one engine as fast as the earlier run's"
    else:
        yield "time", "unknown; --like OUTPUT takes it from an earlier run with the same engine"


def _format_offer(quoted: QuotedOffer) -> Iterator[str]:
    name = f"{quoted.offer.name}, {quoted.offer.model}"
    yield f"this job ({name})" if quoted.is_job else name
    if quoted.cost is None:
        yield "  no price"
        return
    cost, currency = quoted.cost, quoted.currency
    high = "unknown" if cost.high is None else format_money(cost.high, currency)
    once = (
        ""
        if cost.high == cost.high_without_repair
        else (f" ({format_money(cost.high_without_repair, currency)} if no answer is asked for again)")
    )
    yield (
        f"  expected {format_money(cost.expected, currency)}, at least {format_money(cost.low, currency)}, "
        f"at most {high}{once}"
    )
    num_tokens = sum(tier.prompt_tokens.expected for tier in quoted.offer.tiers)
    share = quoted.expected_hits / num_tokens if num_tokens else 0.0
    yield f"  hits {share:.1%} expected, rule {quoted.rule.name}: {quoted.rule.meaning}"
    if len({hour for _, hour in quoted.hours}) > 1:
        yield f"  by hour of start, UTC: {_format_hours(quoted.hours, currency)}"


def _format_hours(hours: Sequence[tuple[datetime, Decimal | None]], currency: str | None) -> str:
    """Format costs by hour, merging adjacent hours of equal cost."""
    spans: list[str] = []
    first = 0
    for index in range(1, len(hours) + 1):
        if index < len(hours) and hours[index][1] == hours[first][1]:
            continue
        at, cost = hours[first]
        end = (hours[index - 1][0].hour + 1) % 24
        spans.append(f"{at:%H}-{end:02d} {'no price' if cost is None else format_money(cost, currency)}")
        first = index
    return "; ".join(spans)


def _format_range(found: Forecast) -> str:
    if found.low == found.high:
        return f"{found.expected:,}"
    return f"{found.expected:,} ({found.low:,} to {found.high:,})"


def _format_instant(at: datetime) -> str:
    return at.isoformat(timespec="minutes").replace("+00:00", "Z")
