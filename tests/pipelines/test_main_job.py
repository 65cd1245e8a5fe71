"""The main room: stages in order, and a plan that spares a second reading."""

from pathlib import Path
from typing import Any

import apache_beam as beam
from apache_beam.pipeline import PipelineVisitor

from moebeam.jobs.check.preflight import check_job
from moebeam.jobs.run.main_job import make_main_job
from moebeam.pipelines.main_job import build
from moebeam.transforms.plan.plan_record import PlannedShard, PlanRecord
from tests.support.jobs.jobs_for_tests import fake_job, write_parquet


class _Stages(PipelineVisitor):
    def __init__(self) -> None:
        self.found: list[str] = []

    def enter_composite_transform(self, transform_node: Any) -> None:
        if transform_node.full_label and "/" not in transform_node.full_label:
            self.found.append(transform_node.full_label)


def stages(tmp_path: Path, checkpoint: Path, planned: PlanRecord | None, **sections: Any) -> list[str]:
    source = write_parquet(tmp_path / "in.parquet", {"id": ["a"], "text": ["x"]})
    job = fake_job(source, tmp_path / "out", checkpoint, **sections)
    pipeline = beam.Pipeline()
    build(pipeline, make_main_job(check_job(job), planned))
    visitor = _Stages()
    pipeline.visit(visitor)
    return visitor.found


def test_a_row_passes_the_stages_in_order(tmp_path: Path, tiny_checkpoint: Path) -> None:
    assert stages(tmp_path, tiny_checkpoint, None) == ["Read", "Render", "Plan", "Answer", "Publish"]


def test_ids_are_compared_only_where_rows_bring_them(tmp_path: Path, tiny_checkpoint: Path) -> None:
    found = stages(tmp_path, tiny_checkpoint, None, input={"id_column": "id"})
    assert found == ["Read", "FindDuplicates", "Render", "Plan", "Answer", "Publish"]


def test_with_a_plan_the_input_is_not_read_again(tmp_path: Path, tiny_checkpoint: Path) -> None:
    plan = PlanRecord((PlannedShard("s000000", 1, 1, 0, 3, 3),))
    assert stages(tmp_path, tiny_checkpoint, plan) == ["ReusePlan", "Answer", "Publish"]
