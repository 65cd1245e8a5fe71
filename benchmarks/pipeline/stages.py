"""The stages of moebeam called one after another, without Beam: what each of them costs a row.

Beam runs bundles in threads of its own, and a profiler sees one thread; here every stage runs in the caller's, through
the same functions that the pipeline's steps call. What a whole run takes beyond the sum is Beam and the launcher.
"""

import cProfile
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import CodeType

import pyarrow as pa

from benchmarks.pipeline.contenders.whole_way import benchmark_job
from benchmarks.pipeline.prompts import BenchmarkFiles
from moebeam.jobs.check.preflight import check_job
from moebeam.jobs.run.main_job import make_main_job
from moebeam.pipelines.main_job import MainJob
from moebeam.transforms.answer.answer_shard import LoadedEngine, answer_shard
from moebeam.transforms.plan.build_shards import build_shards, write_plan
from moebeam.transforms.plan.plan_record import PlannedShard
from moebeam.transforms.plan.shard_ranges import cut_ranges
from moebeam.transforms.plan.sorted_runs import MAX_SORTED_RUN_BYTES, RunFile, read_rows, write_runs
from moebeam.transforms.publish.manifest import publish_shard, write_manifest
from moebeam.transforms.read.input_rows import read_unit
from moebeam.transforms.render.render_rows import Renderer

PACKAGES = ("schemas", "model_runner", "transforms", "pipelines", "jobs")
_ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, slots=True)
class FunctionCost:
    """A profiled function: calls, and seconds with and without what it calls."""

    name: str
    num_calls: int
    total_s: float
    own_s: float


class StageClock:
    """Adds up seconds by the name of a stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def timed(self, stage: str) -> Generator[None]:
        """Count the time of a block."""
        started = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - started


def walk_stages(files: BenchmarkFiles, output: Path, checkpoint: str) -> dict[str, float]:
    """Run the job of the whole way stage by stage; seconds by stage, in their order."""
    clock = StageClock()
    with clock.timed("check"):
        checked = check_job(benchmark_job(files, output, checkpoint))
        checked.claim_output()
        job = make_main_job(checked, None)
    runs = list(_write_runs(job, clock))
    shards = _build_shards(job, runs, clock)
    with clock.timed("answer"):
        engine = LoadedEngine.load(job.answer.engine)
    commits = []
    for shard in shards:
        with clock.timed("answer"):
            table = read_rows(job.plan.layout.shard_plan(shard.shard))
            commits.append(answer_shard(shard.shard, table, engine, job.answer))
        with clock.timed("publish"):
            publish_shard(commits[-1], job.plan.layout)
    with clock.timed("publish"):
        write_manifest(commits, job.publish)
    return clock.seconds


def _write_runs(job: MainJob, clock: StageClock) -> Iterator[RunFile]:
    """Read, render, and write sorted runs, cut where *plan* cuts them: at groups of units, and when one is full."""
    with clock.timed("render"):
        renderer = Renderer(job.render)
    for group in job.scan.groups:
        rendered: list[pa.RecordBatch] = []
        for unit in group.units:
            with clock.timed("read"):
                batches = list(read_unit(unit, job.columns))
            for batch in batches:
                with clock.timed("render"):
                    rendered += renderer.render_rows(batch)
                if sum(batch.nbytes for batch in rendered) >= MAX_SORTED_RUN_BYTES:
                    yield from _write_run(rendered, job, clock)
                    rendered = []
        if rendered:
            yield from _write_run(rendered, job, clock)


def _write_run(rendered: list[pa.RecordBatch], job: MainJob, clock: StageClock) -> list[RunFile]:
    with clock.timed("plan: runs"):
        return list(write_runs(rendered, job.plan.layout, job.plan.section))


def _build_shards(job: MainJob, runs: list[RunFile], clock: StageClock) -> tuple[PlannedShard, ...]:
    with clock.timed("plan: shards"):
        ranges = list(cut_ranges(runs, job.plan.layout))
        planned = [shard for part in ranges for shard in build_shards(part, job.plan, {})]
        shards = write_plan(planned, job.plan.layout)
    return shards


def profile_stages(files: BenchmarkFiles, output: Path, checkpoint: str, *, num_functions: int) -> list[FunctionCost]:
    """Moebeam's own functions in the order of the time spent in them and below; the profiler slows all of them."""
    profile = cProfile.Profile()
    profile.enable()
    walk_stages(files, output, checkpoint)
    profile.disable()
    return _own_functions(profile)[:num_functions]


def _own_functions(profile: cProfile.Profile) -> list[FunctionCost]:
    found: list[FunctionCost] = []
    for entry in profile.getstats():
        code = entry.code
        if not isinstance(code, CodeType):  # a built-in function, which comes as text
            continue
        place = Path(code.co_filename).resolve()
        if place.is_relative_to(_ROOT) and place.relative_to(_ROOT).parts[0] in PACKAGES:
            name = f"{place.relative_to(_ROOT)}:{code.co_qualname}"
            found.append(FunctionCost(name, entry.callcount, entry.totaltime, entry.inlinetime))
    return sorted(found, key=lambda function: -function.total_s)
