"""Runs on a real Flink cluster: its job manager, two task managers, and a pool of Python workers for each of them."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest

from moebeam.jobs.deploy.flink.worker_pool import WORKER_MODULE
from tests.support.disturbances.disturbed_runs import Tables, Work, problems_of, tables_of
from tests.support.disturbances.killed_runs import run_to_end, start
from tests.support.flink.built_cluster import make_cluster
from tests.support.flink.cluster import LocalCluster
from tests.support.jobs.user_project import NUM_ROWS as NUM_PROJECT_ROWS
from tests.support.jobs.user_project import project_environment, write_project
from tests.support.paths import ROOT
from tests.support.servers.local_servers import free_port

pytestmark = pytest.mark.integration

NUM_ROWS = 400
MAX_SHARD_ROWS = 20
LATENCY_MS = 60
"""A shard takes a second or so: time enough to see a run in the middle."""

WAIT_TIMEOUT_S = 180
UNREADABLE_EXIT_CODE = 3


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    cluster = make_cluster(tmp_path_factory.mktemp("flink"))
    cluster.start()
    try:
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Work:
    folder = tmp_path_factory.mktemp("work")
    return Work(folder, tiny_checkpoint, NUM_ROWS, latency_ms=LATENCY_MS, max_shard_rows=MAX_SHARD_ROWS).write()


@pytest.fixture(scope="module")
def local_tables(work: Work) -> Tables:
    output = work.folder / "local"
    assert run_to_end(work.write_job_file(output)) == UNREADABLE_EXIT_CODE, log_of(work, output)
    return tables_of(output)


def log_of(work: Work, output: Path) -> str:
    return (work.folder / f"{output.name}.log").read_text()[-2000:]


def last_job(cluster: LocalCluster) -> dict[str, Any]:
    """What Flink tells of the job that was started last."""
    jobs = cluster.overview("/jobs/overview")["jobs"]
    return cluster.overview(f"/jobs/{max(jobs, key=lambda job: job['start-time'])['jid']}")


def shards_answered_by_task_manager(cluster: LocalCluster) -> dict[str, int]:
    """How many shards each task manager gave to its pool's workers in the last job, by Flink's own count."""
    job = last_job(cluster)
    (vertex,) = [vertex for vertex in job["vertices"] if "Answer/AnswerShard" in vertex["name"]]
    subtasks = cluster.overview(f"/jobs/{job['jid']}/vertices/{vertex['id']}")["subtasks"]
    counts: dict[str, int] = {}
    for subtask in subtasks:
        name = subtask["taskmanager-id"].rpartition("-")[0]
        counts[name] = counts.get(name, 0) + subtask["metrics"]["read-records"]
    return counts


def wait_for(is_so: Callable[[], bool], run: subprocess.Popen[bytes] | None = None) -> None:
    deadline = time.monotonic() + WAIT_TIMEOUT_S
    while not is_so():
        assert run is None or run.poll() is None, "the run ended too early"
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.05)


def num_commits(output: Path) -> int:
    return len(list(output.glob("_moebeam/commits/*.json")))


def worker_of(cluster: LocalCluster, index: int) -> psutil.Process:
    """The newest Python worker of a pool that runs."""
    workers = [child for child in cluster.find(f"pool-{index}").children() if WORKER_MODULE in child.cmdline()]
    return max(workers, key=lambda worker: worker.create_time())


def command(*args: str, cwd: Path = ROOT, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """A command line of moebeam, run to its end."""
    words = [sys.executable, "-c", "from moebeam.jobs.commands.cli import main; main()", *args]
    return subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True, timeout=WAIT_TIMEOUT_S, check=False)


def test_flink_gives_the_tables_of_the_local_runner_row_for_row(
    cluster: LocalCluster, work: Work, local_tables: Tables
) -> None:
    output = work.folder / "on-flink"
    assert run_to_end(work.write_job_file(output), cluster.beam_options) == UNREADABLE_EXIT_CODE, log_of(work, output)
    # Looked at first: idle workers end after some seconds.
    folders = {Path(worker_of(cluster, index).cwd()).parent for index in (0, 1)}
    assert problems_of(output, work, local_tables) == []
    counts = shards_answered_by_task_manager(cluster)
    assert set(counts) == {"task-manager-0", "task-manager-1"}
    assert all(counts.values())
    assert sum(counts.values()) == num_commits(output)
    assert len(folders) == 2


def test_workers_stay_from_step_to_step(cluster: LocalCluster, work: Work, local_tables: Tables) -> None:
    before = set(cluster_worker_folders(cluster))
    output = work.folder / "few-workers"
    run_to_end(work.write_job_file(output), cluster.beam_options)
    assert len(set(cluster_worker_folders(cluster)) - before) == 2


def cluster_worker_folders(cluster: LocalCluster) -> list[Path]:
    return list(cluster.folder.glob("pool-*/worker-*"))


def test_a_killed_task_manager_changes_no_row(cluster: LocalCluster, work: Work, local_tables: Tables) -> None:
    output = work.folder / "task-manager-killed"
    run = start(work.write_job_file(output), cluster.beam_options)
    wait_for(lambda: num_commits(output) >= 3, run)
    cluster.find("task-manager-0").kill()
    num_before = num_commits(output)
    assert run.wait(WAIT_TIMEOUT_S) == UNREADABLE_EXIT_CODE, log_of(work, output)
    assert num_before < num_commits(output)
    assert last_job(cluster)["status-counts"]["FINISHED"]
    assert cluster.overview(f"/jobs/{last_job(cluster)['jid']}/exceptions")["exceptionHistory"]["entries"]
    assert problems_of(output, work, local_tables) == []
    cluster.start_task_manager(0)
    cluster.wait_for_task_managers(2)


def test_a_killed_worker_changes_no_row(cluster: LocalCluster, work: Work, local_tables: Tables) -> None:
    output = work.folder / "worker-killed"
    run = start(work.write_job_file(output), cluster.beam_options)
    wait_for(lambda: num_commits(output) >= 3, run)
    worker_of(cluster, 1).kill()
    num_before = num_commits(output)
    assert run.wait(WAIT_TIMEOUT_S) == UNREADABLE_EXIT_CODE, log_of(work, output)
    assert num_before < num_commits(output)
    assert problems_of(output, work, local_tables) == []


def test_status_tells_how_far_a_run_on_flink_is(cluster: LocalCluster, work: Work, local_tables: Tables) -> None:
    output = work.folder / "watched"
    run = start(work.write_job_file(output), cluster.beam_options)
    wait_for(lambda: num_commits(output) >= 2, run)
    told = json.loads(command("status", str(output), "--json").stdout)
    assert (told["state"], told["is_alive"]) == ("answering", True)
    assert 0 < told["rows_done"] < told["rows_total"] == NUM_ROWS + 1
    assert 0 < told["shards_done"] < told["shards_total"]
    assert run.wait(WAIT_TIMEOUT_S) == UNREADABLE_EXIT_CODE, log_of(work, output)
    assert json.loads(command("status", str(output), "--json").stdout)["state"] == "complete"


def test_ctrl_c_drains_a_run_on_flink_and_the_local_runner_finishes_it(
    cluster: LocalCluster, work: Work, local_tables: Tables
) -> None:
    output = work.folder / "interrupted"
    run = start(work.write_job_file(output), cluster.beam_options)
    wait_for(lambda: num_commits(output) >= 2, run)
    os.kill(run.pid, signal.SIGINT)
    assert run.wait(WAIT_TIMEOUT_S) == 4, log_of(work, output)
    assert json.loads((output / "manifest.json").read_text())["status"] == "incomplete"
    assert command("resume", str(output)).returncode == UNREADABLE_EXIT_CODE
    assert problems_of(output, work, None) == []
    assert tables_of(output) == local_tables


def test_ctrl_c_while_planning_ends_the_work_on_flink_and_status_says_why(cluster: LocalCluster, work: Work) -> None:
    num_jobs = len(cluster.overview("/jobs/overview")["jobs"])
    output = work.folder / "interrupted-early"
    run = start(work.write_job_file(output), cluster.beam_options)
    wait_for(lambda: len(cluster.overview("/jobs/overview")["jobs"]) > num_jobs, run)
    os.kill(run.pid, signal.SIGINT)
    assert run.wait(WAIT_TIMEOUT_S) == 4, log_of(work, output)
    # Its steps end with an error, until Flink has tried often enough: the job server cannot cancel it.
    wait_for(lambda: last_job(cluster)["state"] in ("CANCELED", "FAILED", "RESTARTING"))
    wait_for(lambda: not last_job(cluster)["status-counts"]["RUNNING"])
    assert num_commits(output) == 0
    told = json.loads(command("status", str(output), "--json").stdout)
    assert (told["state"], told["reason"], told["is_alive"]) == ("stopped", "signal", False)
    assert told["message"] == "stopped by SIGINT while planning; nothing was asked of the model yet"


def test_the_flink_runner_brings_its_own_job_server(cluster: LocalCluster, work: Work, local_tables: Tables) -> None:
    output = work.folder / "flink-runner"
    environment = [option for option in cluster.beam_options if option.startswith(("--environment_", "--parallelism"))]
    runner = [
        "--runner=FlinkRunner",
        f"--flink_master={cluster.job_manager_address}",
        f"--flink_job_server_jar={cluster.files.job_server_jar}",
    ]
    code = run_to_end(work.write_job_file(output), [*runner, *environment])
    assert code == UNREADABLE_EXIT_CODE, log_of(work, output)
    assert problems_of(output, work, local_tables) == []


def test_the_torch_engine_answers_on_flink_as_it_does_locally(
    cluster: LocalCluster, tmp_path: Path, tiny_checkpoint: Path
) -> None:
    work = Work(tmp_path, tiny_checkpoint, 24, max_shard_rows=6).write()
    tables = []
    for name, args in (("local", ()), ("flink", cluster.beam_options)):
        output = tmp_path / name
        job_file = work.write_job_file(output)
        lines = job_file.read_text().splitlines()
        job_file.write_text("\n".join(line for line in lines if not line.startswith("script =")))
        settings = ["model.engine=torch", "sampling.max_tokens=40", "accounting.provider=fake", "accounting.model=tiny"]
        assert run_to_end(job_file, [*sets(settings), *args]) == UNREADABLE_EXIT_CODE, log_of(work, output)
        tables.append(without_measured_times(tables_of(output)))
    assert tables[1] == tables[0]
    assert any(row["completion_tokens"] for row in [*tables[0]["results"], *tables[0]["rejects"]])


def test_a_project_with_folders_named_like_ours_runs_on_flink(
    cluster: LocalCluster, tmp_path: Path, tiny_checkpoint: Path
) -> None:
    project = write_project(tmp_path / "project", tiny_checkpoint).parent
    done = command("run", "job.toml", *cluster.beam_options, cwd=project, env=project_environment(project))
    assert done.returncode == 0, done.stderr
    rows = pq.read_table(project / "out" / "results").to_pylist()
    assert [row["status"] for row in rows] == ["ok"] * NUM_PROJECT_ROWS
    assert all(row["output"]["num_prompt_tokens"] >= 1 for row in rows)


def without_measured_times(tables: Tables) -> Tables:
    """Tables without what an engine in process measures of its own work; the fake engine measures nothing."""
    return {
        name: [{column: value for column, value in row.items() if column != "accelerator_s"} for row in rows]
        for name, rows in tables.items()
    }


def sets(settings: Sequence[str]) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


def test_flinks_web_port_is_told_from_a_job_server(cluster: LocalCluster, work: Work) -> None:
    options = ["--runner=PortableRunner", f"--job_endpoint={cluster.job_manager_address}"]
    done = command("run", str(work.write_job_file(work.folder / "wrong-port")), *options)
    assert done.returncode == 2
    assert f"--job_endpoint={cluster.job_manager_address}: expected a Beam job server" in done.stderr
    assert "Traceback" not in done.stderr


def test_nobody_at_the_job_endpoint_is_told_before_anything_is_written(work: Work) -> None:
    output = work.folder / "nobody"
    address = f"localhost:{free_port()}"
    done = command("run", str(work.write_job_file(output)), "--runner=PortableRunner", f"--job_endpoint={address}")
    assert done.returncode == 2
    assert f"--job_endpoint={address}: expected a Beam job server" in done.stderr
    assert "Traceback" not in done.stderr
    assert not output.exists()
