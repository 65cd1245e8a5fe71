"""What `Infer` over rows in memory takes beside the job over a file of the same rows: `python -m benchmarks.infer`.

Both run in processes of their own, taking turns, with the `fake` engine; imports are not counted.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from moebeam.jobs.check.default_checkpoint import CHECKPOINT_PATH

CONTENDERS = ("file_job", "infer")


def make_job(output: Path, **inputs: str) -> dict[str, Any]:
    """The job's sections."""
    return {
        "input": {**inputs, "id_column": "id"},
        "prompt": {"template": "Classify this review: {{ text }}"},
        "output": {"path": str(output)},
        "model": {"engine": "fake", "path": str(CHECKPOINT_PATH), "name": "tiny"},
        "sampling": {"max_tokens": 16},
    }


def measure(name: str, num_rows: int, folder: Path) -> float:
    """Seconds that a contender takes."""
    import apache_beam as beam
    import pyarrow as pa
    import pyarrow.parquet as pq

    from moebeam import Infer
    from moebeam.jobs.check.job_file import read_job
    from moebeam.jobs.run.launch import launch

    rows = [{"id": f"r{number}", "text": f"It was number {number} of many."} for number in range(num_rows)]
    if name == "file_job":
        pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet", row_group_size=20_000)
        job = read_job(make_job(folder / "out", path=str(folder / "rows.parquet")))
        started = time.perf_counter()
        launch(job)
        return time.perf_counter() - started
    elements = [beam.Row(**row) for row in rows]
    started = time.perf_counter()
    with beam.Pipeline("FnApiRunner") as pipeline:
        answers = pipeline | beam.Create(elements) | Infer(make_job(folder / "out"))
        _ = answers.results | beam.combiners.Count.Globally()
    return time.perf_counter() - started


def main(argv: Sequence[str] | None = None) -> None:
    """Let both take turns, or measure one."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.infer", description=__doc__)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", choices=CONTENDERS, help="measure one, in this process")
    args = parser.parse_args(argv)
    if args.only is not None:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(measure(args.only, args.rows, Path(folder))))
        return
    seconds: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for repeat in range(args.repeats):
        for name in CONTENDERS if repeat % 2 == 0 else reversed(CONTENDERS):
            command = [sys.executable, "-m", "benchmarks.infer", "--only", name, "--rows", str(args.rows)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            seconds[name].append(float(done.stdout.splitlines()[-1]))
    file_job, infer = (median(seconds[name]) for name in CONTENDERS)
    print(f"{args.rows:,} rows: file job {file_job:.2f} s, Infer {infer:.2f} s, ratio {infer / file_job:.2f}")


if __name__ == "__main__":
    main()
