"""Specs that a pipeline works out while it runs, for steps that otherwise get theirs when it is built.

A run over files is checked before its pipeline is built. Inside of somebody else's pipeline the rows are known only
once it runs, so the job reaches the steps as a side input. A step takes either kind of spec.
"""

import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

import apache_beam as beam
from apache_beam.pvalue import AsSingleton

from moebeam.schemas.store.run_layout import RunLayout

Spec = TypeVar("Spec")


@dataclass(frozen=True, slots=True)
class LateSpec(Generic[Spec]):
    """A part of a job that a step of the pipeline makes.

    Attributes:
        job: the one pickled job.
        part: name of the attribute of it that is the spec.
        layout: of the run, which is known from the start.
    """

    job: AsSingleton
    part: str
    layout: RunLayout


def call_with(function: Callable[..., Any], spec: "Spec | LateSpec[Spec]") -> tuple[Any, ...]:
    """The first arguments of `beam.Map` and its kind for a function of an element and a spec, whichever kind it is."""
    return (_call_late(function, spec.part), spec.job) if isinstance(spec, LateSpec) else (function, spec)


def do_with(make: "Callable[[Spec], beam.DoFn]", spec: "Spec | LateSpec[Spec]") -> tuple[Any, ...]:
    """The first arguments of `beam.ParDo` for a DoFn that is made of a spec, whichever kind it is."""
    if not isinstance(spec, LateSpec):
        return (make(spec),)
    late = cast("LateSpec[Spec]", spec)
    return _LateDoFn(make, late.part), late.job


class _LatePart:
    """Reads a part of a pickled job, once for each job that it meets."""

    def __init__(self, part: str) -> None:
        self._part = part
        self._pickled: bytes | None = None
        self._read: Any = None

    def __getstate__(self) -> str:
        return self._part

    def __setstate__(self, part: str) -> None:
        self.__init__(part)

    def is_known(self, pickled: bytes) -> bool:
        return pickled is self._pickled or pickled == self._pickled

    def read(self, pickled: bytes) -> Any:
        if not self.is_known(pickled):
            # Made by another step of the same pipeline, as DoFns are pickled by the launcher.
            self._read = getattr(pickle.loads(pickled), self._part)
            self._pickled = pickled
        return self._read


def _call_late(function: Callable[..., Any], part: str) -> Callable[..., Any]:
    # A function, because Beam passes no side input to other callables.
    spec = _LatePart(part)

    def call(element: Any, pickled: bytes, *args: Any, **named: Any) -> Any:
        return function(element, spec.read(pickled), *args, **named)

    return call


class _LateDoFn(beam.DoFn):
    """A DoFn that is made, and set up, when its spec is there."""

    def __init__(self, make: Callable[[Any], beam.DoFn], part: str) -> None:
        self._make = make
        self._part = _LatePart(part)
        self._made: Any = None

    def start_bundle(self) -> None:
        if self._made is not None:
            self._made.start_bundle()

    def process(self, element: Any, pickled: bytes, *args: Any) -> Iterator[Any]:
        if self._made is None or not self._part.is_known(pickled):
            self.teardown()
            self._made = self._make(self._part.read(pickled))
            self._made.setup()
            self._made.start_bundle()
        yield from self._made.process(element, *args) or ()

    def finish_bundle(self) -> Any:
        return self._made.finish_bundle() if self._made is not None else None

    def teardown(self) -> None:
        if self._made is not None:
            self._made.teardown()
