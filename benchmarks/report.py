"""The figures of `benchmarks.pipeline` as lines to read, goals beside them. Imports nothing large."""

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

MAX_RATIO = 2.0
"""Goal: the whole way in at most so many times the seconds of the plain loop."""

MAX_EXTRA_BYTES = 1 << 30
"""Goal: peak memory at ten times the rows at most so much above that at the rows."""

MAX_BUSY_CORES = 0.1
"""What other programs may use while contenders are timed."""

TITLES = {
    "whole_way": "moebeam, whole way",
    "plain_loop": "plain loop (bound)",
    "bare_beam": "bare Beam, no-op",
    "ray_data": "Ray Data, no-op",
    "group_batches": "GroupByKey of batches",
}
_PACKAGES = ("moebeam", "apache-beam", "pyarrow", "tokenizers", "jinja2", "jsonschema-rs")


@dataclass(frozen=True, slots=True)
class Timing:
    """A contender's runs.

    Attributes:
        cpu_s: least CPU seconds of its process.
        version: of another program's own environment, where it tells.
    """

    num_rows: int
    best_s: float
    median_s: float
    cpu_s: float
    version: str | None = None

    @property
    def rows_per_s(self) -> float:
        return self.num_rows / self.best_s

    def as_json(self) -> dict[str, Any]:
        """All values, and the rate."""
        return {**asdict(self), "rows_per_s": self.rows_per_s}


def machine_facts() -> dict[str, Any]:
    """Cores that may be used, memory in bytes, versions."""
    versions: dict[str, str] = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "?"
    return {
        "cpu": _cpu_model(),
        "num_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": versions,
    }


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def machine_cpu_s() -> float | None:
    """CPU seconds that all programs of the machine have used since it started; None where it does not tell."""
    stat = Path("/proc/stat")
    if not stat.exists():
        return None
    user, nice, system = (int(ticks) for ticks in stat.read_text().split()[1:4])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK")


def machine_line(facts: Mapping[str, Any]) -> str:
    """The machine in one line; the load is that of the minute before the run."""
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    memory = facts["memory_bytes"] / (1 << 30)
    return (
        f"{facts['cpu']}, {facts['num_cores']} cores, {memory:.0f} GiB, load {facts['load']:.1f}; "
        f"Python {facts['python']}, {versions}"
    )


def timing_lines(timings: Mapping[str, Timing], *, num_rows: int, row_bytes: int, repeats: int) -> list[str]:
    """A line a contender."""
    runs = "one run" if repeats == 1 else f"{repeats} runs each"
    lines = [
        f"{num_rows:,} rows of {row_bytes:,} bytes, {runs}",
        f"{'':<22}{'best s':>8}{'median s':>10}{'rows/s':>10}{'µs/row':>8}{'CPU s':>8}",
    ]
    for name, timing in timings.items():
        title = TITLES[name] if timing.version is None else f"{TITLES[name]} {timing.version}"
        lines.append(
            f"{title:<22}{timing.best_s:>8.2f}{timing.median_s:>10.2f}{timing.rows_per_s:>10,.0f}"
            f"{1e6 / timing.rows_per_s:>8.0f}{timing.cpu_s:>8.2f}"
        )
    return lines


def others_line(others_cpu_s: float, wall_s: float, *, has_ray: bool) -> str:
    """Whether the machine was quiet: a ratio of timings means little where other programs took turns too."""
    cores = max(0.0, others_cpu_s) / wall_s
    whose = "Ray's workers and other programs" if has_ray else "other programs"
    verdict = "" if cores < MAX_BUSY_CORES or has_ray else ": not a quiet machine, measure again"
    return f"{whose} kept {cores:.2f} cores busy meanwhile{verdict}"


def ratio_lines(timings: Mapping[str, Timing]) -> list[str]:
    """The whole way in times of the bound."""
    whole, bound = timings["whole_way"], timings["plain_loop"]
    ratio = whole.best_s / bound.best_s
    by_median = whole.median_s / bound.median_s
    return [
        f"whole way / plain loop: {ratio:.2f} by best, {by_median:.2f} by median "
        f"(goal: at most {MAX_RATIO}; {_verdict(ratio <= MAX_RATIO)})"
    ]


def memory_lines(peaks: Mapping[str, Sequence[int]], num_rows: Sequence[int]) -> list[str]:
    """Peak memory at each number of rows, in MiB, and how much the last is above the first."""
    header = "".join(f"{rows:>12,}" for rows in num_rows)
    lines = ["peak memory in MiB, by rows", f"{'':<22}{header}{'above':>12}"]
    for name, found in peaks.items():
        cells = "".join(f"{peak / (1 << 20):>12,.0f}" for peak in (*found, found[-1] - found[0]))
        lines.append(f"{TITLES[name]:<22}{cells}")
    extra = peaks["whole_way"][-1] - peaks["whole_way"][0]
    is_met = extra <= MAX_EXTRA_BYTES
    lines.append(f"whole way: {extra / (1 << 30):.2f} GiB above (goal: at most 1.0 GiB; {_verdict(is_met)})")
    return lines


def profile_lines(profile: Mapping[str, Any], *, num_rows: int, whole_s: float) -> list[str]:
    """Stages and functions, in microseconds a row."""
    scale = 1e6 / num_rows
    stages: Mapping[str, float] = profile["stages"]
    rest = whole_s - sum(stages.values())
    lines = ["stages called without Beam, µs/row"]
    lines += [f"{name:<22}{seconds * scale:>8.1f}" for name, seconds in stages.items()]
    lines.append(f"{'Beam and launcher':<22}{rest * scale:>8.1f}  (what the best whole way takes beyond the stages)")
    lines += ["", "under the profiler, which slows all of it, µs/row", f"{'calls/row':>10}{'total':>10}{'own':>8}"]
    for function in profile["functions"]:
        lines.append(
            f"{function['num_calls'] / num_rows:>10.2f}{function['total_s'] * scale:>10.1f}"
            f"{function['own_s'] * scale:>8.1f}  {function['name']}"
        )
    return lines


def _verdict(is_met: bool) -> str:
    return "met" if is_met else "missed"
