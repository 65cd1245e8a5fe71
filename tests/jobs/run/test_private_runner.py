"""Workers of the local runner are reached by their user alone; other pipelines stay as Beam runs them."""

import stat
from collections.abc import Iterator
from pathlib import Path

import apache_beam as beam
import grpc
import psutil
import pytest
from apache_beam.options.pipeline_options import DirectOptions, PipelineOptions
from apache_beam.runners.portability.fn_api_runner import worker_handlers
from apache_beam.testing.util import assert_that, equal_to
from apache_beam.utils.thread_pool_executor import shared_unbounded_instance

from moebeam.jobs.check.beam_options import parse_beam_options
from moebeam.jobs.run.local_runner import make_local_runner
from moebeam.jobs.run.private_runner import PrivateRunner
from moebeam.schemas.errors import PipelineFailed

THREADS = ["--direct_running_mode=multi_threading", "--direct_num_workers=2"]


def ports() -> set[int]:
    """The ports on which this process listens."""
    return {one.laddr.port for one in psutil.Process().net_connections("tcp") if one.status == psutil.CONN_LISTEN}


def sockets() -> list[Path]:
    """The named sockets of this process that are in a folder of a runner."""
    names = {one.laddr for one in psutil.Process().net_connections("unix") if isinstance(one.laddr, str)}
    return [Path(name) for name in names if name.startswith("/") and "moebeam-" in name]


def look(before: set[int]) -> Iterator[tuple[bool, bool, bool]]:
    """From within a worker: whether ports were opened, sockets are there, and their folders keep others out."""
    folders = {socket.parent for socket in sockets()}
    yield ports() == before, bool(folders), all(stat.S_IMODE(folder.stat().st_mode) == 0o700 for folder in folders)


def test_workers_are_reached_by_sockets_in_a_folder_of_the_user(tmp_path: Path) -> None:
    before = ports()
    options = parse_beam_options(THREADS)
    with beam.Pipeline(make_local_runner(options, tmp_path), options=options) as pipeline:
        seen = pipeline | beam.Create([before], reshuffle=False) | beam.FlatMap(look)
        assert_that(seen, equal_to([(True, True, True)]))
    assert sockets() == []


def test_processes_get_a_runner_that_starts_them_itself(tmp_path: Path) -> None:
    options = parse_beam_options(["--direct_running_mode=multi_processing", "--direct_num_workers=2"])
    assert isinstance(make_local_runner(options, tmp_path), PrivateRunner)
    assert options.view_as(DirectOptions).direct_running_mode is None


def test_a_cluster_keeps_its_own_runner(tmp_path: Path) -> None:
    assert make_local_runner(PipelineOptions(["--runner=PortableRunner"]), tmp_path) is None


def test_servers_of_other_pipelines_stay_on_ports() -> None:
    handlers_grpc = vars(worker_handlers)["grpc"]
    assert handlers_grpc.insecure_channel is grpc.insecure_channel
    server = handlers_grpc.server(shared_unbounded_instance())
    assert isinstance(server.add_insecure_port("localhost:0"), int)
    server.stop(None)


def test_a_version_of_beam_that_opens_ports_all_the_same_is_refused() -> None:
    constructor, _ = vars(worker_handlers.WorkerHandler)["_registered_environments"]["moebeam:env:local_process:v1"]
    with pytest.raises(PipelineFailed, match="found one on port 4711"):
        constructor.port_from_worker(None, 4711)
