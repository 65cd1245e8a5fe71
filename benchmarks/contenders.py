"""What `benchmarks.pipeline` lets run: the whole way of moebeam, and what it is held against.

Each contender reads the same Parquet file, writes into a folder of its own, and returns how many rows came out.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import apache_beam as beam
import apache_beam.runners.portability.fn_api_runner
import pyarrow as pa
import pyarrow.parquet as pq
from apache_beam.io.parquetio import ReadFromParquet, WriteToParquet
from apache_beam.ml.inference.base import ModelHandler, RunInference

from benchmarks.prompts import ANSWER, SYSTEM, TEMPLATE, BenchmarkFiles
from jobs.beam_options import beam_options
from jobs.launch import launch
from model_runner.prompt_encoder import PromptEncoder
from schemas.answer_schema import AnswerSchema
from schemas.job import Job, PromptSection
from schemas.tables import RESULT_SCHEMA
from transforms.prompt_template import PromptTemplate
from transforms.read import MAX_BATCH_ROWS

Contender = Callable[[BenchmarkFiles, Path, str], int]
"""(files, output folder, checkpoint) -> rows that came out."""

NUM_KEYS = 16
"""Shards that `group_batches` spreads the rows over."""

MAX_TOKENS = 128


def benchmark_job(files: BenchmarkFiles, output: Path, checkpoint: str) -> Job:
    """The job of the whole way: fake engine, one scripted answer that keeps the schema, a price book."""
    return Job.model_validate(
        {
            "input": {"path": str(files.prompts)},
            "prompt": {"system": SYSTEM, "template": TEMPLATE},
            "output": {"path": str(output), "schema": str(files.answer_schema)},
            "model": {"engine": "fake", "path": checkpoint, "name": "benchmark", "script": str(files.script)},
            "sampling": {"max_tokens": MAX_TOKENS},
            "accounting": {"price_book": str(files.prices)},
        }
    )


def whole_way(files: BenchmarkFiles, output: Path, checkpoint: str) -> int:
    """moebeam from Parquet to published tables, on the runner that a job gets by default."""
    return launch(benchmark_job(files, output, checkpoint)).num_results


def plain_loop(files: BenchmarkFiles, output: Path, checkpoint: str) -> int:
    """The bound: the same render, tokenize, validate and Parquet write of results, and nothing else."""
    template = PromptTemplate(PromptSection(system=SYSTEM, template=TEMPLATE))
    encoder = PromptEncoder.load(checkpoint)
    schema = AnswerSchema.load(str(files.answer_schema))
    output.mkdir(parents=True)
    num_rows = 0
    with (
        pq.ParquetFile(files.prompts) as source,
        pq.ParquetWriter(output / "results.parquet", RESULT_SCHEMA, compression="zstd") as sink,
    ):
        for batch in source.iter_batches(MAX_BATCH_ROWS, use_threads=False):
            prompts = [encoder.render(template.render(row)) for row in batch.to_pylist()]
            lengths = [len(token_ids) for token_ids in encoder.encode_batch(prompts)]
            answers = [ANSWER for _ in prompts]
            for answer in answers:
                schema.check(answer)
            sink.write_table(_results(answers, lengths, num_rows, str(files.prompts)))
            num_rows += len(answers)
    return num_rows


def _results(answers: list[str], lengths: list[int], first_row: int, source_file: str) -> pa.Table:
    """A batch of results with every column of moebeam's own; what only accounting knows is null."""
    num_rows = len(answers)
    values: dict[str, list[Any]] = {
        "custom_id": [f"{source_file}:{first_row + row}" for row in range(num_rows)],
        "status": ["ok"] * num_rows,
        "output_text": answers,
        "output_json": answers,
        "finish_reason": ["stop"] * num_rows,
        "attempts": [1] * num_rows,
        "provider": ["fake"] * num_rows,
        "model": ["benchmark"] * num_rows,
        "model_revision": ["none"] * num_rows,
        "prompt_tokens": lengths,
        "cached_tokens": [0] * num_rows,
        "computed_tokens": lengths,
        "completion_tokens": [40] * num_rows,
        "reasoning_tokens": [0] * num_rows,
        "latency_ms": [0.0] * num_rows,
        "run_id": ["plain"] * num_rows,
        "source_file": [source_file] * num_rows,
        "source_row": list(range(first_row, first_row + num_rows)),
        "scope": ["row"] * num_rows,
        "num_rows": [1] * num_rows,
    }
    missing: list[Any] = [None] * num_rows
    return pa.table(
        [pa.array(values.get(field.name, missing), field.type) for field in RESULT_SCHEMA], schema=RESULT_SCHEMA
    )


def bare_beam(files: BenchmarkFiles, output: Path, checkpoint: str) -> int:
    """Beam's own Parquet source, `RunInference` with a model that does nothing, and Parquet sink; same runner."""
    del checkpoint
    output.mkdir(parents=True)
    with beam.Pipeline(options=beam_options(())) as pipeline:
        rows: Any = pipeline | "Read" >> ReadFromParquet(str(files.prompts)) | RunInference(_ReturnRows())
        written: Any = rows | "Write" >> WriteToParquet(
            str(output / "part"), pq.read_schema(files.prompts), file_name_suffix=".parquet"
        )
    del written
    return _num_parquet_rows(output)


class _ReturnRows(ModelHandler[dict[str, str], dict[str, str], object]):
    """A model whose answer to a row is the row."""

    def load_model(self) -> object:
        return _ReturnRows

    def run_inference(
        self, batch: Any, model: object, inference_args: dict[str, Any] | None = None
    ) -> list[dict[str, str]]:
        return list(batch)


def group_batches(files: BenchmarkFiles, output: Path, checkpoint: str) -> int:
    """The same rows through a GroupByKey as Arrow record batches: what *plan* does not do (ADR 0002)."""
    del checkpoint
    output.mkdir(parents=True)
    path = str(files.prompts)
    with beam.Pipeline(options=beam_options(())) as pipeline:
        counts: Any = (
            pipeline
            | "RowGroups" >> beam.Create(list(range(pq.read_metadata(path).num_row_groups)))
            | "Read" >> beam.FlatMap(_keyed_batches, path).with_output_types(tuple[int, pa.RecordBatch])
            | "Group" >> beam.GroupByKey()
            | "CountRows" >> beam.MapTuple(_count_rows)
            | "Sum" >> beam.CombineGlobally(sum)
        )
        written: Any = counts | "Write" >> beam.io.WriteToText(str(output / "num_rows"), shard_name_template="")
    del written
    return int((output / "num_rows").read_text())


def _keyed_batches(row_group: int, path: str) -> Iterator[tuple[int, pa.RecordBatch]]:
    with pq.ParquetFile(path) as source:
        for batch in source.iter_batches(MAX_BATCH_ROWS, row_groups=[row_group], use_threads=False):
            for key in range(NUM_KEYS):
                # A copy: a slice would be written with all of the batch that it is a slice of.
                yield key, batch.take(pa.array(range(key, batch.num_rows, NUM_KEYS), pa.int64()))


def _count_rows(key: int, batches: Any) -> int:
    del key
    return sum(batch.num_rows for batch in batches)


def _num_parquet_rows(folder: Path) -> int:
    return sum(pq.read_metadata(path).num_rows for path in folder.glob("*.parquet"))


CONTENDERS: dict[str, Contender] = {
    "whole_way": whole_way,
    "plain_loop": plain_loop,
    "bare_beam": bare_beam,
    "group_batches": group_batches,
}
