"""*read*: turns the input's units into record batches of `moebeam.schemas.tables.read_schema`.

Before it: units from `input_scan`. After it: *render*. `transforms/read/input_rows.py` reads the rows of a unit.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any

import apache_beam as beam
import pyarrow as pa

from moebeam.schemas.store.run_layout import RunLayout
from moebeam.transforms.beam.coders import register_record
from moebeam.transforms.beam.counters import add_to_counters
from moebeam.transforms.beam.late_spec import LateSpec, do_with
from moebeam.transforms.durable.failure import record_failure
from moebeam.transforms.read.input_rows import ReadColumns, read_unit
from moebeam.transforms.read.input_scan import InputScan, InputUnit, UnitGroup

register_record(InputUnit)
register_record(UnitGroup)


class ReadPrompts(beam.PTransform[Any, Any]):
    """Groups of input units -> record batches of rows as read.

    Args:
        layout: of the run that reads; a failure is recorded there.
    """

    def __init__(self, scan: InputScan, columns: ReadColumns, layout: RunLayout | None = None) -> None:
        super().__init__()
        self._groups = scan.groups
        self._columns = columns
        self._layout = layout

    def expand(self, pcoll: beam.Pipeline) -> "beam.PCollection[pa.RecordBatch]":
        return (
            pcoll
            | "ListUnits" >> beam.Create(self._groups, reshuffle=False).with_output_types(UnitGroup)
            | "ReadGroups" >> ReadGroups(self._columns, self._layout)
        )


class ReadGroups(beam.PTransform[Any, Any]):
    """Groups of units, as a collection -> record batches of rows as read; arguments as of `ReadPrompts`."""

    def __init__(self, columns: "ReadColumns | LateSpec[ReadColumns]", layout: RunLayout | None = None) -> None:
        super().__init__()
        self._columns = columns
        self._layout = layout

    def expand(self, pcoll: "beam.PCollection[UnitGroup]") -> "beam.PCollection[pa.RecordBatch]":
        read = beam.ParDo(*do_with(partial(_ReadUnits, layout=self._layout), self._columns))
        rows: Any = pcoll | "SpreadUnits" >> beam.Reshuffle() | "ReadUnits" >> read.with_output_types(pa.RecordBatch)
        return rows


class _ReadUnits(beam.DoFn):
    def __init__(self, columns: ReadColumns, layout: RunLayout | None) -> None:
        self._columns = columns
        self._layout = layout

    def process(self, element: UnitGroup) -> Iterator[pa.RecordBatch]:
        with nullcontext() if self._layout is None else record_failure(self._layout, "read"):
            for unit in element.units:
                for batch in read_unit(unit, self._columns):
                    num_bad = batch.num_rows - batch.column("error_type").null_count
                    add_to_counters(
                        "read",
                        {"num_rows": batch.num_rows - num_bad, "num_rejects": num_bad, "num_bytes": batch.nbytes},
                    )
                    yield batch
