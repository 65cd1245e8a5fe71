import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import psutil
import pytest
from apache_beam.portability.api import (
    beam_fn_api_pb2,
    beam_fn_api_pb2_grpc,
    beam_provision_api_pb2,
    beam_provision_api_pb2_grpc,
    endpoints_pb2,
)
from google.protobuf import json_format, struct_pb2

from moebeam.jobs.deploy.flink import worker_pool
from moebeam.jobs.deploy.flink.worker_pool import WorkerPool, worker_environment
from tests.support.paths import ROOT
from tests.support.servers.local_servers import free_port, guarded, is_open, wait_until

OPTIONS = {"beam:option:job_name:v1": "a job", "beam:option:experiments:v1": ["one"]}


class TaskManager(beam_provision_api_pb2_grpc.ProvisionServiceServicer):
    """What a pool asks of a task manager."""

    def GetProvisionInfo(self, request: object, context: grpc.ServicerContext) -> object:
        options = json_format.ParseDict(OPTIONS, struct_pb2.Struct())
        info = beam_provision_api_pb2.ProvisionInfo(
            pipeline_options=options,
            control_endpoint=endpoints_pb2.ApiServiceDescriptor(url="localhost:1"),
            runner_capabilities=["a", "b"],
        )
        return beam_provision_api_pb2.GetProvisionInfoResponse(info=info)


@pytest.fixture(scope="module")
def provision_endpoint() -> Iterator[str]:
    server = grpc.server(ThreadPoolExecutor(2))
    beam_provision_api_pb2_grpc.add_ProvisionServiceServicer_to_server(TaskManager(), server)
    port = server.add_insecure_port("localhost:0")
    server.start()
    yield f"localhost:{port}"
    server.stop(None).wait()


def request_of(worker_id: str, provision_endpoint: str) -> beam_fn_api_pb2.StartWorkerRequest:
    return beam_fn_api_pb2.StartWorkerRequest(
        worker_id=worker_id,
        provision_endpoint=endpoints_pb2.ApiServiceDescriptor(url=provision_endpoint),
        control_endpoint=endpoints_pb2.ApiServiceDescriptor(url="localhost:2"),
        logging_endpoint=endpoints_pb2.ApiServiceDescriptor(url="localhost:3"),
    )


def test_a_worker_is_told_the_options_and_where_its_task_manager_listens(provision_endpoint: str) -> None:
    environment = worker_environment(request_of("w-1", provision_endpoint))
    assert environment["WORKER_ID"] == "w-1"
    assert '"a job"' in environment["PIPELINE_OPTIONS"]
    assert environment["RUNNER_CAPABILITIES"] == "a b"
    # What the task manager provisions wins over what the request says.
    assert environment["CONTROL_API_SERVICE_DESCRIPTOR"].strip() == 'url: "localhost:1"'
    assert environment["LOGGING_API_SERVICE_DESCRIPTOR"].strip() == 'url: "localhost:3"'


def test_workers_get_folders_of_their_own_and_end_when_told(
    provision_endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_pool, "WORKER_MODULE", "tests.support.disturbances.idle_worker")
    pool = WorkerPool(tmp_path / "pool")
    try:
        for name in ("w-1", "w-2"):
            assert not pool.StartWorker(request_of(name, provision_endpoint), None).error
        deadline = time.monotonic() + 30
        told: list[str] = []
        while len(told) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
            # A file that is there may not be written yet.
            told = sorted(filter(None, (path.read_text() for path in tmp_path.glob("pool/worker-*/tmp/started"))))
        assert told == ["w-1", "w-2"]
        logs = [path.read_text() for path in tmp_path.glob("pool/worker-*/worker.log")]
        assert [len(log) for log in logs] == [200_000, 200_000]
        pool.StopWorker(beam_fn_api_pb2.StopWorkerRequest(worker_id="w-1"), None)
        pool.StopWorker(beam_fn_api_pb2.StopWorkerRequest(worker_id="w-1"), None)
        children = psutil.Process().children()
        assert len([child for child in children if "tests.support.disturbances.idle_worker" in child.cmdline()]) == 1
    finally:
        pool.close()
    assert not [
        child for child in psutil.Process().children() if "tests.support.disturbances.idle_worker" in child.cmdline()
    ]


def test_a_task_manager_that_does_not_answer_is_the_pools_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_pool, "PROVISION_TIMEOUT_S", 2.0)
    answer = WorkerPool(tmp_path).StartWorker(request_of("w", f"localhost:{free_port()}"), None)
    assert str(tmp_path) in answer.error
    assert "UNAVAILABLE" in answer.error


@pytest.mark.integration
def test_a_pool_listens_on_its_address_alone_and_says_when_that_is_taken(tmp_path: Path) -> None:
    port = free_port()
    command = [sys.executable, "-m", "moebeam.jobs.deploy.flink.worker_pool", "--address", f"127.0.0.2:{port}"]
    log = tmp_path / "log"
    with log.open("wb") as sink:
        pool = subprocess.Popen(guarded(command), cwd=ROOT, stdout=sink, stderr=sink)
    try:
        wait_until(lambda: b"worker pool at" in log.read_bytes(), pool, 60, log)
        assert not is_open(port)
        again = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
        assert again.returncode == 2
        assert "expected a free port" in again.stderr
        os.kill(pool.pid, signal.SIGTERM)
        assert pool.wait(30) == 0
    finally:
        pool.kill()
        pool.wait()


def test_the_pool_serves_beams_own_protocol() -> None:
    assert issubclass(WorkerPool, beam_fn_api_pb2_grpc.BeamFnExternalWorkerPoolServicer)
