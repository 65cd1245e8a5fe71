"""A worker pool: starts Python workers where a Flink task manager asks for them.

One pool runs beside each task manager; `--environment_type=EXTERNAL` selects it. Beam's own pool listens on all of a
machine's addresses, so that anybody who reaches it can start programs, and leaves workers' output in an unread pipe,
where a worker that prints much hangs. This pool listens on one address and gives each worker a folder and a log.
"""

import json
import signal
import subprocess
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import grpc
import typer
from apache_beam.portability.api import (
    beam_fn_api_pb2,
    beam_fn_api_pb2_grpc,
    beam_provision_api_pb2,
    beam_provision_api_pb2_grpc,
    endpoints_pb2,
)
from google.protobuf import json_format, text_format

from moebeam.model_runner.python_process import python_command, python_environment

DEFAULT_ADDRESS = "localhost:50000"
PROVISION_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 10.0
MAX_CALLS = 16
WORKER_MODULE = "apache_beam.runners.worker.sdk_worker_main"

_KEEP_ALIVE = (("grpc.http2.max_pings_without_data", 0), ("grpc.http2.max_ping_strikes", 0), ("grpc.so_reuseport", 0))
"""Task managers keep idle connections open with pings; an address already in use must raise."""

_app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


class WorkerPool(beam_fn_api_pb2_grpc.BeamFnExternalWorkerPoolServicer):
    """Starts and stops worker processes, each in its own folder below the pool's."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def StartWorker(self, request: Any, unused_context: grpc.ServicerContext) -> Any:
        """Start the worker that a task manager requests; a failure is returned in the response."""
        try:
            process = _start_worker(self._folder, worker_environment(request))
            with self._lock:
                self._processes[request.worker_id] = process
        except (OSError, grpc.RpcError) as error:
            return beam_fn_api_pb2.StartWorkerResponse(error=f"the worker pool in {self._folder}: {error}")
        return beam_fn_api_pb2.StartWorkerResponse()

    def StopWorker(self, request: Any, unused_context: grpc.ServicerContext) -> Any:
        """Stop a worker; ignores one that is already gone."""
        with self._lock:
            process = self._processes.pop(request.worker_id, None)
        if process is not None:
            _stop(process)
        return beam_fn_api_pb2.StopWorkerResponse()

    def close(self) -> None:
        """Stop all workers."""
        with self._lock:
            processes, self._processes = list(self._processes.values()), {}
        for process in processes:
            process.terminate()
        for process in processes:
            _stop(process)


def worker_environment(request: Any) -> dict[str, str]:
    """Build the environment of Beam's worker: the task manager's address and the job's options.

    Args:
        request: a `StartWorkerRequest`.
    Raises:
        grpc.RpcError: the task manager does not provide the job's options.
    """
    with grpc.insecure_channel(request.provision_endpoint.url) as channel:
        stub = beam_provision_api_pb2_grpc.ProvisionServiceStub(channel)
        wanted = beam_provision_api_pb2.GetProvisionInfoRequest()
        metadata = (("worker_id", request.worker_id),)
        info = stub.GetProvisionInfo(wanted, metadata=metadata, timeout=PROVISION_TIMEOUT_S).info
    logging, control = info.logging_endpoint, info.control_endpoint
    return {
        "WORKER_ID": request.worker_id,
        "PIPELINE_OPTIONS": json.dumps(json_format.MessageToDict(info.pipeline_options)),
        "RUNNER_CAPABILITIES": " ".join(info.runner_capabilities),
        "LOGGING_API_SERVICE_DESCRIPTOR": _descriptor(logging.url or request.logging_endpoint.url),
        "CONTROL_API_SERVICE_DESCRIPTOR": _descriptor(control.url or request.control_endpoint.url),
    }


def _descriptor(url: str) -> str:
    return text_format.MessageToString(endpoints_pb2.ApiServiceDescriptor(url=url))


def _start_worker(pool_folder: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    pool_folder.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="worker-", dir=pool_folder))
    temporary = folder / "tmp"
    temporary.mkdir()
    with (folder / "worker.log").open("ab") as log:
        return subprocess.Popen(
            python_command(WORKER_MODULE),
            cwd=folder,
            env={**python_environment(), "TMPDIR": str(temporary), **environment},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@_app.command()
def serve(
    address: Annotated[str, typer.Option(help="Host and port to listen on.")] = DEFAULT_ADDRESS,
    folder: Annotated[Path, typer.Option(help="Each worker gets a folder in it.")] = Path("workers"),
) -> None:
    """Start Python workers for the Flink task manager beside this pool, until a signal ends it."""
    pool = WorkerPool(folder.absolute())
    server = grpc.server(ThreadPoolExecutor(max_workers=MAX_CALLS), options=_KEEP_ALIVE)
    beam_fn_api_pb2_grpc.add_BeamFnExternalWorkerPoolServicer_to_server(pool, server)
    try:
        server.add_insecure_port(address)
    except RuntimeError as error:
        raise typer.BadParameter(f"{address}: expected a free port at an address of this machine: {error}") from error
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: ended.set())
    server.start()
    print(f"worker pool at {address}, folders in {folder}", flush=True)
    ended.wait()
    server.stop(None)
    pool.close()


if __name__ == "__main__":
    _app()
