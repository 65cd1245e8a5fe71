"""Wherever a run stops or is killed, all that shows its money says the same, to the last decimal."""

import json
import os
import random
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

import duckdb
import pyarrow.parquet as pq
import pytest

from moebeam.jobs.output.batch_export import export_batch
from moebeam.jobs.output.current_run import read_current_run
from moebeam.jobs.output.run_record import read_record
from moebeam.jobs.output.run_state import announce_presence, read_manifest
from moebeam.jobs.output.status import read_status
from moebeam.jobs.reports.report import make_report
from moebeam.jobs.run.launch import launch
from moebeam.jobs.run.summarize import summarize_run
from moebeam.model_runner.encoding.prompt_encoder import PromptEncoder
from moebeam.schemas.store import storage
from moebeam.transforms.publish.run_account import PAID_STATES, RunAccount
from tests.support.disturbances.stopped_run import NUM_ROWS, Engine, Killed, PlannedRun

NUM_WRITES = 60
"""About how many writes an attempt makes."""

Money = dict[str, Decimal]


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> PlannedRun:
    return PlannedRun.plan(tmp_path_factory.mktemp("planned"), tiny_checkpoint)


@pytest.fixture(scope="module")
def encoder(tiny_checkpoint: Path) -> PromptEncoder:
    return PromptEncoder.load(str(tiny_checkpoint), "auto")


def money(costs: Mapping[str, str] | None) -> Money:
    return {currency: Decimal(amount) for currency, amount in (costs or {}).items()}


def tokens_of(part: Mapping[str, Any]) -> tuple[int, ...]:
    return tuple(part[name] for name in ("num_attempts", "prompt_tokens", "completion_tokens", "num_lost_calls"))


def account_of_report(run: PlannedRun) -> dict[str, tuple[Money, tuple[int, ...]]]:
    report = make_report(read_record(str(run.output)), by="shard")
    tables: dict[str, Any] = {table.name: table.to_json() for table in report.tables}
    found: dict[str, tuple[Money, tuple[int, ...]]] = {}
    for row in tables["paid"]:
        counts = tuple(row[name] for name in ("attempts", "prompt_tokens", "completion_tokens", "lost_calls"))
        found[row["state"]] = (money({row["currency"]: row["cost"]}), counts)
    if tables["costs"]:
        for name in ("costs", "outcomes"):
            assert sum(Decimal(row["cost"]) for row in tables[name]) == found["paid"][0]["USD"]
            assert sum(row["attempts"] for row in tables[name]) == found["paid"][1][0]
    return found


def account_of_duckdb(run: PlannedRun) -> dict[str, tuple[Money, tuple[int, ...]]]:
    connection = duckdb.connect()
    connection.execute(f"SET VARIABLE moebeam_run = '{run.output}'")
    connection.execute((run.output / "views.sql").read_text())
    query = (
        "SELECT state, currency, cost, attempts, prompt_tokens, completion_tokens, lost_calls FROM spending_by_state"
    )
    rows = connection.sql(query).fetchall()
    return {state: ({currency: cost}, tuple(map(int, counts))) for state, currency, cost, *counts in rows}


def expect(account: Mapping[str, Any]) -> dict[str, tuple[Money, tuple[int, ...]]]:
    """An account by state as the others are written here, without states that hold nothing."""
    states = (*PAID_STATES, "paid")
    return {
        state: (money(account[state]["costs"]), tokens_of(account[state]))
        for state in states
        if account[state]["num_attempts"]
    }


def check_views(run: PlannedRun, target: Path) -> RunAccount:
    """Hold all views against each other; returns their account."""
    record = read_record(str(run.output))
    status = read_status(record)
    assert status.account is not None
    account = expect(status.account)
    assert account_of_report(run) == account
    manifest = json.loads((run.output / "manifest.json").read_text())
    told = RunAccount.from_manifest(manifest)
    assert expect(told.by_state()) == account
    assert (
        expect({"committed": manifest["totals"], **{n: manifest[n] for n in ("journaled", "wasted", "paid")}})
        == account
    )
    summary = summarize_run(manifest, run.job, "incomplete", 0.0)
    assert summary.account == status.account
    assert (summary.cost_paid or 0, summary.num_answered) == (status.cost, status.rows_done)
    assert (summary.cost or 0) + (summary.cost_wasted or 0) == (summary.cost_paid or 0)
    by_state = account_of_duckdb(run)
    assert by_state == {state: account[state] for state in account if state != "paid"}
    live = read_current_run(run.layout)
    assert live.is_published and live.account == told
    check_export(run, told, status.rows_done, target)
    partial = [pq.read_table(path) for path in sorted((run.output / "partial").glob("*.parquet"))]
    assert sum(table.num_rows for table in partial) == told.journaled.num_attempts
    assert None not in [custom_id for table in partial for custom_id in table.column("custom_id").to_pylist()]
    check_oracle(run, told)
    return told


def check_export(run: PlannedRun, told: RunAccount, num_rows: int, target: Path) -> None:
    made = export_batch(read_record(str(run.output)), str(target), is_partial=True)
    texts = (Path(file).read_text() for file in (made.output_file, made.error_file))
    lines = [json.loads(line) for text in texts for line in text.splitlines()]
    assert len(lines) == num_rows and len({line["custom_id"] for line in lines}) == num_rows
    bodies = [line["response"]["body"] for line in lines if line["response"] is not None]
    for name in ("prompt_tokens", "completion_tokens"):
        used = sum(body["usage"][name] for body in bodies)
        assert used == getattr(told.committed, name) + getattr(told.journaled, name)


def check_oracle(run: PlannedRun, told: RunAccount) -> None:
    """Every answer was journaled, so the journals alone say what was paid: each of their lines once."""
    entries = [entry for entry in run.entries() if entry.is_answer]
    costs, num_prompt_tokens = Decimal(0), 0
    for entry in entries:
        usage = entry.completion.usage
        prompt, cached, output = usage.prompt_tokens or 0, usage.cached_tokens or 0, usage.completion_tokens or 0
        hits, misses = cached * Decimal("0.028"), (prompt - cached) * Decimal("0.14")
        costs += (hits + misses + output * Decimal("0.28")) / 10**6
        num_prompt_tokens += prompt
    assert money(told.paid.costs).get("USD", Decimal(0)) == costs
    assert told.paid.prompt_tokens == num_prompt_tokens
    assert told.paid.num_lost_calls == sum(len(entry.completion.lost_calls) for entry in run.entries())


def disturb(run: PlannedRun, dice: random.Random) -> None:
    """What other attempts and machines may have left beside an attempt's journal."""
    manifest = read_manifest(run.layout)
    if not run.entries() or (manifest is not None and manifest["status"] == "complete"):
        return
    for leave in (run.journal_again, run.give_up, run.damage):
        if dice.random() < 0.4:
            leave(dice)


@pytest.mark.parametrize("seed", range(int(os.environ.get("MOEBEAM_STOPS", "4"))))
def test_all_views_agree_wherever_a_run_stops_or_is_killed(
    seed: int, planned: PlannedRun, encoder: PromptEncoder, tmp_path: Path
) -> None:
    dice = random.Random(seed)
    run = planned.copy(tmp_path / "out")
    before = RunAccount()
    for number in range(3):
        engine = Engine(dice.randrange(1, NUM_ROWS))
        kill_at = dice.choice([None, dice.randrange(1, NUM_WRITES), dice.randrange(1, NUM_WRITES)])
        if dice.random() < 0.5:
            run.stop(engine, encoder, kill_at=kill_at)
        else:
            run.launch(engine, encoder, kill_at=kill_at)
        disturb(run, dice)
        before = check_views(run, tmp_path / f"export-{number}")
    assert run.launch(Engine(), encoder) == "done"
    manifest = json.loads((run.output / "manifest.json").read_text())
    told = RunAccount.from_manifest(manifest)
    assert (manifest["status"], told.journaled.num_attempts) == ("complete", 0)
    assert not (run.output / "partial").exists()
    check_oracle(run, told)
    ledger = account_of_duckdb(run)
    assert sum(cost["USD"] for cost, _ in ledger.values()) == money(told.paid.costs)["USD"]
    assert money(before.paid.costs).get("USD", Decimal(0)) <= money(told.paid.costs)["USD"]


def test_the_account_of_a_run_killed_after_its_last_answer_is_the_ledger_of_the_complete_one(
    planned: PlannedRun, encoder: PromptEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = planned.copy(tmp_path / "out")
    real = storage.create_exclusive

    def die(path: str, content: bytes) -> bool:
        if path == run.layout.shard_commit(run.shards[-1]):
            raise Killed
        return real(path, content)

    with monkeypatch.context() as patched:
        patched.setattr(storage, "create_exclusive", die)
        assert run.launch(Engine(), encoder) == "killed"
    before = check_views(run, tmp_path / "export")
    assert before.journaled.num_attempts > 0 and before.num_answered_rows == NUM_ROWS
    again = Engine()
    assert (run.launch(again, encoder), again.num_asked) == ("done", 0)
    after = RunAccount.from_manifest(json.loads((run.output / "manifest.json").read_text()))
    assert expect({**before.by_state(), "paid": after.by_state()["paid"]}) == expect(before.by_state())
    assert after.committed.costs == before.paid.costs


@pytest.mark.parametrize("look", ["status", "run"])
def test_what_is_journaled_after_a_run_was_complete_is_in_its_ledger_at_the_next_look(
    look: str, planned: PlannedRun, encoder: PromptEncoder, tmp_path: Path
) -> None:
    """As a holder does that lost its lease, and wakes up late with paid answers."""
    run = planned.copy(tmp_path / "out")
    assert run.launch(Engine(), encoder) == "done"
    before = read_manifest(run.layout)
    assert before is not None and read_current_run(run.layout).account.wasted.num_attempts == 0
    run.journal_again(random.Random(1))
    run.give_up(random.Random(1))
    if look == "status":
        assert read_status(read_record(str(run.output))).cost_wasted
    else:
        summary = launch(run.job)
        assert summary.status == "already_done" and summary.cost_wasted
    manifest = read_manifest(run.layout)
    assert manifest is not None and (manifest["status"], manifest["totals"]) == ("complete", before["totals"])
    told = RunAccount.from_manifest(manifest)
    assert (told.wasted.num_attempts, told.wasted.num_lost_calls) == (3, 1)
    check_oracle(run, told)
    assert account_of_duckdb(run)["wasted"][0]["USD"] == money(told.wasted.costs)["USD"]
    assert read_current_run(run.layout).is_published


def test_a_run_that_was_killed_is_published_by_who_looks_and_stays_unfinished(
    planned: PlannedRun, encoder: PromptEncoder, tmp_path: Path
) -> None:
    run = planned.copy(tmp_path / "out")
    assert run.launch(Engine(15), encoder) == "crashed"
    assert not (run.output / "manifest.json").exists() and not (run.output / "results").exists()
    report = read_status(read_record(str(run.output)))
    assert (report.state, report.reason) == ("stopped", None)
    assert report.num_journaled > 0 and report.num_results > 0
    assert report.rows_done == report.num_journaled + report.num_results + report.num_rejects
    assert len(list((run.output / "results").glob("*.parquet"))) == report.shards_done
    manifest = (run.output / "manifest.json").read_bytes()
    read_status(read_record(str(run.output)))
    assert (run.output / "manifest.json").read_bytes() == manifest


def test_what_may_only_be_read_is_told_all_the_same(
    planned: PlannedRun, encoder: PromptEncoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = planned.copy(tmp_path / "out")
    run.launch(Engine(15), encoder)
    other = run.copy(tmp_path / "other")

    def refuse(*unused: object) -> None:
        raise PermissionError("read-only")

    with monkeypatch.context() as patched:
        for name in ("write_whole", "copy_whole"):
            patched.setattr(storage, name, refuse)
        record = read_record(str(run.output))
        status, report = read_status(record), account_of_report(run)
        assert status.account is not None and expect(status.account) == report
        assert not (run.output / "manifest.json").exists()
    there = read_status(read_record(str(other.output)))
    assert there.account == status.account


def test_a_run_that_another_launcher_works_at_is_left_alone(
    planned: PlannedRun, encoder: PromptEncoder, tmp_path: Path
) -> None:
    run = planned.copy(tmp_path / "out")
    run.launch(Engine(15), encoder)
    with announce_presence(run.layout):
        assert read_current_run(run.layout).account.journaled.num_attempts > 0
        assert not (run.output / "manifest.json").exists()


def test_the_commonest_messages_of_rejects_are_counted(
    planned: PlannedRun, encoder: PromptEncoder, tmp_path: Path
) -> None:
    run = planned.copy(tmp_path / "out")
    assert run.launch(Engine(), encoder) == "done"
    manifest = json.loads((run.output / "manifest.json").read_text())
    rejects = manifest["totals"]["num_rejects"]
    assert manifest["rejects_by_message"] == [
        {"error_type": "refused", "message": "the provider refuses", "num_rows": rejects}
    ]
    assert summarize_run(manifest, run.job, "succeeded", 0.0).rejects_by_message == {"the provider refuses": rejects}
