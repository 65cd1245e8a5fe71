"""One measurement of `benchmarks.pipeline`, in a process of its own: `python -m benchmarks.pipeline.measure NAME ...`.

Prints one line of JSON. Imports are not counted, and neither is a first run over a few rows, where one is asked for.
"""

import argparse
import json
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.pipeline.contenders import NAMES, Name, load_contender
from benchmarks.pipeline.prompts import BenchmarkFiles, write_files
from moebeam.jobs.check.default_checkpoint import CHECKPOINT_PATH

# Linux counts in KiB, macOS in bytes.
_RSS_UNIT_BYTES = 1 if sys.platform == "darwin" else 1024


def measure(
    contender: Name, files: BenchmarkFiles, output: Path, checkpoint: str, *, warm_up: BenchmarkFiles | None = None
) -> dict[str, Any]:
    """Let one contender run.

    Args:
        warm_up: files of a few rows to run first, uncounted; left out where peak memory is asked for.
    Returns:
        `seconds` of wall clock, `cpu_s`, `num_rows` that came out, and `peak_rss_bytes` of this process since it
        started, or of its largest child where that is more.
    """
    run = load_contender(contender)
    if warm_up is not None:
        run(warm_up, output / "warm_up", checkpoint)
    cpu_before = _cpu_s()
    started = time.perf_counter()
    num_rows = run(files, output / "rows", checkpoint)
    return {
        "seconds": time.perf_counter() - started,
        "cpu_s": _cpu_s() - cpu_before,
        "num_rows": num_rows,
        "peak_rss_bytes": peak_rss_bytes(),
    }


def profile(files: BenchmarkFiles, output: Path, checkpoint: str, *, num_functions: int = 30) -> dict[str, Any]:
    """Seconds by stage, then the dearest functions of moebeam, from a second walk under the profiler."""
    from benchmarks.pipeline.stages import profile_stages, walk_stages

    stages = walk_stages(files, output / "timed", checkpoint)
    functions = profile_stages(files, output / "profiled", checkpoint, num_functions=num_functions)
    return {"stages": stages, "functions": [asdict(function) for function in functions]}


def peak_rss_bytes() -> int:
    """Most resident memory that this process, or any one child that has ended, ever had."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return max(usage.ru_maxrss for usage in usages) * _RSS_UNIT_BYTES


def _cpu_s() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def main(argv: Sequence[str] | None = None) -> None:
    """Write files, profile, or run a contender."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.pipeline.measure")
    parser.add_argument("name", choices=["files", "profile", *NAMES])
    parser.add_argument("--folder", type=Path, required=True, help="where the files lie")
    parser.add_argument("--output", type=Path, help="folder to write into, not there yet")
    parser.add_argument("--checkpoint", default=str(CHECKPOINT_PATH))
    parser.add_argument("--warm_up", type=Path, help="folder of files for a first run, not counted")
    parser.add_argument("--rows", type=int)
    parser.add_argument("--row_bytes", type=int)
    args = parser.parse_args(argv)
    found: dict[str, Any] = {}
    if args.name == "files":
        write_files(args.folder, num_rows=args.rows, row_bytes=args.row_bytes)
    elif args.name == "profile":
        found = profile(BenchmarkFiles(args.folder), args.output, args.checkpoint)
    else:
        warm_up = BenchmarkFiles(args.warm_up) if args.warm_up is not None else None
        found = measure(args.name, BenchmarkFiles(args.folder), args.output, args.checkpoint, warm_up=warm_up)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
