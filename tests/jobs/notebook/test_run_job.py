"""`run_job`: the same call goes on, a stop carries what was answered, and the run outlives the notebook."""

import json
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from moebeam import JobFileError, OutputError, RunStopped, run_job
from moebeam.jobs.commands.cli import run_command
from tests.support.jobs.remote_jobs import KEY, KEY_VARIABLE, MODEL, Answers
from tests.support.servers.fake_endpoint import FakeEndpoint

FRAME = pd.DataFrame(
    {"text": [f"ticket {row}: the printer is on fire" for row in range(6)]},
    index=pd.Index([f"key {row}" for row in range(6)], name="ticket"),
)


@pytest.fixture
def answers() -> Answers:
    return Answers()


@pytest.fixture
def endpoint(answers: Answers, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeEndpoint]:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    with FakeEndpoint(answers) as served:
        yield served


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary folders are made."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def job_at(endpoint: FakeEndpoint, **sections: dict[str, Any]) -> dict[str, Any]:
    model = {"engine": "openai", "provider": "deepseek", "name": MODEL, "base_url": endpoint.base_url}
    return {
        "prompt": {"template": "{{ text }}"},
        "model": {**model, "api_key_variable": KEY_VARIABLE, "max_concurrency": 1},
        "sampling": {"max_tokens": 64},
        "thinking": {"mode": "disabled"},
        **sections,
    }


def test_the_same_rows_are_answered_once_and_a_stopped_run_goes_on_without_the_notebook(
    endpoint: FakeEndpoint, answers: Answers, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = job_at(endpoint, output={"path": tmp_path / "out"}, limits={"max_requests": 2})
    with pytest.raises(
        RunStopped, match=r"2 allowed.*moebeam resume .*run_job .*a larger \[limits\] max_requests"
    ) as e:
        run_job(job, FRAME)
    assert (e.value.exit_code, e.value.output) == (4, str(tmp_path / "out"))
    assert e.value.summary["reason"] == "max_requests"
    assert isinstance(e.value.answers, pd.DataFrame)
    assert list(e.value.answers.index) == [f"key {row}" for row in sorted(answers.num_calls)]
    assert list(e.value.answers["output_text"]) == ['{"category": "fine"}'] * 2
    assert answers.num_calls.total() == 2

    shutil.move(tmp_path / "out", tmp_path / "moved")
    command = ["resume", str(tmp_path / "moved"), "--quiet", "--json", "--set", "limits.max_requests=100"]
    assert run_command(command) == 0
    assert json.loads(capsys.readouterr().out)["num_results"] == len(FRAME)
    assert set(answers.num_calls.values()) == {1}

    job["output"]["path"] = tmp_path / "moved"
    for _ in range(2):
        answered = run_job(job, FRAME.copy())
        assert list(answered["status"]) == ["ok"] * len(FRAME)
        pd.testing.assert_index_equal(answered.index, FRAME.index)
    assert answers.num_calls.total() == len(FRAME)

    with pytest.raises(OutputError, match=r"belongs to a run over another data frame, expected these 2 rows"):
        run_job(job, FRAME.head(2))
    assert answers.num_calls.total() == len(FRAME)


def test_an_interrupt_of_the_kernel_stops_the_run_and_keeps_what_is_paid(
    endpoint: FakeEndpoint, answers: Answers, temporary: Path
) -> None:
    answers.delay_s = 0.3
    stopped = threading.Event()

    def interrupt() -> None:
        while not answers.num_calls and not stopped.is_set():
            stopped.wait(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    before = signal.getsignal(signal.SIGINT)
    frame = pd.DataFrame({"text": [f"ticket {row}: slow" for row in range(40)]})
    try:
        with pytest.raises(RunStopped) as e:
            run_job(job_at(endpoint), frame)
    finally:
        stopped.set()
    assert signal.getsignal(signal.SIGINT) is before
    assert 0 < answers.num_calls.total() < len(frame)
    assert Path(e.value.output).is_relative_to(temporary)
    assert f"moebeam resume {e.value.output}" in e.value.__notes__[0]
    answers.delay_s = 0.0
    assert run_command(["resume", e.value.output, "--quiet"]) == 0
    assert sorted(answers.num_calls) == list(range(len(frame)))


def test_without_an_output_nothing_stays_on_disk(tmp_path: Path, temporary: Path, tiny_checkpoint: Path) -> None:
    path = tmp_path / "job.toml"
    model = f'engine = "fake"\npath = "{tiny_checkpoint}"'
    path.write_text(f'[prompt]\ntemplate = "{{{{ text }}}}"\n[model]\n{model}\n[sampling]\nmax_tokens = 8\n')
    rows = [{"text": "one", "label": 1}, {"text": None}, {"text": "three"}]
    answered = run_job(path, rows)
    assert [row["status"] for row in answered] == ["ok", "rejected", "ok"]
    assert [row["source_row"] for row in answered] == [0, 1, 2]
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"sampling": {"max_token": 3}}, r"job: \[sampling\] max_token: unknown key; did you mean 'max_tokens'\?"),
        ({"samplin": {}}, r"job: \[samplin\]: unknown section; did you mean \[sampling\]\?"),
        ({"sampling": {"max_tokens": "many"}}, r'\[sampling\] max_tokens: expected a whole number, found "many"'),
        ({"input": 5}, r"\[input\]: expected a section, found 5"),
        ({"model": {}}, r"\[model\]: missing; write which model answers"),
        ({"output": None}, r"\[output\]: expected a section"),
        (
            {"prompt": {"template": "{{ txt }}"}},
            r"\[prompt\] template: data has no column 'txt'; did you mean 'text'",
        ),
    ],
)
def test_a_wrong_mapping_is_refused_in_the_words_of_the_job_file(
    tmp_path: Path, tiny_checkpoint: Path, changes: dict[str, Any], told: str
) -> None:
    job = {
        "prompt": {"template": "{{ text }}"},
        "model": {"engine": "fake", "path": tiny_checkpoint},
        "output": {"path": tmp_path / "out"},
    }
    with pytest.raises(JobFileError, match=told):
        run_job({**job, **changes}, FRAME)
    assert list(tmp_path.glob("out/**/*.parquet")) == []


@pytest.mark.parametrize(
    ("job", "told"),
    [
        ("no/such/job.toml", r"no/such/job\.toml: there is no such job file"),
        (Path("no/such/job.toml"), "there is no such job file"),
        (5, "job: expected a Job, a path or a mapping of sections, found int"),
    ],
)
def test_what_is_no_job_is_refused(job: Any, told: str) -> None:
    with pytest.raises(JobFileError, match=told):
        run_job(job, FRAME)


def test_relative_paths_of_a_mapping_lie_in_the_working_directory(
    tmp_path: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    job = {
        "prompt": {"template": "{{ text }}"},
        "model": {"engine": "fake", "path": str(tiny_checkpoint)},
        "output": {"path": "here"},
        "sampling": {"max_tokens": 8},
    }
    run_job(job, FRAME.head(1))
    record = json.loads((tmp_path / "here" / "_moebeam" / "job.json").read_text())
    assert record["job"]["input"]["path"].startswith(str(tmp_path / "here" / "_moebeam" / "frames"))
