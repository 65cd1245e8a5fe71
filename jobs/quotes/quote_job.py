"""`moebeam estimate`: what a job will take and cost, before any call to a model.

The job gets the checks of `run`, and its prompts are read, rendered and counted by the same functions. The arithmetic
is in `transforms/quote/` (`quote.py`, `cheapest_start.py`). Neither Beam nor torch is imported.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from decimal import Decimal

from moebeam.jobs.check.engine_config import find_price_mode, find_provider
from moebeam.jobs.check.identity import JobIdentity
from moebeam.jobs.check.preflight import CheckedJob, check_job
from moebeam.jobs.prices.shipped import BUILTIN, load_named_book
from moebeam.jobs.quotes.earlier_run import EarlierRun
from moebeam.model_runner.vllm_engine.options import VllmOptions
from moebeam.model_runner.vllm_engine.prefix_units import describe_reach, measure_reach
from moebeam.schemas.canonical import Json
from moebeam.schemas.errors import JobFileError
from moebeam.schemas.job.sections import Job
from moebeam.schemas.prices import PriceMode
from moebeam.schemas.providers import name_provider, suggest_provider
from moebeam.transforms.money.exchange_rates import ExchangeRates
from moebeam.transforms.money.price_book import PriceBook
from moebeam.transforms.quote.cache_rules import UNKNOWN, CacheRule, find_rule, unit_rule
from moebeam.transforms.quote.cheapest_start import Offer, Start, cheapest, cost_at, hourly_costs, starts, tier_starts
from moebeam.transforms.quote.prompt_survey import PromptSurvey, survey_columns, survey_prompts
from moebeam.transforms.quote.quote import (
    CONFIDENCE,
    CostRange,
    Forecast,
    OutputForecast,
    RepairTerms,
    TokenForecast,
    demand,
    forecast_tokens,
)
from moebeam.transforms.render.render_rows import Renderer


@dataclass(frozen=True, slots=True)
class QuoteTerms:
    """Options of a quote.

    Attributes:
        at: when the job starts.
        num_sample_rows: number of rows to read; None reads all.
        providers: providers to compare; empty for all that the book has for the model.
        model: name in the price book; None for the job's.
        output_tokens: mean output tokens per request; None takes `like`, or else `max_tokens`.
        deadline: when the job must be done; None plans no start.
        currency: the currency in which costs are compared, converted by `rates`.
    """

    at: datetime
    num_sample_rows: int | None = None
    providers: tuple[str, ...] = ()
    model: str | None = None
    output_tokens: float | None = None
    like: EarlierRun | None = None
    deadline: datetime | None = None
    currency: str | None = None
    rates: ExchangeRates | None = None


@dataclass(frozen=True, slots=True)
class QuotedOffer:
    """One provider's part of a quote; `is_job` marks the job as written, with its own engine."""

    offer: Offer
    is_job: bool
    rule: CacheRule
    expected_hits: int
    cost: CostRange | None
    currency: str | None
    hours: tuple[tuple[datetime, Decimal | None], ...]


@dataclass(frozen=True, slots=True)
class Quote:
    """The result of `moebeam estimate`."""

    job_fingerprint: str
    output: str
    terms: QuoteTerms
    survey: PromptSurvey
    tokens: TokenForecast
    expected_output_tokens: int
    output_basis: str
    is_estimated: bool
    price_book: str
    model: str
    offers: tuple[QuotedOffer, ...]
    plan: Start | None
    notes: tuple[str, ...]

    @property
    def own(self) -> QuotedOffer:
        """The offer for the job as written."""
        return self.offers[0]

    def to_json(self) -> dict[str, Json]:
        """The quote as JSON; money is decimal text."""
        survey, tokens, terms = self.survey, self.tokens, self.terms
        return {
            "job_fingerprint": self.job_fingerprint,
            "output": self.output,
            "at": terms.at.isoformat(),
            "num_rows": survey.num_rows,
            "num_surveyed_rows": survey.num_surveyed_rows,
            "is_sample": survey.is_sample,
            "confidence": CONFIDENCE if survey.is_sample else 1.0,
            "rejects": dict(survey.rejects),
            "requests": _range(tokens.requests),
            "merged_rows": _range(tokens.merged_rows),
            "prompt_tokens": _range(tokens.prompt_tokens),
            "tree_tokens": _range(tokens.tree_tokens),
            "max_hit_rate": tokens.max_hit_rate,
            "max_output_tokens": _range(tokens.max_output_tokens),
            "expected_output_tokens": self.expected_output_tokens,
            "output_basis": self.output_basis,
            "tokens_are_estimated": self.is_estimated,
            "price_book": self.price_book,
            "model": self.model,
            "offers": [_offer_to_json(offer) for offer in self.offers],
            "plan": self.plan and _start_to_json(self.plan),
            "notes": list(self.notes),
        }


def quote_job(job: Job, terms: QuoteTerms, *, limit: int | None = None) -> tuple[Quote, JobIdentity]:
    """Quote a job; also returns its identity, for `save_quote`.

    Raises:
        JobError: the job is wrong, or a named provider or model has no price.
    """
    checked = check_job(job, limit=limit, is_quote=True)
    checked.check_readable()
    renderer = Renderer(checked.render_spec)
    survey = survey_prompts(
        checked.scan,
        survey_columns(checked.columns),
        renderer,
        checked.plan_section,
        has_ids=checked.has_ids,
        num_sample_rows=terms.num_sample_rows,
    )
    tokens = forecast_tokens(survey)
    output = _forecast_output(terms)
    repair = RepairTerms(job.repair.max_attempts, _can_fail(checked, survey), renderer.context_length)
    book = checked.prices or load_named_book(BUILTIN)
    model = terms.model or job.accounting.model or checked.engine.config.name
    offers = [
        _quote_offer(book, survey, tokens, rule, output, repair, terms, checked, (provider, model, mode), is_job)
        for provider, mode, rule, is_job in _list_candidates(checked, book, model, terms.providers)
    ]
    plan, notes = _plan_start(book, offers, terms)
    if all(quoted.cost is None for quoted in offers):
        notes.append(
            f"{book.version} has no price of {model!r} at {terms.at.isoformat()}: costs are unknown; "
            "--model names another, [accounting] price_book a book"
        )
    if routes := checked.engine.config.options.route_names:
        notes.append(f"rows that ask for another model ({', '.join(routes)}) are quoted at the price of {model!r}")
    if survey.is_sample and terms.num_sample_rows is not None and job.input.id_column is not None:
        notes.append("repeated ids are not looked for in a sample; each is a row that is not asked")
    if (unit := offers[0].rule.unit) is not None:
        notes.append(describe_reach(measure_reach(survey.num_prompt_tokens, survey.num_shared_tokens, unit), unit))
    if renderer.is_estimated:
        notes.append("prompt tokens are estimated from their text, so the bounds do not cover the tokenizer's error")
    if any(quoted.rule is not UNKNOWN and not quoted.is_job for quoted in offers):
        notes.append("a provider's tokenizer may cut the prompts otherwise than the job's checkpoint")
    quote = Quote(
        job_fingerprint=checked.identity.fingerprint,
        output=job.output.path,
        terms=terms,
        survey=survey,
        tokens=tokens,
        expected_output_tokens=sum(tier.expected_output for tier in offers[0].offer.tiers),
        output_basis=output.basis,
        is_estimated=renderer.is_estimated,
        price_book=book.version,
        model=model,
        offers=tuple(offers),
        plan=plan,
        notes=tuple(notes),
    )
    return quote, checked.identity


def _forecast_output(terms: QuoteTerms) -> OutputForecast:
    given = terms.output_tokens
    if terms.like is None:
        return OutputForecast() if given is None else OutputForecast(given, basis="--output-tokens")
    found = terms.like.forecast()
    if given is None:
        return found
    return OutputForecast(
        given, found.extra_prompt_tokens_a_request, found.extra_hit_rate, f"--output-tokens; repairs: {found.basis}"
    )


def _can_fail(checked: CheckedJob, survey: PromptSurvey) -> bool:
    """Whether answers can be invalid, and thus retried."""
    options = checked.terms.options
    return options.response_format.type != "text" or bool(options.tools) or bool(survey.own_terms.any())


def _list_candidates(
    checked: CheckedJob, book: PriceBook, model: str, wanted: Sequence[str]
) -> list[tuple[str, PriceMode, CacheRule, bool]]:
    """List provider, mode and cache rule of each offer: the job as written, then the book's other providers."""
    engine = checked.engine.config
    own, own_mode = (
        name_provider(checked.request.job.accounting.provider or find_provider(engine)),
        find_price_mode(engine),
    )
    is_remote = engine.options.is_remote
    rule = find_rule(own, engine.engine) if is_remote else find_rule("local", engine.engine)
    if isinstance(engine.options, VllmOptions):
        rule = unit_rule(engine.options.expect_unit(engine.path))
    found: list[tuple[str, PriceMode, CacheRule, bool]] = [(own, own_mode, rule, True)]
    lines = [line for line in book.lines if line.model == model]
    known: list[tuple[str, PriceMode]] = list(dict.fromkeys((line.provider, line.mode) for line in lines))
    names = sorted({name for name, _ in known})
    for provider in wanted:
        if name_provider(provider) not in names:
            raise JobFileError(
                f"--provider: expected one of {', '.join(names) or 'none'}, which {book.version} has for {model!r}, "
                f"found {provider!r}{suggest_provider(provider, names)}"
            )
    wanted = [name_provider(provider) for provider in wanted]
    for provider, mode in known:
        is_own = provider == own and mode == own_mode and (is_remote or provider in ("local", "fake"))
        if not is_own and (not wanted or provider in wanted):
            found.append((provider, mode, find_rule(provider, ""), False))
    return found


def _quote_offer(
    book: PriceBook,
    survey: PromptSurvey,
    tokens: TokenForecast,
    rule: CacheRule,
    output: OutputForecast,
    repair: RepairTerms,
    terms: QuoteTerms,
    checked: CheckedJob,
    priced: tuple[str, str, PriceMode],
    is_job: bool,
) -> QuotedOffer:
    provider, model, mode = priced
    tiers = tuple(demand(survey, tokens, rule, output, repair, tier_starts=tier_starts(book, provider, model)))
    hits = sum(tier.expected_hits for tier in tiers)
    duration_s = None
    if is_job and terms.like is not None and terms.like.engine == checked.engine.config.engine:
        num_prompt_tokens = sum(tier.prompt_tokens.expected for tier in tiers)
        num_output_tokens = sum(tier.expected_output for tier in tiers)
        duration_s = terms.like.duration_s(num_prompt_tokens - hits, num_output_tokens)
    offer = Offer(provider, model, mode, tiers, duration_s)
    found = cost_at(book, offer, terms.at)
    return QuotedOffer(
        offer=offer,
        is_job=is_job,
        rule=rule,
        expected_hits=hits,
        cost=found and found[0],
        currency=found and found[1],
        hours=tuple(hourly_costs(book, offer, terms.at)),
    )


def _plan_start(book: PriceBook, offers: Sequence[QuotedOffer], terms: QuoteTerms) -> tuple[Start | None, list[str]]:
    """Find the cheapest start that meets the deadline, and notes on the choice."""
    notes: list[str] = []
    if terms.deadline is None:
        return None, notes
    candidates: list[Start] = []
    for quoted in offers:
        if quoted.offer.mode == "batch":
            notes.append(f"plan: {quoted.offer.name} is left out, nobody promises when a batch is done")
        else:
            candidates += starts(book, quoted.offer, terms.at, terms.deadline)
    into = terms.currency or (candidates[0].currency if candidates else "")

    def into_common(cost: Decimal, currency: str) -> Decimal | None:
        if currency == into:
            return cost
        converted = terms.rates and terms.rates.convert(cost, currency, into, terms.at)
        return converted.amount if converted else None

    apart = sorted({start.offer.name for start in candidates if into_common(start.cost, start.currency) is None})
    if apart:
        notes.append(
            f"plan: left out for want of a rate into {into}: {', '.join(apart)}; --rates names a file of rates"
        )
    plan = cheapest(candidates, into_common)
    if plan is None:
        notes.append(f"plan: nothing is known to be done by {terms.deadline.isoformat()}")
    elif plan.offer.duration_s is None:
        notes.append("plan: how long the job takes there is not known, so only its start is sure to be in time")
    return plan, notes


def _range(found: Forecast) -> dict[str, Json]:
    return asdict(found)


def _offer_to_json(quoted: QuotedOffer) -> dict[str, Json]:
    cost = quoted.cost
    return {
        "provider": quoted.offer.provider,
        "model": quoted.offer.model,
        "mode": quoted.offer.mode,
        "is_job": quoted.is_job,
        "cache_rule": quoted.rule.name,
        "cache_rule_meaning": quoted.rule.meaning,
        "expected_hits": quoted.expected_hits,
        "currency": quoted.currency,
        "cost": None
        if cost is None
        else {
            "low": format(cost.low, "f"),
            "expected": format(cost.expected, "f"),
            "high": None if cost.high is None else format(cost.high, "f"),
            "high_without_repair": format(cost.high_without_repair, "f"),
        },
        "duration_s": quoted.offer.duration_s,
        "hours": [
            {"at": at.isoformat(), "cost": None if hour is None else format(hour, "f")} for at, hour in quoted.hours
        ],
    }


def _start_to_json(start: Start) -> dict[str, Json]:
    return {
        "provider": start.offer.provider,
        "model": start.offer.model,
        "start": start.at.isoformat(),
        "cost": format(start.cost, "f"),
        "currency": start.currency,
        "duration_s": start.offer.duration_s,
    }
