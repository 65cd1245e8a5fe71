"""moebeam from Parquet to published tables, on the runner that a job gets by default."""

from pathlib import Path

from benchmarks.pipeline.prompts import SYSTEM, TEMPLATE, BenchmarkFiles
from moebeam.jobs.run.launch import launch
from moebeam.schemas.job.sections import Job

MAX_TOKENS = 128


def run(files: BenchmarkFiles, output: Path, checkpoint: str) -> int:
    """Launch the job as `moebeam run` does; rows with an answer."""
    return launch(benchmark_job(files, output, checkpoint)).num_results


def benchmark_job(files: BenchmarkFiles, output: Path, checkpoint: str) -> Job:
    """A job with the fake engine, one scripted answer that keeps the schema, and a price book."""
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
