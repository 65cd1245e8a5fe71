"""Jobs whose answers a provider gives: without its tokenizer, repaired, priced, resumed, and never with its key."""

import io
import json
import logging
import re
from collections import Counter
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from apache_beam.internal.cloudpickle import cloudpickle
from rich.console import Console

from moebeam.jobs.check.preflight import check_job
from moebeam.jobs.output.run_record import read_record
from moebeam.jobs.run.launch import launch, resume
from moebeam.jobs.run.main_job import make_main_job
from moebeam.jobs.run.progress import print_summary
from moebeam.jobs.run.retry_failed import prepare_retry, retry_job
from moebeam.schemas.errors import JobFileError, OutputError, PipelineFailed
from moebeam.schemas.job.sections import Job
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.transforms.durable.journal_file import JournalWriter, read_journal
from tests.support.jobs.jobs_for_tests import read_table
from tests.support.jobs.remote_jobs import KEY, KEY_VARIABLE, MODEL, Answers, remote_job, write_tickets
from tests.support.servers.fake_endpoint import Call, FakeEndpoint, Reply, error

NUM_ROWS = 20


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tickets(tmp_path, NUM_ROWS)
    return tmp_path


def files_with(folder: Path, text: bytes) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and text in path.read_bytes()]


def manifest_of(output: Path) -> dict[str, Any]:
    return json.loads((output / "manifest.json").read_text())


def cost(hit: int, miss: int, completion: int) -> Decimal:
    """By the mission's reference prices."""
    return (hit * Decimal("0.028") + miss * Decimal("0.14") + completion * Decimal("0.28")) / 10**6


def test_a_remote_job_is_answered_repaired_and_priced_to_the_last_decimal(folder: Path) -> None:
    answers = Answers(broken=frozenset({3, 8}), refused=frozenset({5}))
    output = folder / "out"
    with FakeEndpoint(answers) as endpoint:
        summary = launch(remote_job(folder, output, endpoint))
    assert (summary.num_results, summary.num_rejects, summary.rejects_by_type) == (NUM_ROWS - 1, 1, {"refused": 1})
    assert answers.num_calls == Counter({row: 2 if row in (3, 8) else 1 for row in range(NUM_ROWS)})
    results, rejects, ledger = (read_table(output, name) for name in ("results", "rejects", "ledger"))
    assert {row["output_json"] for row in results} == {'{"category": "fine"}'}
    assert {(row["provider"], row["model"], row["model_revision"]) for row in results} == {
        ("deepseek", MODEL, "fp_deep")
    }
    expected = {row: cost(30, 20 + row, 5) for row in range(NUM_ROWS)}
    expected |= {row: cost(10, 40 + row, 2) + cost(30, 20 + 2 * row, 5) for row in (3, 8)} | {5: cost(0, 55, 1)}
    assert {row["n"]: row["cost"] for row in (*results, *rejects)} == expected
    assert sum(line["cost"] for line in ledger) == sum(expected.values()) == summary.cost
    assert sum(line["cost_allocated"] for line in ledger) == summary.cost
    assert {row["n"]: row["prompt_tokens"] for row in results}[7] == 57, "the provider's own count"
    # Every line names where its answer was kept as it arrived.
    references = {line["journal"] for line in ledger}
    kept = [
        entry.reference
        for path in (output / "_moebeam" / "journal").iterdir()
        for entry in read_journal(RunLayout(str(output)), path.name).entries
    ]
    assert references == {*kept} and len(kept) == len(ledger) == NUM_ROWS + 2


def test_prompts_of_one_tenant_are_planned_apart_and_told_apart_to_the_provider(folder: Path) -> None:
    with FakeEndpoint(Answers()) as endpoint:
        launch(remote_job(folder, folder / "out", endpoint))
        users = {(call.body["user_id"], int(call.last_user_text.split()[1][:-1]) % 2) for call in endpoint.calls}
    assert len(users) == 2
    assert manifest_of(folder / "out")["max_hit_rate"] > 0.5, "the system text is shared, inside a tenant"


def test_no_key_is_in_any_file_nor_in_the_pickled_pipeline_nor_in_an_error(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def refused(call: Call) -> Reply:
        assert call.headers["authorization"] == f"Bearer {KEY}"
        return error(401, f"the key {KEY} is wrong")

    with caplog.at_level(logging.DEBUG):
        with FakeEndpoint(Answers()) as endpoint:
            job = remote_job(folder, folder / "out", endpoint)
            checked = check_job(job)
            pickled = cloudpickle.dumps(make_main_job(checked, None))
            launch(job)
        with FakeEndpoint(refused) as endpoint, pytest.raises(PipelineFailed) as caught:
            launch(remote_job(folder, folder / "out-2", endpoint))
    assert KEY_VARIABLE.encode() in pickled
    assert KEY.encode() not in pickled
    assert files_with(folder, KEY.encode()) == []
    assert KEY not in f"{caught.value!r} {caught.value.__cause__!r}"
    assert KEY not in caplog.text


def test_a_wrong_key_leaves_rows_unanswered_and_another_endpoint_goes_on(folder: Path) -> None:
    output = folder / "out"
    with FakeEndpoint(lambda call: error(401, "no")) as endpoint, pytest.raises(PipelineFailed, match="no provider"):
        launch(remote_job(folder, output, endpoint))
    answers = Answers()
    with FakeEndpoint(answers) as endpoint:
        record = read_record(str(output))
        changed = {"base_url": endpoint.base_url, "max_concurrency": 2, "timeout_s": 5.0}
        job = record.request.job.model_copy(update={"model": record.request.job.model.model_copy(update=changed)})
        summary = resume(record, job)
    assert (summary.status, summary.num_results) == ("succeeded", NUM_ROWS)
    assert answers.num_calls == Counter(range(NUM_ROWS))


@pytest.mark.parametrize(
    ("section", "changed"),
    [("model", {"name": "deepseek-v4-pro"}), ("model", {"provider": "vllm"}), ("thinking", {"mode": "enabled"})],
)
def test_who_answers_and_how_cannot_change_within_a_run(folder: Path, section: str, changed: dict[str, str]) -> None:
    with FakeEndpoint(Answers()) as endpoint:
        check = check_job(job := remote_job(folder, folder / "out", endpoint))
        check.claim_output()
        values = {**getattr(job, section).model_dump(exclude_unset=True), **changed}
        part = "[model]" if section == "model" else "[thinking] and [tools]"
        with pytest.raises(OutputError, match=rf"belongs to another job; different: {re.escape(part)}\."):
            check_job(remote_job(folder, folder / "out", endpoint, **{section: values}))


def test_a_run_that_stopped_inside_a_shard_pays_nothing_twice(folder: Path) -> None:
    # The engine takes some requests ahead, and what it has taken it asks.
    output, num_rows = folder / "out", 160
    write_tickets(folder, num_rows)
    answers = Answers(broken=frozenset({1}))
    with FakeEndpoint(answers) as endpoint:
        job = remote_job(folder, output, endpoint, plan={"max_shard_rows": 1000}, model={"max_concurrency": 1})
        total = sum((cost(30, 20 + row, 5) for row in range(num_rows)), Decimal(0))
        limited = job.model_copy(update={"limits": job.limits.model_copy(update={"max_cost": total / 10})})
        stopped = launch(limited)
        assert (stopped.status, stopped.reason) == ("incomplete", "max_cost")
        asked = sum(answers.num_calls.values())
        assert 0 < asked < num_rows
        assert manifest_of(output)["wasted"]["num_attempts"] == 0, "the journal keeps it for the next attempt"
        still = launch(limited)
        assert (still.status, sum(answers.num_calls.values())) == ("incomplete", asked), "what was journaled counts"
        done = launch(job)
    assert done.status == "succeeded"
    assert answers.num_calls == Counter({row: 1 + (row == 1) for row in range(num_rows)})
    ledger = read_table(output, "ledger")
    assert Counter(line["outcome"] for line in ledger) == Counter({"answered": num_rows, "rejected": 1})
    assert done.cost == sum(line["cost"] for line in ledger)
    assert manifest_of(output)["engine"]["num_replayed_answers"] == asked


def test_an_answer_that_two_attempts_paid_is_used_once_and_wasted_once(folder: Path) -> None:
    output = folder / "out"
    with FakeEndpoint(Answers()) as endpoint:
        launch(remote_job(folder, folder / "first", endpoint))
        # A copy whose lease was lost journals on, for a shard that another one answers.
        layout = RunLayout(str(output))
        for shard in sorted(path.name for path in (folder / "first" / "_moebeam" / "journal").iterdir()):
            for _ in range(2):
                writer = JournalWriter(layout, shard)
                for entry in read_journal(RunLayout(str(folder / "first")), shard).entries[:3]:
                    writer.append(entry.key, entry.attempt, entry.completion)
                writer.close()
        endpoint.calls.clear()
        job = remote_job(folder, output, endpoint)
        check_job(remote_job(folder, folder / "other", endpoint))
        claim(job)
        summary = launch(job)
        num_shards = manifest_of(output)["num_shards"]
        assert len(endpoint.calls) == NUM_ROWS - 3 * num_shards
    assert summary.num_results == NUM_ROWS
    ledger = read_table(output, "ledger")
    outcomes = Counter(line["outcome"] for line in ledger)
    assert outcomes == Counter({"answered": NUM_ROWS, "wasted": 3 * num_shards})
    references = [line["journal"] for line in ledger]
    assert len({*references}) == len(references), "no answer is priced twice"
    wasted = [line for line in ledger if line["outcome"] == "wasted"]
    assert summary.cost_wasted == sum(line["cost"] for line in wasted) > 0
    assert summary.cost == sum(line["cost"] for line in ledger if line["outcome"] == "answered")


def claim(job: Job) -> None:
    """Make an output folder that holds a journal the job's own, as a killed run would have."""
    Path(job.output.path, "_moebeam").rename(Path(job.output.path).with_name("kept"))
    Path(job.output.path).rmdir()
    checked = check_job(job)
    checked.claim_output()
    Path(job.output.path).with_name("kept").joinpath("journal").rename(RunLayout(job.output.path).journal)


def test_rejects_of_a_remote_run_are_retried(folder: Path) -> None:
    with FakeEndpoint(Answers(refused=frozenset({5, 6}))) as endpoint:
        launch(remote_job(folder, folder / "out", endpoint))
    answers = Answers()
    with FakeEndpoint(answers) as endpoint:
        retry = prepare_retry(str(folder / "out"), ["refused"])
        job = retry_job(retry, retry.source.request.job, str(folder / "again"))
        job = job.model_copy(update={"model": job.model.model_copy(update={"base_url": endpoint.base_url})})
        job = job.model_copy(update={"sampling": job.sampling.model_copy(update={"max_tokens": 128})})
        summary = launch(job, retry_of=retry.retry_of, retried=retry.retried)
        assert {call.body["max_tokens"] for call in endpoint.calls} == {128}
    assert summary.num_results == 2
    assert answers.num_calls == Counter({5: 1, 6: 1})


def test_a_fallback_answers_where_the_first_cannot_and_rows_say_who(folder: Path) -> None:
    with FakeEndpoint(lambda call: error(402, "no balance")) as first, FakeEndpoint(Answers()) as second:
        fallbacks = [{"provider": "vllm", "base_url": second.base_url}]
        summary = launch(remote_job(folder, folder / "out", first, model={"fallbacks": fallbacks}))
    assert summary.num_results == NUM_ROWS
    assert {row["provider"] for row in read_table(folder / "out", "results")} == {"vllm"}
    assert summary.cost == 0


def test_with_a_tokenizer_prompts_are_counted_exactly(folder: Path, tiny_checkpoint: Path) -> None:
    with FakeEndpoint(Answers()) as endpoint:
        job = remote_job(folder, folder / "out", endpoint, model={"path": str(tiny_checkpoint)}, prompt={"system": "x"})
        summary = launch(job)
    assert summary.num_results == NUM_ROWS


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"name": None}, r"\[model\] name: missing"),
        ({"provider": "nobody"}, r"\[model\] provider: expected one of .*found 'nobody'"),
        ({"provider": "vllm", "base_url": None}, r"\[model\] base_url: missing; provider 'vllm'"),
        ({"api_key_variable": "MOEBEAM_UNSET"}, r"environment variable MOEBEAM_UNSET, found none"),
        ({"device": "cuda"}, r"\[model\] device: only for engines with a checkpoint, found engine 'openai'"),
        ({"engine": "fake", "max_retries": 6}, r"\[model\] provider: only for the engine openai, found engine 'fake'"),
        ({"fallbacks": [{"provider": "sglang2"}]}, r"\[model\] fallbacks\.1 provider: expected one of"),
    ],
)
def test_a_remote_job_that_cannot_run_says_why_before_it_costs_anything(
    folder: Path, model: dict[str, Any], message: str
) -> None:
    with FakeEndpoint(Answers()) as endpoint:
        with pytest.raises(JobFileError, match=message):
            check_job(remote_job(folder, folder / "out", endpoint, model=model))
        assert endpoint.calls == []


def test_a_schema_that_is_always_told_is_in_the_prompt_once_whatever_the_provider_takes(folder: Path) -> None:
    with FakeEndpoint(Answers()) as endpoint:
        for provider in ("deepseek", "vllm"):
            output = {"path": str(folder / provider), "schema_in_prompt": "always"}
            launch(remote_job(folder, folder / provider, endpoint, model={"provider": provider}, output=output))
        told = [json.dumps(call.body["messages"]).count("must keep this JSON Schema") for call in endpoint.calls]
        forms = {call.body["response_format"]["type"] for call in endpoint.calls}
        assert told == [1] * 2 * NUM_ROWS
        assert forms == {"json_object", "json_schema"}
        never = check_job(remote_job(folder, folder / "never", endpoint, output={"schema_in_prompt": "never"}))
    assert any("with the schema in the prompt all the same" in warning for warning in never.warnings)
    assert any("prompt tokens are estimated" in warning for warning in never.warnings)


def test_calls_that_may_be_billed_without_a_usage_are_counted_beside_the_cost(folder: Path) -> None:
    answers = Answers()

    def reply(call: Call) -> Reply:
        answered = answers(call)
        row = int(call.last_user_text.split("ticket ")[1].split(":")[0])
        # Each third row is cut off once; row 7 never comes through.
        is_cut = row == 7 or (row % 3 == 0 and answers.num_calls[row] == 1)
        return replace(answered, fault="half_body") if is_cut else answered

    with FakeEndpoint(reply) as endpoint:
        summary = launch(remote_job(folder, folder / "out", endpoint))
        num_lost = len(endpoint.calls) - (NUM_ROWS - 1)
    ledger, totals = read_table(folder / "out", "ledger"), manifest_of(folder / "out")["totals"]
    by_row = {line["source_row"]: line for line in ledger}
    assert {row for row, line in by_row.items() if line["num_lost_calls"]} == {7, *range(0, NUM_ROWS, 3)}
    assert (by_row[7]["outcome"], by_row[7]["cost"]) == ("rejected", 0)
    assert by_row[7]["num_lost_calls"] > 2, "its tries, and canaries that told them from an outage"
    assert by_row[1]["lost_cost_at_most"] is None
    # max_tokens is 64; the provider counted more of the prompt than was estimated here, or less.
    for row in range(0, NUM_ROWS, 3):
        least = cost(0, by_row[row]["cache_hit_tokens"] + by_row[row]["cache_miss_tokens"], 64)
        assert by_row[row]["lost_cost_at_most"] >= least > by_row[row]["cost"]
    at_most = sum((line["lost_cost_at_most"] or Decimal(0) for line in ledger), Decimal(0))
    assert (totals["num_lost_calls"], Decimal(totals["lost_costs_at_most"]["USD"])) == (num_lost, at_most)
    assert (summary.num_lost_calls, summary.lost_cost_at_most) == (num_lost, at_most)
    assert summary.cost == sum(line["cost"] for line in ledger), "what is not known is in no sum"
    told = io.StringIO()
    print_summary(Console(file=told, width=200), summary)
    assert f"{num_lost} ended without a usage; the provider may bill them" in told.getvalue()
