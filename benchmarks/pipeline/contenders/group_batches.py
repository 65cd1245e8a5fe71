"""The same rows through a Beam GroupByKey as Arrow record batches: what *plan* does not do (ADR 0002).

Only its memory is of interest: moebeam writes sorted runs to the store instead of shuffling rows.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import apache_beam as beam
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.pipeline.prompts import BenchmarkFiles
from moebeam.jobs.check.beam_options import parse_beam_options
from moebeam.transforms.beam.coders import RecordBatchCoder
from moebeam.transforms.read.input_rows import MAX_BATCH_ROWS

NUM_KEYS = 16


def run(files: BenchmarkFiles, output: Path, checkpoint: str) -> int:
    """Group batches by a shard number and count the rows of each group. `checkpoint` is not used."""
    del checkpoint
    assert isinstance(beam.coders.registry.get_coder(pa.RecordBatch), RecordBatchCoder)
    output.mkdir(parents=True)
    path = str(files.prompts)
    with beam.Pipeline(options=parse_beam_options(())) as pipeline:
        counts: Any = (
            pipeline
            | "ListRowGroups" >> beam.Create(list(range(pq.read_metadata(path).num_row_groups)))
            | "Read" >> beam.FlatMap(_keyed_batches, path).with_output_types(tuple[int, pa.RecordBatch])
            | "Group" >> beam.GroupByKey()
            | "CountRows" >> beam.MapTuple(_count_rows)
            | "Sum" >> beam.CombineGlobally(sum)
        )
        _ = counts | "Write" >> beam.io.WriteToText(str(output / "num_rows"), shard_name_template="")
    return int((output / "num_rows").read_text())


def _keyed_batches(row_group: int, path: str) -> Iterator[tuple[int, pa.RecordBatch]]:
    with pq.ParquetFile(path) as source:
        for batch in source.iter_batches(MAX_BATCH_ROWS, row_groups=[row_group], use_threads=False):
            for key in range(NUM_KEYS):
                yield key, batch.take(pa.array(range(key, batch.num_rows, NUM_KEYS), pa.int64()))


def _count_rows(key: int, batches: Iterable[pa.RecordBatch]) -> int:
    del key
    return sum(batch.num_rows for batch in batches)
