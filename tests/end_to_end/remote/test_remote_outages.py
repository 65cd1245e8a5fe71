"""Whole runs over a provider that goes away, comes back, or refuses everybody: nothing is booked on rows."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from moebeam.jobs.output.run_record import read_record
from moebeam.jobs.run.launch import launch, resume
from moebeam.schemas.errors import PipelineFailed
from tests.support.jobs.jobs_for_tests import read_table
from tests.support.jobs.remote_jobs import KEY, KEY_VARIABLE, Answers, remote_job, write_tickets
from tests.support.servers.fake_endpoint import Call, FakeEndpoint, Reply, error
from tests.support.servers.local_servers import free_port

NUM_ROWS = 60


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    write_tickets(tmp_path, NUM_ROWS)
    return tmp_path


def num_rejects(output: Path) -> int:
    return len(read_table(output, "rejects")) if (output / "rejects").exists() else 0


def test_an_outage_in_mid_run_rejects_no_row_and_is_counted(folder: Path) -> None:
    answers = Answers()

    def reply(call: Call) -> Reply:
        return error(502, "bad gateway") if 20 <= call.number < 30 else answers(call)

    with FakeEndpoint(reply) as endpoint:
        summary = launch(remote_job(folder, folder / "out", endpoint, model={"max_concurrency": 4}))
    assert (summary.status, summary.num_results, summary.num_rejects) == ("succeeded", NUM_ROWS, 0)
    assert answers.num_calls == Counter(range(NUM_ROWS))
    engine = json.loads((folder / "out" / "manifest.json").read_text())["engine"]
    assert engine["num_outages"] >= 1 and engine["outage_s"] > 0


def test_a_wrong_address_ends_the_run_unfinished_and_the_right_one_goes_on(folder: Path) -> None:
    output, nowhere = folder / "out", {"base_url": f"http://127.0.0.1:{free_port()}/v1"}
    with FakeEndpoint(Answers()) as endpoint:
        with pytest.raises(PipelineFailed, match=r"deepseek: no answer since .* run again to continue"):
            launch(remote_job(folder, output, endpoint, model=nowhere, failures={"max_outage_s": 0.5}))
        assert num_rejects(output) == 0 and endpoint.calls == []
        record = read_record(str(output))
        model = record.request.job.model.model_copy(update={"base_url": endpoint.base_url})
        summary = resume(record, record.request.job.model_copy(update={"model": model}))
    assert (summary.status, summary.num_results) == ("succeeded", NUM_ROWS)


@pytest.mark.parametrize(
    ("provider", "most_calls"), [("deepseek", 16), ("vllm", 20 + 16)], ids=["a profile knows it", "by the series"]
)
def test_a_model_that_the_provider_does_not_know_ends_the_run_with_its_words(
    folder: Path, provider: str, most_calls: int
) -> None:
    sections: dict[str, Any] = {"model": {"provider": provider}, "plan": {"max_shard_rows": 1000}}
    with FakeEndpoint(lambda call: error(400, "Model Not Exist")) as endpoint:
        with pytest.raises(PipelineFailed, match="HTTP 400: Model Not Exist"):
            launch(remote_job(folder, folder / "out", endpoint, **sections))
        assert len(endpoint.calls) <= most_calls
    assert num_rejects(folder / "out") == 0
