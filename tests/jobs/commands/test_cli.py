import json
import logging
import signal
import sys
import threading
import types
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from moebeam.jobs.commands.cli import run_command
from moebeam.jobs.console.summary import CheckReport, ProgressSnapshot, RunSummary
from moebeam.schemas.errors import EngineLoadError, InputPatternError, JobError, JobInterrupted, OutputError
from moebeam.schemas.job.sections import Job
from moebeam.transforms.answer.reuse import ReuseSource
from tests.support.jobs.run_summaries import SNAPSHOT, summary


class FakeLaunch:
    """Stands for `moebeam.jobs.run.launch`: remembers how it was called, then does what the test says."""

    def __init__(self, act: Callable[[], RunSummary]) -> None:
        self.act = act
        self.jobs: list[Job] = []
        self.limits: list[int | None] = []
        self.beam_args: list[Sequence[str]] = []
        self.stops: list[threading.Event] = []
        self.shows_progress: list[bool] = []

    def launch(
        self,
        job: Job,
        *,
        limit: int | None,
        beam_args: Sequence[str],
        stop: threading.Event,
        progress: Callable[[ProgressSnapshot], None] | None,
        reuse: ReuseSource | None,
    ) -> RunSummary:
        assert reuse is None
        self.jobs.append(job)
        self.limits.append(limit)
        self.beam_args.append(beam_args)
        self.stops.append(stop)
        self.shows_progress.append(progress is not None)
        if progress is not None:
            progress(SNAPSHOT)
        return self.act()


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], RunSummary]], FakeLaunch]:
    def install(act: Callable[[], RunSummary]) -> FakeLaunch:
        launch = FakeLaunch(act)
        module = types.ModuleType("moebeam.jobs.run.launch")
        module.launch = launch.launch  # pyright: ignore[reportAttributeAccessIssue]
        monkeypatch.setitem(sys.modules, "moebeam.jobs.run.launch", module)
        return launch

    return install


def raising(error: Exception) -> Callable[[], RunSummary]:
    def act() -> RunSummary:
        raise error

    return act


def spoken(capsys: pytest.CaptureFixture[str], args: Sequence[str]) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of one command."""
    exit_code = run_command(args)
    captured = capsys.readouterr()
    return exit_code, captured.out, captured.err


def test_help_of_run_fits_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("COLUMNS", "60")
    code, out, _ = spoken(capsys, ["run", "--help"])
    assert code == 0
    assert max(map(len, out.splitlines())) <= 60
    for part in ["--set", "--limit", "--json", "--quiet", "--debug", "Examples:", "moebeam run job.toml"]:
        assert part in out


def test_version_is_one_line_on_standard_output(capsys: pytest.CaptureFixture[str]):
    code, out, err = spoken(capsys, ["--version"])
    assert (code, err, len(out.splitlines())) == (0, "", 1)
    assert out.startswith("moebeam ")


def test_run_hands_job_limit_and_beam_options_to_launch(fake: Any, job_file: str, capsys: pytest.CaptureFixture[str]):
    launch = fake(summary)
    args = ["run", job_file, "--set", "sampling.max_tokens=7", "--limit", "3", "--direct_num_workers", "1", "--json"]
    code, _, _ = spoken(capsys, [*args, "--set=model.name=m"])
    assert code == 0
    assert (launch.jobs[0].sampling.max_tokens, launch.jobs[0].model.name) == (7, "m")
    assert launch.limits == [3]
    assert launch.beam_args == [["--direct_num_workers", "1"]]
    assert not launch.stops[0].is_set()


def test_json_is_the_only_line_on_standard_output(fake: Any, job_file: str, capsys: pytest.CaptureFixture[str]):
    def act() -> RunSummary:
        print("a library says hello")
        return summary()

    fake(act)
    code, out, err = spoken(capsys, ["run", job_file, "--json"])
    assert (code, len(out.splitlines())) == (0, 1)
    assert json.loads(out) == summary().to_json()
    assert "a library says hello" in err
    assert "per 1,000 rows" in err


def test_without_json_standard_output_is_empty(fake: Any, job_file: str, capsys: pytest.CaptureFixture[str]):
    fake(summary)
    code, out, err = spoken(capsys, ["run", job_file])
    assert (code, out) == (0, "")
    assert "answer: 5/10 rows" in err


def test_quiet_shows_nothing_but_errors(fake: Any, job_file: str, capsys: pytest.CaptureFixture[str]):
    launch = fake(summary)
    assert spoken(capsys, ["run", job_file, "--quiet"]) == (0, "", "")
    assert launch.shows_progress == [False]
    fake(raising(OutputError("belongs to another job")))
    assert spoken(capsys, ["run", job_file, "--quiet"]) == (2, "", "error: belongs to another job\n")


@pytest.mark.parametrize("exit_code", [0, 3, 4])
def test_the_exit_code_is_that_of_the_summary(
    fake: Any, job_file: str, capsys: pytest.CaptureFixture[str], exit_code: int
):
    fake(lambda: summary(exit_code=exit_code))
    code, out, _ = spoken(capsys, ["run", job_file, "--json"])
    assert (code, json.loads(out)["exit_code"]) == (exit_code, exit_code)


@pytest.mark.parametrize(
    ("error", "exit_code", "status"),
    [
        (JobError("x"), 1, "failed"),
        (EngineLoadError("x"), 1, "failed"),
        (InputPatternError("x"), 2, "failed"),
        (OutputError("x"), 2, "failed"),
        (JobInterrupted("x"), 4, "incomplete"),
    ],
)
def test_a_job_error_has_its_exit_code_one_line_and_no_traceback(
    fake: Any, job_file: str, capsys: pytest.CaptureFixture[str], error: JobError, exit_code: int, status: str
):
    fake(raising(error))
    code, out, err = spoken(capsys, ["run", job_file, "--quiet", "--json"])
    assert code == exit_code
    assert json.loads(out) == {"status": status, "exit_code": exit_code, "error": "x"}
    assert err == "error: x\n"


def test_an_unexpected_error_exits_with_1_and_points_to_debug(
    fake: Any, job_file: str, capsys: pytest.CaptureFixture[str]
):
    fake(raising(ZeroDivisionError("one\ntwo")))
    code, out, err = spoken(capsys, ["run", job_file, "--quiet", "--json"])
    assert code == 1
    assert json.loads(out)["error"] == "ZeroDivisionError: one"
    assert err == "error: ZeroDivisionError: one\nThis is not expected; --debug shows where it happened.\n"


def test_debug_shows_the_traceback(fake: Any, job_file: str, capsys: pytest.CaptureFixture[str]):
    fake(raising(ZeroDivisionError("oh")))
    code, _, err = spoken(capsys, ["run", job_file, "--quiet", "--debug"])
    assert code == 1
    assert "Traceback (most recent call last)" in err
    assert err.endswith("error: ZeroDivisionError: oh\n")


def test_an_error_with_brackets_is_not_read_as_markup(fake: Any, job_file: str, capsys: pytest.CaptureFixture[str]):
    fake(raising(JobError("job.toml: [input] path: " + "x" * 200 + "\n  [red]two[/red]")))
    _, _, err = spoken(capsys, ["run", job_file, "--quiet"])
    assert err == f"error: job.toml: [input] path: {'x' * 200}\n  [red]two[/red]\n"


@pytest.mark.parametrize(
    ("args", "part"),
    [
        (["run"], "Missing argument"),
        (["rnu", "x"], "No such command"),
        (["run", "job.toml", "--limit", "0"], "greater than or equal to 1"),
        (["run", "job.toml", "--limit", "x"], "valid integer"),
        (["validate", "job.toml", "--runner=x"], "No such option"),
        (["run", "--runner", "direct", "job.toml"], "found where the job file belongs"),
    ],
)
def test_a_wrong_command_exits_with_2_and_says_why(capsys: pytest.CaptureFixture[str], args: list[str], part: str):
    code, out, err = spoken(capsys, args)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert part in err
    assert "Traceback" not in err
    code, out, _ = spoken(capsys, [*args, "--json"])
    assert (code, json.loads(out)["status"], json.loads(out)["exit_code"]) == (2, "failed", 2)


@pytest.mark.parametrize("arg", ["--direct_num_wrokers=2", "--s3_secret_access_key=hunter2", "more.toml"])
def test_a_refused_beam_option_stops_before_the_launch(
    fake: Any, job_file: str, capsys: pytest.CaptureFixture[str], arg: str
):
    launch = fake(summary)
    code, out, err = spoken(capsys, ["run", job_file, arg, "--json"])
    assert code == 2
    assert launch.jobs == []
    assert "hunter2" not in out + err


def test_validate_prints_what_it_found_and_runs_nothing(
    monkeypatch: pytest.MonkeyPatch, fake: Any, job_file: str, capsys: pytest.CaptureFixture[str]
):
    report = CheckReport(
        output="/out",
        num_files=1,
        num_rows=2000,
        limit=3,
        columns=("a",),
        engine="fake",
        model="m",
        schema=None,
        price=None,
    )
    seen: list[object] = []

    def check_job(job: Job, *, limit: int | None) -> object:
        seen.append(limit)
        return types.SimpleNamespace(
            report=lambda: report,
            check_readable=lambda: seen.append("readable"),
            engine=types.SimpleNamespace(config="the engine's config"),
        )

    monkeypatch.setattr("moebeam.model_runner.protocol.check_loadable", seen.append)
    module = types.ModuleType("moebeam.jobs.check.preflight")
    module.check_job = check_job  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "moebeam.jobs.check.preflight", module)
    launch = fake(summary)
    code, out, err = spoken(capsys, ["validate", job_file, "--json", "--limit", "3"])
    assert code == 0
    assert json.loads(out) == {"status": "valid", "exit_code": 0, **report.to_json()}
    assert "2,000 rows in 1 file" in err
    assert (seen, launch.jobs) == ([3, "readable", "the engine's config"], [])


def test_log_warnings_are_lines_and_those_of_beam_are_left_to_debug(
    fake: Any, job_file: str, capsys: pytest.CaptureFixture[str]
):
    def act() -> RunSummary:
        logging.getLogger("jobs.x").warning("mind %s", "[this]")
        logging.getLogger("apache_beam.x").warning("chatter")
        logging.getLogger("apache_beam.x").error("trouble")
        return summary()

    fake(act)
    _, _, err = spoken(capsys, ["run", job_file])
    assert "warning: mind [this]\n" in err
    assert "error: trouble\n" in err
    assert "chatter" not in err
    _, _, err = spoken(capsys, ["run", job_file, "--debug"])
    assert "warning: chatter\n" in err


def test_signal_handlers_are_put_back(fake: Any, job_file: str, capsys: pytest.CaptureFixture[str]):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    fake(summary)
    spoken(capsys, ["run", job_file])
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
