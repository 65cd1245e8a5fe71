"""Beam's options for Dataflow, completed and checked before anything is staged.

Runs after `jobs/check/beam_options.py`, which is independent of the runner. Missing options, paths that workers cannot
read, and a container without moebeam fail at the command here; Dataflow would report them after minutes, on workers
that cost money.
"""

import importlib
import logging
import re
from collections.abc import Iterator

from apache_beam.options.pipeline_options import (
    DebugOptions,
    GoogleCloudOptions,
    PipelineOptions,
    SetupOptions,
    StandardOptions,
    WorkerOptions,
)
from apache_beam.options.pipeline_options_validator import PipelineOptionsValidator
from apache_beam.runners import create_runner

from moebeam.jobs.deploy.dataflow.worker_paths import find_local_paths
from moebeam.schemas.errors import JobFileError
from moebeam.schemas.job.sections import Job

ONE_PROCESS = "no_use_multiple_sdk_containers"
"""Beam's experiment for one worker process per machine; by default Dataflow starts one per core."""

_CLIENT = "apache_beam.runners.dataflow.internal.apiclient"
"""The part of Beam that needs the extra to be imported."""

_PROCESS_EXPERIMENTS = (ONE_PROCESS, "use_multiple_sdk_containers", "use_sibling_sdk_workers")
_ONE_DEVICE_ENGINES = ("torch", "transformers")
"""Engines that keep one model per process on one device, and answer one shard at a time."""

_DEVICE_COUNT = re.compile(r";count:(\d*[2-9]|[1-9]\d+)(?:;|$)")
_LOGGER = logging.getLogger(__name__)


def is_dataflow(options: PipelineOptions) -> bool:
    """Whether the pipeline runs on Dataflow."""
    runner: str | None = options.view_as(StandardOptions).runner
    return (runner or "").rpartition(".")[2].lower() in ("dataflow", "dataflowrunner")


def complete_dataflow_options(options: PipelineOptions, job: Job, reuse: str | None = None) -> None:
    """Complete and check the options of a job on Dataflow; no-op for other runners.

    Args:
        options: changed in place where unset: for engines with a model in the process, one process per machine and
            one thread in it.
        reuse: output of the earlier run whose answers are reused, if any.
    Raises:
        JobFileError: all problems, one per line.
    """
    if not is_dataflow(options):
        return
    problems = [*_check_options(options), *_check_resources(options, job), *find_local_paths(job, reuse)]
    if problems:
        raise JobFileError("\n".join(problems))
    _share_model(options, job)


def _check_options(options: PipelineOptions) -> Iterator[str]:
    """Report missing or malformed options, and a container without moebeam, which Beam cannot detect."""
    yield from _check_client(options)
    setup = options.view_as(SetupOptions)
    brings_packages = setup.requirements_file or setup.setup_file or setup.extra_packages
    if not options.view_as(WorkerOptions).sdk_container_image and not brings_packages:
        yield (
            "--sdk_container_image: missing; Beam's own image has no moebeam in it, so name one that was built from "
            "jobs/containers/Dockerfile, or bring moebeam with --extra_package"
        )


def _check_client(options: PipelineOptions) -> Iterator[str]:
    """Report a missing client for Dataflow, or what Beam's own validator finds wrong with the options."""
    try:
        importlib.import_module(_CLIENT)
    except ImportError as error:
        yield f"--runner=DataflowRunner: needs Google's client, install moebeam[gcp] ({error})"
        return
    runner = create_runner(options.view_as(StandardOptions).runner)
    found: list[str] = PipelineOptionsValidator(options, runner).validate()
    yield from (f"--runner=DataflowRunner: {problem}" for problem in found)


def _check_resources(options: PipelineOptions, job: Job) -> Iterator[str]:
    """Report options that Dataflow does not allow with resource hints."""
    google = options.view_as(GoogleCloudOptions)
    services: list[str] = google.dataflow_service_options or []
    for_all = [service for service in services if service.startswith("worker_accelerator=")]
    if "accelerator" in job.model.resource_hints and for_all:
        yield (
            f"--dataflow_service_options={for_all[0]}: gives every worker an accelerator, but [model] accelerator "
            "asks for one where rows are answered; leave one of them out"
        )
    num_devices = _DEVICE_COUNT.search(job.model.resource_hints.get("accelerator", ""))
    if num_devices is not None and job.model.engine in _ONE_DEVICE_ENGINES and not _has_chosen_processes(options):
        yield (
            f"[model] accelerator: asks for {num_devices[1]} devices a machine, of which engine {job.model.engine!r} "
            "uses one; ask for count:1 and more workers, or take the engine 'vllm', which spreads a model over them"
        )
    if job.model.resource_hints and google.flexrs_goal is not None:
        yield "--flexrs_goal: Dataflow knows no resource hints with it; leave out [model] accelerator and min_ram"


def _share_model(options: PipelineOptions, job: Job) -> None:
    """Make a machine load the model once: processes share no memory, but threads share one engine."""
    engine = job.model.engine
    if not job.model.has_weights or _has_chosen_processes(options):
        return
    debug = options.view_as(DebugOptions)
    debug.add_experiment(ONE_PROCESS)
    _LOGGER.info("--experiments=%s: one process a machine, so that each machine holds the model once", ONE_PROCESS)
    if engine in _ONE_DEVICE_ENGINES and debug.number_of_worker_harness_threads is None:
        # Concurrent shards in a process take turns on the model, but each holds its own device memory.
        debug.number_of_worker_harness_threads = 1
        _LOGGER.info("--number_of_worker_harness_threads=1: a machine answers one shard at a time")


def _has_chosen_processes(options: PipelineOptions) -> bool:
    """Whether the user set the number of processes per machine."""
    experiments: list[str] = options.view_as(DebugOptions).experiments or []
    return any(experiment.partition("=")[0] in _PROCESS_EXPERIMENTS for experiment in experiments)
