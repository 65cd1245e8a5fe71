"""Checks a job's engine without loading a model or calling a provider, and finds the prices of its answers.

Part of `jobs/check/preflight.py`.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

from moebeam.jobs.check.default_checkpoint import CHECKPOINT_PATH
from moebeam.model_runner.checkpoint.fenced_tokenizer import try_tokenizer
from moebeam.model_runner.checkpoint.files import compute_checkpoint_revision
from moebeam.model_runner.checkpoint.model_limits import find_limits
from moebeam.model_runner.encoding.prompt_encoder import PromptEncoder
from moebeam.model_runner.encoding.remote_prompts import Encoder, RemotePrompts, load_encoder
from moebeam.model_runner.openai_engine.options import FallbackSection, OpenAIOptions
from moebeam.model_runner.openai_engine.profiles import Profile, find_profile
from moebeam.model_runner.protocol import ENGINES, EngineConfig, load_runner
from moebeam.schemas.chat_options import ChatOptions
from moebeam.schemas.errors import EngineLoadError, JobFileError
from moebeam.schemas.job.model import ModelSection
from moebeam.schemas.job.sections import Job
from moebeam.schemas.prices import PriceLine, PriceMode, find_tier_mode
from moebeam.schemas.redaction.known_secrets import learn_secret
from moebeam.transforms.money.price_book import PriceBook

EMBEDDED_NAME = "moebeam-tickets-v4"


@dataclass(frozen=True, slots=True)
class CheckedEngine:
    """An engine that can be loaded, and its prompt encoder: a tokenizer, read once, or estimates."""

    config: EngineConfig
    encoder: Encoder


def check_engine(job: Job, *, needs_key: bool = True) -> CheckedEngine:
    """Check the engine and its checkpoint's tokenizer, context and revision; loads no weights.

    Args:
        needs_key: whether providers will be called, so that their keys are required.
    Raises:
        JobFileError: a key of `[model]` is wrong, missing, or not an option of this engine.
        EngineLoadError: the checkpoint cannot be read.
    """
    section = job.model
    if section.engine not in ENGINES:
        raise JobFileError(f"[model] engine: expected one of {', '.join(sorted(ENGINES))}, found {section.engine!r}")
    is_remote = isinstance(section, OpenAIOptions)
    checked = _remote_engine(section, needs_key=needs_key) if is_remote else _local_engine(section)
    _check_max_tokens(job, checked.encoder)
    _check_sampling(job)
    if is_remote:
        _check_tiers_and_routes(job, section)
    if section.engine == "fake":
        load_runner(checked.config)
    return checked


def _local_engine(section: ModelSection) -> CheckedEngine:
    if section.path is None and section.has_weights and section.name != EMBEDDED_NAME:
        raise JobFileError(_explain_missing_model(section))
    path = section.path if section.path is not None else str(CHECKPOINT_PATH)
    default_name = EMBEDDED_NAME if section.path is None else path.rstrip("/").rpartition("/")[2]
    # Read first: their errors name the file and the field.
    section.check_files(path)
    if section.path is not None:
        try_tokenizer(path)
    encoder = PromptEncoder.load(path, section.encoding, section.max_model_len)
    if section.has_weights:
        encoder.end_token_ids()
    config = EngineConfig(section, path, section.name or default_name, compute_checkpoint_revision(path))
    return CheckedEngine(config, encoder)


def _explain_missing_model(section: ModelSection) -> str:
    """The embedded model knows the demo's tickets alone, so it answers only where a job names it."""
    demo = f'the demo\'s own model, which knows support tickets alone, answers where name = "{EMBEDDED_NAME}"'
    if section.model_fields_set - {"engine"}:
        return f"[model] path: missing; engine {section.engine!r} needs a checkpoint's folder, or {demo}"
    return (
        '[model]: missing; write which model answers, such as engine = "openai", provider = "deepseek", '
        'name = "deepseek-v4-flash", or engine = "torch", path = "checkpoints/my-model"; ' + demo
    )


def _remote_engine(section: OpenAIOptions, *, needs_key: bool) -> CheckedEngine:
    if section.name is None:
        raise JobFileError("[model] name: missing; the provider must be told which model is to answer")
    if section.path is None and section.encoding != "auto":
        raise JobFileError("[model] encoding: needs `path`; without a tokenizer's folder prompts are not encoded here")
    providers: list[tuple[OpenAIOptions | FallbackSection, str]] = [(section, "[model]")]
    providers += [(named, f"[model] fallbacks.{number}") for number, named in enumerate(section.fallbacks, start=1)]
    providers += [
        (section.complete_route(route), f"[model] routes.{number}")
        for number, route in enumerate(section.routes, start=1)
    ]
    for named, where in providers:
        profile = _profile(named.provider, where)
        if named.base_url is None and profile.base_url is None:
            raise JobFileError(f"{where} base_url: missing; provider {profile.name!r} has no address of its own")
        if "?" in (named.base_url or "") and not profile.takes_api_version:
            raise JobFileError(
                f"{where} base_url: expected an address without query for provider {profile.name!r}, "
                f"found {named.base_url!r}; Azure's takes an api-version"
            )
        variable = named.api_key_variable or profile.api_key_variable
        # A base URL without a named provider is not OpenAI's; it gets no key unless one is named.
        is_free = profile.is_key_optional or (not named.provider and named.base_url is not None)
        if section.mode == "batch" and not profile.has_batches:
            raise JobFileError(f"{where} mode: expected a provider with batches, found {profile.name!r}")
        needs_one = named.api_key_variable is not None or not is_free
        key = os.environ.get(variable, "").strip()
        # What workers say is shown here.
        learn_secret(key)
        if needs_key and needs_one and not key:
            raise JobFileError(
                f"{where}: expected the key of provider {profile.name!r} in the environment variable {variable}, "
                "found none"
            )
    for key, found in (("fallbacks", section.fallbacks), ("routes", section.routes)):
        if section.mode == "batch" and found:
            raise JobFileError(f"[model] {key}: expected none in mode 'batch', whose batches lie at one provider")
    if section.path is not None:
        try_tokenizer(section.path)
    revision = compute_checkpoint_revision(section.path) if section.path is not None else ""
    config = EngineConfig(section, section.path or "", section.name, revision)
    return CheckedEngine(config, load_encoder(config.path, section.encoding, config.name, section.max_model_len))


def _profile(name: str | None, where: str) -> Profile:
    try:
        return find_profile(name)
    except EngineLoadError as error:
        raise JobFileError(f"{where} {error}") from error


def _check_max_tokens(job: Job, encoder: Encoder) -> None:
    most = job.sampling.max_tokens
    if encoder.context_length is not None and most >= encoder.context_length:
        raise JobFileError(
            f"[sampling] max_tokens: expected less than the model's context of {encoder.context_length} tokens, "
            f"found {most}"
        )


def _check_sampling(job: Job) -> None:
    """Refuse what no answer of the job could follow; a provider's own gaps are warnings, see `engine_warnings`."""
    for name, value in _list_sampling(job):
        refusal = job.model.find_refusal(name, value)
        if refusal is not None and not (job.model.is_remote and name in _SOFT_OPTIONS):
            raise JobFileError(f"[sampling] {refusal}")


_SOFT_OPTIONS = ("seed", "min_p", "logprobs", "stop", "top_p")
"""Options that are not sent to a provider that takes none, where the job as a whole asks for them."""


def _list_sampling(job: Job) -> Iterator[tuple[str, object]]:
    """What `[sampling]` asks for beyond its defaults."""
    for name, key in type(job.sampling).model_fields.items():
        value: object = getattr(job.sampling, name)
        if value != key.default:
            yield name, value


def _check_tiers_and_routes(job: Job, section: OpenAIOptions) -> None:
    tier = section.service_tier
    if tier is not None and (refusal := section.find_refusal("service_tier", tier)) is not None:
        raise JobFileError(f"[model] {refusal}")
    for number, fallback in enumerate(section.fallbacks, start=1):
        refusal = tier and find_profile(fallback.provider).find_refusal("service_tier", tier)
        if refusal:
            raise JobFileError(f"[model] fallbacks.{number} {refusal}")
    if section.routes and job.accounting.model is not None:
        raise JobFileError(
            "[accounting] model: expected none beside [[model.routes]], whose answers are priced by their own names, "
            f"found {job.accounting.model!r}"
        )


def thinks(encoder: Encoder, options: ChatOptions) -> bool:
    """Whether the model will think, defaults resolved."""
    return encoder.thinks(options) if isinstance(encoder, RemotePrompts) else encoder.encoding.is_thinking(options)


def price_line(job: Job, engine: EngineConfig, prices: PriceBook) -> PriceLine:
    """Look up the current price of the engine's answers.

    For a service tier that the book does not price it is the ordinary price, for its currency: see `engine_warnings`.

    Raises:
        JobFileError: the book has none, or none of the tier to which `[limits] max_cost` would apply.
    """
    provider = job.accounting.provider or find_provider(engine)
    model = job.accounting.model or engine.name
    mode, now = find_price_mode(engine), datetime.now(UTC)
    line = prices.find(provider, model, now, mode=mode)
    if line is None and mode in ("flex", "priority") and job.limits.max_cost is None:
        line = prices.find(provider, model, now)
    if line is not None:
        return line
    has_mode = "" if mode == "online" else f", mode {mode!r}"
    others = sorted({line.provider for line in prices.lines if line.model == model})
    hint = f"of this model the book has prices of {', '.join(others)}; " if others else ""
    raise JobFileError(
        f"{job.accounting.price_book}: expected a price of provider {provider!r}, model {model!r}{has_mode} that holds "
        f"now, found none; {hint}name both in [accounting] provider and model"
    )


def find_price_mode(engine: EngineConfig) -> PriceMode:
    """At which prices a job's rows are answered that ask for no tier of their own."""
    if engine.options.is_batch:
        return "batch"
    return find_tier_mode(engine.options.service_tier if isinstance(engine.options, OpenAIOptions) else None)


def find_provider(engine: EngineConfig) -> str:
    """The provider named in the engine's completions."""
    if isinstance(engine.options, OpenAIOptions):
        return find_profile(engine.options.provider).name
    return "fake" if engine.engine == "fake" else "local"


def engine_warnings(job: Job, engine: EngineConfig, prices: PriceBook | None) -> Iterator[str]:
    """Warnings about a remote engine before the run; none for others."""
    options = engine.options
    if not isinstance(options, OpenAIOptions):
        return
    if not engine.path:
        known = find_limits(engine.name, datetime.now(UTC)) is not None
        yield (
            "[model] has no `path`: prompt tokens are estimated until the provider reports them"
            + ("" if known else f", and nobody here knows the context of {engine.name}: the provider refuses long rows")
        )
    if job.failures.journal == "never":
        yield "[failures] journal is `never`: after a crash the answers of unfinished shards are paid again"
    if find_limits(engine.name, datetime.now(UTC)) is None:
        for name, value in _list_sampling(job):
            if name in _SOFT_OPTIONS and (refusal := options.find_refusal(name, value)) is not None:
                yield f"[sampling] {refusal}: it is not sent"
    for name, value in (("thinking", job.thinking.mode), ("reasoning_effort", job.thinking.reasoning_effort)):
        if value not in (None, "auto") and (refusal := options.find_refusal(name, value)) is not None:
            yield f"[thinking] {refusal}: it is not sent"
    if prices is not None:
        yield from _price_warnings(job, engine, options, prices)
    if job.output.schema_in_prompt == "never":
        for name in (options.provider, *(fallback.provider for fallback in options.fallbacks)):
            if "json_schema" not in (profile := find_profile(name)).response_types:
                yield (
                    f"[output] schema_in_prompt is `never`, but provider {profile.name!r} takes no schema elsewhere: "
                    "its answers are asked for with the schema in the prompt all the same"
                )


def _price_warnings(job: Job, engine: EngineConfig, options: OpenAIOptions, prices: PriceBook) -> Iterator[str]:
    """Who may answer at no known price; the job's own provider and model are checked by `price_line`."""
    mode, book = find_price_mode(engine), job.accounting.price_book
    own = job.accounting.provider or find_provider(engine), job.accounting.model or engine.name
    others = [(named.provider, named.name or engine.name) for named in options.fallbacks]
    others += [(route.provider or options.provider, route.name) for route in options.routes]
    asked = [own] if mode in ("flex", "priority") else []
    asked += [
        (job.accounting.provider or find_profile(provider).name, job.accounting.model or name)
        for provider, name in others
    ]
    for provider, model in dict.fromkeys(asked):
        if prices.find(provider, model, datetime.now(UTC), mode=mode) is None:
            has_mode = "" if mode == "online" else f", mode {mode!r}"
            yield f"{book}: no price of provider {provider!r}, model {model!r}{has_mode}: such costs stay null"
