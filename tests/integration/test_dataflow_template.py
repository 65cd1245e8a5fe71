"""A job for Dataflow without the cloud: Beam's own client stages it on a GCS server here, and what it staged runs.

The command, the launcher of the flex template and the workers all come from the images' lock and the wheel, in a
virtual environment of their own; the checkout is not on their path. What a container would be is a process with the
image's entry point and environment, see `tests/support/jobs/staged_pipelines.py`.
"""

import base64
import bz2
import contextlib
import json
import os
import subprocess
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest
from apache_beam.portability.api import beam_runner_api_pb2

from tests.support.clean_environment import clean_environment, image_entry_point, image_variables
from tests.support.jobs.s3_jobs import NUM_ROWS, tables, write_job
from tests.support.jobs.staged_pipelines import Image, run_staged
from tests.support.jobs.user_project import SCHEMA, write_packages
from tests.support.paths import ROOT
from tests.support.servers import beam_boot
from tests.support.servers.gcs_server import GcsServer

pytestmark = pytest.mark.integration

IMAGE = "images/moebeam-worker:cuda"
L4 = "type:nvidia-l4;count:1;install-nvidia-driver"
SECRET = "sk-not-to-be-seen"
TIMEOUT_S = 300
ACCELERATOR, MIN_RAM = "beam:resources:accelerator:v1", "beam:resources:min_ram_bytes:v1"


@dataclass(frozen=True)
class Launcher:
    """A machine that starts jobs: the wheel's environment, a project of its own, and a bucket.

    Attributes:
        folder: the project, whose packages are named like moebeam's and found before any other.
        job: the job's folder on this machine, of which input, script and checkpoint lie in the bucket too.
    """

    programs: Path
    folder: Path
    job: Path
    server: GcsServer
    bucket: str

    @property
    def environment(self) -> dict[str, str]:
        path = f"{self.programs}{os.pathsep}{os.defpath}"
        return {
            **self.server.environment,
            "PATH": path,
            "HOME": str(self.folder),
            "PYTHONPATH": str(self.folder),
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "200",
            "DEEPSEEK_API_KEY": SECRET,
        }

    def run(self, *command: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            command,
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )

    def dataflow(self, name: str) -> list[str]:
        """Beam's options for a job template of this name."""
        return [
            "--runner=DataflowRunner",
            "--project=proj-test",
            "--region=us-central1",
            f"--temp_location={self.bucket}/tmp",
            f"--staging_location={self.bucket}/staging/{name}",
            f"--template_location={self.bucket}/templates/{name}",
            f"--sdk_container_image={IMAGE}",
            "--no_auth",
        ]

    def objects(self, prefix: str) -> dict[str, bytes]:
        """Objects of the bucket by what follows a prefix."""
        bucket = self.bucket.removeprefix("gs://")
        listing = f"{self.server.address}/storage/v1/b/{bucket}/o"
        found = httpx2.get(listing, params={"prefix": prefix}, timeout=TIMEOUT_S).json().get("items", [])
        return {
            item["name"].removeprefix(prefix): httpx2.get(item["mediaLink"], timeout=TIMEOUT_S).content
            for item in found
        }


@pytest.fixture(scope="module")
def launcher(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Iterator[Launcher]:
    folder = tmp_path_factory.mktemp("dataflow")
    for name in ("server", "environment", "home"):
        (folder / name).mkdir()
    write_packages(folder / "home")
    server = GcsServer(folder / "server")
    server.start()
    try:
        job = write_job(folder / "job", tiny_checkpoint)
        bucket = server.bucket("jobs-of-tests")
        for path in sorted(job.rglob("*")):
            if path.is_file():
                upload_object(server, bucket, f"job/{path.relative_to(job)}", path.read_bytes())
        yield Launcher(clean_environment(folder / "environment"), folder / "home", job, server, bucket)
    finally:
        server.kill()


def upload_object(server: GcsServer, bucket: str, name: str, content: bytes) -> None:
    upload = f"{server.address}/upload/storage/v1/b/{bucket.removeprefix('gs://')}/o"
    httpx2.post(upload, params={"uploadType": "media", "name": name}, content=content, timeout=TIMEOUT_S)


@dataclass(frozen=True)
class Staged:
    """What a command wrote: its summary, the job template, and the pipeline as the service would run it."""

    summary: Mapping[str, Any]
    errors: str
    template: Mapping[str, Any]
    content: bytes

    @property
    def components(self) -> beam_runner_api_pb2.Components:
        return beam_runner_api_pb2.Pipeline.FromString(self.content).components


@pytest.fixture(scope="module")
def staged(launcher: Launcher) -> Staged:
    """The job with its schema and prices on the launcher's disk, which are gone afterwards."""
    local = launcher.folder / "only-here"
    local.mkdir()
    for name in ("answer.schema.json", "prices.csv"):
        (launcher.job / name).rename(local / name)
    job = [
        f"{launcher.bucket}/job/job.toml",
        "--json",
        "--set",
        f"model.accelerator={L4}",
        "--set",
        "model.min_ram=64GB",
    ]
    job += ["--set", f"output.schema={local}/answer.schema.json", "--set", f"accounting.price_book={local}/prices.csv"]
    ended = launcher.run("moebeam", "run", *job, *launcher.dataflow("job"))
    for path in local.iterdir():
        path.rename(launcher.job / path.name)
    assert ended.returncode == 0, ended.stderr
    (pipeline,) = [name for name in launcher.objects("staging/job") if name.endswith("/pipeline.pb")]
    return Staged(
        json.loads(ended.stdout),
        ended.stderr,
        json.loads(launcher.objects("templates/job")[""]),
        launcher.objects("staging/job")[pipeline],
    )


def hints_of(components: beam_runner_api_pb2.Components) -> dict[str, dict[str, str]]:
    """The resource hints of every step that has any."""
    steps = [step for step in components.transforms.values() if not step.subtransforms and step.environment_id]
    hints = {step.unique_name: components.environments[step.environment_id].resource_hints for step in steps}
    return {name: {urn: value.decode() for urn, value in found.items()} for name, found in hints.items() if found}


def opened(payload: bytes) -> bytes:
    """A payload as Beam's pickler packed it, or as it is."""
    with contextlib.suppress(ValueError):
        packed = base64.b64decode(payload, validate=True)
        for unpack in (zlib.decompress, bz2.decompress):
            with contextlib.suppress(zlib.error, OSError, ValueError):
                return unpack(packed)
    return payload


def payloads(components: beam_runner_api_pb2.Components) -> Iterator[bytes]:
    """Everything in a pipeline that Beam pickled."""
    for step in components.transforms.values():
        yield step.spec.payload
        if step.spec.urn == "beam:transform:pardo:v1":
            yield opened(beam_runner_api_pb2.ParDoPayload.FromString(step.spec.payload).do_fn.payload)
    for coder in components.coders.values():
        yield opened(coder.spec.payload)


def test_writing_a_template_is_a_success_that_says_where_it_lies(launcher: Launcher, staged: Staged) -> None:
    assert (staged.summary["status"], staged.summary["exit_code"]) == ("staged", 0)
    assert staged.summary["num_results"] == 0
    assert f"{launcher.bucket}/templates/job starts the job" in staged.summary["message"]
    assert "a job template is written; nothing was run, nothing was paid" in staged.errors
    assert "NoneType" not in staged.errors


def test_the_step_that_answers_asks_for_the_accelerator_and_no_other(staged: Staged) -> None:
    assert hints_of(staged.components) == {"Answer/AnswerShard": {ACCELERATOR: L4, MIN_RAM: str(64 * 10**9)}}


def test_what_comes_before_and_after_the_answer_is_parted_from_it_by_a_shuffle(staged: Staged) -> None:
    steps = staged.components.transforms.values()
    readers = {name: step for step in steps for name in step.inputs.values() if not step.subtransforms}
    (answer,) = [step for step in steps if step.unique_name == "Answer/AnswerShard"]
    names: list[str] = []
    step = answer
    while step.spec.urn != "beam:transform:group_by_key:v1":
        step = readers[next(iter(step.outputs.values()))]
        names.append(step.unique_name)
    assert all(name.startswith("Publish/SpreadCommits/") for name in names), names


def test_every_worker_runs_the_image_that_was_named(staged: Staged) -> None:
    environments = staged.components.environments.values()
    images = [beam_runner_api_pb2.DockerPayload.FromString(found.payload).container_image for found in environments]
    assert images == [IMAGE, IMAGE]
    pool = staged.template["environment"]["workerPools"][0]
    assert [found["containerImage"] for found in pool["sdkHarnessContainerImages"]] == [IMAGE, IMAGE]
    # A list of what the launcher has installed, for people; nothing that a worker would have to install.
    files = {found.role_payload.decode().strip() for step in environments for found in step.dependencies}
    assert {file.lstrip("'") for file in files} == {"submission_environment_dependencies.txt"}


def test_the_template_holds_the_options_and_names_the_staged_pipeline(launcher: Launcher, staged: Staged) -> None:
    options = staged.template["environment"]["sdkPipelineOptions"]["options"]
    assert (options["project"], options["region"]) == ("proj-test", "us-central1")
    assert options["pipelineUrl"].startswith(f"{launcher.bucket}/staging/job/")
    assert options["save_main_session"] is False
    assert staged.template["type"] == "JOB_TYPE_BATCH"


def test_no_secret_of_the_launchers_environment_is_staged(staged: Staged) -> None:
    texts = [json.dumps(staged.template).encode(), staged.content, *payloads(staged.components)]
    assert not [text for text in texts if SECRET.encode() in text]


def test_nothing_staged_leads_to_a_file_of_the_launcher(launcher: Launcher, staged: Staged) -> None:
    content = b"\n".join(payloads(staged.components))
    assert b"gs://jobs-of-tests/job/script.json" in content
    for folder in (launcher.job, launcher.folder / "only-here", ROOT):
        # Schema and prices travel by content; what names their files is for people.
        read = content.replace(f"{folder}/answer.schema.json".encode(), b"")
        assert str(folder).encode() not in read


def answer_in_containers(launcher: Launcher, pipeline_pb: bytes, folder: Path) -> None:
    """Run a staged pipeline, whose workers know nothing of the launcher's machine."""
    pipeline = folder / "pipeline.pb"
    pipeline.write_bytes(pipeline_pb)
    image = Image(
        name=IMAGE,
        folder=str(folder),
        environment={
            **image_variables("worker-cpu"),
            **launcher.server.environment,
            "PATH": f"{launcher.programs}{os.pathsep}{os.defpath}",
            "BEAM_BOOT": str(beam_boot.install()),
            "OMP_NUM_THREADS": "1",
        },
        entry_point=image_entry_point("worker-cpu"),
    )
    assert run_staged(pipeline, image).strip() == "DONE"


def download(launcher: Launcher, prefix: str, folder: Path) -> None:
    for name, content in launcher.objects(prefix).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def test_the_staged_pipeline_gives_the_tables_of_the_local_runner(
    launcher: Launcher, staged: Staged, tmp_path: Path
) -> None:
    on_disk = launcher.run("moebeam", "run", str(launcher.job / "job.toml"), "--set", f"output.path={tmp_path}/direct")
    assert on_disk.returncode == 0, on_disk.stderr
    answer_in_containers(launcher, staged.content, tmp_path)
    assert len([*tmp_path.glob("container-*")]) == 2  # one that answers, one for all else
    download(launcher, "job/out/", tmp_path / "dataflow")
    found = tables(tmp_path / "dataflow")
    assert found == tables(tmp_path / "direct")
    assert len(found["results"]) + len(found["rejects"]) == NUM_ROWS
    assert json.loads((tmp_path / "dataflow" / "manifest.json").read_text())["status"] == "complete"
    status = launcher.run("moebeam", "status", f"{launcher.bucket}/job/out")
    assert status.returncode == 0, status.stderr


def test_a_class_of_the_projects_own_travels_with_the_staged_pipeline(launcher: Launcher, tmp_path: Path) -> None:
    job = [f"{launcher.bucket}/job/job.toml", "--set", f"output.schema={SCHEMA}"]
    job += ["--set", f"output.path={launcher.bucket}/job/reviewed"]
    ended = launcher.run("moebeam", "run", *job, *launcher.dataflow("reviewed"))
    assert ended.returncode == 0, ended.stderr
    staged = launcher.objects("staging/reviewed")
    (pipeline,) = [name for name in staged if name.endswith("/pipeline.pb")]
    answer_in_containers(launcher, staged[pipeline], tmp_path)
    download(launcher, "job/reviewed/", tmp_path / "dataflow")
    rows = tables(tmp_path / "dataflow")["results"]
    assert rows
    assert all(row["output"]["num_prompt_tokens"] >= 1 for row in rows)


def test_the_flex_template_stages_the_same_pipeline_and_ends(launcher: Launcher, staged: Staged) -> None:
    python = launcher.programs / "python"
    where = launcher.run(
        str(python), "-c", "import moebeam.jobs.containers.flex_launcher as found; print(found.__file__)"
    )
    parameters = [f"--job_file={launcher.bucket}/job/job.toml", f"--output={launcher.bucket}/flex", "--limit=7"]
    parameters += ["--max_requests=500", f'--overrides=["model.accelerator={L4}", "model.min_ram=64GB"]']
    ended = launcher.run(str(python), where.stdout.strip(), *parameters, *launcher.dataflow("flex"))
    assert ended.returncode == 0, ended.stderr
    (pipeline,) = [
        content for name, content in launcher.objects("staging/flex").items() if name.endswith("/pipeline.pb")
    ]
    components = beam_runner_api_pb2.Pipeline.FromString(pipeline).components
    assert hints_of(components) == hints_of(staged.components)
    steps = [{step.unique_name for step in found.transforms.values()} for found in (components, staged.components)]
    assert steps[0] == steps[1]
    assert json.loads(launcher.objects("flex/_moebeam/job.json")[""])["limit"] == 7


def test_options_that_dataflow_misses_are_named_before_the_output_is_touched(launcher: Launcher) -> None:
    job = [f"{launcher.bucket}/job/job.toml", "--set", f"output.path={launcher.bucket}/untouched"]
    ended = launcher.run("moebeam", "run", *job, "--runner=DataflowRunner", f"--sdk_container_image={IMAGE}")
    assert ended.returncode == 2
    assert "--runner=DataflowRunner: Missing required option: project" in ended.stderr
    assert "temp_location" in ended.stderr
    assert launcher.objects("untouched") == {}
