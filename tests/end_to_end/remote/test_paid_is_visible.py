"""A remote run that a limit or a failing row stops: what it paid stands wherever one looks, and is paid once."""

import json
from collections import Counter
from decimal import Decimal
from pathlib import Path
from typing import Any

import duckdb
import pytest

from moebeam.jobs.commands.cli import run_command
from tests.support.jobs.jobs_for_tests import write_job_file
from tests.support.jobs.remote_jobs import KEY, KEY_VARIABLE, remote_job, write_tickets
from tests.support.servers.fake_endpoint import Call, FakeEndpoint, Reply, deepseek, error

NUM_ROWS = 40
COST = (Decimal(100) * Decimal("0.14") + Decimal(10) * Decimal("0.28")) / 10**6
"""Of each answer here."""


class Answers:
    """One price for each answer; refuses some rows outright."""

    def __init__(self, refused: frozenset[int] = frozenset()) -> None:
        self.refused = refused
        self.calls: Counter[int] = Counter()

    def __call__(self, call: Call) -> Reply:
        row = int(call.last_user_text.split("ticket ")[1].split(":")[0])
        self.calls[row] += 1
        if row in self.refused:
            return error(400, "Prompt Not Liked")
        return Reply(deepseek('{"category": "fine"}', hit=0, miss=100, completion=10))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    write_tickets(tmp_path, NUM_ROWS)
    return tmp_path


def spoken(capfd: pytest.CaptureFixture[str], *args: str) -> tuple[int, dict[str, Any], str]:
    """Exit code, JSON line and standard error of a command."""
    capfd.readouterr()
    code = run_command([*args, "--json"])
    told = capfd.readouterr()
    return code, json.loads(told.out), told.err


def test_what_a_limit_stopped_was_paid_and_every_command_says_so(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    answers, output = Answers(), str(folder / "out")
    sections = {
        "prompt": {"system": "x"},
        "input": {"tenant_column": None},
        "plan": {"max_shard_rows": NUM_ROWS},
        "model": {"max_concurrency": 2},
        "limits": {"max_cost": str(COST * 21)},
    }
    with FakeEndpoint(answers) as endpoint:
        job = write_job_file(remote_job(folder, Path(output), endpoint, **sections), folder / "job.toml")
        code, summary, screen = spoken(capfd, "run", str(job))
        num_answered = sum(answers.calls.values())
        paid = COST * num_answered
        assert (code, summary["reason"], summary["num_results"]) == (4, "max_cost", 0)
        assert 21 <= num_answered < NUM_ROWS
        assert summary["num_answered"] == summary["num_journaled"] == num_answered
        assert Decimal(summary["cost"]) == Decimal(summary["cost_journaled"]) == Decimal(summary["cost_paid"]) == paid
        assert summary["prompt_tokens"] == 100 * num_answered
        assert (
            f"{num_answered} answered ({num_answered} of them in the journal), {NUM_ROWS - num_answered} left" in screen
        )
        assert "in the journal" in screen and "unknown" not in screen
        account = summary["account"]

        code, status, _ = spoken(capfd, "status", output)
        assert (code, status["account"], Decimal(status["cost"])) == (0, account, paid)
        assert status["rows_done"] == num_answered
        code, report, _ = spoken(capfd, "report", output, "--html", str(folder / "report.html"))
        assert {row["state"]: Decimal(row["cost"]) for row in report["paid"]} == {"journaled": paid, "paid": paid}
        assert sum(Decimal(row["cost"]) for row in report["costs"]) == paid
        assert "journaled" in (folder / "report.html").read_text()
        manifest = json.loads(Path(output, "manifest.json").read_text())
        assert manifest["journaled"] == manifest["paid"] and manifest["totals"]["num_attempts"] == 0
        assert Decimal(manifest["paid"]["costs"]["USD"]) == paid
        code, made, _ = spoken(capfd, "export", output, "--openai-batch", str(folder / "files"), "--partial")
        assert (made["num_answers"], made["num_journaled"]) == (num_answered, num_answered)
        connection = duckdb.connect()
        connection.execute(f"SET VARIABLE moebeam_run = '{output}'")
        connection.execute(Path(output, "views.sql").read_text())
        query = "SELECT count(DISTINCT custom_id), sum(cost), min(state), min(output_text) FROM spending"
        assert connection.sql(query).fetchall() == [(num_answered, paid, "journaled", '{"category": "fine"}')]
        assert connection.sql("SELECT count(*) FROM results").fetchall() == [(0,)]

        code, summary, _ = spoken(capfd, "resume", output, "--set", "limits.max_cost=1000")
        assert (code, Decimal(summary["cost"]), summary["cost_journaled"]) == (0, COST * NUM_ROWS, None)
    assert answers.calls == Counter(dict.fromkeys(range(NUM_ROWS), 1))
    assert connection.sql("SELECT count(*), sum(cost), min(state) FROM spending").fetchall() == [
        (NUM_ROWS, COST * NUM_ROWS, "committed")
    ]


def test_a_run_that_fails_says_what_it_has_paid_and_why_rows_were_rejected(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    answers, output = Answers(refused=frozenset({3, 4, 30})), str(folder / "out")
    sections = {"prompt": {"system": "x"}, "model": {"max_concurrency": 1}, "failures": {"on_error": "fail"}}
    with FakeEndpoint(answers) as endpoint:
        job = write_job_file(remote_job(folder, Path(output), endpoint, **sections), folder / "job.toml")
        code, told, screen = spoken(capfd, "run", str(job))
        num_answered = sum(answers.calls.values()) - 1
        assert (code, told["status"]) == (1, "failed")
        assert Decimal(told["account"]["paid"]["costs"]["USD"]) == COST * num_answered > 0
        assert "so far: paid 0.000" in screen
        code, status, _ = spoken(capfd, "status", output)
        assert status["account"] == told["account"]
        code, summary, screen = spoken(capfd, "resume", output, "--set", "failures.on_error=reject")
        assert (code, summary["num_rejects"]) == (0, 3)
        assert summary["rejects_by_message"] == {"deepseek: HTTP 400: Prompt Not Liked": 3}
        assert "3 x deepseek: HTTP 400: Prompt Not Liked" in screen
