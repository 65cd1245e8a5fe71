"""moebeam on a Flink cluster of this machine: `python -m benchmarks.flink --rows 1000 10000 100000 [--json]`.

For each number of rows the whole way with the `fake` engine takes turns with bare Beam pipelines of its shape
(`benchmarks.flink.shape`) on the same cluster. Beside the seconds stand when a run came to its first answer and how
long each stage took, as its files show, and the memory and CPU time of every process of the cluster.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil

from benchmarks.flink.plot import plot
from benchmarks.pipeline.contenders.whole_way import benchmark_job
from benchmarks.pipeline.prompts import BenchmarkFiles, write_files
from benchmarks.report import machine_facts, machine_line
from benchmarks.sharding.plot import can_plot
from moebeam.jobs.check.default_checkpoint import CHECKPOINT_PATH
from moebeam.jobs.deploy.flink.worker_pool import WORKER_MODULE
from tests.support.flink.built_cluster import make_cluster
from tests.support.flink.cluster import ClusterSize, LocalCluster, read_processes
from tests.support.jobs.jobs_for_tests import write_job_file

MAX_RATIO = 1.5
"""Goal: the whole way in at most so many times the seconds of the bare pipeline."""

MAX_WORKER_BYTES = 3 << 29
"""Goal: most resident memory of a Python worker, whatever the rows."""

CONTENDERS = ("moebeam", "shape", "work")
TITLES = {"moebeam": "moebeam, whole way", "shape": "bare Beam, no work", "work": "bare Beam, same work a row"}
RUN_TIMEOUT_S = 1800
WARM_UP_ROWS = 256
POLL_S = 0.05
SAMPLE_S = 0.5

_ROOT = Path(__file__).resolve().parents[2]


class RunFailed(Exception):
    """A run ended with an error or lost rows; its last words are in the message."""


@dataclass(slots=True)
class Stages:
    """When a run's files showed what, in seconds from the command on; 0 where they did not."""

    planned_s: float = 0.0
    first_answer_s: float = 0.0
    answered_s: float = 0.0
    published_s: float = 0.0

    def look(self, output: Path, elapsed_s: float) -> None:
        """Note what has newly appeared."""
        state = output / "_moebeam"
        if not self.planned_s and (state / "plan" / "plan.json").exists():
            self.planned_s = elapsed_s
        if not self.first_answer_s and any(state.glob("commits/*.json")):
            self.first_answer_s = elapsed_s
        if self.first_answer_s and not self.answered_s and any(output.glob("results/*.parquet")):
            self.answered_s = elapsed_s
        if not self.published_s and (output / "manifest.json").exists():
            self.published_s = elapsed_s


@dataclass(frozen=True, slots=True)
class FlinkRun:
    """One run of a contender.

    Attributes:
        cpu_s: of all processes of the cluster, workers included, without the launcher.
        worker_peaks: most resident bytes of each Python worker.
        worker_growth: bytes that the largest worker gained over the second half of its samples; near 0 is flat.
    """

    contender: str
    num_rows: int
    seconds: float
    cpu_s: float
    worker_peaks: tuple[int, ...]
    worker_growth: int
    cluster_peak: int
    stages: Stages | None = None


@dataclass
class MemoryWatch:
    """Samples the processes of a cluster, and their Python workers, while it is entered."""

    folder: Path
    resident: dict[tuple[str, int], list[int]] = field(default_factory=dict[tuple[str, int], list[int]])
    peak_sum: int = 0
    _cpu_s: dict[int, tuple[float, float]] = field(default_factory=dict[int, tuple[float, float]])
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None
    _others: set[int] = field(default_factory=set[int])

    def __enter__(self) -> "MemoryWatch":
        # Workers of the job before wait a few seconds for a next step of theirs.
        self._others = {process.pid for kind, process in _processes(self.folder) if kind == "worker"}
        self.sample()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *unused: object) -> None:
        assert self._thread is not None
        self._stop.set()
        self._thread.join()

    @property
    def cpu_s(self) -> float:
        """Since it was entered; of workers that ended, up to their last sample."""
        return sum(last - first for first, last in self._cpu_s.values())

    @property
    def workers(self) -> list[list[int]]:
        return [samples for (kind, _), samples in sorted(self.resident.items()) if kind == "worker"]

    def sample(self) -> None:
        """Look at all processes once."""
        total = 0
        for kind, process in _processes(self.folder):
            if process.pid in self._others:
                continue
            try:
                resident, times = process.memory_info().rss, process.cpu_times()
                born_at_0 = process.create_time() > time.time() - SAMPLE_S * 4
            except psutil.Error:
                continue
            total += resident
            self.resident.setdefault((kind, process.pid), []).append(resident)
            used = times.user + times.system
            first = self._cpu_s[process.pid][0] if process.pid in self._cpu_s else (0.0 if born_at_0 else used)
            self._cpu_s[process.pid] = (first, used)
        self.peak_sum = max(self.peak_sum, total)

    def _run(self) -> None:
        while not self._stop.wait(SAMPLE_S):
            self.sample()


def _processes(folder: Path) -> Iterator[tuple[str, psutil.Process]]:
    for known in read_processes(folder):
        process = known.find()
        if process is None:
            continue
        yield known.name, process
        try:
            children = process.children() if known.name.startswith("pool-") else []
            yield from (("worker", child) for child in children if WORKER_MODULE in child.cmdline())
        except psutil.Error:
            continue


def growth(samples: Sequence[int]) -> int:
    """How much the later half of a process's life needed beyond the most that it had before."""
    middle = len(samples) // 2
    return max(0, max(samples[middle:]) - max(samples[:middle])) if middle else 0


def run_once(
    contender: str, cluster: LocalCluster, files: BenchmarkFiles, output: Path, checkpoint: str, num_rows: int
) -> FlinkRun:
    """Run one contender to its end, count its rows, and remove what it wrote.

    Raises:
        RunFailed: it failed, or rows are missing.
    """
    stages = Stages() if contender == "moebeam" else None
    command = command_of(contender, cluster.beam_options, files, output, checkpoint)
    log = output.with_suffix(".log")
    with MemoryWatch(cluster.folder) as watch, log.open("w") as sink:
        started = time.monotonic()
        process = subprocess.Popen(command, cwd=_ROOT, stdout=subprocess.PIPE, stderr=sink, text=True)
        while process.poll() is None and time.monotonic() - started < RUN_TIMEOUT_S:
            if stages is not None:
                stages.look(output, time.monotonic() - started)
            time.sleep(POLL_S)
        seconds = time.monotonic() - started
        if process.poll() is None:
            process.kill()
        if stages is not None:
            stages.look(output, seconds)
        told, _ = process.communicate()
    try:
        if process.returncode:
            raise RunFailed(f"{' '.join(command)}: exit code {process.returncode}\n{log.read_text()[-2000:]}")
        values = json.loads(told.splitlines()[-1])
        found = values["num_results"] if contender == "moebeam" else values["num_rows"]
        if found != num_rows:
            raise RunFailed(f"{contender}: expected {num_rows} rows, found {found}")
    finally:
        shutil.rmtree(output, ignore_errors=True)
    workers = watch.workers
    return FlinkRun(
        contender=contender,
        num_rows=num_rows,
        seconds=seconds,
        cpu_s=watch.cpu_s,
        worker_peaks=tuple(max(samples) for samples in workers),
        worker_growth=max((growth(samples) for samples in workers), default=0),
        cluster_peak=watch.peak_sum,
        stages=stages,
    )


def command_of(
    contender: str, beam_options: Sequence[str], files: BenchmarkFiles, output: Path, checkpoint: str
) -> list[str]:
    """The command line of a contender; it ends with a line of JSON on standard output."""
    if contender != "moebeam":
        module = [sys.executable, "-m", "benchmarks.flink.shape", contender]
        return [*module, str(files.folder), str(output), checkpoint, *beam_options]
    job_file = write_job_file(benchmark_job(files, output, checkpoint), files.folder / "job.toml")
    code = "from moebeam.jobs.commands.cli import main; main()"
    return [sys.executable, "-c", code, "run", str(job_file), "--json", "--quiet", *beam_options]


def lines_of(runs: Sequence[FlinkRun]) -> list[str]:
    """The figures as a table, goals beside them."""
    lines = [
        f"{'':<28}{'rows':>10}{'seconds':>10}{'rows/s':>10}{'CPU s':>9}{'worker MiB':>12}{'grew':>7}{'cluster':>9}"
    ]
    for run in runs:
        lines.append(
            f"{TITLES[run.contender]:<28}{run.num_rows:>10,}{run.seconds:>10.1f}{run.num_rows / run.seconds:>10,.0f}"
            f"{run.cpu_s:>9.1f}{max(run.worker_peaks, default=0) >> 20:>12,}{run.worker_growth >> 20:>7,}"
            f"{run.cluster_peak >> 20:>9,}"
        )
    lines += [
        "",
        f"{'moebeam, seconds to':<28}{'rows':>10}{'planned':>10}{'1st shard':>11}{'published':>11}{'manifest':>10}",
    ]
    for run in runs:
        if run.stages is not None:
            stages = run.stages
            lines.append(
                f"{'':<28}{run.num_rows:>10,}{stages.planned_s:>10.1f}{stages.first_answer_s:>11.1f}"
                f"{stages.answered_s:>11.1f}{stages.published_s:>10.1f}"
            )
    by_size = {(run.contender, run.num_rows): run for run in runs}
    lines.append("")
    for (contender, num_rows), run in by_size.items():
        moebeam = by_size.get(("moebeam", num_rows))
        if contender != "moebeam" and moebeam is not None:
            ratio = moebeam.seconds / run.seconds
            verdict = "met" if ratio <= MAX_RATIO else "missed"
            lines.append(
                f"{num_rows:,} rows: {ratio:.2f} times the seconds of {TITLES[contender]} (goal {MAX_RATIO}, {verdict})"
                f", {moebeam.cpu_s / max(run.cpu_s, 0.1):.2f} times its CPU time"
            )
    peak = max((max(run.worker_peaks, default=0) for run in runs if run.contender == "moebeam"), default=0)
    verdict = "met" if peak < MAX_WORKER_BYTES else "missed"
    lines.append(f"largest worker of moebeam: {peak >> 20:,} MiB (goal {MAX_WORKER_BYTES >> 20:,}, {verdict})")
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; 1 if a run failed, whatever the figures say."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.flink", description="moebeam on a local Flink cluster.")
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--row_bytes", type=int, default=512, help="UTF-8 bytes of text a row")
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--task_managers", type=int, default=2)
    parser.add_argument("--task_manager_mib", type=int, default=2048, help="bare pipelines of many rows die with 1024")
    parser.add_argument("--checkpoint", default=str(CHECKPOINT_PATH), help="folder whose tokenizer is used")
    parser.add_argument("--plot", type=Path, help="picture of seconds over rows, .png or .svg; needs matplotlib")
    parser.add_argument("--json", action="store_true", help="one line of JSON on stdout, the tables on stderr")
    options = parser.parse_args(argv)
    if options.plot is not None and not can_plot(options.plot):
        parser.error(f"--plot {options.plot}: expected a .png or .svg, and matplotlib installed")
    # In worker processes as here: threads of small matrices only wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    runs: list[FlinkRun] = []
    has_failed = False
    sink = sys.stderr if options.json else sys.stdout
    with tempfile.TemporaryDirectory(prefix="moebeam-flink-") as temporary:
        folder = Path(temporary)
        cluster = make_cluster(folder / "cluster", _size_of(options))
        started = time.monotonic()
        cluster.start()
        start_s = time.monotonic() - started
        try:
            # Java compiles what it runs often: the first job on a new cluster takes twice as long as the second.
            few = write_files(folder / "few", num_rows=WARM_UP_ROWS, row_bytes=options.row_bytes)
            for contender in options.contenders:
                run_once(contender, cluster, few, folder / "output", options.checkpoint, WARM_UP_ROWS)
            for num_rows in options.rows:
                files = write_files(folder / "rows", num_rows=num_rows, row_bytes=options.row_bytes)
                for contender in options.contenders:
                    run = run_once(contender, cluster, files, folder / "output", options.checkpoint, num_rows)
                    runs.append(run)
                    print(f"{contender}, {num_rows:,} rows: {run.seconds:.1f} s", file=sys.stderr, flush=True)
        except RunFailed as error:
            # What was measured before is still told.
            print(error, file=sys.stderr)
            has_failed = True
        finally:
            cluster.stop()
    facts = machine_facts()
    print("\n".join([machine_line(facts), f"cluster started in {start_s:.0f} s", "", *lines_of(runs)]), file=sink)
    if options.plot is not None:
        plot([asdict(run) for run in runs], TITLES, options.plot)
    if options.json:
        print(json.dumps({"benchmark": "flink", "machine": facts, "runs": [asdict(run) for run in runs]}))
    return int(has_failed)


def _size_of(options: argparse.Namespace) -> ClusterSize:
    return ClusterSize(num_task_managers=options.task_managers, task_manager_mib=options.task_manager_mib)


if __name__ == "__main__":
    sys.exit(main())
