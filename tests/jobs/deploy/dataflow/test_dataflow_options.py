"""Beam's options for Dataflow: what is refused before anything is staged, and what is added."""

import re
from pathlib import Path
from typing import Any

import pytest
from apache_beam.options.pipeline_options import DebugOptions, PipelineOptions

from moebeam.jobs.check.beam_options import parse_beam_options
from moebeam.jobs.deploy.dataflow import dataflow_options
from moebeam.jobs.deploy.dataflow.dataflow_options import complete_dataflow_options, is_dataflow
from moebeam.schemas.errors import JobFileError
from moebeam.schemas.job.sections import Job

IMAGE = "--sdk_container_image=images/moebeam-worker:cpu"
L4 = "type:nvidia-l4;count:1;install-nvidia-driver"


@pytest.fixture(autouse=True)
def _beam_is_content(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Beam's own client asks for is tested where that client is installed."""
    monkeypatch.setattr(dataflow_options, "_check_client", lambda _options: iter(()))


def job(**model: Any) -> Job:
    return Job.model_validate(
        {
            "input": {"path": "gs://bucket/in"},
            "prompt": {"template": "{{ text }}"},
            "output": {"path": "gs://bucket/out"},
            "model": {"engine": "torch", "path": "gs://bucket/model", **model},
        }
    )


def settled(*args: str, of: Job | None = None, reuse: str | None = None) -> PipelineOptions:
    options = parse_beam_options(["--runner=DataflowRunner", *args])
    complete_dataflow_options(options, of or job(), reuse)
    return options


def problem(*args: str, of: Job | None = None, reuse: str | None = None) -> str:
    with pytest.raises(JobFileError) as raised:
        settled(*args, of=of, reuse=reuse)
    return str(raised.value)


@pytest.mark.parametrize(
    ("runner", "is_it"),
    [
        ("DataflowRunner", True),
        ("dataflow", True),
        ("apache_beam.runners.dataflow.dataflow_runner.DataflowRunner", True),
        ("DirectRunner", False),
        ("FlinkRunner", False),
    ],
)
def test_dataflow_is_known_by_every_spelling_that_beam_takes(runner: str, is_it: bool) -> None:
    assert is_dataflow(parse_beam_options([f"--runner={runner}"])) is is_it


def test_options_for_other_runners_are_left_alone() -> None:
    options = parse_beam_options([])
    before = options.get_all_options()
    complete_dataflow_options(options, job(path="checkpoints/v3"))
    assert options.get_all_options() == before


@pytest.mark.parametrize("engine", ["torch", "transformers"])
def test_a_machine_loads_a_model_once_and_answers_one_shard_at_a_time(engine: str) -> None:
    debug = settled(IMAGE, of=job(engine=engine)).view_as(DebugOptions)
    assert debug.experiments == ["no_use_multiple_sdk_containers"]
    assert debug.number_of_worker_harness_threads == 1


def test_vllm_takes_many_shards_at_a_time() -> None:
    debug = settled(IMAGE, of=job(engine="vllm")).view_as(DebugOptions)
    assert debug.experiments == ["no_use_multiple_sdk_containers"]
    assert debug.number_of_worker_harness_threads is None


@pytest.mark.parametrize(
    "chosen", ["use_multiple_sdk_containers", "no_use_multiple_sdk_containers", "use_sibling_sdk_workers"]
)
def test_a_choice_of_processes_is_kept(chosen: str) -> None:
    debug = settled(IMAGE, f"--experiments={chosen}").view_as(DebugOptions)
    assert debug.experiments == [chosen]
    assert debug.number_of_worker_harness_threads is None


def test_a_choice_of_threads_is_kept() -> None:
    options = settled(IMAGE, "--number_of_worker_harness_threads=4")
    assert options.view_as(DebugOptions).number_of_worker_harness_threads == 4


def test_engines_without_weights_use_every_core() -> None:
    remote = job(engine="openai", path=None, name="deepseek-v4-flash")
    assert settled(IMAGE, of=remote).view_as(DebugOptions).experiments is None


@pytest.mark.parametrize(
    ("key", "path", "section"),
    [
        ("[input] path", "in/*.parquet", {"input": {"path": "in/*.parquet"}}),
        ("[output] path", "/data/out", {"output": {"path": "/data/out"}}),
        ("[model] path", "file:///models/v3", {"model": {"path": "file:///models/v3"}}),
        ("[model] script", "script.json", {"model": {"engine": "fake", "path": "gs://b/m", "script": "script.json"}}),
    ],
)
def test_a_path_that_no_worker_can_read_is_refused(key: str, path: str, section: dict[str, Any]) -> None:
    values = {**job().model_dump(by_alias=True), **section}
    assert f"{key}: {path!r} lies on this machine's disk" in problem(IMAGE, of=Job.model_validate(values))


def test_the_embedded_checkpoint_and_a_local_run_to_reuse_are_refused_in_one_message() -> None:
    message = problem(IMAGE, of=job(path=None), reuse="runs/yesterday")
    assert "[model] path (left out): " in message
    assert "--reuse: 'runs/yesterday'" in message


def test_an_endpoint_needs_no_checkpoint() -> None:
    settled(IMAGE, of=job(engine="openai", path=None, name="deepseek-v4-flash"))


def test_schema_tools_and_prices_may_lie_on_the_launchers_disk(tmp_path: Path) -> None:
    values = job().model_dump(by_alias=True)
    local = {"schema": str(tmp_path / "s.json")}
    values |= {"output": {**values["output"], **local}, "accounting": {"price_book": str(tmp_path / "p.csv")}}
    values |= {"tools": {"path": str(tmp_path / "t.json")}}
    settled(IMAGE, of=Job.model_validate(values))


def test_beams_own_image_is_refused_because_moebeam_is_not_in_it() -> None:
    assert "--sdk_container_image: missing" in problem()
    settled("--extra_package=dist/moebeam.whl")


def test_accelerators_for_all_workers_beside_those_for_answers_are_refused() -> None:
    for_all = f"--dataflow_service_options=worker_accelerator={L4}"
    assert "gives every worker an accelerator" in problem(IMAGE, for_all, of=job(accelerator=L4))
    settled(IMAGE, for_all)


@pytest.mark.parametrize("num_devices", [2, 8, 10, 16])
def test_devices_that_no_engine_would_use_are_refused(num_devices: int) -> None:
    many = f"type:nvidia-l4;count:{num_devices};install-nvidia-driver"
    assert f"asks for {num_devices} devices a machine" in problem(IMAGE, of=job(accelerator=many))
    settled(IMAGE, of=job(accelerator=many, engine="vllm"))
    settled(IMAGE, "--experiments=use_multiple_sdk_containers", of=job(accelerator=many))
    settled(IMAGE, of=job(accelerator=L4))


def test_flexrs_beside_resource_hints_is_refused() -> None:
    flexrs = "--flexrs_goal=COST_OPTIMIZED"
    assert "--flexrs_goal: Dataflow knows no resource hints" in problem(IMAGE, flexrs, of=job(min_ram="64GB"))
    settled(IMAGE, flexrs)


@pytest.mark.parametrize("value", [L4, "type:nvidia-h100-80gb;count:8", "type:a;count:1;install-nvidia-driver:5xx"])
def test_an_accelerator_is_a_hint_for_the_answer_alone(value: str) -> None:
    assert job(accelerator=value, min_ram="1.5TiB").model.resource_hints == {"accelerator": value, "min_ram": "1.5TiB"}
    assert job().model.resource_hints == {}


@pytest.mark.parametrize(
    ("key", "value"),
    [("accelerator", "nvidia-l4"), ("accelerator", "type:l4 ;count:1"), ("min_ram", "64"), ("min_ram", "-1GB")],
)
def test_an_ill_formed_hint_is_refused_with_what_was_expected(key: str, value: str) -> None:
    with pytest.raises(ValueError, match=rf"expected .* found {re.escape(repr(value))}"):
        job(**{key: value})
