"""Self-host or buy: compares a run's cost on one's own accelerators with API prices.

Implements `moebeam report --self-host PROFILE.toml`. Throughput comes from the run's engine counters; hourly price,
power, PUE and energy price come from the profile. A figure without a source counts as missing: what depends on it stays
empty, and the report asks for it. No figure is assumed.
"""

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moebeam.jobs.console.report_table import Column, ReportTable
from moebeam.jobs.prices.shipped import load_named_book
from moebeam.schemas.errors import JobFileError
from moebeam.schemas.job.sections import Job
from moebeam.schemas.records import Usage
from moebeam.schemas.store import storage
from moebeam.transforms.money.accelerator_time import NUM_PROMPTS, engine_seconds
from moebeam.transforms.money.account import charge
from moebeam.transforms.publish.rollup import GroupSums

_MILLION = Decimal(1_000_000)
_JOULES_A_KWH = Decimal(3_600_000)
_HOUR_S = Decimal(3600)
_HOURS_A_DAY = Decimal(24)


class Figure(BaseModel):
    """A figure of a profile and where it is from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    value: Annotated[Decimal, Field(ge=0)] | None = None
    source: str = ""

    @property
    def known(self) -> Decimal | None:
        """The value, if its source is given too."""
        return self.value if self.source.strip() else None


class SelfHostProfile(BaseModel):
    """Accelerators that would answer in place of an API: one engine's `count` of them.

    Every figure may be left out; the report says what it then cannot tell.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    accelerator: str
    count: Annotated[int, Field(ge=1)] = 1
    currency: Annotated[str, Field(pattern="^[A-Z]{3}$")]
    hour_price: Figure = Figure()
    """Of one accelerator, with its share of the machine."""
    hour_price_includes_energy: bool | None = None
    utilisation: Figure = Figure()
    """Share of the hours paid for in which it is at work, 0 to 1."""
    power_w: Figure = Figure()
    """Of one accelerator at this work, with its share of the machine."""
    pue: Figure = Figure()
    energy_price_per_kwh: Figure = Figure()


@dataclass(frozen=True, slots=True)
class Work:
    """A run's work: busy seconds of its engine, and tokens.

    Attributes:
        computed_tokens: tokens that went through the model: uncached prompt tokens and output tokens.
    """

    engine_s: Decimal
    num_attempts: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int

    @property
    def num_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens

    @property
    def computed_tokens(self) -> int:
        return self.prompt_tokens - self.cached_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class SelfHost:
    """Results from a profile and a run's throughput; None if a required figure is missing.

    Attributes:
        hours: accelerator hours to pay for, at the profile's utilisation.
        capacity_tokens_per_day: at that utilisation.
        joules_per_computed_token: at the wall, PUE included.
        asks: figures missing from the profile, in words.
    """

    hours: Decimal | None
    hour_cost: Decimal | None
    energy_kwh: Decimal | None
    energy_cost: Decimal | None
    cost: Decimal | None
    cost_per_million: Decimal | None
    fixed_cost_per_day: Decimal | None
    capacity_tokens_per_day: Decimal | None
    joules_per_computed_token: Decimal | None
    hits_saved_kwh: Decimal | None
    hits_saved_cost: Decimal | None
    asks: tuple[str, ...]


def load_profile(path: str) -> SelfHostProfile:
    """Read a profile.

    Raises:
        JobFileError: names file, key, expected and found.
    """
    try:
        found = tomllib.loads(storage.read_bytes(path).decode("utf-8-sig"), parse_float=str)
    except FileNotFoundError as error:
        raise JobFileError(f"{path}: expected a self-host profile in TOML, found no such file") from error
    except (OSError, ValueError) as error:
        raise JobFileError(f"{path}: expected a self-host profile in TOML, found: {error}") from error
    try:
        profile = SelfHostProfile.model_validate(found)
    except ValidationError as error:
        problems = (f"{'.'.join(map(str, e['loc']))}: {e['msg']}, found {e['input']!r}" for e in error.errors())
        raise JobFileError(f"{path}: {'; '.join(problems)}") from error
    share, pue = profile.utilisation.value, profile.pue.value
    if share is not None and not 0 < share <= 1:
        raise JobFileError(f"{path}: utilisation: expected a share above 0 and up to 1, found {share}")
    if pue is not None and pue < 1:
        raise JobFileError(f"{path}: pue: expected at least 1, found {pue}")
    return profile


def read_work(manifest: Mapping[str, Any]) -> Work | str:
    """Read the work of a run's engine, or why it is unknown."""
    seconds = engine_seconds(manifest["engine"])
    if seconds is None:
        return f"the engine {manifest['model']['engine']!r} does not count its time"
    if seconds == 0:
        return "the engine was never at work"
    totals = manifest["totals"]
    num_prompts = manifest["engine"].get(NUM_PROMPTS)
    if num_prompts != totals["num_attempts"]:
        return (
            f"the engine counted {num_prompts} prompts for {totals['num_attempts']} attempts, so its time is not this "
            "run's alone"
        )
    if num_unknown := totals.get("num_unknown_usage", 0):
        return f"the tokens of {num_unknown} attempts are not known"
    cached: int | None = totals["cached_tokens"]
    if cached is None:
        return "cached tokens are not known"
    return Work(
        Decimal(repr(seconds)), totals["num_attempts"], totals["prompt_tokens"], cached, totals["completion_tokens"]
    )


def self_host(profile: SelfHostProfile, work: Work) -> SelfHost:
    """Compute what a run would cost on a profile's accelerators."""
    count = Decimal(profile.count)
    price, share = profile.hour_price.known, profile.utilisation.known
    power, pue, energy_price = profile.power_w.known, profile.pue.known, profile.energy_price_per_kwh.known
    hours = None if share is None else work.engine_s * count / _HOUR_S / share
    hour_cost = None if hours is None or price is None else hours * price
    joules = None if power is None or pue is None else power * count * work.engine_s * pue
    energy_kwh = None if joules is None else joules / _JOULES_A_KWH
    energy_cost = None if energy_kwh is None or energy_price is None else energy_kwh * energy_price
    extra = Decimal(0) if profile.hour_price_includes_energy else energy_cost
    if profile.hour_price_includes_energy is None:
        extra = None
    cost = None if hour_cost is None or extra is None else hour_cost + extra
    a_token = None if joules is None or not work.computed_tokens else joules / work.computed_tokens
    saved = None if a_token is None else a_token * work.cached_tokens / _JOULES_A_KWH
    tokens_per_s = work.num_tokens / work.engine_s
    return SelfHost(
        hours=hours,
        hour_cost=hour_cost,
        energy_kwh=energy_kwh,
        energy_cost=energy_cost,
        cost=cost,
        cost_per_million=None if cost is None or not work.num_tokens else cost / work.num_tokens * _MILLION,
        fixed_cost_per_day=None if price is None else price * count * _HOURS_A_DAY,
        capacity_tokens_per_day=None if share is None else tokens_per_s * share * _HOUR_S * _HOURS_A_DAY,
        joules_per_computed_token=a_token,
        hits_saved_kwh=saved,
        hits_saved_cost=None if saved is None or energy_price is None else saved * energy_price,
        asks=tuple(_list_missing_figures(profile)),
    )


def _list_missing_figures(profile: SelfHostProfile) -> Iterator[str]:
    questions = {
        "hour_price": f"what an hour of one {profile.accelerator} costs you, in {profile.currency}",
        "utilisation": "in which share of the hours paid for it is at work, 0 to 1",
        "power_w": f"the power of one {profile.accelerator} at this work, in watts, as measured",
        "pue": "the power usage effectiveness of its data centre",
        "energy_price_per_kwh": f"your price of a kilowatt hour, in {profile.currency}",
    }
    for name, question in questions.items():
        figure: Figure = getattr(profile, name)
        if figure.value is None:
            yield f"{name}: {question}"
        elif figure.known is None:
            yield f"{name}: where {figure.value} is from (`source`); without that it is not used"
    if profile.hour_price_includes_energy is None:
        yield "hour_price_includes_energy: whether the energy is in the hour price"


def break_even_tokens_per_day(made: SelfHost, work: Work, price_per_million: Decimal) -> Decimal | None:
    """Tokens per day, in the run's mix, above which accelerators paid around the clock cost less than a price.

    Returns:
        None if a figure is missing, or if energy alone costs as much as the price.
    """
    if made.fixed_cost_per_day is None or made.cost is None or made.hour_cost is None:
        return None
    energy = (made.cost - made.hour_cost) / work.num_tokens * _MILLION
    left = price_per_million - energy
    return made.fixed_cost_per_day / left * _MILLION if left > 0 else None


def api_prices(job: Job, work: Work, at: datetime) -> list[tuple[str, str, Decimal]]:
    """Price the run's tokens at every price of the job's book that applies at an instant.

    Returns:
        Provider and model, currency, and cost per 1,000,000 tokens of the run's mix; cheapest first in each currency.
    """
    if job.accounting.price_book is None:
        return []
    book = load_named_book(job.accounting.price_book)
    usage = Usage(work.prompt_tokens, work.completion_tokens, work.cached_tokens)
    found: list[tuple[str, str, Decimal]] = []
    for provider, model in sorted({(line.provider, line.model) for line in book.lines}):
        # Tiers depend on the prompt of one attempt; the mean prompt represents the mix.
        line = book.find(provider, model, at, prompt_tokens=work.prompt_tokens // work.num_attempts)
        if line is not None and work.num_tokens:
            cost = charge(usage, line).cost / work.num_tokens * _MILLION
            found.append((f"{provider} {model}", line.currency, cost))
    return sorted(found, key=lambda price: (price[1], price[2], price[0]))


def self_host_tables(
    profile: SelfHostProfile, manifest: Mapping[str, Any], ledger: Mapping[str | None, GroupSums], job: Job
) -> list[ReportTable]:
    """Format the comparison as tables.

    Args:
        ledger: the run's sums by currency.
    """
    title = f"Self-host: {profile.name}, {profile.count} x {profile.accelerator}"
    columns = (Column("what", "text"), Column("value", "number"), Column("unit", "text"))
    work = read_work(manifest)
    if isinstance(work, str):
        return [ReportTable("self_host", title, columns, (), f"Not known: {work}.")]
    made = self_host(profile, work)
    money = profile.currency
    rows = (
        ("engine at work", work.engine_s, "s"),
        ("throughput while at work", work.num_tokens / work.engine_s, "tokens/s"),
        ("accelerator hours to pay for", made.hours, "h"),
        ("cost of the hours", made.hour_cost, money),
        ("energy", made.energy_kwh, "kWh"),
        ("cost of the energy", made.energy_cost, money),
        ("cost of the run, self-hosted", made.cost, money),
        ("cost per 1,000,000 tokens, self-hosted", made.cost_per_million, money),
        ("tokens a day at this utilisation, at most", made.capacity_tokens_per_day, "tokens"),
        ("energy of a computed token", made.joules_per_computed_token, "J"),
        ("energy that cache hits saved", made.hits_saved_kwh, "kWh"),
        ("worth of that energy", made.hits_saved_cost, money),
    )
    note = "Please tell: " + "; ".join(made.asks) + "." if made.asks else None
    shown = tuple((what, None if value is None else float(value), unit) for what, value, unit in rows)
    return [ReportTable("self_host", title, columns, shown, note), _prices_table(profile, made, work, ledger, job)]


def _prices_table(
    profile: SelfHostProfile, made: SelfHost, work: Work, ledger: Mapping[str | None, GroupSums], job: Job
) -> ReportTable:
    prices = [
        ("this run, by its ledger", currency, sums.cost / sums_tokens * _MILLION)
        for currency, sums in ledger.items()
        if currency is not None and (sums_tokens := sums.prompt_tokens + sums.completion_tokens)
    ]
    now = datetime.now(UTC)
    prices += api_prices(job, work, now)
    rows = tuple(
        (name, currency, float(price), *_compare_with_price(profile, made, work, currency, price))
        for name, currency, price in prices
    )
    columns = (
        Column("price", "text"),
        Column("currency", "text"),
        Column("per_million_tokens", "number"),
        Column("break_even_tokens_per_day", "number"),
        Column("verdict", "text"),
    )
    note = (
        f"Prices of the job's book as of {now:%Y-%m-%d %H:%M} UTC, for the run's own mix of hits, misses and output. "
        f"Only prices in {profile.currency} are compared."
    )
    return ReportTable("self_host_or_buy", "Self-host or buy", columns, rows, note)


def _compare_with_price(
    profile: SelfHostProfile, made: SelfHost, work: Work, currency: str, price: Decimal
) -> tuple[float | None, str]:
    if currency != profile.currency:
        return None, f"not compared: the profile is in {profile.currency}"
    if made.cost is None or made.capacity_tokens_per_day is None:
        return None, "not known: the profile leaves figures out"
    volume = break_even_tokens_per_day(made, work, price)
    if volume is None:
        return None, "buy: energy alone costs as much"
    if volume > made.capacity_tokens_per_day:
        return float(volume), "buy: more than these accelerators can do in a day"
    return float(volume), "self-host from this volume on"
