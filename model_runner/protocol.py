"""The one protocol behind which every engine stands, and how an engine is named and loaded.

Stands inside the *answer* stage: `transforms/run.py` pulls completions from `ModelRunner.generate`.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Protocol, cast, runtime_checkable

from schemas.errors import EngineLoadError
from schemas.records import Completion, Request


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """What a job says of its engine; picklable, small, no loaded model.

    Attributes:
        engine: a key of `ENGINES`.
        path: folder of a Hugging Face checkpoint (config, tokenizer, safetensors).
        name: the model's name as written to tables and looked up in price books.
        revision: digest that pins the checkpoint's files; see `checkpoint_revision`.
        dtype: `auto`, `float32` or `bfloat16`.
        device: `auto` or a torch device string.
        batch_size: most sequences that run together; 0 lets the engine decide.
        script: `fake` only: path of a JSON file with scripted answers and failures.
        max_cache_bytes: `torch` only: most memory for live keys and states; 0 lets the device decide.
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


ENGINES: dict[str, str] = {
    "fake": "model_runner.fake:load_fake_runner",
    "torch": "model_runner.torch_runner:load_torch_runner",
    "transformers": "model_runner.transformers_runner:load_transformers_runner",
    "vllm": "model_runner.vllm_runner:load_vllm_runner",
}
"""Engine names and where their loaders live; imported on first use, so a job pays only for its own engine."""

CONSTRAINED_ENGINES = frozenset({"torch", "transformers", "vllm"})
"""Engines that hold answers to `Request.grammar`."""


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
