"""Ray Data as a contender of `benchmarks.pipeline`: read Parquet, map batches with a no-op, write Parquet.

A script without imports of ours, because Ray may live in another environment: `ray_data.py PROMPTS OUTPUT` prints a
line of JSON as `benchmarks.pipeline.measure` does. Starting Ray is not counted, nor is a first small run.
"""

import json
import logging
import resource
import sys
import time
from pathlib import Path
from typing import Any


def copy_rows(prompts: str, output: str) -> None:
    """Read, pass every batch through a function that returns it, and write."""
    import ray  # pyright: ignore[reportMissingImports]  # not among our requirements

    ray.data.read_parquet(prompts).map_batches(_return_batch, batch_format="pyarrow").write_parquet(output)


def _return_batch(batch: Any) -> Any:
    return batch


def measure(prompts: str, warm_up: str, output: Path) -> dict[str, Any]:
    """Seconds, CPU seconds of this process alone, and rows written."""
    import pyarrow.parquet as pq
    import ray  # pyright: ignore[reportMissingImports]

    ray.init(log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    copy_rows(warm_up, str(output / "warm_up"))
    started = time.perf_counter()
    copy_rows(prompts, str(output / "rows"))
    seconds = time.perf_counter() - started
    num_rows = sum(pq.read_metadata(path).num_rows for path in (output / "rows").glob("*.parquet"))
    usage = resource.getrusage(resource.RUSAGE_SELF)
    version = ray.__version__
    ray.shutdown()
    # Its workers hold most of the memory and are no children of this process, so no peak is given.
    return {"seconds": seconds, "cpu_s": usage.ru_utime + usage.ru_stime, "num_rows": num_rows, "version": version}


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], sys.argv[2], Path(sys.argv[3]))))
