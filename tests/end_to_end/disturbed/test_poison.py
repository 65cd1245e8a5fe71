"""Rows that kill the engine, or make it stand still: they are found and rejected alone, whoever dies."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moebeam.jobs.commands.cli import run_command
from tests.support.disturbances.disturbed_runs import tables_of
from tests.support.jobs.jobs_for_tests import run_fake_job, write_parquet, write_script

pytestmark = pytest.mark.integration

NUM_ROWS = 40


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    texts = [f"row {row} " + ("POISON" if row == 17 else "fine") for row in range(NUM_ROWS)]
    return write_parquet(tmp_path_factory.mktemp("poison") / "in.parquet", {"text": texts})


def rejects(output: Path) -> list[tuple[str, int]]:
    return [(row["error_type"], row["source_row"]) for row in tables_of(output)["rejects"]]


@pytest.mark.parametrize(
    ("accident", "failures", "error_type"),
    [
        ("crash", {"engine_process": "own"}, "engine_crashed"),
        ("crash", {"engine_process": "host"}, "engine_crashed"),
        ("hang", {"max_silence_s": 0.5, "max_retries": 0}, "engine_timeout"),
    ],
)
def test_a_row_that_the_engine_dies_over_is_one_reject(
    tmp_path: Path, source: Path, tiny_checkpoint: Path, accident: str, failures: dict[str, Any], error_type: str
) -> None:
    script = write_script(tmp_path / "script.json", {"rules": [{"contains": "POISON", "accident": accident}]})
    summary = run_fake_job(
        source,
        tmp_path / "out",
        tiny_checkpoint,
        model={"script": str(script)},
        plan={"max_shard_rows": 16},
        failures=failures,
    )
    assert (summary.num_results, summary.rejects_by_type) == (NUM_ROWS - 1, {error_type: 1})
    assert rejects(tmp_path / "out") == [(error_type, 17)]


def test_a_run_that_died_with_its_engine_goes_on_and_rejects_the_row(
    tmp_path: Path, source: Path, tiny_checkpoint: Path
) -> None:
    """The first attempt has the engine in its own process and dies; the next one finds out over which row."""
    script = write_script(tmp_path / "script.json", {"rules": [{"contains": "POISON", "accident": "crash"}]})
    job_file = tmp_path / "job.toml"
    job_file.write_text(
        f"""
        [input]
        path = {json.dumps(str(source))}
        [prompt]
        template = "{{{{ text }}}}"
        [output]
        path = "out"
        [model]
        engine = "fake"
        path = {json.dumps(str(tiny_checkpoint))}
        script = {json.dumps(str(script))}
        [sampling]
        max_tokens = 64
        [plan]
        max_shard_rows = 16
        """
    )
    command = [
        sys.executable,
        "-c",
        "from moebeam.jobs.commands.cli import main; main()",
        "run",
        str(job_file),
        "--quiet",
    ]
    died = subprocess.run(command, capture_output=True, timeout=120, check=False)
    assert died.returncode == -signal.SIGKILL
    assert run_command(["resume", str(tmp_path / "out"), "--quiet"]) == 3
    assert rejects(tmp_path / "out") == [("engine_crashed", 17)]
    answered = sorted(
        row["source_row"] for table in ("results", "rejects") for row in tables_of(tmp_path / "out")[table]
    )
    assert answered == list(range(NUM_ROWS))


def test_an_overloaded_engine_is_asked_again_and_each_attempt_is_in_the_ledger(
    tmp_path: Path, source: Path, tiny_checkpoint: Path
) -> None:
    rules = [{"contains": "row 3 ", "attempt": attempt, "failure": "engine_overloaded"} for attempt in (1, 2)]
    rules.append({"contains": "row 5 ", "failure": "engine_overloaded"})
    summary = run_fake_job(
        source,
        tmp_path / "out",
        tiny_checkpoint,
        model={"script": str(write_script(tmp_path / "script.json", {"rules": rules}))},
        failures={"max_retries": 2, "retry_wait_s": 0.01},
    )
    assert summary.rejects_by_type == {"engine_overloaded": 1}
    tables = tables_of(tmp_path / "out")
    attempts = {row["source_row"]: row["attempts"] for row in tables["results"] + tables["rejects"]}
    assert (attempts[3], attempts[5], attempts[4]) == (3, 3, 1)
    assert [line["attempt"] for line in tables["ledger"] if line["source_row"] == 3] == [1, 2, 3]
