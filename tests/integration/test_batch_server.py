"""`moebeam serve`, driven by OpenAI's own client: kills, cancels, a hundred clients at once."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pyarrow.parquet as pq
import pytest
from openai.types import Batch

pytestmark = pytest.mark.integration

NUM_LINES = 10_000
DEADLINE_S = 240.0


class Server:
    """A server process on a port of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "server"
        self._job = folder / "job.toml"
        self._job.write_text('[output]\npath = "x"\n[model]\nengine = "fake"\nname = "m"\n')
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        self.client = openai.OpenAI(base_url=f"http://127.0.0.1:{self._port}/v1", api_key="unused", max_retries=8)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = "from moebeam.jobs.commands.cli import main; main()"
        options = ["serve", str(self.folder), "--job", str(self._job), "--port", str(self._port), "--runs", "2"]
        self.process = subprocess.Popen([sys.executable, "-c", command, *options])

    def end(self, number: signal.Signals) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(60)

    def upload(self, num_lines: int, first: int = 0) -> str:
        body = {"messages": [{"role": "user", "content": "Hello"}]}
        lines = [
            json.dumps({"custom_id": f"row-{row}", "method": "POST", "url": "/v1/chat/completions", "body": body})
            for row in range(first, first + num_lines)
        ]
        return self.client.files.create(file=("in.jsonl", "\n".join(lines).encode()), purpose="batch").id

    def create(self, file_id: str, number: int = 0) -> Batch:
        return self.client.batches.create(
            input_file_id=file_id,
            endpoint="/v1/chat/completions",
            completion_window="24h",
            metadata={"number": str(number)},
        )

    def wait(self, batch_id: str, is_there: Callable[[Batch], bool]) -> Batch:
        until = time.monotonic() + DEADLINE_S
        while time.monotonic() < until:
            batch = self.client.batches.retrieve(batch_id)
            if is_there(batch):
                return batch
            time.sleep(0.2)
        raise AssertionError(f"{batch_id} did not get there within {DEADLINE_S:g} s: {batch}")

    def read_ids(self, file_id: str | None) -> list[str]:
        text = "" if file_id is None else self.client.files.content(file_id).text
        return [json.loads(line)["custom_id"] for line in text.splitlines()]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path)
    server.start()
    yield server
    if server.process is not None and server.process.poll() is None:
        server.end(signal.SIGTERM)


def has_ended(batch: Batch) -> bool:
    return batch.status in ("completed", "failed", "expired", "cancelled")


def test_a_batch_of_ten_thousand_lines_survives_a_killed_server_and_a_killed_run(server: Server) -> None:
    batch = server.create(server.upload(NUM_LINES))
    server.wait(batch.id, lambda batch: batch.status == "in_progress")
    server.end(signal.SIGKILL)  # its run lives on
    server.start()
    process = server.folder / f"tenants/local/runs/{batch.id}.made/process.json"
    until = time.monotonic() + DEADLINE_S
    while not process.exists() and time.monotonic() < until:
        time.sleep(0.1)
    time.sleep(3)
    os.kill(json.loads(process.read_text())["pid"], signal.SIGKILL)
    batch = server.wait(batch.id, has_ended)
    assert (batch.status, batch.error_file_id) == ("completed", None)
    assert batch.request_counts is not None and batch.request_counts.completed == NUM_LINES
    assert sorted(server.read_ids(batch.output_file_id)) == sorted(f"row-{row}" for row in range(NUM_LINES))
    ledger = pq.read_table(server.folder / f"tenants/local/runs/{batch.id}/ledger")
    assert set(ledger["tenant"].to_pylist()) == {"local"}
    assert server.end(signal.SIGTERM) == 0


def test_a_cancelled_batch_has_a_line_for_every_request(server: Server) -> None:
    batch = server.create(server.upload(NUM_LINES))
    server.wait(batch.id, lambda batch: batch.status == "in_progress")
    assert server.client.batches.cancel(batch.id).status == "cancelling"
    batch = server.wait(batch.id, has_ended)
    assert batch.status == "cancelled"
    ids = server.read_ids(batch.output_file_id) + server.read_ids(batch.error_file_id)
    assert sorted(ids) == sorted(f"row-{row}" for row in range(NUM_LINES))


def test_a_hundred_clients_at_once_each_get_their_own(server: Server) -> None:
    server.wait(server.create(server.upload(1)).id, has_ended)

    def ask(number: int) -> tuple[str, str]:
        file_id = server.upload(20, first=1000 * number)
        return file_id, server.create(file_id, number).id

    with ThreadPoolExecutor(100) as pool:
        made = list(pool.map(ask, range(100)))
    assert len({batch_id for _, batch_id in made}) == 100
    for batch_id in [batch_id for _, batch_id in made[4:]]:
        server.client.batches.cancel(batch_id)
    for number, (file_id, batch_id) in enumerate(made):
        batch = server.wait(batch_id, has_ended)
        assert (batch.input_file_id, batch.metadata) == (file_id, {"number": str(number)})
        ids = server.read_ids(batch.output_file_id) + server.read_ids(batch.error_file_id)
        assert sorted(ids) == sorted(f"row-{1000 * number + row}" for row in range(20))
    assert len(server.client.batches.list(limit=100).data) == 100
