"""The one protocol behind which every engine stands, and how an engine is named and loaded.

Stands inside the *answer* stage: `transforms/answer/run.py` pulls completions from `ModelRunner.generate`.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from importlib import import_module
from typing import Any, Protocol, TypeVar, runtime_checkable

from moebeam.schemas.determinism import NO_PROMISE, Determinism
from moebeam.schemas.errors import EngineLoadError
from moebeam.schemas.extras import require_extra
from moebeam.schemas.job.model import ENGINE_OPTIONS, ModelSection, load_options
from moebeam.schemas.job.sections import FailuresSection
from moebeam.schemas.records import Completion, Request

Options = TypeVar("Options", bound=ModelSection)


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """An engine as a job names it, and what was found of its model; picklable, small, no loaded model.

    Attributes:
        options: the job's `[model]`, as the engine declares it.
        path: folder of a Hugging Face checkpoint (config, tokenizer, safetensors), or empty; engines with weights are
            given one on a local disk, see `checkpoint/model_store.py`.
        name: the model's name as written to tables and looked up in price books.
        revision: digest that pins the checkpoint's files; see `compute_checkpoint_revision`.
        run_id: whose batches are taken up after a crash; set where the engine is loaded.
        failures: how long an outage is waited for, and how many equal refusals are borne; set where the engine is
            loaded.
    """

    options: ModelSection
    path: str
    name: str
    revision: str
    run_id: str = ""
    failures: FailuresSection = field(default_factory=FailuresSection)

    @property
    def engine(self) -> str:
        """The engine's name, a key of `ENGINES`."""
        return self.options.engine

    def options_as(self, kind: type[Options]) -> Options:
        """The options, as the engine that is being loaded declares them."""
        assert isinstance(self.options, kind), f"expected {kind.__name__}, found {type(self.options).__name__}"
        return self.options


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


@runtime_checkable
class PromisingRunner(Protocol):
    """An engine that says whether its answers repeat. One that does not promises nothing."""

    def determinism(self) -> Determinism:
        """What the engine promises on the device, with the numbers and under the settings that it was loaded with."""
        ...


@dataclass(frozen=True, slots=True)
class Outage:
    """Why a remote engine waits: its provider answers nobody at present.

    Attributes:
        since: when the provider last stopped answering; UTC.
        next_try_at: when it is asked again; UTC.
        message: the provider's own words or the network's, redacted, on one line.
    """

    provider: str
    since: datetime
    next_try_at: datetime
    message: str


@runtime_checkable
class OutageReporter(Protocol):
    """An engine that waits for its provider instead of failing requests."""

    def find_outage(self) -> Outage | None:
        """The outage that the engine waits for now; None while its provider answers. Safe from any thread."""
        ...


@runtime_checkable
class StoppableRunner(Protocol):
    """An engine that can give up requests in flight."""

    def give_back(self) -> None:
        """End what is in flight, in all calls of `generate` and for good; safe from any thread.

        Each call of `generate` ends soon, after the completions that have arrived. A request that a provider may bill
        comes out with the error `RequestGivenUp` and its lost call; the others have no completion.
        """
        ...


def read_determinism(runner: object) -> Determinism:
    """What an engine promises, wherever it runs."""
    return runner.determinism() if isinstance(runner, PromisingRunner) else NO_PROMISE


def add_counters(one: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    """What two engines, or one in two stretches of time, have counted together."""
    names = {**one, **other}
    return {name: (max if _is_peak(name) else sum)((one.get(name, 0), other.get(name, 0))) for name in names}


def counters_since(before: Mapping[str, float], now: Mapping[str, float]) -> dict[str, float]:
    """What an engine has counted between two looks; a maximum stays that of all the time."""
    return {name: value if _is_peak(name) else value - before.get(name, 0) for name, value in now.items()}


def _is_peak(name: str) -> bool:
    return name.startswith("peak_")


ENGINES: dict[str, str] = {name: load_options(name).loader for name in ENGINE_OPTIONS}
"""Engine names and where their loaders live; imported on first use, so a job pays only for its own engine."""


def require_packages(options: ModelSection) -> None:
    """Check that an engine's packages are installed on this machine, without importing them.

    Raises:
        MissingExtra: with the command that installs them.
    """
    if options.extra:
        require_extra(options.extra, f'[model] engine = "{options.engine}"')


def check_loadable(config: EngineConfig) -> None:
    """Check a checkpoint as its engine loads it, as far as that can be known without weights; imports the engine.

    Raises:
        EngineLoadError: names the file and what is wrong with it.
    """
    if config.options.checker:
        check: Callable[[EngineConfig], None] = _import_function(config.options.checker, config.options)
        check(config)


def load_runner(config: EngineConfig) -> ModelRunner:
    """Load the engine that a configuration names.

    Raises:
        EngineLoadError: the engine is unknown, or its code or its model cannot be loaded.
        MissingExtra: its packages are not installed.
    """
    require_packages(config.options)
    try:
        place = ENGINES[config.engine]
    except KeyError:
        known = ", ".join(sorted(ENGINES))
        raise EngineLoadError(f"unknown engine {config.engine!r}; expected one of: {known}") from None
    try:
        load: Callable[[EngineConfig], ModelRunner] = _import_function(place, config.options)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("moebeam"):
            raise
        raise EngineLoadError(
            f"engine {config.engine!r} needs a package that is not installed: {error.name}"
        ) from error
    return load(config)


def _import_function(place: str, options: ModelSection) -> Any:
    """Import a function of an engine, named as `module:function`, with what its libraries read while they load."""
    module_name, _, function_name = place.partition(":")
    added = options.choose_library_environment(os.environ)
    os.environ.update(added)
    try:
        return getattr(import_module(module_name), function_name)
    finally:
        for name in added:  # other programs that this process starts have no use for it
            del os.environ[name]
