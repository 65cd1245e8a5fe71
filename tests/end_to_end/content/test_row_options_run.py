"""A batch file whose rows bring options of their own: followed, priced as followed, or rejected by name."""

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from moebeam.jobs.check.job_file import read_job
from moebeam.jobs.run.launch import launch
from tests.support.jobs.jobs_for_tests import read_table
from tests.support.servers.fake_endpoint import Call, FakeEndpoint, Reply, deepseek

PRICES = """\
provider,model,effective_from_utc,effective_to_utc,window_utc,mode,currency,cache_hit_per_mtok,cache_miss_per_mtok,\
output_per_mtok
openai,m,2020-01-01T00:00:00Z,,,,USD,1,10,100
openai,m,2020-01-01T00:00:00Z,,,flex,USD,0.5,5,50
openai,b,2020-01-01T00:00:00Z,,,,USD,2,20,200
"""
PROMPT = "Which of the colours of the rainbow is the warmest one? " * 8

ROWS: dict[str, dict[str, Any]] = {
    "plain": {},
    "named": {"model": "m"},
    "flex": {"service_tier": "flex"},
    "busy": {"service_tier": "flex", "user": "served in the ordinary tier"},
    "unpriced": {"service_tier": "priority"},
    "routed": {"model": "b"},
    "penalised": {"frequency_penalty": 0.5, "presence_penalty": 0.25, "logprobs": True, "top_logprobs": 1},
    "stranger": {"model": "gpt-9"},
    "many": {"n": 2, "temperature": 1, "seed": 5},
    "wild": {"presence_penalty": 3},
}


def reply(call: Call) -> Reply:
    body = call.body
    is_busy = "busy" in body["messages"][0]["content"]
    answer = deepseek("yes", hit=0, miss=100, completion=10, model=body["model"])
    if "service_tier" in body:
        answer["service_tier"] = "default" if is_busy else body["service_tier"]
    if body.get("logprobs"):
        token = {"token": "yes", "logprob": -0.5, "top_logprobs": [{"token": "yes", "logprob": -0.5}]}
        answer["choices"][0]["logprobs"] = {"content": [token]}
    return Reply(answer)


def test_rows_get_what_they_ask_for_or_a_reject_that_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "key")
    (tmp_path / "prices.csv").write_text(PRICES)
    lines = [
        {
            "custom_id": name,
            "method": "POST",
            "url": "/v1/chat/completions",
            "body": {"messages": [{"role": "user", "content": PROMPT + name}], "max_tokens": 20, **own},
        }
        for name, own in ROWS.items()
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with FakeEndpoint(reply) as served:
        model = {"engine": "openai", "provider": "openai", "name": "m", "base_url": served.base_url}
        job = read_job(
            {
                "input": {"path": str(tmp_path / "in.jsonl")},
                "output": {"path": str(tmp_path / "out"), "max_reject_share": 1.0},
                "model": {**model, "max_retries": 0, "routes": [{"name": "b"}]},
                "accounting": {"price_book": str(tmp_path / "prices.csv")},
            }
        )
        launch(job)
        sent = {call.body["messages"][0]["content"].removeprefix(PROMPT): call.body for call in served.calls}
        seeds = {call.body["seed"] for call in served.calls if "seed" in call.body}
        assert not any("n" in call.body for call in served.calls)
    results = {row["custom_id"]: row for row in read_table(tmp_path / "out", "results")}
    rejects = {row["custom_id"]: row for row in read_table(tmp_path / "out", "rejects")}
    ledger = {row["custom_id"]: row for row in read_table(tmp_path / "out", "ledger")}

    assert set(rejects) == {"stranger", "wild"}
    assert sent.keys() == ledger.keys() == results.keys()
    assert rejects["stranger"]["error_type"] == "unsupported_request"
    assert "expected 'm' or 'b', found 'gpt-9'" in rejects["stranger"]["error_message"]
    many = [row["sample"] for row in read_table(tmp_path / "out", "results") if row["custom_id"] == "many"]
    assert (sorted(many), len(seeds)) == ([0, 1], 2), "one request an answer, each with a seed of its own"
    assert rejects["wild"]["error_message"] == "body.presence_penalty: expected at most 2, found 3"

    assert sent["flex"]["service_tier"] == "flex"
    assert "service_tier" not in sent["plain"]
    assert {name: body["model"] for name, body in sent.items() if body["model"] != "m"} == {"routed": "b"}
    assert (sent["penalised"]["frequency_penalty"], sent["penalised"]["top_logprobs"]) == (0.5, 1)
    assert results["penalised"]["top_logprobs"] == [[{"token": "yes", "logprob": -0.5}]]
    assert results["plain"]["top_logprobs"] is None

    lines_of = {name: row["price_line"] for name, row in ledger.items()}
    assert lines_of == {
        "plain": "2",
        "named": "2",
        "flex": "3",
        "busy": "2",
        "unpriced": None,
        "routed": "4",
        "penalised": "2",
        "many": "2",
    }
    assert results["routed"]["model"] == ledger["routed"]["model"] == "b"
    assert results["flex"]["cost"] == Decimal("0.001")
    assert results["busy"]["cost"] == Decimal("0.002")
    assert results["routed"]["cost"] == Decimal("0.004")
    assert results["unpriced"]["cost"] is None
