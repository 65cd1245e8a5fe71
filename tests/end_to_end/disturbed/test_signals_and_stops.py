"""Runs that a signal stops, in every stage: nothing leaves any more, nothing that arrived is lost, and it is told."""

import json
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from moebeam.jobs.console.formats import format_outage
from moebeam.jobs.console.signals import StopSignal
from moebeam.jobs.console.summary import EXIT_STOPPED, PIPELINE_THREAD, ProgressSnapshot
from moebeam.jobs.output.run_record import read_record
from moebeam.jobs.output.status import StatusReport, read_status
from moebeam.jobs.run.launch import launch
from moebeam.schemas.errors import JobInterrupted
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.transforms.durable.journal_file import read_journal
from tests.support.jobs.jobs_for_tests import fake_job, read_table, write_parquet, write_script
from tests.support.jobs.remote_jobs import KEY, KEY_VARIABLE, remote_job, write_tickets
from tests.support.paths import ROOT
from tests.support.servers.fake_endpoint import Call, FakeEndpoint, Reply, deepseek, error
from tests.support.servers.local_servers import free_port

NUM_ROWS = 60
TIMEOUT_S = 120


def status_of(output: Path) -> StatusReport:
    return read_status(read_record(str(output)))


class StopsAt:
    """A first signal, given at a snapshot of the run."""

    def __init__(self, is_time: Callable[[ProgressSnapshot], bool], name: str = "SIGTERM") -> None:
        self.stop = StopSignal()
        self.told: list[str] = []
        self._is_time = is_time
        self._name = name
        self.at_stop: Callable[[], None] = lambda: None

    def __call__(self, snapshot: ProgressSnapshot) -> None:
        if self._is_time(snapshot):
            self.stop.name = self._name
            self.stop.set()
        if snapshot.stop is not None:
            if not self.told:
                self.at_stop()
            self.told.append(snapshot.stop)


class Tickets:
    """Answers each row; late, or once `is_slow` says so, never."""

    def __init__(self, delay_s: float = 0.0) -> None:
        self.calls: Counter[int] = Counter()
        self.delay_s = delay_s

    def __call__(self, call: Call) -> Reply:
        row = int(call.last_user_text.split("ticket ")[1].split(":")[0])
        self.calls[row] += 1
        return Reply(deepseek('{"category": "fine"}'), delay_s=self.delay_s)


@pytest.fixture
def tickets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    write_tickets(tmp_path, NUM_ROWS)
    return tmp_path


def sections(**failures: Any) -> dict[str, Any]:
    return {
        "prompt": {"system": "x"},
        "input": {"tenant_column": None},
        "plan": {"max_shard_rows": NUM_ROWS},
        "model": {"max_concurrency": 10},
        "failures": failures,
    }


def test_endless_overloads_end_at_a_signal_and_no_call_begins_after_it(tickets: Path) -> None:
    with FakeEndpoint(lambda _: error(429, "slow down")) as endpoint:
        stops = StopsAt(lambda snapshot: snapshot.stage == "answer" and len(endpoint.calls) > 10)
        stops.at_stop = lambda: seen.append(len(endpoint.calls))
        seen: list[int] = []
        summary = launch(
            remote_job(tickets, tickets / "out", endpoint, **sections(drain_s=0.5)), stop=stops.stop, progress=stops
        )
        assert (summary.exit_code, summary.reason, summary.num_rejects) == (EXIT_STOPPED, "signal", 0)
        assert summary.message is not None and summary.message.startswith("stopped by SIGTERM")
        time.sleep(0.5)
        assert len(endpoint.calls) <= seen[0] + 10, "beyond those that were about to leave, none leaves"
        num_calls = len(endpoint.calls)
    status = status_of(tickets / "out")
    assert (status.state, status.reason) == ("incomplete", "signal")
    assert status.message is not None and status.message.startswith("stopped by SIGTERM")
    assert stops.told and num_calls


def test_a_slow_provider_is_awaited_as_long_as_the_job_says_and_nothing_arrived_is_asked_again(tickets: Path) -> None:
    answers = Tickets(delay_s=0.0)

    def reply(call: Call) -> Reply:
        answers.delay_s = 3600.0 if sum(answers.calls.values()) >= 20 else 0.0
        return answers(call)

    with FakeEndpoint(reply) as endpoint:
        stops = StopsAt(lambda snapshot: sum(answers.calls.values()) >= 30, "SIGINT")
        job = remote_job(tickets, tickets / "out", endpoint, **sections(drain_s=0.5))
        summary = launch(job, stop=stops.stop, progress=stops)
        assert (summary.exit_code, summary.reason) == (EXIT_STOPPED, "signal")
        assert sum(answers.calls.values()) == 30, "20 arrived, 10 were in flight"
    layout = RunLayout(str(tickets / "out"))
    entries = read_journal(layout, "s000000").entries
    assert sum(entry.is_answer for entry in entries) == 20
    again = Tickets()
    with FakeEndpoint(again) as endpoint:
        summary = launch(remote_job(tickets, tickets / "out", endpoint, **sections(drain_s=0.5)))
    assert (summary.status, summary.num_results) == ("succeeded", NUM_ROWS)
    assert set(again.calls.values()) == {1} and len(again.calls) == NUM_ROWS - 20


@pytest.mark.parametrize("is_own_process", [False, pytest.param(True, marks=pytest.mark.integration)])
def test_an_engine_in_process_stops_within_a_shard_and_goes_on_there(
    tmp_path: Path, tiny_checkpoint: Path, is_own_process: bool
) -> None:
    source = write_parquet(tmp_path / "in.parquet", {"text": [f"ticket {row}" for row in range(NUM_ROWS)]})
    values: dict[str, Any] = {
        "plan": {"max_shard_rows": NUM_ROWS},
        "failures": {"drain_s": 0.2, "engine_process": "own" if is_own_process else "shared"},
    }
    undisturbed = launch(fake_job(source, tmp_path / "undisturbed", tiny_checkpoint, **values))
    values["model"] = {"script": str(write_script(tmp_path / "slow.json", {"latency_ms": 50}))}
    assert undisturbed.num_results == NUM_ROWS
    stops = StopsAt(lambda snapshot: snapshot.stage == "answer" and snapshot.rows_done > 3)
    output = tmp_path / "out"
    job = fake_job(source, output, tiny_checkpoint, **values)
    summary = launch(job, stop=stops.stop, progress=stops)
    assert (summary.exit_code, summary.reason) == (EXIT_STOPPED, "signal")
    num_kept = len(read_journal(RunLayout(str(output)), "s000000").entries)
    assert 3 < num_kept < NUM_ROWS
    summary = launch(job)
    assert (summary.status, summary.num_results) == ("succeeded", NUM_ROWS)
    manifest = json.loads((output / "manifest.json").read_text())
    assert manifest["engine"]["num_replayed_answers"] == num_kept
    texts = [[row["output_text"] for row in read_table(path, "results")] for path in (output, tmp_path / "undisturbed")]
    assert texts[0] == texts[1]


def test_an_outage_is_shown_by_the_run_and_by_status_until_the_provider_answers(tickets: Path) -> None:
    endpoint = FakeEndpoint(Tickets(), port=free_port())
    shown: list[str] = []
    statuses: list[StatusReport] = []

    def watch(snapshot: ProgressSnapshot) -> None:
        if snapshot.outage is not None and not statuses:
            shown.append(format_outage(snapshot.outage))
            statuses.append(status_of(tickets / "out"))
            endpoint.__enter__()

    try:
        summary = launch(remote_job(tickets, tickets / "out", endpoint, **sections()), progress=watch)
    finally:
        if statuses:
            endpoint.__exit__()
    assert (summary.num_results, summary.num_rejects) == (NUM_ROWS, 0)
    assert shown[0].startswith("deepseek unreachable since ")
    (status,) = statuses
    assert status.outage is not None and status.outage.provider == "deepseek"
    told = status.to_json()["outage"]
    assert isinstance(told, dict) and {*told} == {"provider", "since", "next_try_at", "message"}
    assert status_of(tickets / "out").outage is None


def test_a_stop_while_planning_is_told_by_status_until_the_run_goes_on(tmp_path: Path, tiny_checkpoint: Path) -> None:
    source = write_parquet(tmp_path / "in.parquet", {"text": ["a", "b"]})
    stop = StopSignal()
    stop.name = "SIGHUP"
    stop.set()
    job = fake_job(source, tmp_path / "out", tiny_checkpoint)
    with pytest.raises(JobInterrupted, match="stopped by SIGHUP while planning; nothing was asked"):
        launch(job, stop=stop)
    status = status_of(tmp_path / "out")
    assert (status.state, status.reason) == ("stopped", "signal")
    assert status.message == "stopped by SIGHUP while planning; nothing was asked of the model yet"
    # A part of the rows never becomes a plan: the pipeline ends by itself, without a reason of its own.
    wait_for(lambda: not any(thread.name == PIPELINE_THREAD for thread in threading.enumerate()))
    layout = RunLayout(str(tmp_path / "out"))
    assert not Path(layout.plan_record).exists() and not Path(layout.failure).exists()
    assert launch(job).num_results == 2
    assert status_of(tmp_path / "out").state == "complete"


@pytest.fixture
def slow_template(tmp_path: Path, tiny_checkpoint: Path) -> Path:
    """A job whose template takes an hour of C code for its row, and may."""
    write_parquet(tmp_path / "in.parquet", {"text": ["x"]})
    path = tmp_path / "job.toml"
    path.write_text(f"""
[input]
path = "{tmp_path}/in.parquet"
[prompt]
template = "{{{{ text }}}}{{{{ ([[text]] * 1000000) | sum(start=[]) | length }}}}"
max_template_s = 3600
[output]
path = "{tmp_path}/out"
[model]
engine = "fake"
path = "{tiny_checkpoint}"
name = "tiny"
[sampling]
max_tokens = 8
[failures]
drain_s = 0.5
""")
    return path


def start(job: Path, *options: str) -> "subprocess.Popen[str]":
    words = [sys.executable, "-c", "from moebeam.jobs.commands.cli import main; main()", "run", str(job), *options]
    return subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def wait_for(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not is_so():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.05)


@pytest.mark.integration
@pytest.mark.parametrize("num_signals", [1, 2])
@pytest.mark.parametrize("options", [(), ("--direct_num_workers=2", "--direct_running_mode=multi_processing")])
def test_a_template_that_takes_an_hour_outlives_no_signal(
    slow_template: Path, options: tuple[str, ...], num_signals: int
) -> None:
    output = slow_template.parent / "out"
    process = start(slow_template, *options)
    try:
        wait_for(lambda: (output / "_moebeam" / "launchers").exists())
        time.sleep(5)  # until the template runs, more or less: the claim holds at any time
        workers = psutil.Process(process.pid).children(recursive=True)
        for _ in range(num_signals):
            process.send_signal(signal.SIGTERM)
            time.sleep(0.2)
        process.communicate(timeout=TIMEOUT_S)
    finally:
        process.kill()
    # A second one may also find a process that is past its run, and that it ends as any other.
    assert process.returncode in (EXIT_STOPPED, -signal.SIGKILL, -signal.SIGTERM)
    # After an end by force, a process of its own leaves the note.
    wait_for(lambda: (status_of(output).message or "").startswith("stopped by SIGTERM"))
    assert status_of(output).state == "stopped"
    wait_for(lambda: not any(worker.is_running() for worker in workers))
