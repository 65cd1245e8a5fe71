import atexit
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from apache_beam.options.pipeline_options import DebugOptions, PortableOptions, StandardOptions
from apache_beam.portability.api import beam_job_api_pb2, beam_job_api_pb2_grpc
from apache_beam.runners import create_runner
from apache_beam.runners.portability import flink_runner

from moebeam.jobs.check.beam_options import LOCAL_RUNNER, parse_beam_options
from moebeam.jobs.deploy import job_service
from moebeam.jobs.deploy.flink.runner import FlinkRunner
from moebeam.jobs.deploy.job_service import KEEP_WORKERS_MS, check_job_endpoint, prepare_job_service
from moebeam.schemas.errors import ClusterUnavailable, JobFileError
from tests.support.servers.local_servers import free_port


class JobServer(beam_job_api_pb2_grpc.JobServiceServicer):
    def DescribePipelineOptions(self, request: object, context: object) -> object:
        return beam_job_api_pb2.DescribePipelineOptionsResponse()


@pytest.fixture(scope="module")
def job_endpoint() -> Iterator[str]:
    server = grpc.server(ThreadPoolExecutor(2))
    beam_job_api_pb2_grpc.add_JobServiceServicer_to_server(JobServer(), server)
    port = server.add_insecure_port("localhost:0")
    server.start()
    yield f"localhost:{port}"
    server.stop(None).wait()


def test_a_job_server_passes_and_its_runs_keep_their_workers_between_steps(job_endpoint: str) -> None:
    options = parse_beam_options(["--runner=PortableRunner", f"--job_endpoint={job_endpoint}"])
    prepare_job_service(options)
    assert options.view_as(PortableOptions).environment_cache_millis == KEEP_WORKERS_MS
    assert options.view_as(DebugOptions).lookup_experiment("disable_logging_submission_environment")


def test_a_time_that_the_user_names_is_kept(job_endpoint: str) -> None:
    options = parse_beam_options(
        ["--runner=portable", f"--job_endpoint={job_endpoint}", "--environment_cache_millis=90000"]
    )
    prepare_job_service(options)
    assert int(options.view_as(PortableOptions).environment_cache_millis) == 90_000


def test_other_runners_are_left_as_they_are() -> None:
    for args in ([], ["--runner=DataflowRunner"]):
        options = parse_beam_options(args)
        before = options.get_all_options()
        prepare_job_service(options)
        assert options.get_all_options() == before
    assert parse_beam_options([]).view_as(StandardOptions).runner == LOCAL_RUNNER


def test_a_port_where_nobody_listens_is_refused_by_name() -> None:
    address = f"localhost:{free_port()}"
    with pytest.raises(ClusterUnavailable, match=rf"--job_endpoint={address}: expected a Beam job server, found unava"):
        check_job_endpoint(address)


def test_a_service_that_is_no_job_server_is_refused() -> None:
    server = grpc.server(ThreadPoolExecutor(2))
    port = server.add_insecure_port("localhost:0")
    server.start()
    with pytest.raises(ClusterUnavailable, match="unimplemented"):
        check_job_endpoint(f"localhost:{port}")
    server.stop(None).wait()


def test_a_port_that_never_answers_is_given_up() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        kept: list[socket.socket] = []
        thread = threading.Thread(target=lambda: kept.append(silent.accept()[0]))
        thread.start()
        with pytest.raises(ClusterUnavailable, match=r"deadline exceeded|unavailable"):
            check_job_endpoint(f"127.0.0.1:{silent.getsockname()[1]}", timeout_s=0.5)
        thread.join()
        kept[0].close()


@pytest.mark.parametrize("address", ["8099", "localhost", "localhost:job", ":8099"])
def test_an_address_without_host_or_port_is_refused(address: str) -> None:
    with pytest.raises(JobFileError, match="expected HOST:PORT"):
        check_job_endpoint(address)


def test_a_portable_run_without_an_address_is_refused_before_it_starts() -> None:
    with pytest.raises(JobFileError, match=r"expected --job_endpoint=HOST:PORT"):
        prepare_job_service(parse_beam_options(["--runner=PortableRunner"]))


def test_the_flink_runner_is_ours_and_starts_its_job_server_in_any_thread(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    options = parse_beam_options(
        ["--runner=FlinkRunner", "--flink_master=localhost:1", "--flink_job_server_jar=nothing.jar"]
    )
    prepare_job_service(options)
    runner = create_runner(options.view_as(StandardOptions).runner)
    assert type(runner) is FlinkRunner
    started: list[Any] = []
    monkeypatch.setattr(flink_runner.FlinkJarJobServer, "start", lambda server: started.append(server))
    monkeypatch.setattr(atexit, "register", started.append)
    thread = threading.Thread(target=lambda: runner.default_job_server(options).start())
    thread.start()
    thread.join()
    server, at_exit = started
    assert at_exit == server.stop
    assert job_service.FLINK_RUNNER.endswith(FlinkRunner.__qualname__)
