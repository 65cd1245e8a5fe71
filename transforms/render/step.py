"""*render*: turns rows into chat messages, the model's own prompt, and token ids.

Before it: *read*. After it: *plan*. Yields batches of `moebeam.schemas.tables.plan_schema`;
`transforms/render/render_rows.py` renders the rows.
"""

from collections.abc import Iterator
from typing import Any

import apache_beam as beam
import pyarrow as pa
import pyarrow.compute as pc

from moebeam.transforms.beam.counters import add_to_counters
from moebeam.transforms.beam.late_spec import LateSpec, do_with
from moebeam.transforms.render.render_rows import Renderer, RenderSpec


class RenderPrompts(beam.PTransform[Any, Any]):
    """Batches of rows as read -> batches of planned rows, unordered."""

    def __init__(self, spec: RenderSpec | LateSpec[RenderSpec]) -> None:
        super().__init__()
        self._spec = spec

    def expand(self, pcoll: "beam.PCollection[pa.RecordBatch]") -> "beam.PCollection[pa.RecordBatch]":
        render = beam.ParDo(*do_with(_RenderBatch, self._spec))
        planned: Any = pcoll | "RenderBatch" >> render.with_output_types(pa.RecordBatch)
        return planned


class _RenderBatch(beam.DoFn):
    def __init__(self, spec: RenderSpec) -> None:
        self._spec = spec

    def setup(self) -> None:
        self._renderer = Renderer(self._spec)

    def process(self, element: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
        num_bad, tokens = -_count_rejects(element), 0
        for rendered in self._renderer.render_rows(element):
            num_bad += _count_rejects(rendered)
            tokens += pc.sum(rendered.column("num_prompt_tokens")).as_py() or 0
            yield rendered
        add_to_counters("render", {"num_rows": element.num_rows, "num_rejects": num_bad, "prompt_tokens": tokens})


def _count_rejects(rows: pa.RecordBatch) -> int:
    return rows.num_rows - rows.column("error_type").null_count
