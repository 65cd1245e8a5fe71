"""The Flink benchmark's parts: what it runs, counts and says. No cluster is started, and no time is asserted."""

import subprocess
import sys
import tomllib
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest

from benchmarks.flink import __main__ as flink
from benchmarks.flink import shape as flink_shape
from benchmarks.flink.__main__ import FlinkRun, MemoryWatch, Stages, command_of, growth, lines_of
from benchmarks.pipeline.prompts import BenchmarkFiles, write_files
from moebeam.jobs.check.job_file import load_job

NUM_ROWS = 30


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> BenchmarkFiles:
    return write_files(tmp_path_factory.mktemp("flink"), num_rows=NUM_ROWS, row_bytes=120)


@pytest.mark.parametrize("contender", ["shape", "work"])
def test_bare_pipelines_let_every_row_out(
    contender: flink_shape.Contender, files: BenchmarkFiles, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    assert flink_shape.run(contender, files, tmp_path / "out", str(tiny_checkpoint), ()) == NUM_ROWS
    rows = pq.read_table(tmp_path / "out")
    if contender == "shape":
        assert sorted(rows.column("text").to_pylist()) == sorted(
            pq.read_table(files.prompts).column("text").to_pylist()
        )
    else:
        assert set(rows.column("status").to_pylist()) == {"ok"}
        assert min(rows.column("prompt_tokens").to_pylist()) > 0


def test_moebeam_runs_the_job_of_the_other_benchmarks(files: BenchmarkFiles, tmp_path: Path) -> None:
    command = command_of("moebeam", ["--runner=PortableRunner"], files, tmp_path / "out", "checkpoint")
    assert command[-1] == "--runner=PortableRunner"
    job_file = command[command.index("run") + 1]
    assert tomllib.loads(Path(job_file).read_text())["model"]["engine"] == "fake"
    assert load_job(job_file, ()).output.path == str(tmp_path / "out")


def test_stages_are_told_by_the_files_of_a_run(tmp_path: Path) -> None:
    stages = Stages()
    for second, path in enumerate(("_moebeam/plan/plan.json", "_moebeam/commits/s.json", "results/s.parquet"), 1):
        (tmp_path / path).parent.mkdir(parents=True)
        (tmp_path / path).touch()
        stages.look(tmp_path, float(second))
    stages.look(tmp_path, 9.0)
    assert stages == Stages(planned_s=1.0, first_answer_s=2.0, answered_s=3.0, published_s=0.0)


def test_memory_that_stays_is_flat_and_memory_that_grows_is_not() -> None:
    assert growth([100, 300, 300, 250]) == 0
    assert growth([100, 100, 100, 180]) == 80
    assert growth([100]) == 0


def test_processes_are_sampled_with_the_cpu_time_since_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        found = psutil.Process(process.pid)
        looks = iter([[("worker", psutil.Process())]])
        both = [("worker", psutil.Process()), ("worker", found)]
        monkeypatch.setattr(flink, "_processes", lambda folder: next(looks, both))
        monkeypatch.setattr(flink, "SAMPLE_S", 0.05)
        with MemoryWatch(tmp_path) as watch:
            while len(watch.resident[("worker", process.pid)]) < 3 or not watch.cpu_s:
                assert process.poll() is None
        (samples,) = watch.workers
        assert watch.peak_sum >= max(samples) > 1 << 20
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize(("seconds", "verdict"), [(15.0, "met"), (15.1, "missed")])
def test_goals_stand_beside_the_figures(seconds: float, verdict: str) -> None:
    def run_of(contender: str, seconds: float) -> FlinkRun:
        stages = Stages() if contender == "moebeam" else None
        return FlinkRun(contender, 1000, seconds, seconds, (1 << 30,), 0, 2 << 30, stages)

    lines = lines_of([run_of("moebeam", seconds), run_of("shape", 10.0)])
    assert f"1,000 rows: {seconds / 10:.2f} times the seconds of bare Beam, no work (goal 1.5, {verdict})" in lines[-2]
    assert lines[-1] == "largest worker of moebeam: 1,024 MiB (goal 1,536, met)"
