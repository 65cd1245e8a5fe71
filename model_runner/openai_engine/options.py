"""The options of the engine `openai` in `[model]`."""

from typing import Annotated, ClassVar, Literal, TypeAlias

from pydantic import Field, model_validator

from moebeam.model_runner.openai_engine.profiles import find_profile
from moebeam.schemas.chat_options import ServiceTier
from moebeam.schemas.job.endpoint import Address, KeyVariable
from moebeam.schemas.job.model import ModelSection
from moebeam.schemas.job.section import Section

RemoteMode: TypeAlias = Literal["auto", "plain", "stream", "batch"]


class FallbackSection(Section):
    """One of `[[model.fallbacks]]`: a further provider, asked where those before it could not answer."""

    provider: Annotated[str, Field(min_length=1, description="Name of a provider profile")]
    name: str | None = Field(default=None, description="The model as this provider calls it; default `[model] name`")
    base_url: Address | None = Field(default=None, description="Its endpoint; default the profile's")
    api_key_variable: KeyVariable | None = Field(
        default=None, description="NAME of the environment variable that holds its key; default the profile's"
    )
    max_concurrency: int = Field(default=0, ge=0, description="As in `[model]`")


class RouteSection(Section):
    """One of `[[model.routes]]`: another model, for rows that ask for it by name."""

    name: Annotated[str, Field(min_length=1, description="The model, as rows and its provider call it")]
    provider: str | None = Field(default=None, description="Name of a provider profile; default `[model] provider`")
    base_url: Address | None = Field(
        default=None, description="Its endpoint; default that of `[model]`, or of the provider that is named here"
    )
    api_key_variable: KeyVariable | None = Field(
        default=None, description="NAME of the environment variable that holds its key; default as `base_url`"
    )
    max_concurrency: int = Field(default=0, ge=0, description="As in `[model]`")


class OpenAIOptions(ModelSection):
    """`engine = "openai"`: any endpoint that speaks OpenAI's chat completions."""

    loader: ClassVar[str] = "moebeam.model_runner.openai_engine.runner:load_openai_runner"
    has_weights: ClassVar[bool] = False
    is_remote: ClassVar[bool] = True
    is_self_healing: ClassVar[bool] = True
    unsupported: ClassVar[frozenset[str]] = frozenset()

    engine: str = "openai"
    provider: str | None = Field(
        default=None,
        description="Name of a provider profile, such as `deepseek`, `alibaba`, `openrouter`, `azure`, `vllm`; default "
        "`openai`",
    )
    base_url: Address | None = Field(
        default=None, description="Endpoint, up to where `/chat/completions` follows; default the profile's"
    )
    api_key_variable: KeyVariable | None = Field(
        default=None,
        description="NAME of the environment variable that holds the key, never the key; default the profile's",
    )
    max_concurrency: int = Field(
        default=0, ge=0, description="Most requests in flight in one process; 0 takes the profile's limit for the model"
    )
    timeout_s: float = Field(
        default=0.0, ge=0, description="Most seconds of silence, however long an answer takes; 0 takes the profile's"
    )
    max_answer_s: float = Field(
        default=0.0,
        ge=0,
        description="Most seconds for a whole answer; 0 takes `timeout_s`, and 0.1 s for each token of `max_tokens` "
        "and of 32,768 more, which may be reasoning that a provider does not count",
    )
    max_response_bytes: int = Field(
        default=0,
        ge=0,
        description="Most bytes of a response, compressed or not; 0 takes 256 B for each of the tokens that "
        "`max_answer_s` counts, 1,024 B where it is a stream, and with `logprobs` 256 B for each token and each of its "
        "`top_logprobs`",
    )
    max_retries: int = Field(
        default=6,
        ge=0,
        le=50,
        description="Times that one provider is asked again before a failure can be the row's own, which it is only "
        "where others are answered; in batch mode, further batches for lines on which it failed",
    )
    mode: RemoteMode = Field(
        default="auto",
        description="Whether answers come whole or in pieces; `auto` is what suits the provider; `batch` sends files "
        "that it answers within a day at its batch price",
    )
    fallbacks: tuple[FallbackSection, ...] = Field(
        default=(),
        description="Providers to be asked, in this order, where the one before could not answer, as "
        "`[[model.fallbacks]]` with `provider`, `name`, `base_url`, `api_key_variable`, `max_concurrency`",
    )

    service_tier: ServiceTier | None = Field(
        default=None,
        description="How soon the provider answers, and at which price, where it has tiers: `flex` is cheaper and "
        "slower, `priority` dearer and faster; a row's own wins. A price book has lines of these modes",
    )
    routes: tuple[RouteSection, ...] = Field(
        default=(),
        description="Further models for rows of batch files that name them in `model`, as `[[model.routes]]` with "
        "`name`, `provider`, `base_url`, `api_key_variable`, `max_concurrency`; rows that name any other are rejected",
    )

    @model_validator(mode="after")
    def _check_routes(self) -> "OpenAIOptions":
        names = [name for name in (self.name, *self.route_names) if name is not None]
        if repeated := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"routes: expected every model once, found {', '.join(repeated)} again")
        return self

    @property
    def is_batch(self) -> bool:
        """As of `ModelSection`."""
        return self.mode == "batch"

    @property
    def route_names(self) -> tuple[str, ...]:
        """As of `ModelSection`."""
        return tuple(route.name for route in self.routes)

    def complete_route(self, route: RouteSection) -> FallbackSection:
        """A route with what it leaves to `[model]` filled in, as an endpoint is named."""
        is_own = route.provider is None
        return FallbackSection.model_construct(
            provider=(self.provider or "") if is_own else route.provider,
            name=route.name,
            base_url=route.base_url or (self.base_url if is_own else None),
            api_key_variable=route.api_key_variable or (self.api_key_variable if is_own else None),
            max_concurrency=route.max_concurrency or (self.max_concurrency if is_own else 0),
        )

    def find_refusal(self, option: str, value: object, model: str | None = None) -> str | None:
        """As of `ModelSection`: what the first provider that is asked cannot follow."""
        if option == "service_tier" and self.is_batch and value in ("flex", "priority"):
            return f"service_tier: batches have a price of their own and no tiers, found {value!r}"
        route = next((route for route in self.routes if route.name == model), None)
        return find_profile(self.provider if route is None else route.provider or self.provider).find_refusal(
            option, value
        )
