"""A provider that sends the key back, wherever there is room for it: nothing that a run leaves or says holds it."""

import base64
import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pyarrow.parquet as pq
import pytest

from moebeam.jobs.commands.cli import run_command
from moebeam.model_runner.openai_engine.batch.service import BatchPolling
from moebeam.model_runner.openai_engine.endpoint import RetryPolicy
from tests.support.jobs.jobs_for_tests import write_job_file
from tests.support.jobs.remote_jobs import KEY_VARIABLE, MODEL, remote_job, write_tickets
from tests.support.servers.batch_endpoint import BatchEndpoint
from tests.support.servers.fake_endpoint import Call, FakeEndpoint, Reply, as_events, deepseek

KEY = "sk-planted/0123456789+abcdef"
SECOND_VARIABLE, SECOND_KEY = "MOEBEAM_SECOND_KEY", "tok_of_the_second_endpoint_42"
SPELLINGS = (KEY, KEY[:14], quote(KEY, safe=""), base64.b64encode(f"user:{KEY}".encode()).decode()[8:-4], SECOND_KEY)
PRICES = f"""\
provider,model,effective_from_utc,effective_to_utc,window_utc,currency,cache_hit_per_mtok,cache_miss_per_mtok,\
output_per_mtok,batch_percent,evidence,note
deepseek,{MODEL},2020-01-01T00:00:00Z,,,USD,0.028,0.14,0.28,50,made up,
vllm,{MODEL},2020-01-01T00:00:00Z,,,USD,0.028,0.14,0.28,50,made up,
alibaba,{MODEL},2020-01-01T00:00:00Z,,,USD,0.028,0.14,0.28,50,made up,
"""


def calls() -> list[dict[str, Any]]:
    function = {"name": f"f_{KEY}", "arguments": json.dumps({"a": KEY, "b": quote(KEY, safe="")})}
    return [{"id": f"call_{KEY}", "type": "function", "function": function}]


def likely() -> dict[str, Any]:
    return {"content": [{"token": KEY, "logprob": -1.0, "top_logprobs": [{"token": KEY, "logprob": -1.0}]}]}


def with_choice(answer: dict[str, Any], **values: Any) -> dict[str, Any]:
    answer["choices"][0].update(values)
    return answer


def refusal(message: str, **values: Any) -> dict[str, Any]:
    return {"error": {"message": message, "type": KEY, "param": KEY, **values}}


ENCODED = base64.b64encode(f"user:{KEY}".encode()).decode()
BODIES: list[tuple[int, Any]] = [
    (200, {**deepseek(json.dumps({"category": f"{KEY} {SECOND_KEY} {ENCODED}"}), reasoning_content=f"why {KEY}")}),
    (200, {**deepseek('{"category": "x"}', model=f"m {KEY}", system_fingerprint=f"fp {KEY}"), "id": KEY}),
    (200, deepseek(f"no json {KEY}", finish_reason=f"weird {KEY}")),
    (200, {**deepseek("x"), "usage": {"prompt_tokens": KEY, "completion_tokens": [KEY]}, "service_tier": KEY}),
    (200, deepseek("", finish_reason="tool_calls", tool_calls=calls())),
    (200, with_choice(deepseek("{}"), logprobs=likely())),
    (200, deepseek(f"echo {KEY}", finish_reason="content_filter")),
    (200, deepseek(f"echo {KEY}", finish_reason="insufficient_system_resource")),
    (200, {"choices": KEY, "padding": "x" * 70 + KEY}),
    (200, f"not json {KEY}".encode()),
    (400, refusal(f"bad {KEY} {ENCODED}", code=f"code {KEY}")),
    (400, refusal("x" * 185 + KEY)),
    (413, {"error": KEY}),
    (422, f"<html>{KEY}</html>".encode()),
    (400, {"message": f"Bearer {KEY}", "code": KEY}),
]
"""What rows get, one after the other; the rest is answered well."""


def row_of(body: Mapping[str, Any]) -> int:
    return int(
        next(turn for turn in body["messages"] if turn["role"] == "user")["content"].split("ticket ")[1][:2].strip(":")
    )


def find_reply(body: Mapping[str, Any]) -> tuple[int, Any]:
    row = row_of(body)
    return BODIES[row] if row < len(BODIES) else (200, deepseek('{"category": "fine"}'))


def reply(call: Call) -> Reply:
    status, body = find_reply(call.body)
    headers = {"x-request-id": KEY, "location": f"http://user:{KEY.replace('/', '')}@127.0.0.1/", "retry-after": KEY}
    answer = Reply(body, status=status, headers=headers)
    is_whole = status == 200 and isinstance(body, dict) and isinstance(body["choices"], list)
    return replace(answer, events=as_events(body)) if call.body.get("stream") and is_whole else answer


def batch_reply(body: Mapping[str, Any]) -> Mapping[str, Any]:
    status, content = find_reply(body)
    if status == 413:
        return {"response": None, "error": {"code": f"code {KEY}", "message": f"message {KEY}"}}
    content = content.decode() if isinstance(content, bytes) else content
    return {"response": {"status_code": status, "request_id": KEY, "body": content}, "error": None}


def assert_nothing_holds_the_key(folder: Path, *texts: str) -> None:
    found = {str(number): text for number, text in enumerate(texts)}
    for path in folder.rglob("*"):
        if path.is_file():
            found[str(path)] = path.read_bytes().decode("latin-1")
            if path.suffix in (".parquet", ".parquet-staged"):
                found[str(path)] = json.dumps(pq.read_table(path).to_pylist(), default=str)
    assert len(found) > len(texts) + 8
    assert [(name, spelling) for name, text in found.items() for spelling in SPELLINGS if spelling in text] == []


@pytest.mark.parametrize(
    "mode", ["plain", *(pytest.param(mode, marks=pytest.mark.integration) for mode in ("stream", "batch"))]
)
def test_no_file_line_or_message_of_a_run_holds_a_key_that_came_back(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    mode: str,
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    monkeypatch.setenv(SECOND_VARIABLE, SECOND_KEY)
    monkeypatch.setattr(BatchPolling.__init__, "__defaults__", (0.001, 0.002, 3, 0.001))
    waits = RetryPolicy.__init__.__defaults__ or ()
    monkeypatch.setattr(RetryPolicy.__init__, "__defaults__", tuple(min(wait, 0.001) for wait in waits))
    write_tickets(tmp_path, len(BODIES) + 3)
    output, job_file, is_batch = tmp_path / "out", tmp_path / "job.toml", mode == "batch"
    server: Any = BatchEndpoint(batch_reply) if is_batch else FakeEndpoint(reply)
    with server as endpoint:
        model = {"mode": mode, "max_retries": 0, "provider": "alibaba" if is_batch else "deepseek"}
        (tmp_path / "prices.csv").write_text(PRICES)
        write_job_file(remote_job(tmp_path, output, endpoint, model=model, failures={"max_outage_s": 0.1}), job_file)
        if not is_batch:
            second = {"provider": "vllm", "base_url": endpoint.base_url, "api_key_variable": SECOND_VARIABLE}
            with job_file.open("a") as file:
                file.writelines(["[[model.fallbacks]]\n", *(f'{key} = "{value}"\n' for key, value in second.items())])
        with caplog.at_level(logging.DEBUG):
            run_command(["run", str(job_file), "--json", "--debug"])
            run_command(["status", str(output), "--json"])
            run_command(
                ["report", str(output), "--json", "--html", str(tmp_path / "page"), "--csv", str(tmp_path / "csv")]
            )
    said = capsys.readouterr()
    assert_nothing_holds_the_key(tmp_path, said.out, said.err, caplog.text)
    rejects = pq.read_table(output / "rejects")
    assert rejects.num_rows >= 8
    assert sum("[key]" in str(message) for message in rejects.column("error_message").to_pylist()) >= 5
