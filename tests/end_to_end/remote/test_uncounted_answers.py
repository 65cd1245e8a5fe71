"""Runs whose provider counts nothing, or counts wrongly: answers stay answers, and nothing unknown becomes a figure."""

import io
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from moebeam.jobs.output.run_record import read_record
from moebeam.jobs.output.status import read_status
from moebeam.jobs.reports.report import make_report
from moebeam.jobs.run.launch import launch
from moebeam.jobs.run.progress import print_summary
from tests.support.jobs.jobs_for_tests import read_table
from tests.support.jobs.remote_jobs import KEY, KEY_VARIABLE, remote_job, write_tickets
from tests.support.servers.fake_endpoint import Call, FakeEndpoint, Reply, deepseek, with_usage

ANSWER = '{"category": "fine"}'
GOOD = {"prompt_tokens": 50, "completion_tokens": 5, "prompt_cache_hit_tokens": 30, "prompt_cache_miss_tokens": 20}
USAGES: dict[int, Any] = {
    1: None,
    2: {**GOOD, "prompt_cache_hit_tokens": 90},
    3: {**GOOD, "completion_tokens": int("9" * 26)},
    4: {**GOOD, "completion_tokens_details": {"reasoning_tokens": 40}},
}
EXPECTED = {
    0: ("reported", 50, 30, 5, "exact"),
    1: ("missing", None, None, None, None),
    2: ("contradictory", 50, 90, 5, "upper_bound"),
    3: ("contradictory", 50, 30, None, None),
    4: ("contradictory", 50, 30, 5, "upper_bound"),
    5: ("reported", 50, 30, 5, "exact"),
}


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)


def reply(call: Call) -> Reply:
    row = int(call.last_user_text.split("ticket ")[1].split(":")[0])
    answer = deepseek(ANSWER, finish_reason="end_turn")
    return Reply(with_usage(answer, USAGES.get(row, GOOD)))


def test_each_kind_of_usage_is_a_result_and_every_view_says_what_is_unknown(tmp_path: Path) -> None:
    write_tickets(tmp_path, 6)
    output = tmp_path / "out"
    with FakeEndpoint(reply) as endpoint:
        summary = launch(remote_job(tmp_path, output, endpoint))
        assert len(endpoint.calls) == 6
    assert (summary.num_results, summary.num_rejects, summary.exit_code) == (6, 0, 0)
    assert (summary.num_unknown_usage, summary.cost_basis, summary.prompt_tokens) == (2, "partial", 340)
    names = ("usage_status", "prompt_tokens", "cached_tokens", "completion_tokens", "cost_basis")
    results = {row["n"]: row for row in read_table(output, "results")}
    assert {n: tuple(row[name] for name in names) for n, row in results.items()} == EXPECTED
    assert {(row["finish_reason"], row["provider_finish_reason"]) for row in results.values()} == {("stop", "end_turn")}
    assert results[1]["cost"] is None and results[1]["estimated_prompt_tokens"] > 50
    assert results[1]["estimated_completion_tokens"] == results[3]["estimated_completion_tokens"] == len(ANSWER) // 4
    lines = {line["custom_id"]: line for line in read_table(output, "ledger")}
    assert sum(line["cost"] or Decimal(0) for line in lines.values()) == summary.cost
    assert lines[results[2]["custom_id"]]["cache_miss_tokens"] == 140

    manifest = json.loads((output / "manifest.json").read_text())
    assert manifest["checks"]["ledger_and_rows"].startswith("costs equal; tokens not comparable: the usage of 4 ")
    shown = io.StringIO()
    print_summary(Console(file=shown, width=200), summary)
    assert "2 answers without a usage: their cost is unknown" in shown.getvalue()
    record = read_record(str(output))
    assert read_status(record).num_unknown_usage == 2
    run = {row[0]: row[1] for table in make_report(record).tables if table.name == "run" for row in table.rows}
    assert run["answers without a usage: their tokens and cost are unknown"] == "2"
    assert run["attempts whose cost is an upper bound"] == "2"


def test_a_limit_of_money_stops_at_an_answer_whose_cost_nobody_knows(tmp_path: Path) -> None:
    write_tickets(tmp_path, 6)
    with FakeEndpoint(lambda call: Reply(with_usage(deepseek(ANSWER), None))) as endpoint:
        summary = launch(
            remote_job(tmp_path, tmp_path / "out", endpoint, limits={"max_cost": "1"}, model={"max_concurrency": 1})
        )
        assert len(endpoint.calls) < 6
    assert (summary.exit_code, summary.reason) == (4, "max_cost")
    assert "an answer came without a usage, so nobody knows the cost" in (summary.message or "")


def test_a_limit_of_tokens_counts_what_is_estimated(tmp_path: Path) -> None:
    write_tickets(tmp_path, 6)
    with FakeEndpoint(lambda call: Reply(with_usage(deepseek(ANSWER), None))) as endpoint:
        sections = {"limits": {"max_output_tokens": 12}, "model": {"max_concurrency": 1}}
        summary = launch(remote_job(tmp_path, tmp_path / "out", endpoint, **sections))
        assert len(endpoint.calls) == 3, "of 5 tokens by their text"
    assert (summary.exit_code, summary.reason) == (4, "max_output_tokens")
