"""The one protocol behind which every engine stands, and how an engine is named and loaded.

Stands inside the *answer* stage: `transforms/answer/run.py` pulls completions from `ModelRunner.generate`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Literal, Protocol, TypeAlias, cast, runtime_checkable

from moebeam.schemas.errors import EngineLoadError
from moebeam.schemas.records import Completion, Request

RemoteMode: TypeAlias = Literal["auto", "plain", "stream", "batch"]


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """What a job says of its engine; picklable, small, no loaded model.

    Attributes:
        engine: a key of `ENGINES`.
        path: folder of a Hugging Face checkpoint (config, tokenizer, safetensors); engines with weights are given one
            on a local disk, see `model_store`.
        name: the model's name as written to tables and looked up in price books.
        revision: digest that pins the checkpoint's files; see `checkpoint_revision`.
        dtype: `auto`, `float32` or `bfloat16`.
        device: `auto` or a torch device string.
        batch_size: most sequences that run together; 0 lets the engine decide.
        script: `fake` only: path of a JSON file with scripted answers and failures.
        max_cache_bytes: `torch` only: most memory for live keys and states; 0 lets the device decide.
        base_url: `openai` only, like all below: the endpoint, up to where `/chat/completions` follows; None takes the
            profile's.
        provider: name of a provider profile, such as `deepseek`; see `openai_engine/profiles.toml`.
        api_key_variable: NAME of the environment variable that holds the key, never the key; None takes the profile's.
        max_concurrency: most requests in flight from this machine; 0 takes the profile's limit for the model.
        timeout_s: most seconds without a byte from the provider; 0 takes the profile's.
        max_retries: how often one provider is asked again after a failure that may pass.
        fallbacks: who is asked, in this order, where the one before could not answer.
        mode: `plain` waits for whole answers, `stream` reads them in pieces, `auto` takes the profile's; `batch` sends
            files that the provider answers within a day.
        run_id: whose batches are taken up after a crash; set where the engine is loaded.
    """

    engine: str
    path: str
    name: str
    revision: str
    dtype: str = "auto"
    device: str = "auto"
    batch_size: int = 0
    script: str | None = None
    max_cache_bytes: int = 0
    encoding: str = "auto"
    base_url: str | None = None
    provider: str | None = None
    api_key_variable: str | None = None
    max_concurrency: int = 0
    timeout_s: float = 0.0
    max_retries: int = 6
    fallbacks: tuple["Fallback", ...] = ()
    mode: RemoteMode = "auto"
    run_id: str = ""


@dataclass(frozen=True, slots=True)
class Fallback:
    """A further provider of an `openai` engine; the fields mean what they mean in `EngineConfig`.

    Attributes:
        name: the model as this provider calls it; None keeps the engine's.
    """

    provider: str
    name: str | None = None
    base_url: str | None = None
    api_key_variable: str | None = None
    max_concurrency: int = 0


class ModelRunner(Protocol):
    """A loaded engine.

    Requests are pulled lazily, in windows the engine chooses, so the iterable may be longer than memory. For each
    request exactly one `Completion` comes out: an answer or a typed failure (`Completion.error`), in any order, each
    as soon as it is done. Greedy completions depend on their request alone, not on its neighbours.
    """

    def generate(self, requests: Iterable[Request]) -> Iterator[Completion]:
        """Answer requests; raises only when the engine itself is broken, never for one request."""
        ...


@runtime_checkable
class CountingRunner(Protocol):
    """An engine that counts its work."""

    def counters(self) -> Mapping[str, float]:
        """Sums since the engine was loaded, by name; names that begin with `peak_` are maxima."""
        ...


def add_counters(one: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    """What two engines, or one in two stretches of time, have counted together."""
    names = {**one, **other}
    return {name: (max if _is_peak(name) else sum)((one.get(name, 0), other.get(name, 0))) for name in names}


def counters_since(before: Mapping[str, float], now: Mapping[str, float]) -> dict[str, float]:
    """What an engine has counted between two looks; a maximum stays that of all the time."""
    return {name: value if _is_peak(name) else value - before.get(name, 0) for name, value in now.items()}


def _is_peak(name: str) -> bool:
    return name.startswith("peak_")


ENGINES: dict[str, str] = {
    "fake": "moebeam.model_runner.fake_engine.runner:load_fake_runner",
    "openai": "moebeam.model_runner.openai_engine.runner:load_openai_runner",
    "torch": "moebeam.model_runner.torch_engine.runner:load_torch_runner",
    "transformers": "moebeam.model_runner.transformers_engine.runner:load_transformers_runner",
    "vllm": "moebeam.model_runner.vllm_engine.runner:load_vllm_runner",
}
"""Engine names and where their loaders live; imported on first use, so a job pays only for its own engine."""

CONSTRAINED_ENGINES = frozenset({"torch", "transformers", "vllm"})
"""Engines that hold answers to `Request.grammar`."""

SELF_HEALING_ENGINES = frozenset({"openai", "vllm"})
"""Engines whose model lives elsewhere: they see to its crashes and its silence themselves."""

WEIGHTLESS_ENGINES = frozenset({"fake", "openai"})
"""Engines that read no weights on this machine."""

REMOTE_ENGINES = frozenset({"openai"})
"""Engines whose answers are paid to somebody else: they need no checkpoint, and what arrives is kept at once."""


def load_runner(config: EngineConfig) -> ModelRunner:
    """Load the engine that a configuration names.

    Raises:
        EngineLoadError: the engine is unknown, its packages are missing, or its model cannot be loaded.
    """
    try:
        module_name, _, function_name = ENGINES[config.engine].partition(":")
    except KeyError:
        known = ", ".join(sorted(ENGINES))
        raise EngineLoadError(f"unknown engine {config.engine!r}; expected one of: {known}") from None
    try:
        module = import_module(module_name)
    except ImportError as error:
        raise EngineLoadError(
            f"engine {config.engine!r} needs a package that is not installed: {error.name}"
        ) from error
    load = cast("Callable[[EngineConfig], ModelRunner]", getattr(module, function_name))
    return load(config)
