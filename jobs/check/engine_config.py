"""Checks a job's engine without loading a model or calling a provider, and finds the prices of its answers.

Part of `jobs/check/preflight.py`.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

from moebeam.jobs.check.default_checkpoint import CHECKPOINT_PATH
from moebeam.model_runner.checkpoint.files import compute_checkpoint_revision
from moebeam.model_runner.checkpoint.model_limits import find_limits
from moebeam.model_runner.encoding.prompt_encoder import PromptEncoder
from moebeam.model_runner.encoding.remote_prompts import Encoder, RemotePrompts, load_encoder
from moebeam.model_runner.openai_engine.options import OpenAIOptions
from moebeam.model_runner.openai_engine.profiles import Profile, find_profile
from moebeam.model_runner.protocol import ENGINES, EngineConfig, load_runner
from moebeam.schemas.chat_options import ChatOptions
from moebeam.schemas.errors import EngineLoadError, JobFileError
from moebeam.schemas.job.model import ModelSection
from moebeam.schemas.job.sections import Job
from moebeam.schemas.prices import PriceLine
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
    if section.engine == "fake":
        load_runner(checked.config)
    return checked


def _local_engine(section: ModelSection) -> CheckedEngine:
    path = section.path if section.path is not None else str(CHECKPOINT_PATH)
    default_name = EMBEDDED_NAME if section.path is None else path.rstrip("/").rpartition("/")[2]
    # Read first: its errors name the file and the field.
    encoder = PromptEncoder.load(path, section.encoding)
    config = EngineConfig(section, path, section.name or default_name, compute_checkpoint_revision(path))
    return CheckedEngine(config, encoder)


def _remote_engine(section: OpenAIOptions, *, needs_key: bool) -> CheckedEngine:
    if section.name is None:
        raise JobFileError("[model] name: missing; the provider must be told which model is to answer")
    if section.path is None and section.encoding != "auto":
        raise JobFileError("[model] encoding: needs `path`; without a tokenizer's folder prompts are not encoded here")
    providers = (
        (section, "[model]"),
        *((fallback, f"[model] fallbacks.{number}") for number, fallback in enumerate(section.fallbacks, start=1)),
    )
    for named, where in providers:
        profile = _profile(named.provider, where)
        if named.base_url is None and profile.base_url is None:
            raise JobFileError(f"{where} base_url: missing; provider {profile.name!r} has no address of its own")
        variable = named.api_key_variable or profile.api_key_variable
        # A base URL without a named provider is not OpenAI's; it gets no key unless one is named.
        is_free = profile.is_key_optional or (named.provider is None and named.base_url is not None)
        if section.mode == "batch" and not profile.has_batches:
            raise JobFileError(f"{where} mode: expected a provider with batches, found {profile.name!r}")
        needs_one = named.api_key_variable is not None or not is_free
        if needs_key and needs_one and not os.environ.get(variable, "").strip():
            raise JobFileError(
                f"{where}: expected the key of provider {profile.name!r} in the environment variable {variable}, "
                "found none"
            )
    if section.mode == "batch" and section.fallbacks:
        raise JobFileError("[model] fallbacks: expected none in mode 'batch', whose batches lie at one provider")
    revision = compute_checkpoint_revision(section.path) if section.path is not None else ""
    config = EngineConfig(section, section.path or "", section.name, revision)
    return CheckedEngine(config, load_encoder(config.path, section.encoding, config.name))


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


def thinks(encoder: Encoder, options: ChatOptions) -> bool:
    """Whether the model will think, defaults resolved."""
    return encoder.thinks(options) if isinstance(encoder, RemotePrompts) else encoder.encoding.is_thinking(options)


def price_line(job: Job, engine: EngineConfig, prices: PriceBook) -> PriceLine:
    """Look up the current price of the engine's answers.

    Raises:
        JobFileError: the book has none.
    """
    provider = job.accounting.provider or find_provider(engine)
    model = job.accounting.model or engine.name
    mode = "batch" if engine.options.is_batch else "online"
    line = prices.find(provider, model, datetime.now(UTC), mode=mode)
    if line is None:
        raise JobFileError(
            f"{job.accounting.price_book}: expected a price of provider {provider!r}, model {model!r} that holds now, "
            "found none; name both in [accounting] provider and model"
        )
    return line


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
    is_fixed = job.accounting.provider is not None and job.accounting.model is not None
    for fallback in options.fallbacks if prices is not None and not is_fixed else ():
        provider = job.accounting.provider or find_profile(fallback.provider).name
        model = job.accounting.model or fallback.name or engine.name
        if prices is not None and prices.find(provider, model, datetime.now(UTC)) is None:
            book = job.accounting.price_book
            yield f"{book}: no price of provider {provider!r}, model {model!r}: such costs stay null"
    if job.output.schema_in_prompt == "never":
        for name in (options.provider, *(fallback.provider for fallback in options.fallbacks)):
            if "json_schema" not in (profile := find_profile(name)).response_types:
                yield (
                    f"[output] schema_in_prompt is `never`, but provider {profile.name!r} takes no schema elsewhere: "
                    "its answers are asked for with the schema in the prompt all the same"
                )
