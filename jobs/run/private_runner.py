"""Beam's local runner, whose workers are reached by their user alone.

Beam serves work, rows and state to its local workers without asking who calls, on ports of all of the machine's
addresses; whoever reaches them reads rows, answers in a worker's place, and fetches any file that the launcher can
read. Here these services listen on sockets in a folder that only its user may enter. Workers are started without a
shell, and import nothing from the working directory.
"""

import os
import shlex
import subprocess
import tempfile
import threading
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

import grpc
from apache_beam.portability import python_urns
from apache_beam.portability.api import beam_runner_api_pb2, endpoints_pb2
from apache_beam.runners.portability.fn_api_runner import FnApiRunner, worker_handlers
from google.protobuf import json_format, text_format

from moebeam.model_runner.python_process import python_environment
from moebeam.schemas.errors import PipelineFailed

_PROCESS = "moebeam:env:local_process:v1"
_THREAD = "moebeam:env:local_thread:v1"
_OURS = {python_urns.SUBPROCESS_SDK: _PROCESS, python_urns.EMBEDDED_PYTHON_GRPC: _THREAD}
"""What stands for Beam's environments in pipelines of this runner; those of others in this process stay Beam's."""

_MAX_PATH_BYTES = 100
"""The kernel takes 107 bytes for the path of a socket."""

_SCHEME = "unix:"
_folder: ContextVar[str | None] = ContextVar("folder", default=None)


class PrivateRunner(FnApiRunner):
    """Runs a pipeline in this process, or in threads or processes beside it that nobody else can reach."""

    def run_via_runner_api(self, pipeline_proto: "beam_runner_api_pb2.Pipeline", options: Any) -> Any:
        for environment in pipeline_proto.components.environments.values():
            environment.urn = _OURS.get(environment.urn, environment.urn)
        return super().run_via_runner_api(pipeline_proto, options)

    def run_stages(self, stage_context: Any, stages: Any) -> Any:
        """Run to the end; the services live as long."""
        with tempfile.TemporaryDirectory(prefix="moebeam-", dir=_find_short_folder()) as folder:
            token = _folder.set(folder)
            try:
                return super().run_stages(stage_context, stages)
            finally:
                _folder.reset(token)


def _find_short_folder() -> str:
    """Where a folder for sockets can be made; `mkdtemp` gives it to its user alone, wherever it lies."""
    usual = tempfile.gettempdir()
    return usual if len(os.fsencode(usual)) <= _MAX_PATH_BYTES - 40 else "/tmp"


class _Grpc:
    """The module `grpc`, as Beam's worker handlers see it: servers of a `PrivateRunner` get sockets for ports."""

    def __getattr__(self, name: str) -> Any:
        return getattr(grpc, name)

    def server(self, *args: Any, **options: Any) -> Any:
        server: Any = grpc.server(*args, **options)
        folder = _folder.get()
        if folder is not None:
            listen = server.add_insecure_port

            def add_socket(unused_address: str) -> str:
                address = f"{_SCHEME}{folder}/{len(os.listdir(folder))}"
                listen(address)
                return address

            server.add_insecure_port = add_socket
        return server


def _install_grpc(handlers: Any) -> None:
    handlers.grpc = _Grpc()


_install_grpc(worker_handlers)


class _PrivateWorker(worker_handlers.GrpcWorkerHandler):
    """The runner's side of a worker that is reached by sockets."""

    def port_from_worker(self, port: Any) -> str:
        """The address of a service, by what `add_insecure_port` returned for it.

        Raises:
            PipelineFailed: it is a port, which others reach too.
        """
        if not str(port).startswith(_SCHEME):
            raise PipelineFailed(
                f"expected a service for workers on a socket of this user, found one on port {port}; this version of "
                "Beam is not the one that moebeam was tested with"
            )
        return str(port)


_BeamThreadWorker: Any = worker_handlers.EmbeddedGrpcWorkerHandler


@worker_handlers.WorkerHandler.register_environment(_THREAD, bytes)
class _ThreadWorker(_PrivateWorker, _BeamThreadWorker):
    """A worker in a thread of this process."""


@worker_handlers.WorkerHandler.register_environment(_PROCESS, bytes)
class _ProcessWorker(_PrivateWorker):
    """A worker process; a thread named as Beam names its own waits for it, and raises when it ends badly."""

    def __init__(self, command: bytes, state: Any, provision_info: Any, grpc_server: Any) -> None:
        super().__init__(state, provision_info, grpc_server)
        self._command = shlex.split(command.decode())
        self._thread: threading.Thread | None = None

    def start_worker(self) -> None:
        """Start the process.

        Raises:
            PipelineFailed: the system does not let it start.
        """
        try:
            process = subprocess.Popen(self._command, env=self._build_environment(), stdin=subprocess.DEVNULL)
            self._thread = threading.Thread(name="run_worker", target=_wait_for, args=(process,))
            self._thread.start()
        except (OSError, RuntimeError) as error:
            raise PipelineFailed(f"a worker process cannot be started: {error}") from error

    def stop_worker(self) -> None:
        if self._thread is not None:
            self._thread.join()

    def _build_environment(self) -> Mapping[str, str]:
        options = json_format.MessageToJson(self.provision_info.provision_info.pipeline_options)
        return {
            **python_environment(),
            "CONTROL_API_SERVICE_DESCRIPTOR": _describe(self.control_api_service_descriptor()),
            "LOGGING_API_SERVICE_DESCRIPTOR": _describe(self.logging_api_service_descriptor()),
            "PIPELINE_OPTIONS": options,
            "WORKER_ID": self.worker_id,
        }


def _describe(descriptor: "endpoints_pb2.ApiServiceDescriptor") -> str:
    return text_format.MessageToString(descriptor)


def _wait_for(process: "subprocess.Popen[bytes]") -> None:
    if code := process.wait():
        raise RuntimeError(f"Worker subprocess exited with return code {code}")
