"""The options of the engine `openai` in `[model]`."""

from typing import Annotated, ClassVar, Literal, TypeAlias

from pydantic import Field

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


class OpenAIOptions(ModelSection):
    """`engine = "openai"`: any endpoint that speaks OpenAI's chat completions."""

    loader: ClassVar[str] = "moebeam.model_runner.openai_engine.runner:load_openai_runner"
    has_weights: ClassVar[bool] = False
    is_remote: ClassVar[bool] = True
    is_self_healing: ClassVar[bool] = True

    engine: str = "openai"
    provider: str | None = Field(
        default=None,
        description="Name of a provider profile, such as `deepseek`, `alibaba`, `volcano`, `vllm`; default `openai`",
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
    max_retries: int = Field(
        default=6, ge=0, le=50, description="Times that one provider is asked again after a failure that may pass"
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

    @property
    def is_batch(self) -> bool:
        """As of `ModelSection`."""
        return self.mode == "batch"
