"""*render*: rows become chat messages, the model's own prompt, and token ids.

Before it: *read*. After it: *plan*. Batches of `schemas.tables.plan_schema` leave; how a row is rendered is
`transforms/renderer.py`.
"""

from collections.abc import Iterator
from typing import Any

import apache_beam as beam
import pyarrow as pa

from transforms.renderer import (
    Renderer,
    RenderSpec,
    SchemaInPrompt,
    prompt_of,
    sampling_json,
    sampling_of,
    tools_value,
)

__all__ = [
    "RenderPrompts",
    "RenderSpec",
    "Renderer",
    "SchemaInPrompt",
    "prompt_of",
    "sampling_json",
    "sampling_of",
    "tools_value",
]


class RenderPrompts(beam.PTransform[Any, Any]):
    """Batches of rows as read -> batches of planned rows, not yet in order."""

    def __init__(self, spec: RenderSpec) -> None:
        super().__init__()
        self._spec = spec

    def expand(self, pcoll: "beam.PCollection[pa.RecordBatch]") -> "beam.PCollection[pa.RecordBatch]":
        planned: Any = pcoll | "RenderBatch" >> beam.ParDo(_RenderBatch(self._spec))
        return planned


class _RenderBatch(beam.DoFn):
    def __init__(self, spec: RenderSpec) -> None:
        self._spec = spec
        self._num_rows = beam.metrics.Metrics.counter("render", "num_rows")

    def setup(self) -> None:
        self._renderer = Renderer(self._spec)

    def process(self, element: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
        self._num_rows.inc(element.num_rows)
        yield self._renderer.render_batch(element)
