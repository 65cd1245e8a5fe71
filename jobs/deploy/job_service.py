"""Prepares runs through a Beam job server (Flink, Spark): sets what Beam's defaults lack, and checks the server.

Called by `jobs/run/launch.py` before the pipeline. With a wrong address, Beam waits silently for minutes or prints a
stack trace; here the error takes seconds and names the address.
"""

import grpc
from apache_beam.options.pipeline_options import DebugOptions, PipelineOptions, PortableOptions, StandardOptions
from apache_beam.portability.api import beam_job_api_pb2, beam_job_api_pb2_grpc

from moebeam.schemas.errors import ClusterUnavailable, JobFileError

ANSWER_TIMEOUT_S = 15.0
KEEP_WORKERS_MS = 8_000
"""How long a step's workers wait for the next step; new workers would reload libraries and model.

Shorter than a cluster's pause before it restarts a job: the runner forgets a dead worker only along with all others."""

FLINK_RUNNER = "moebeam.jobs.deploy.flink.runner.FlinkRunner"

_FLINK_NAMES = {"flink", "flinkrunner"}
_NO_FREEZE = "disable_logging_submission_environment"


def prepare_job_service(options: PipelineOptions) -> None:
    """Complete the options of a run through a job service and check that it answers; no-op for other runs.

    Raises:
        JobFileError: the runner needs an address that the command lacks.
        ClusterUnavailable: no Beam job service answers at the address.
    """
    standard, portable = options.view_as(StandardOptions), options.view_as(PortableOptions)
    runner = str(standard.runner).lower()
    is_flink = runner in _FLINK_NAMES
    if not is_flink and runner not in ("portable", "portablerunner"):
        return
    if is_flink:
        standard.runner = FLINK_RUNNER
    if not int(portable.environment_cache_millis):
        portable.environment_cache_millis = KEEP_WORKERS_MS
    # Beam would run `pip freeze` and send its output with every job.
    options.view_as(DebugOptions).add_experiment(_NO_FREEZE)
    if portable.job_endpoint not in (None, "embed"):
        check_job_endpoint(str(portable.job_endpoint))
    elif not is_flink and portable.job_endpoint is None:
        raise JobFileError("--runner=PortableRunner: expected --job_endpoint=HOST:PORT of a Beam job server beside it")


def check_job_endpoint(address: str, *, timeout_s: float = ANSWER_TIMEOUT_S) -> None:
    """Query a job server for its capabilities.

    Raises:
        JobFileError: the address is not a host and a port.
        ClusterUnavailable: no job server answers there in time.
    """
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal():
        raise JobFileError(f"--job_endpoint={address}: expected HOST:PORT of a Beam job server, such as localhost:8099")
    with grpc.insecure_channel(address) as channel:
        stub = beam_job_api_pb2_grpc.JobServiceStub(channel)
        try:
            stub.DescribePipelineOptions(
                beam_job_api_pb2.DescribePipelineOptionsRequest(), timeout=timeout_s, wait_for_ready=False
            )
        except grpc.RpcError as error:
            raise ClusterUnavailable(
                f"--job_endpoint={address}: expected a Beam job server, found {format_rpc_error(error)}\n"
                "Is the job server running, and is this its job port, not its artifact port or Flink's web port?"
            ) from error


def format_rpc_error(error: grpc.RpcError) -> str:
    """Format the error of a remote call on one line."""
    if isinstance(error, grpc.Call):
        code, details = error.code(), error.details()
        return f"{code.name.lower().replace('_', ' ')} ({details})" if details else code.name.lower()
    return type(error).__name__
