"""Bare Beam pipelines of moebeam's shape: read -> GroupByKey of record batches -> write Parquet.

`python -m benchmarks.flink.shape shape|work FOLDER OUTPUT CHECKPOINT BEAM_OPTIONS...`, what `benchmarks.flink` holds
moebeam against. `shape` moves rows and does nothing to them; `work` also renders, tokenizes and validates them, as one
would without moebeam. Neither plans, accounts or commits, and what they write is not there whole or not at all.
"""

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import apache_beam as beam
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.pipeline.contenders.plain_loop import render_rows, results_table
from benchmarks.pipeline.prompts import ANSWER, SYSTEM, TEMPLATE, BenchmarkFiles
from moebeam.jobs.check.beam_options import parse_beam_options
from moebeam.jobs.deploy.job_service import prepare_job_service
from moebeam.model_runner.encoding.prompt_encoder import PromptEncoder
from moebeam.schemas.contract.answer_schema import AnswerSchema
from moebeam.schemas.contract.output_column import output_column
from moebeam.schemas.contract.output_type import OutputType, output_type
from moebeam.schemas.job.sections import PromptSection
from moebeam.schemas.tables import OUTPUT
from moebeam.transforms.beam.coders import RecordBatchCoder
from moebeam.transforms.read.input_rows import MAX_BATCH_ROWS
from moebeam.transforms.render.prompt_template import PromptTemplate

Contender = Literal["shape", "work"]

GROUP_ROWS = 8192
"""Rows that a group is to have; a file each."""

_PROMPTS = pa.schema([pa.field("prompt", pa.string()), pa.field("length", pa.int64()), pa.field("row", pa.int64())])


def run(contender: Contender, files: BenchmarkFiles, output: Path, checkpoint: str, args: Sequence[str]) -> int:
    """Run a pipeline to its end; rows in the files written."""
    assert isinstance(beam.coders.registry.get_coder(pa.RecordBatch), RecordBatchCoder)
    options = parse_beam_options(args)
    prepare_job_service(options)
    output.mkdir(parents=True)
    path = str(files.prompts)
    footer = pq.read_metadata(path)
    num_groups = max(4, footer.num_rows // GROUP_ROWS)
    with beam.Pipeline(options=options) as pipeline:
        batches: Any = (
            pipeline
            | "ListRowGroups" >> beam.Create(list(range(footer.num_row_groups)), reshuffle=False)
            | "SpreadRowGroups" >> beam.Reshuffle()
            | "Read" >> beam.FlatMap(_batches, path, num_groups).with_output_types(tuple[int, pa.RecordBatch])
        )
        if contender == "work":
            batches = batches | "Render" >> beam.ParDo(_Render(checkpoint))
        groups: Any = batches | "Group" >> beam.GroupByKey()
        writer = _WriteAnswers(str(output), files) if contender == "work" else _WriteRows(str(output))
        _ = groups | "Write" >> beam.ParDo(writer)
    return sum(pq.read_metadata(part).num_rows for part in output.glob("*.parquet"))


def _batches(row_group: int, path: str, num_groups: int) -> Iterator[tuple[int, pa.RecordBatch]]:
    with pq.ParquetFile(path) as source:
        for number, batch in enumerate(source.iter_batches(MAX_BATCH_ROWS, row_groups=[row_group], use_threads=False)):
            # Whole batches are the least work: cutting them by key would double the time.
            yield (row_group * 7919 + number) % num_groups, batch


class _Render(beam.DoFn):
    def __init__(self, checkpoint: str) -> None:
        self._checkpoint = checkpoint

    def setup(self) -> None:
        self._template = PromptTemplate(PromptSection(system=SYSTEM, template=TEMPLATE))
        self._encoder = PromptEncoder.load(self._checkpoint)

    def process(self, element: tuple[int, pa.RecordBatch]) -> Iterator[tuple[int, pa.RecordBatch]]:
        key, batch = element
        prompts = render_rows(self._template, self._encoder, batch.to_pylist())
        lengths = [int(token_ids.shape[0]) for token_ids in self._encoder.encode_batch(prompts)]
        columns = [pa.array(prompts), pa.array(lengths, pa.int64()), pa.array(range(len(prompts)), pa.int64())]
        yield key, pa.record_batch(columns, schema=_PROMPTS)


class _WriteRows(beam.DoFn):
    def __init__(self, output: str) -> None:
        self._output = output

    def process(self, element: tuple[int, Iterable[pa.RecordBatch]]) -> None:
        key, batches = element
        sink: pq.ParquetWriter | None = None
        for batch in batches:
            rows = self.rows_of(batch)
            sink = sink or pq.ParquetWriter(f"{self._output}/part-{key:05d}.parquet", rows.schema, compression="zstd")
            sink.write_table(rows)
        if sink is not None:
            sink.close()

    def rows_of(self, batch: pa.RecordBatch) -> pa.Table:
        return pa.Table.from_batches([batch])


class _WriteAnswers(_WriteRows):
    def __init__(self, output: str, files: BenchmarkFiles) -> None:
        super().__init__(output)
        self._files = files
        self._typed: OutputType | None = None

    def setup(self) -> None:
        self._schema = AnswerSchema.load(str(self._files.answer_schema))
        self._typed = output_type(self._schema.document)

    def rows_of(self, batch: pa.RecordBatch) -> pa.Table:
        assert self._typed is not None
        answers = [ANSWER] * batch.num_rows
        values = output_column([self._schema.check(answer) for answer in answers], self._typed).array
        table = results_table(answers, batch.column("length").to_pylist(), 0, str(self._files.prompts))
        return table.append_column(OUTPUT, values)


def main(argv: Sequence[str]) -> None:
    """Print the rows that came out, as JSON."""
    contender, folder, output, checkpoint, *args = argv
    assert contender == "shape" or contender == "work", f"expected shape or work, found {contender}"
    print(json.dumps({"num_rows": run(contender, BenchmarkFiles(Path(folder)), Path(output), checkpoint, args)}))


if __name__ == "__main__":
    main(sys.argv[1:])
