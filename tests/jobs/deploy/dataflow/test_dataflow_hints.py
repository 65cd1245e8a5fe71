"""Resource hints of a job: on the step that answers and on no other, and harmless where a runner knows none."""

from pathlib import Path

import apache_beam as beam
import pytest

from moebeam.jobs.check.identity import why_not_resumable
from moebeam.jobs.check.preflight import check_job
from moebeam.jobs.run.launch import launch
from moebeam.jobs.run.main_job import make_main_job
from moebeam.pipelines.main_job import build
from moebeam.schemas.errors import JobFileError
from moebeam.schemas.job.sections import Job
from tests.support.jobs.jobs_for_tests import fake_job, read_table, write_parquet

HINTS = {"accelerator": "type:nvidia-l4;count:1", "min_ram": "16GB"}


def job(folder: Path, checkpoint: Path, output: str = "out", **model: str) -> Job:
    source = folder / "in.parquet"
    if not source.exists():
        write_parquet(source, {"text": [f"ticket {row}" for row in range(12)]})
    return fake_job(source, folder / output, checkpoint, model=model, plan={"max_shard_rows": 4})


def hinted_steps(found: Job) -> dict[str, list[str]]:
    pipeline = beam.Pipeline()
    build(pipeline, make_main_job(check_job(found), None))
    components = pipeline.to_runner_api().components
    steps = [step for step in components.transforms.values() if step.environment_id and not step.subtransforms]
    hints = {step.unique_name: components.environments[step.environment_id].resource_hints for step in steps}
    return {name: sorted(value.decode() for value in found.values()) for name, found in hints.items() if found}


def test_only_the_step_that_answers_has_hints(tmp_path: Path, tiny_checkpoint: Path) -> None:
    expected = {"Answer/AnswerShard": ["16000000000", "type:nvidia-l4;count:1"]}
    assert hinted_steps(job(tmp_path, tiny_checkpoint, **HINTS)) == expected
    assert hinted_steps(job(tmp_path, tiny_checkpoint)) == {}


def test_hints_change_no_row_on_the_local_runner(tmp_path: Path, tiny_checkpoint: Path) -> None:
    measured = ("latency_ms",)
    rows: list[list[dict[str, object]]] = []
    for output, model in (("plain", {}), ("hinted", HINTS)):
        launch(job(tmp_path, tiny_checkpoint, output, **model))
        found = read_table(tmp_path / output, "results")
        rows.append([{name: value for name, value in row.items() if name not in measured} for row in found])
    assert len(rows[0]) == 12
    assert rows[0] == rows[1]


@pytest.mark.parametrize("key", list(HINTS))
def test_a_run_may_go_on_with_other_machines(key: str) -> None:
    assert why_not_resumable(("model", key)) is None


def test_an_accelerator_for_an_engine_that_asks_an_endpoint_is_refused(tmp_path: Path, tiny_checkpoint: Path) -> None:
    remote = {"engine": "openai", "name": "m", "base_url": "http://127.0.0.1:1/v1"}
    with pytest.raises(JobFileError, match=r"\[model\] accelerator: only for engines with a checkpoint"):
        check_job(job(tmp_path, tiny_checkpoint, **remote, accelerator=HINTS["accelerator"]))
