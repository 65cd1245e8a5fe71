"""The flex template: its parameters become `moebeam run`, and its description names just those."""

import itertools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from moebeam.jobs.check.job_file import load_job
from moebeam.jobs.containers.flex_launcher import PARAMETERS, WORKER_IMAGE_VARIABLE, run_arguments
from moebeam.jobs.containers.worker_start import SECRETS_VARIABLE, secret_variables
from moebeam.schemas.errors import EngineLoadError, JobFileError
from tests.support.paths import ROOT

METADATA = ROOT / "jobs" / "deploy" / "dataflow" / "metadata.json"
EXAMPLES: Mapping[str, str] = {
    "job_file": "gs://bucket/jobs/reviews.toml",
    "input": "gs://bucket/in/*.parquet",
    "output": "gs://bucket/out",
    "limit": "50",
    "reuse": "gs://bucket/yesterday",
    "max_cost": "12.5",
    "max_input_tokens": "1000000",
    "max_output_tokens": "1000000",
    "max_requests": "7",
    "deadline": "2026-12-01T06:00:00Z",
    "overrides": '["sampling.max_tokens=256", "model.accelerator=type:nvidia-l4;count:1"]',
}
JOB = """\
[input]
path = "in"
[prompt]
template = "{{ text }}"
[output]
path = "out"
"""


def parameters() -> list[dict[str, Any]]:
    return json.loads(METADATA.read_text())["parameters"]


def test_the_template_describes_exactly_the_parameters_that_the_launcher_reads() -> None:
    assert [parameter["name"] for parameter in parameters()] == list(EXAMPLES)
    assert {parameter["name"] for parameter in parameters()} == {*PARAMETERS, "job_file", "limit", "reuse", "overrides"}
    assert [parameter["name"] for parameter in parameters() if not parameter["isOptional"]] == ["job_file"]


def test_the_template_accepts_what_the_launcher_reads_and_nothing_on_a_disk() -> None:
    for parameter in parameters():
        (pattern,) = parameter["regexes"]
        assert re.search(pattern, EXAMPLES[parameter["name"]]), parameter["name"]
        assert not re.search(pattern, "")
    for name in ("job_file", "input", "output", "reuse"):
        (pattern,) = next(parameter["regexes"] for parameter in parameters() if parameter["name"] == name)
        assert not re.search(pattern, "/home/me/job.toml")


def test_every_parameter_reaches_the_job(tmp_path: Path) -> None:
    file = tmp_path / "job.toml"
    file.write_text(JOB)
    args = [f"--{name}={value}" for name, value in {**EXAMPLES, "job_file": str(file)}.items()]
    command = run_arguments(args, {})
    overrides = [value for flag, value in itertools.pairwise(command) if flag == "--set"]
    job = load_job(command[1], overrides)
    assert command[0] == "run"
    assert (job.input.path, job.output.path) == (EXAMPLES["input"], EXAMPLES["output"])
    assert job.limits.model_dump(mode="json") == {
        "max_cost": "12.5",
        "max_input_tokens": 1_000_000,
        "max_output_tokens": 1_000_000,
        "max_requests": 7,
        "deadline": "2026-12-01T06:00:00Z",
    }
    assert (job.sampling.max_tokens, job.model.accelerator) == (256, "type:nvidia-l4;count:1")
    assert command[-4:] == ["--limit", "50", "--reuse", "gs://bucket/yesterday"]


def test_a_deadline_in_minutes_stays_a_number(tmp_path: Path) -> None:
    file = tmp_path / "job.toml"
    file.write_text(JOB)
    command = run_arguments([f"--job_file={file}", "--deadline=90"], {})
    assert load_job(command[1], [command[3]]).limits.deadline == 90


def test_what_is_no_parameter_is_passed_on_to_beam() -> None:
    beam = ["--runner=DataflowRunner", "--template_location=gs://bucket/staged/t", "--labels=a=b"]
    assert run_arguments(["--job_file=gs://b/j.toml", *beam], {}) == ["run", "gs://b/j.toml", *beam]


def test_parameters_that_a_form_sends_empty_are_left_out() -> None:
    empty = [f"--{name}=" for name in EXAMPLES if name != "job_file"]
    assert run_arguments(["--job_file=gs://b/j.toml", *empty], {}) == ["run", "gs://b/j.toml"]


def test_one_override_needs_no_list() -> None:
    command = run_arguments(["--job_file=gs://b/j.toml", "--overrides=sampling.max_tokens=9"], {})
    assert command == ["run", "gs://b/j.toml", "--set", "sampling.max_tokens=9"]


@pytest.mark.parametrize("overrides", ["[1]", '["a=1"', "[null]"])
def test_overrides_that_are_no_list_of_texts_are_refused(overrides: str) -> None:
    with pytest.raises(JobFileError, match="--overrides: expected"):
        run_arguments(["--job_file=gs://b/j.toml", f"--overrides={overrides}"], {})


def test_a_missing_job_file_is_named() -> None:
    with pytest.raises(JobFileError, match="--job_file: missing"):
        run_arguments(["--output=gs://b/out"], {})


def test_workers_get_the_image_that_the_launcher_was_built_for_unless_another_is_named() -> None:
    environment = {WORKER_IMAGE_VARIABLE: "images/moebeam-worker:cuda"}
    job = "--job_file=gs://b/j.toml"
    assert run_arguments([job], environment)[-1] == "--sdk_container_image=images/moebeam-worker:cuda"
    named = "--sdk_container_image=images/other"
    assert run_arguments([job, named], environment)[2:] == [named]


def test_secrets_become_variables_and_those_that_are_set_are_not_read() -> None:
    entries = "KEY=projects/p/secrets/k/versions/latest OTHER=projects/p/secrets/o/versions/3"
    read: list[str] = []

    def access(name: str) -> str:
        read.append(name)
        return "hush"

    assert secret_variables({SECRETS_VARIABLE: entries, "OTHER": "here"}, access) == {"KEY": "hush"}
    assert read == ["projects/p/secrets/k/versions/latest"]
    assert secret_variables({}, access) == {}


def test_a_key_where_the_name_of_a_secret_belongs_is_refused_and_not_shown() -> None:
    with pytest.raises(EngineLoadError, match="expected VARIABLE=projects/") as raised:
        secret_variables({SECRETS_VARIABLE: "KEY=sk-0123456789"}, lambda name: name)
    assert "0123456789" not in str(raised.value)


def test_a_secret_that_cannot_be_read_is_named() -> None:
    def access(name: str) -> str:
        raise PermissionError(f"no access to {name}")

    with pytest.raises(EngineLoadError, match=r"KEY: secret projects/p/s cannot be read: PermissionError"):
        secret_variables({SECRETS_VARIABLE: "KEY=projects/p/s"}, access)
