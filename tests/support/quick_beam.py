"""Beam without what it works out again and again while it builds a pipeline: half of the time of a run of a few rows.

Beam 2.77 inspects the methods of each `DoFn` about eight times, and builds an argument parser for each look at the
options. What comes out depends on the `DoFn`'s class and on the options alone, so that tests, which build hundreds of
pipelines, remember it.
"""

import types
from typing import Any

from apache_beam.options import pipeline_options
from apache_beam.transforms import userstate

MAX_REMEMBERED_OPTIONS = 64


def remember_what_beam_inspects() -> None:
    """Let this process remember the state and timers of each `DoFn`, and the views of each set of options."""
    inspect, view_as = userstate.get_dofn_specs, pipeline_options.PipelineOptions.view_as
    specs: dict[type, Any] = {}
    views: dict[int, tuple[Any, dict[type, Any]]] = {}

    def get_dofn_specs(dofn: Any) -> Any:
        if any(isinstance(value, types.MethodType) for value in vars(dofn).values()):
            # Methods of this instance alone.
            return inspect(dofn)
        if type(dofn) not in specs:
            specs[type(dofn)] = inspect(dofn)
        return specs[type(dofn)]

    def view_remembered(options: Any, cls: type) -> Any:
        # All views of the same options share this dict; held here, its id stays its own.
        shared = options._all_options
        if id(shared) not in views:
            if len(views) >= MAX_REMEMBERED_OPTIONS:
                views.clear()
            views[id(shared)] = (shared, {})
        known = views[id(shared)][1]
        if cls not in known:
            known[cls] = view_as(options, cls)
        return known[cls]

    userstate.get_dofn_specs = get_dofn_specs
    pipeline_options.PipelineOptions.view_as = view_remembered
