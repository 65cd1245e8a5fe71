"""*keep*: rows of any collection become Parquet files of the run, which *read* reads as any input.

Before it: somebody else's transforms. After it: the run is opened, and *read* begins. Rows are counted by digest first,
so that files depend on the rows alone; a bundle that runs twice writes the same file under the same name.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import apache_beam as beam
import pyarrow as pa
from apache_beam.pvalue import AsSingleton
from apache_beam.transforms.window import GlobalWindow, GlobalWindows
from apache_beam.utils.windowed_value import WindowedValue

from moebeam.schemas.store.run_layout import RunLayout
from moebeam.transforms.beam.coders import register_record
from moebeam.transforms.beam.counters import add_to_counters
from moebeam.transforms.keep.cut_files import FileCut, RowCounts, count_slots, cut_files, divide_table
from moebeam.transforms.keep.kept_file import write_kept_file
from moebeam.transforms.keep.row_batches import RowColumns, count_rows, read_rows

for record_type in (RowCounts, FileCut):
    register_record(record_type)

MAX_BATCH_ROWS = 20_000


class KeepRows(beam.PTransform[Any, Any]):
    """Rows -> how they were cut, once all of them lie in files below the run's folder."""

    def __init__(self, layout: RunLayout, columns: RowColumns) -> None:
        super().__init__()
        self._layout = layout
        self._columns = columns

    def expand(self, pcoll: "beam.PCollection[Any]") -> "beam.PCollection[FileCut]":
        batches: Any = (
            pcoll
            | "OneWindow" >> beam.WindowInto(GlobalWindows())
            | "BatchRows" >> beam.ParDo(_BatchRows(self._columns)).with_output_types(pa.RecordBatch)
        )
        cut: Any = (
            batches
            | "CountRows" >> beam.Map(_count).with_output_types(RowCounts)
            | "AddCounts" >> beam.CombineGlobally(_add_counts).with_output_types(RowCounts)
            | "CutFiles" >> beam.Map(cut_files).with_output_types(FileCut)
        )
        written: Any = (
            batches
            | "DivideRows" >> beam.FlatMap(_divide, AsSingleton(cut)).with_output_types(tuple[int, pa.RecordBatch])
            | "GroupByFile" >> beam.GroupByKey()
            | "WriteFile" >> beam.Map(_write, AsSingleton(cut), self._layout, self._columns).with_output_types(str)
            | "CountFiles" >> beam.combiners.Count.Globally()
        )
        kept: Any = cut | "AwaitFiles" >> beam.Map(_check_written, AsSingleton(written)).with_output_types(FileCut)
        return kept


class _BatchRows(beam.DoFn):
    """Collects rows until they make a batch."""

    def __init__(self, columns: RowColumns) -> None:
        self._columns = columns

    def start_bundle(self) -> None:
        self._elements: list[Any] = []
        self._num_rows = 0

    def process(self, element: Any) -> "Iterator[pa.RecordBatch] | None":
        self._elements.append(element)
        self._num_rows += count_rows(element)
        return self._flush() if self._num_rows >= MAX_BATCH_ROWS else None

    def finish_bundle(self) -> "Iterator[WindowedValue]":
        for batch in self._flush():
            yield WindowedValue(batch, GlobalWindow().max_timestamp(), (GlobalWindow(),))

    def _flush(self) -> "Iterator[pa.RecordBatch]":
        elements, self._elements, self._num_rows = self._elements, [], 0
        for table in read_rows(elements, self._columns):
            add_to_counters("keep", {"num_rows": table.num_rows, "num_bytes": table.nbytes})
            yield from _split(table)


def _split(table: pa.Table) -> "Iterator[pa.RecordBatch]":
    if table.num_rows:
        yield from table.combine_chunks().to_batches()


def _count(batch: pa.RecordBatch) -> RowCounts:
    return count_slots(pa.Table.from_batches([batch]))


def _add_counts(counts: Iterable[RowCounts]) -> RowCounts:
    return sum(counts, RowCounts())


def _divide(batch: pa.RecordBatch, cut: FileCut) -> "Iterator[tuple[int, pa.RecordBatch]]":
    for number, table in divide_table(pa.Table.from_batches([batch]), cut).items():
        for piece in _split(table):
            yield number, piece


def _write(file: "tuple[int, Iterable[pa.RecordBatch]]", cut: FileCut, layout: RunLayout, columns: RowColumns) -> str:
    number, batches = file
    return write_kept_file(layout, cut, number, [pa.Table.from_batches([batch]) for batch in batches], columns)


def _check_written(cut: FileCut, num_files: int) -> FileCut:
    expected = len(cut.starts) if cut.num_rows else 0
    assert num_files == expected, f"expected {expected} files of kept rows, found {num_files}"
    return cut
