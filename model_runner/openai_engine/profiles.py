"""Provider profiles: what OpenAI-compatible endpoints differ in, as data (`profiles.toml`).

Read once a process, and checked; `request_body.py` and `responses.py` follow what a profile says, so a new provider
is a table in that file and no code.
"""

import tomllib
from functools import cache
from importlib import resources
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, TypeAdapter, ValidationError

from moebeam.schemas.chat_options import NO_EFFORT, ORDINARY_TIERS, ResponseType, ServiceTier
from moebeam.schemas.errors import EngineLoadError
from moebeam.schemas.providers import name_provider, suggest_provider

DEFAULT_PROFILE = "openai"
"""What an endpoint without a named provider is taken for."""


class Profile(BaseModel):
    """One provider.

    Attributes:
        base_url: None where every job brings its own.
        strict_tools_url: used in place of `base_url` for requests all of whose tools are strict.
        api_key_variable: NAME of the environment variable of the key.
        is_key_optional: whether the endpoint may be asked without a key.
        max_concurrency: most requests in flight, and `max_concurrency_by_model` for models with a limit of their own.
        timeout_s: most seconds of silence that are normal.
        mode: `stream` where the provider cuts connections that are silent for long.
        thinking: how thinking is switched: DeepSeek's `thinking: {type}`, Alibaba's `enable_thinking`,
            OpenRouter's `reasoning: {enabled}`, an argument of the chat template (`template:NAME`), or not at all.
        effort: `reasoning_effort` as it is asked for, mapped by `model_runner/checkpoint/model_limits.py`, or not sent.
        strict_tools: whether `strict` may stand in a function.
        response_types: forms of answers it takes; a schema goes into the prompt where `json_schema` is missing.
        unsupported: fields of `Sampling` that it refuses or does not know.
        service_tiers: those it takes in `service_tier`; empty where it has none.
        max_stop_strings: 0 where no limit is known.
        tenant_field: the field that keeps the caches of tenants apart; None where there is none.
        cached_tokens: where in `usage` the cached tokens stand, the first that is there counts.
        refusal_codes: error codes of its content filter.
        stop_codes: error codes, whatever the HTTP status, after which no request can succeed.
        stop_messages: messages that say the same where there is no such code; whole and as they are spelled.
        num_leaders: how many requests of a shared prefix have to be through before the rest can hit it.
        min_prefix_tokens: shorter shared prefixes are not worth waiting for.
        idempotency_header: where it offers one.
        key_header: the header that carries the key; `Authorization` has it as a bearer's token.
        takes_api_version: whether an address may end with `?api-version=...`.
        part_separator: what joins the text parts of a message where the provider takes text only; None sends the list.
        more_fields: what else stands in every request.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    base_url: str | None = None
    strict_tools_url: str | None = None
    api_key_variable: str
    is_key_optional: bool = False
    evidence: Literal["tested", "untested"]
    max_concurrency: int = Field(gt=0)
    max_concurrency_by_model: dict[str, int] = Field(default_factory=dict[str, int])
    timeout_s: float = Field(gt=0)
    mode: Literal["plain", "stream"] = "plain"
    max_tokens_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    thinking: str = Field(pattern=r"^(type|enable_thinking|reasoning|none|template:[a-z_]+)$")
    effort: Literal["plain", "mapped", "none"]
    strict_tools: bool = True
    response_types: tuple[ResponseType, ...]
    unsupported: tuple[
        Literal["seed", "min_p", "logprobs", "stop", "top_p", "top_logprobs", "frequency_penalty", "presence_penalty"],
        ...,
    ] = ()
    service_tiers: tuple[ServiceTier, ...] = ()
    max_stop_strings: int = 0
    tenant_field: str | None = None
    cached_tokens: tuple[str, ...] = ("prompt_tokens_details.cached_tokens", "cached_tokens")
    refusal_codes: frozenset[str] = frozenset()
    stop_codes: frozenset[str] = frozenset()
    stop_messages: frozenset[str] = frozenset()
    num_leaders: int = Field(default=1, ge=0)
    min_prefix_tokens: int = Field(default=256, gt=0)
    idempotency_header: str | None = None
    key_header: Literal["Authorization", "api-key"] = "Authorization"
    takes_api_version: bool = False
    part_separator: str | None = None
    more_fields: dict[str, JsonValue] = Field(default_factory=dict[str, JsonValue])
    has_batches: bool = False

    def find_refusal(self, option: str, value: object) -> str | None:
        """Why the provider cannot follow an option of a request; None if it can.

        Args:
            option: its name in `Sampling` or `ChatOptions`.
        """
        match option:
            case "service_tier":
                can_follow = value in ORDINARY_TIERS or value in self.service_tiers
            case "thinking":
                can_follow = self.thinking != "none"
            case "reasoning_effort":
                can_follow = self.effort != "none" or (value == NO_EFFORT and self.thinking != "none")
            case "max_reasoning_tokens":
                can_follow = False
            case _:
                can_follow = option not in self.unsupported
        return None if can_follow else f"{option}: the provider {self.name!r} cannot follow it, found {value!r}"

    def concurrency_for(self, model: str) -> int:
        """Most requests in flight that the provider is known to take for a model."""
        return self.max_concurrency_by_model.get(model.lower(), self.max_concurrency)


@cache
def profiles() -> dict[str, Profile]:
    """All profiles by name.

    Raises:
        EngineLoadError: the file is damaged; names the profile and the field.
    """
    text = resources.files("moebeam.model_runner.openai_engine").joinpath("profiles.toml").read_text("utf-8")
    tables = tomllib.loads(text)
    named = {name: {"name": name, **table} for name, table in tables.items()}
    try:
        return TypeAdapter(dict[str, Profile]).validate_python(named)
    except ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, found['loc']))}: {found['msg']}" for found in error.errors(include_url=False)
        )
        raise EngineLoadError(f"profiles.toml: {problems}") from error


def find_profile(name: str | None) -> Profile:
    """A profile by any of its provider's names; `openai` where none is given.

    Raises:
        EngineLoadError: there is no such profile; names those that there are.
    """
    known = profiles()
    profile = known.get(name_provider(name or DEFAULT_PROFILE))
    if profile is None:
        hint = suggest_provider(name or "", sorted(known))
        raise EngineLoadError(f"provider: expected one of {', '.join(sorted(known))}, found {name!r}{hint}")
    return profile
