"""What the way of a row costs beside its parts: `python -m benchmarks.pipeline --rows 20000 [--memory] [--profile]`.

The whole way with the `fake` engine is held against a plain loop that does the same render, tokenize, validate and
Parquet write (the bound), against bare Beam, and against Ray Data where it can be run; all in one run, on the same
rows, taking turns. Every measurement is a process of its own (`benchmarks.pipeline.measure`). This one imports nothing
large: on Linux the peak memory of a process counts from what its parent held when it was started.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.report import (
    Timing,
    machine_cpu_s,
    machine_facts,
    machine_line,
    memory_lines,
    others_line,
    profile_lines,
    ratio_lines,
    timing_lines,
)
from moebeam.jobs.check.default_checkpoint import CHECKPOINT_PATH

WARM_UP_ROWS = 256
TIMED = ("whole_way", "plain_loop", "bare_beam")
MEASURED = ("whole_way", "group_batches")
"""Contenders whose memory is compared."""

_ROOT = Path(__file__).resolve().parents[2]
_RAY_SCRIPT = Path(__file__).parent / "contenders" / "ray_data.py"


class ChildFailed(Exception):
    """A measuring process ended with an error; its last words are in the message."""


@dataclass(frozen=True, slots=True)
class Options:
    """What is asked for; see `parse_options`."""

    rows: int
    row_bytes: int
    repeats: int
    checkpoint: str
    ray_python: str | None
    memory_rows: tuple[int, ...]
    is_profiled: bool
    is_json: bool


def parse_options(argv: Sequence[str] | None) -> Options:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pipeline", description="What the way of a row costs beside its parts."
    )
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--row_bytes", type=int, default=2048, help="UTF-8 bytes of text a row")
    parser.add_argument("--repeats", type=int, default=3, help="times that each contender runs")
    parser.add_argument("--checkpoint", default=str(CHECKPOINT_PATH), help="folder whose tokenizer is used")
    parser.add_argument("--ray", action="store_true", help="measure Ray Data too")
    parser.add_argument("--ray_python", help="interpreter of an environment that has ray[data]; implies --ray")
    parser.add_argument("--memory", action="store_true", help="compare peak memory at the --memory_rows")
    parser.add_argument("--memory_rows", type=int, nargs=2, default=(20_000, 200_000), metavar="ROWS")
    parser.add_argument("--profile", action="store_true", help="show where moebeam's own stages spend the time")
    parser.add_argument("--json", action="store_true", help="one line of JSON on stdout, the table on stderr")
    args = parser.parse_args(argv)
    ray_python = args.ray_python or (sys.executable if args.ray else None)
    return Options(
        rows=args.rows,
        row_bytes=args.row_bytes,
        repeats=args.repeats,
        checkpoint=args.checkpoint,
        ray_python=ray_python,
        memory_rows=tuple(args.memory_rows) if args.memory else (),
        is_profiled=args.profile,
        is_json=args.json,
    )


def run_child(command: Sequence[str]) -> dict[str, Any]:
    """Run a measuring process and read the line of JSON that it ends with.

    Raises:
        ChildFailed: it ended with an error.
    """
    done = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True)
    if done.returncode:
        last_words = "\n".join(done.stderr.splitlines()[-15:])
        raise ChildFailed(f"{' '.join(command)}: exit code {done.returncode}\n{last_words}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def write_inputs(folder: Path, *, num_rows: int, row_bytes: int) -> Path:
    """Let a child write the rows and the job's files."""
    sizes = ["--rows", str(num_rows), "--row_bytes", str(row_bytes)]
    run_child([sys.executable, "-m", "benchmarks.pipeline.measure", "files", "--folder", str(folder), *sizes])
    return folder


def measure_once(name: str, inputs: Path, output: Path, options: Options, *, warm_up: Path | None) -> dict[str, Any]:
    """One run of a contender in its own process; what it wrote is removed.

    Raises:
        ChildFailed: the contender failed.
    """
    if name == "ray_data":
        assert options.ray_python is not None and warm_up is not None
        rows = [str(folder / "prompts.parquet") for folder in (inputs, warm_up)]
        command = [options.ray_python, str(_RAY_SCRIPT), *rows, str(output)]
    else:
        command = [sys.executable, "-m", "benchmarks.pipeline.measure", name]
        command += ["--folder", str(inputs), "--output", str(output), "--checkpoint", options.checkpoint]
        command += ["--warm_up", str(warm_up)] if warm_up is not None else []
    try:
        return run_child(command)
    finally:
        shutil.rmtree(output, ignore_errors=True)


def time_contenders(folder: Path, options: Options, names: Sequence[str]) -> dict[str, Timing]:
    """Let contenders take turns, each as often as `options.repeats` says.

    Raises:
        ChildFailed: a contender failed, or lost rows.
    """
    inputs = write_inputs(folder / "rows", num_rows=options.rows, row_bytes=options.row_bytes)
    warm_up = write_inputs(folder / "few", num_rows=WARM_UP_ROWS, row_bytes=options.row_bytes)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for repeat in range(options.repeats):
        # Every other turn backwards, so that none always follows the same one.
        for name in names if repeat % 2 == 0 else reversed(names):
            run = measure_once(name, inputs, folder / "output", options, warm_up=warm_up)
            if run["num_rows"] != options.rows:
                raise ChildFailed(f"{name}: expected {options.rows} rows, found {run['num_rows']}")
            runs[name].append(run)
    return {name: _timing(found) for name, found in runs.items()}


def _timing(runs: Sequence[dict[str, Any]]) -> Timing:
    seconds = [run["seconds"] for run in runs]
    return Timing(
        num_rows=runs[0]["num_rows"],
        best_s=min(seconds),
        median_s=median(seconds),
        cpu_s=min(run["cpu_s"] for run in runs),
        version=runs[0].get("version"),
    )


def measure_memory(folder: Path, options: Options) -> dict[str, list[int]]:
    """Peak memory of each of `MEASURED` at each of `options.memory_rows`, in bytes."""
    peaks: dict[str, list[int]] = {name: [] for name in MEASURED}
    for num_rows in options.memory_rows:
        inputs = write_inputs(folder / "memory", num_rows=num_rows, row_bytes=options.row_bytes)
        for name in MEASURED:
            run = measure_once(name, inputs, folder / "output", options, warm_up=None)
            peaks[name].append(run["peak_rss_bytes"])
    return peaks


class QuietClock:
    """From its making on: wall clock, and the CPU time of programs that are not children of this one."""

    def __init__(self) -> None:
        self._started = time.perf_counter()
        self._machine_cpu_s = machine_cpu_s()
        self._own_cpu_s = _own_cpu_s()

    def wall_s(self) -> float:
        return time.perf_counter() - self._started

    def others_cpu_s(self) -> float | None:
        """None where the machine does not tell; may be a little below 0, as both clocks tick."""
        now = machine_cpu_s()
        if now is None or self._machine_cpu_s is None:
            return None
        return now - self._machine_cpu_s - (_own_cpu_s() - self._own_cpu_s)


def _own_cpu_s() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def has_ray(python: str) -> bool:
    """Whether an interpreter can import Ray Data."""
    try:
        return subprocess.run([python, "-c", "import ray.data"], capture_output=True).returncode == 0
    except OSError:
        return False


def run_benchmark(options: Options, folder: Path) -> tuple[list[str], dict[str, Any]]:
    """Measure all that is asked for: the lines to show, and the same as values."""
    facts = machine_facts()
    lines = [machine_line(facts), ""]
    found: dict[str, Any] = {"benchmark": "pipeline", "rows": options.rows, "row_bytes": options.row_bytes}
    can_run_ray = options.ray_python is not None and has_ray(options.ray_python)
    quiet = QuietClock()
    timings = time_contenders(folder, options, (*TIMED, "ray_data") if can_run_ray else TIMED)
    others_cpu_s, wall_s = quiet.others_cpu_s(), quiet.wall_s()
    lines += timing_lines(timings, num_rows=options.rows, row_bytes=options.row_bytes, repeats=options.repeats)
    if not can_run_ray:
        asked = options.ray_python
        reason = "not asked for (--ray)" if asked is None else f"not run: {asked} has no ray[data]"
        lines.append(f"{'Ray Data':<22}{reason}")
    lines += ["", *ratio_lines(timings)]
    if others_cpu_s is not None:
        lines.append(others_line(others_cpu_s, wall_s, has_ray=can_run_ray))
        found["others_busy_cores"] = others_cpu_s / wall_s
    found["timings"] = {name: timing.as_json() for name, timing in timings.items()}
    found["ratio_to_plain_loop"] = timings["whole_way"].best_s / timings["plain_loop"].best_s
    if options.memory_rows:
        peaks = measure_memory(folder, options)
        lines += ["", *memory_lines(peaks, options.memory_rows)]
        found["memory"] = {"rows": options.memory_rows, "peak_rss_bytes": peaks}
    if options.is_profiled:
        profile = measure_once("profile", folder / "rows", folder / "output", options, warm_up=None)
        lines += ["", *profile_lines(profile, num_rows=options.rows, whole_s=timings["whole_way"].best_s)]
        found["profile"] = profile
    return lines, {**found, "machine": facts}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; 1 if a contender failed, whatever the figures say."""
    options = parse_options(argv)
    with tempfile.TemporaryDirectory(prefix="moebeam-benchmark-") as folder:
        try:
            lines, found = run_benchmark(options, Path(folder))
        except ChildFailed as error:
            print(error, file=sys.stderr)
            return 1
    print("\n".join(lines), file=sys.stderr if options.is_json else sys.stdout)
    if options.is_json:
        print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
