"""Beam alone: its own Parquet source, `RunInference` with a model that does nothing, its own Parquet sink.

Rows travel as dictionaries, as `ReadFromParquet` gives them; the runner is the one that moebeam's jobs get.
"""

from pathlib import Path
from typing import Any

import apache_beam as beam
import pyarrow.parquet as pq
from apache_beam.io.parquetio import ReadFromParquet, WriteToParquet
from apache_beam.ml.inference.base import ModelHandler, RunInference

from benchmarks.pipeline.prompts import BenchmarkFiles
from moebeam.jobs.check.beam_options import parse_beam_options


class ReturnRows(ModelHandler[dict[str, str], dict[str, str], object]):
    """A model whose answer to a row is the row."""

    def load_model(self) -> object:
        return ReturnRows

    def run_inference(
        self, batch: Any, model: object, inference_args: dict[str, Any] | None = None
    ) -> list[dict[str, str]]:
        return list(batch)


def run(files: BenchmarkFiles, output: Path, checkpoint: str) -> int:
    """Write the rows as they are; rows in the files written. `checkpoint` is not used."""
    del checkpoint
    output.mkdir(parents=True)
    with beam.Pipeline(options=parse_beam_options(())) as pipeline:
        answered: Any = pipeline | "Read" >> ReadFromParquet(str(files.prompts)) | RunInference(ReturnRows())
        sink = WriteToParquet(str(output / "part"), pq.read_schema(files.prompts), file_name_suffix=".parquet")
        _ = answered | "Write" >> sink
    return sum(pq.read_metadata(path).num_rows for path in output.glob("*.parquet"))
