"""Jobs with `[model] mode = "batch"`: half the price, repairs in a batch of their own, and no row paid twice."""

import json
from collections import Counter
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from moebeam.jobs.run.launch import launch
from moebeam.model_runner.openai_engine.batch.service import BatchPolling
from moebeam.schemas.errors import JobFileError
from tests.support.jobs.jobs_for_tests import read_table
from tests.support.jobs.remote_jobs import KEY, KEY_VARIABLE, MODEL, remote_job, write_tickets
from tests.support.servers.batch_endpoint import BatchEndpoint
from tests.support.servers.fake_endpoint import deepseek

PRICES = f"""\
provider,model,effective_from_utc,effective_to_utc,window_utc,currency,cache_hit_per_mtok,cache_miss_per_mtok,\
output_per_mtok,batch_percent,evidence,note
alibaba,{MODEL},2020-01-01T00:00:00Z,,,USD,0.028,0.14,0.28,50,made up,
"""


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    monkeypatch.setattr(BatchPolling.__init__, "__defaults__", (0.001, 0.002, 3, 0.001))


def row_of(body: Mapping[str, Any]) -> int:
    turns = [message["content"] for message in body["messages"] if message["role"] == "user"]
    return int(turns[0].split("ticket ")[1].split(":")[0])


def reply(body: Mapping[str, Any]) -> Mapping[str, Any]:
    num_turns = sum(message["role"] == "user" for message in body["messages"])
    is_broken = row_of(body) == 5 and num_turns == 1
    answer = deepseek("no json" if is_broken else '{"category": "fine"}', hit=30, miss=20, completion=5)
    return {"response": {"status_code": 200, "body": answer}, "error": None}


def job(folder: Path, output: Path, endpoint: BatchEndpoint, **model: Any) -> Any:
    server: Any = endpoint
    return remote_job(
        folder,
        output,
        server,
        model={"provider": "alibaba", "mode": "batch", **model},
        plan={"max_shard_rows": 10},
        failures={"max_outage_s": 0.1},
    )


def test_a_job_in_batch_mode_answers_every_row_once_at_half_the_price(tmp_path: Path) -> None:
    write_tickets(tmp_path, 20)
    (tmp_path / "prices.csv").write_text(PRICES)
    with BatchEndpoint(reply) as endpoint:
        summary = launch(job(tmp_path, tmp_path / "out", endpoint))
        assert (summary.exit_code, summary.num_results, summary.num_rejects) == (0, 20, 0)
        asked = Counter(map(row_of, endpoint.asked))
        assert asked == Counter({**dict.fromkeys(range(20), 1), 5: 2})
    ledger = read_table(tmp_path / "out", "ledger")
    assert len(ledger) == 21 and {line["price_line"] for line in ledger} == {"2/batch"}
    one = (Decimal("0.028") * 30 + Decimal("0.14") * 20 + Decimal("0.28") * 5) / 2 / 1_000_000
    assert sum(line["cost"] for line in ledger) == 21 * one
    assert sum(row["cost"] for row in read_table(tmp_path / "out", "results")) == 21 * one


def test_a_stopped_job_takes_its_batches_up_again(tmp_path: Path) -> None:
    write_tickets(tmp_path, 20)
    (tmp_path / "prices.csv").write_text(PRICES)
    with BatchEndpoint(reply) as endpoint:
        endpoint.fault = lambda method, path: "refused" if path.endswith("/content") else "none"
        with pytest.raises(Exception, match="cannot be downloaded"):
            launch(job(tmp_path, tmp_path / "out", endpoint))
        endpoint.fault = lambda method, path: "none"
        summary = launch(job(tmp_path, tmp_path / "out", endpoint))
        assert (summary.exit_code, summary.num_results) == (0, 20)
        assert Counter(map(row_of, endpoint.asked)) == Counter({**dict.fromkeys(range(20), 1), 5: 2})
        manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
        assert manifest["engine"]["num_batches_taken_up"] >= 1


def test_a_line_that_the_provider_failed_on_is_answered_by_another_batch(tmp_path: Path) -> None:
    write_tickets(tmp_path, 6)
    (tmp_path / "prices.csv").write_text(PRICES)
    no_reason = {"response": None, "error": None}
    failed: dict[int, Mapping[str, Any]] = {
        1: {"response": {"status_code": 500, "body": {"error": {"message": "oops"}}}, "error": None},
        2: {"response": {"status_code": 0, "request_id": "", "body": {}}, "error": None},
        3: {"response": None, "error": {"code": "server_error", "message": "the model had an error"}},
        4: no_reason,
    }

    def answer(body: Mapping[str, Any]) -> Mapping[str, Any]:
        return failed.pop(row_of(body), None) or reply(body)

    with BatchEndpoint(answer) as endpoint:
        summary = launch(job(tmp_path, tmp_path / "out", endpoint, max_retries=1))
        assert (summary.exit_code, summary.num_results, summary.num_rejects) == (0, 6, 0)
        asked = Counter(row_of(body) for body in endpoint.asked if body["max_tokens"] > 1)
        assert asked == Counter({0: 1, 1: 2, 2: 2, 3: 2, 4: 2, 5: 2}), "row 5 is repaired"


def test_a_provider_without_batches_is_refused_before_the_run(tmp_path: Path) -> None:
    write_tickets(tmp_path, 2)
    with (
        BatchEndpoint(reply) as endpoint,
        pytest.raises(JobFileError, match=r"\[model\] mode: expected a provider with batches, found 'deepseek'"),
    ):
        launch(job(tmp_path, tmp_path / "out", endpoint, provider="deepseek"))
