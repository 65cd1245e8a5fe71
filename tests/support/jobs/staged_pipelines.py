"""Runs a pipeline that was staged for Dataflow, as it lies in the bucket, on Beam's portable runner.

Its workers are containers. There is no container engine here, so a program named `docker` stands in for one: it starts
what the image's entry point starts, with the image's environment and the arguments that Beam gives, as a process in
an empty folder. Nothing else of the tests' own environment reaches it.

`python -m tests.support.jobs.staged_pipelines PIPELINE_PB` runs the pipeline; `... docker ARGS` is the stand-in.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.support.paths import ROOT
from tests.support.servers.local_servers import guarded

RUN_TIMEOUT_S = 300
_LAST_WORDS = 3000
_NOTHING_STAGED = "__no_artifacts_staged__"
_IMAGE_VARIABLE = "STAND_IN_IMAGE"


class StagedPipelineError(Exception):
    """A staged pipeline did not run to its end."""


@dataclass(frozen=True, slots=True)
class Image:
    """What a container of an image is.

    Attributes:
        folder: each container works in a folder of its own below it, and its output lies there.
        environment: all that its processes have in their environment.
        entry_point: the program and its first arguments.
    """

    name: str
    folder: str
    environment: Mapping[str, str]
    entry_point: Sequence[str]


def run_staged(pipeline_pb: Path, image: Image) -> str:
    """Run a staged pipeline whose workers are containers of `image`; what the runner says of its end.

    Raises:
        StagedPipelineError: it failed, or did not end in time; with the end of what runner and containers wrote.
    """
    programs = Path(image.folder) / "programs"
    programs.mkdir(parents=True, exist_ok=True)
    docker = programs / "docker"
    docker.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m tests.support.jobs.staged_pipelines docker "$@"\n')
    docker.chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        _IMAGE_VARIABLE: json.dumps(asdict(image)),
    }
    command = [sys.executable, "-m", "tests.support.jobs.staged_pipelines", str(pipeline_pb)]
    log = Path(image.folder) / "runner.log"
    with log.open("wb") as sink:
        runner = subprocess.Popen(
            guarded(command), cwd=image.folder, env=environment, stdout=subprocess.PIPE, stderr=sink, text=True
        )
    try:
        said, _ = runner.communicate(timeout=RUN_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        runner.kill()
        runner.communicate()
    finally:
        for started in Path(image.folder).glob("*.log"):
            if started.stem.isdecimal() and _is_running(int(started.stem)):
                os.killpg(int(started.stem), signal.SIGKILL)
    if runner.returncode:
        logs = [log, *Path(image.folder).glob("container-*/log")]
        words = [f"{path}: {path.read_text(errors='replace')[-_LAST_WORDS:]}" for path in logs]
        raise StagedPipelineError("\n".join([f"the runner ended with {runner.returncode}", *words]))
    return said


def _run_pipeline(path: Path) -> None:
    from apache_beam.options.pipeline_options import PipelineOptions
    from apache_beam.portability.api import beam_provision_api_pb2, beam_runner_api_pb2
    from apache_beam.runners.portability.fn_api_runner.fn_runner import ExtendedProvisionInfo, FnApiRunner

    pipeline = beam_runner_api_pb2.Pipeline.FromString(path.read_bytes())
    # With the runner's own token the boot program would ask for files by a protocol that this runner never had.
    provision = beam_provision_api_pb2.ProvisionInfo(retrieval_token=_NOTHING_STAGED)
    runner = FnApiRunner(provision_info=ExtendedProvisionInfo(provision))
    result = runner.run_via_runner_api(pipeline, PipelineOptions([]))
    result.wait_until_finish()
    print(result.state)


def _docker(args: Sequence[str]) -> None:
    """The few commands of Docker that Beam uses."""
    image = Image(**json.loads(os.environ[_IMAGE_VARIABLE]))
    if args[0] == "run":
        print(_start(image, args[list(args).index(image.name) + 1 :]))
    elif args[0] == "inspect":
        print("running" if _is_running(int(args[-1])) else "exited")
    elif args[:2] == ["container", "logs"]:
        sys.stdout.write((Path(image.folder) / f"{args[-1]}.log").read_text(errors="replace"))
    elif args[0] == "kill" and _is_running(int(args[-1])):
        os.killpg(int(args[-1]), signal.SIGKILL)


def _start(image: Image, args: Sequence[str]) -> int:
    container = tempfile.mkdtemp(dir=image.folder, prefix="container-")
    log = Path(container) / "log"
    with log.open("wb") as sink:
        process = subprocess.Popen(
            [*image.entry_point, *args, f"--semi_persist_dir={container}"],
            cwd=container,
            env={**image.environment, "HOME": container},
            stdin=subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
            start_new_session=True,
        )
    (Path(image.folder) / f"{process.pid}.log").symlink_to(log)
    return process.pid


def _is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


if __name__ == "__main__":
    if sys.argv[1] == "docker":
        _docker(sys.argv[2:])
    else:
        _run_pipeline(Path(sys.argv[1]))
