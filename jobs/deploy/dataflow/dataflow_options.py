"""Beam's options for Dataflow, completed and checked before anything is staged.

Stands between `jobs/check/beam_options.py`, which knows no runner, and the pipeline. What Dataflow itself would find
out after minutes, on workers that cost money, is an error of the command here: options that are missing, paths that no
worker can read, a container without moebeam in it.
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

from moebeam.jobs.deploy.dataflow.worker_paths import local_paths
from moebeam.schemas.errors import JobFileError
from moebeam.schemas.job.sections import Job

ONE_PROCESS = "no_use_multiple_sdk_containers"
"""Beam's experiment for one worker process a machine; without it Dataflow starts one for each of its cores."""

_CLIENT = "apache_beam.runners.dataflow.internal.apiclient"
"""The part of Beam that cannot be imported without its extra."""

_PROCESS_EXPERIMENTS = (ONE_PROCESS, "use_multiple_sdk_containers", "use_sibling_sdk_workers")
_OF_ONE_DEVICE = ("torch", "transformers")
"""Engines that keep one model on one device in a process, and answer one shard at a time."""

_DEVICE_COUNT = re.compile(r";count:(\d*[2-9]|[1-9]\d+)(?:;|$)")
_LOGGER = logging.getLogger(__name__)


def is_dataflow(options: PipelineOptions) -> bool:
    """Whether Dataflow is to run the pipeline."""
    runner: str | None = options.view_as(StandardOptions).runner
    return (runner or "").rpartition(".")[2].lower() in ("dataflow", "dataflowrunner")


def settle_options(options: PipelineOptions, job: Job, reuse: str | None = None) -> None:
    """Complete and check the options of a job for Dataflow; those for other runners are left as they are.

    Args:
        options: changed in place, only where nothing was said: one process a machine, and one thread in it, for
            engines that hold a model in the process.
        reuse: output of the earlier run whose answers are taken over, if any.
    Raises:
        JobFileError: with every problem found, one a line.
    """
    if not is_dataflow(options):
        return
    problems = [*_option_problems(options), *_resource_problems(options, job), *local_paths(job, reuse)]
    if problems:
        raise JobFileError("\n".join(problems))
    _share_the_model(options, job)


def _option_problems(options: PipelineOptions) -> Iterator[str]:
    """What is missing or ill-formed, and a container without moebeam, which Beam cannot know."""
    yield from _client_problems(options)
    setup = options.view_as(SetupOptions)
    brings_packages = setup.requirements_file or setup.setup_file or setup.extra_packages
    if not options.view_as(WorkerOptions).sdk_container_image and not brings_packages:
        yield (
            "--sdk_container_image: missing; Beam's own image has no moebeam in it, so name one that was built from "
            "jobs/containers/Dockerfile, or bring moebeam with --extra_package"
        )


def _client_problems(options: PipelineOptions) -> Iterator[str]:
    """What Beam's own client says of the options, once it is installed."""
    try:
        importlib.import_module(_CLIENT)
    except ImportError as error:
        yield f"--runner=DataflowRunner: needs Google's client, install moebeam[gcp] ({error})"
        return
    runner = create_runner(options.view_as(StandardOptions).runner)
    found: list[str] = PipelineOptionsValidator(options, runner).validate()
    yield from (f"--runner=DataflowRunner: {problem}" for problem in found)


def _resource_problems(options: PipelineOptions, job: Job) -> Iterator[str]:
    """What Dataflow does not allow beside resource hints."""
    google = options.view_as(GoogleCloudOptions)
    services: list[str] = google.dataflow_service_options or []
    for_all = [service for service in services if service.startswith("worker_accelerator=")]
    if "accelerator" in job.model.resource_hints and for_all:
        yield (
            f"--dataflow_service_options={for_all[0]}: gives every worker an accelerator, but [model] accelerator "
            "asks for one where rows are answered; leave one of them out"
        )
    num_devices = _DEVICE_COUNT.search(job.model.resource_hints.get("accelerator", ""))
    if num_devices is not None and job.model.engine in _OF_ONE_DEVICE and not _chosen_processes(options):
        yield (
            f"[model] accelerator: asks for {num_devices[1]} devices a machine, of which engine {job.model.engine!r} "
            "uses one; ask for count:1 and more workers, or take the engine 'vllm', which spreads a model over them"
        )
    if job.model.resource_hints and google.flexrs_goal is not None:
        yield "--flexrs_goal: Dataflow knows no resource hints with it; leave out [model] accelerator and min_ram"


def _share_the_model(options: PipelineOptions, job: Job) -> None:
    """See that a machine loads a model once: its processes share no memory, and its threads share one engine."""
    engine = job.model.engine
    if not job.model.has_weights or _chosen_processes(options):
        return
    debug = options.view_as(DebugOptions)
    debug.add_experiment(ONE_PROCESS)
    _LOGGER.info("--experiments=%s: one process a machine, so that each machine holds the model once", ONE_PROCESS)
    if engine in _OF_ONE_DEVICE and debug.number_of_worker_harness_threads is None:
        # Shards at work in one process take turns at the model, but each keeps memory of its own on the device.
        debug.number_of_worker_harness_threads = 1
        _LOGGER.info("--number_of_worker_harness_threads=1: a machine answers one shard at a time")


def _chosen_processes(options: PipelineOptions) -> bool:
    """Whether the user said how many processes a machine has."""
    experiments: list[str] = options.view_as(DebugOptions).experiments or []
    return any(experiment.partition("=")[0] in _PROCESS_EXPERIMENTS for experiment in experiments)
