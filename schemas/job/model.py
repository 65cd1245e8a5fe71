"""`[model]`: what every engine's section has, and how the section of the named engine is found.

Each engine declares its own options once, as a subclass of `ModelSection` beside its code; the job file, its
documentation and the engine read that one declaration.
"""

import json
import re
from collections.abc import Mapping
from importlib import import_module
from typing import Any, ClassVar, Literal, cast

from pydantic import Field, ValidationError, ValidationInfo, field_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from moebeam.schemas.chat_options import ORDINARY_TIERS
from moebeam.schemas.job.section import Section

DEFAULT_ENGINE = "torch"

ENGINE_OPTIONS: dict[str, str] = {
    "torch": "moebeam.model_runner.torch_engine.options:TorchOptions",
    "transformers": "moebeam.model_runner.transformers_engine.options:TransformersOptions",
    "vllm": "moebeam.model_runner.vllm_engine.options:VllmOptions",
    "openai": "moebeam.model_runner.openai_engine.options:OpenAIOptions",
    "fake": "moebeam.model_runner.fake_engine.options:FakeOptions",
}
"""Engine names and where their options are declared; imported on first use. A new engine adds a line."""

_ACCELERATOR = re.compile(r"type:[^\s;:=]+(;[a-z][a-z0-9_-]*(:[^\s;]+)?)*")
_RAM = re.compile(r"[0-9]+(\.[0-9]+)? ?([KMGTP]i?)?B")


class ModelSection(Section):
    """`[model]`: which engine and checkpoint answer."""

    loader: ClassVar[str] = ""
    """Where the engine's loading function lives, as `module:function`."""
    checker: ClassVar[str] = ""
    """Where the function lives that checks a checkpoint as the engine loads it, but without weights; empty for none."""
    has_weights: ClassVar[bool] = True
    """Whether the engine reads a checkpoint's weights on this machine."""
    extra: ClassVar[str] = ""
    """The extra of moebeam that brings the engine's packages; empty if every installation has them."""
    is_remote: ClassVar[bool] = False
    """Whether answers are paid to somebody else: no checkpoint is needed, and what arrives is kept at once."""
    is_constrained: ClassVar[bool] = False
    """Whether the engine holds answers to `Request.grammar`."""
    is_self_healing: ClassVar[bool] = False
    """Whether the model lives elsewhere, so that the engine itself sees to its crashes and its silence."""
    plans_prefixes: ClassVar[bool] = False
    """Whether the engine takes requests with `Request.earlier`."""
    unsupported: ClassVar[frozenset[str]] = frozenset({"service_tier", "top_logprobs"})
    """Options of requests, by their names in `Sampling` and `ChatOptions`, that the engine cannot follow."""

    engine: str = Field(
        default=DEFAULT_ENGINE,
        description="`torch`, `transformers`, `vllm`, `fake`, or `openai` for any endpoint that speaks OpenAI's chat "
        "completions",
    )
    path: str | None = Field(
        default=None,
        description="Folder of a Hugging Face checkpoint, on disk or in an object store, from which each host copies "
        "it once. `fake` needs none, nor does the demo's model, `moebeam-tickets-v4`, which knows support tickets "
        "alone, nor `openai`: with a folder of `tokenizer.json` and `config.json` "
        "prompts are counted exactly before they are sent, else estimated",
    )
    name: str | None = Field(
        default=None,
        description="Model name in tables and price books, and as a provider calls it; default the folder's name",
    )
    encoding: str = Field(
        default="auto",
        description="How chats become prompts: `chat_template`, `deepseek_v4`, `deepseek_v4_1`, `deepseek_v3_2`; "
        "`auto` is what the checkpoint brings",
    )
    max_model_len: int = Field(
        default=0,
        ge=0,
        description="Most tokens of prompt and answer together, as vLLM names it; 0 takes what the checkpoint's "
        "`config.json` implies, a scaled rope included",
    )
    min_ram: str | None = Field(
        default=None,
        description="Memory that a runner's workers need to answer, such as `64GB`: Beam's resource hint, for runners "
        "that know such hints, as Dataflow does",
    )

    @field_validator("min_ram")
    @classmethod
    def _check_ram(cls, value: str | None) -> str | None:
        if value is not None and not _RAM.fullmatch(value):
            raise ValueError(f"expected a number with its unit, such as 64GB, found {value!r}")
        return value

    @property
    def is_batch(self) -> bool:
        """Whether requests are sent as files, at a provider's batch price."""
        return False

    @property
    def route_names(self) -> tuple[str, ...]:
        """Models beside `name` that a request may ask for."""
        return ()

    def find_refusal(self, option: str, value: object, model: str | None = None) -> str | None:
        """Why the engine cannot follow an option of a request; None if it can.

        Args:
            option: its name in `Sampling` or `ChatOptions`.
            model: one of `route_names`, if the request goes there.
        """
        if option not in self.unsupported or value in ORDINARY_TIERS:
            return None
        able = [name for name in ENGINE_OPTIONS if option not in load_options(name).unsupported]
        return f"{option}: the engine {self.engine!r} cannot follow it, found {value!r}; {' and '.join(able)} can"

    @classmethod
    def choose_library_environment(cls, environment: Mapping[str, str]) -> dict[str, str]:
        """Variables that the engine's libraries read once, while they load, to be added to those of the user."""
        return {}

    def check_files(self, path: str) -> None:
        """Check the files of a checkpoint as far as that is quick: without the engine's packages and without weights.

        Raises:
            EngineLoadError: names the file, what was expected and what was found.
        """

    @property
    def extra_files(self) -> dict[str, str]:
        """Files beside the checkpoint that workers read, by the keys that name them."""
        return {}

    @property
    def resource_hints(self) -> dict[str, str]:
        """What a worker needs to answer, in Beam's names."""
        return {} if self.min_ram is None else {"min_ram": self.min_ram}


class LocalModelSection(ModelSection):
    """What engines in process, on this machine's accelerators, have in common."""

    accelerator: str | None = Field(
        default=None,
        description="Accelerator that a runner's workers need to answer, and for nothing else: Beam's resource hint, "
        "such as `type:nvidia-l4;count:1;install-nvidia-driver`; for runners that know such hints, as Dataflow does",
    )

    @field_validator("accelerator")
    @classmethod
    def _check_accelerator(cls, value: str | None) -> str | None:
        if value is not None and not _ACCELERATOR.fullmatch(value):
            raise ValueError(f"expected `type:…;count:…` with further options after `;`, found {value!r}")
        return value

    @property
    def resource_hints(self) -> dict[str, str]:
        """As of `ModelSection`, with the accelerator."""
        return {**({} if self.accelerator is None else {"accelerator": self.accelerator}), **super().resource_hints}


class CheckpointSection(LocalModelSection):
    """What engines that run a checkpoint's weights have in common."""

    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="float32",
        description="Type of weights and arithmetic; `float32` gives the same answers at any batch size",
    )
    device: str = Field(default="auto", description="`auto` or a torch device")
    batch_size: int = Field(default=0, ge=0, description="Most sequences that run together; 0 lets the engine decide")


def load_options(engine: str) -> type[ModelSection]:
    """The options that an engine declares.

    Raises:
        KeyError: no engine has this name.
    """
    module, _, name = ENGINE_OPTIONS[engine].partition(":")
    return cast("type[ModelSection]", getattr(import_module(module), name))


def model_keys() -> list[str]:
    """The keys that `[model]` has with one engine or another."""
    return list(dict.fromkeys(key for engine in ENGINE_OPTIONS for key in load_options(engine).model_fields))


def default_model() -> ModelSection:
    """`[model]` of a job file without one, which `check_engine` refuses."""
    return load_options(DEFAULT_ENGINE)()


def check_model(values: object, info: ValidationInfo) -> object:
    """Read `[model]` as its engine declares it: a validator of the job's field `model`, to be called before pydantic's.

    Of an unknown engine only the name is kept, which `check_engine` refuses. A section that is one already passes.

    Raises:
        ValidationError: with the place of every key that is wrong.
    """
    if not isinstance(values, Mapping):
        return values
    given = dict(cast("Mapping[str, Any]", values))
    engine = given.get("engine", DEFAULT_ENGINE)
    if not isinstance(engine, str):
        return ModelSection.model_validate({"engine": engine}, strict=True)
    if engine not in ENGINE_OPTIONS:
        return ModelSection(engine=engine)
    options = load_options(engine)
    if problems := _drop_foreign_options(given, engine, options):
        raise ValidationError.from_exception_data("[model]", problems)
    if info.mode == "json":
        return options.model_validate_json(json.dumps(given), strict=True)
    return options.model_validate(given)


def _drop_foreign_options(given: dict[str, Any], engine: str, options: type[ModelSection]) -> list[InitErrorDetails]:
    """Take the options of other engines out of `given`; returns a refusal for each that has another than its default.

    Defaults are dropped in silence, since records of earlier versions hold the options of all engines.
    """
    foreign = [key for key in given if key not in options.model_fields]
    declared = {name: load_options(name) for name in ENGINE_OPTIONS} if foreign else {}
    problems: list[InitErrorDetails] = []
    for key in foreign:
        owners = {name: other for name, other in declared.items() if key in other.model_fields}
        if not owners:
            continue
        value, default = given.pop(key), next(iter(owners.values())).model_fields[key].default
        if value not in (default, _plain(default)):
            error = PydanticCustomError("value_error", "{error}", {"error": _refusal(owners, engine)})
            problems.append(InitErrorDetails(type=error, loc=(key,), input=value))
    return problems


def _refusal(owners: Mapping[str, type[ModelSection]], engine: str) -> str:
    if len(owners) == 1:
        whose = f"the engine {next(iter(owners))}"
    elif any(options.has_weights for options in owners.values()):
        whose = "engines with a checkpoint"
    else:
        whose = f"the engines {', '.join(sorted(owners))}"
    return f"only for {whose}, found engine {engine!r}"


def _plain(value: Any) -> Any:
    """A default as JSON has it."""
    return list(cast("tuple[Any, ...]", value)) if isinstance(value, tuple) else value
