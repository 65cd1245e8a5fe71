"""Budgets of remote runs: what is in flight counts before it has arrived, and the bill passes no limit by more."""

import json
import random
from collections import Counter
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from moebeam.jobs.run.launch import launch
from tests.support.jobs.jobs_for_tests import read_table
from tests.support.jobs.remote_jobs import KEY, KEY_VARIABLE, remote_job, write_tickets
from tests.support.servers.fake_endpoint import Call, FakeEndpoint, Reply, deepseek

pytestmark = pytest.mark.integration

NUM_ROWS, NUM_IN_FLIGHT, MAX_TOKENS = 600, 64, 200
PROMPT_TOKENS = 100
DEAREST = (PROMPT_TOKENS * Decimal("0.14") + MAX_TOKENS * Decimal("0.28")) / 10**6
"""What one answer can cost by the prices of `remote_job`."""


class Varying:
    """Answers of 1 to `MAX_TOKENS` tokens, drawn by the row; counts calls by row."""

    def __init__(self) -> None:
        self.calls: Counter[int] = Counter()

    def output_tokens(self, row: int) -> int:
        return random.Random(row).choice([10, 10, 20, 40, MAX_TOKENS])

    def __call__(self, call: Call) -> Reply:
        row = int(call.last_user_text.split("ticket ")[1].split(":")[0])
        self.calls[row] += 1
        answer = deepseek('{"category": "fine"}', hit=0, miss=PROMPT_TOKENS, completion=self.output_tokens(row))
        return Reply(answer, delay_s=0.05)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    write_tickets(tmp_path, NUM_ROWS)
    return tmp_path


def sections(**limits: Any) -> dict[str, Any]:
    return {
        # Prompts of their own, since cold shared ones go one after the other.
        "prompt": {"system": "x"},
        "input": {"tenant_column": None},
        "model": {"max_concurrency": NUM_IN_FLIGHT},
        "sampling": {"max_tokens": MAX_TOKENS},
        "plan": {"max_shard_rows": NUM_ROWS},
        "limits": limits,
    }


def spent(output: Path) -> tuple[int, int, Decimal]:
    """Attempts, output tokens and cost that a run's journal and tables hold, read as its next attempt would."""
    ledger = read_table(output, "ledger")
    tokens = sum(line["visible_output_tokens"] + line["reasoning_tokens"] for line in ledger)
    return len(ledger), tokens, sum((line["cost"] for line in ledger), Decimal(0))


def finished(
    folder: Path, output: Path, endpoint: FakeEndpoint, answers: Varying, max_shard_rows: int = NUM_ROWS
) -> None:
    """A further attempt without limits asks for the rest alone."""
    job = sections(max_cost="1000", max_requests=10**6) | {"plan": {"max_shard_rows": max_shard_rows}}
    summary = launch(remote_job(folder, output, endpoint, **job))
    assert summary.status == "succeeded"
    assert answers.calls == Counter(dict.fromkeys(range(NUM_ROWS), 1)), "nothing is asked twice, nothing left out"
    num_attempts, _, cost = spent(output)
    assert (num_attempts, cost) == (NUM_ROWS, summary.cost)
    assert json.loads((output / "manifest.json").read_text())["checks"]["ledger_and_rows"] == "equal"


@pytest.mark.parametrize("share", [0.02, 0.3, 0.8])
def test_the_bill_passes_a_limit_of_money_by_no_more_than_what_was_in_flight(folder: Path, share: float) -> None:
    answers = Varying()
    total = sum((PROMPT_TOKENS * 14 + answers.output_tokens(row) * 28) for row in range(NUM_ROWS)) * Decimal("1e-8")
    most = total * Decimal(str(share))
    with FakeEndpoint(answers) as endpoint:
        summary = launch(remote_job(folder, folder / "out", endpoint, **sections(max_cost=str(most))))
        billed = sum((PROMPT_TOKENS * 14 + answers.output_tokens(row) * 28) for row in answers.calls) * Decimal("1e-8")
        assert (summary.status, summary.reason) == ("incomplete", "max_cost")
        assert set(answers.calls.values()) == {1}
        assert endpoint.peak_in_flight <= NUM_IN_FLIGHT
        assert most <= billed <= most + NUM_IN_FLIGHT * DEAREST
        finished(folder, folder / "out", endpoint, answers)


def test_the_number_of_requests_is_kept_exactly_and_inside_a_shard(folder: Path) -> None:
    answers = Varying()
    job = sections(max_requests=151) | {"plan": {"max_shard_rows": 100}}
    with FakeEndpoint(answers) as endpoint:
        assert launch(remote_job(folder, folder / "out", endpoint, **job)).reason == "max_requests"
        assert answers.calls == Counter(dict.fromkeys(answers.calls, 1)) and len(answers.calls) == 151
        finished(folder, folder / "out", endpoint, answers, max_shard_rows=100)


def test_twenty_of_sixty_rows_in_one_shard_are_asked_and_answered(folder: Path) -> None:
    write_tickets(folder, 60)
    answers = Varying()
    with FakeEndpoint(answers) as endpoint:
        summary = launch(remote_job(folder, folder / "out", endpoint, **sections(max_requests=20)))
        assert (summary.exit_code, summary.reason, sum(answers.calls.values())) == (4, "max_requests", 20)
        summary = launch(remote_job(folder, folder / "out", endpoint, **sections(max_requests=1000)))
    assert (summary.status, summary.num_results) == ("succeeded", 60)
    assert answers.calls == Counter(dict.fromkeys(range(60), 1))


def test_tokens_of_answers_pass_their_limit_by_no_more_than_what_was_in_flight(folder: Path) -> None:
    answers, most = Varying(), 5000
    with FakeEndpoint(answers) as endpoint:
        summary = launch(remote_job(folder, folder / "out", endpoint, **sections(max_output_tokens=most)))
        assert summary.reason == "max_output_tokens"
        taken = sum(answers.output_tokens(row) for row in answers.calls)
        assert most <= taken <= most + NUM_IN_FLIGHT * MAX_TOKENS
        finished(folder, folder / "out", endpoint, answers)
