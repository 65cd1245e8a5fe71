"""Coders: what travels between stages is deterministic and comes back equal."""

from typing import Any

import apache_beam as beam
import pyarrow as pa
import pytest
from apache_beam import coders
from apache_beam.pipeline import PipelineVisitor

import moebeam.pipelines.main_job  # noqa: F401  each step registers what it sends
from moebeam.schemas.answers import ShardCommit, StagedFile, Totals
from moebeam.transforms.beam.coders import RecordBatchCoder, RecordCoder
from moebeam.transforms.plan.plan_record import PlannedShard, PlanRecord
from moebeam.transforms.plan.shard_ranges import ShardRange
from moebeam.transforms.plan.sorted_runs import RunFile
from moebeam.transforms.read.input_scan import InputUnit

RECORDS = [
    InputUnit(3, "s3://b/ü.parquet", "ü.parquet", "parquet", 1, 10, None, error="broken"),
    RunFile("r", "requests", 5, 6, 7),
    ShardRange("s0", "00ff", "", ("a", "b")),
    PlanRecord((PlannedShard("s0", 1, 1, 0, 10, 5),)),
    ShardCommit("s0", "run", "x", "t", (StagedFile("results", "p", 1, 2, "d"),), Totals(costs={"USD": "0.10"})),
]


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: type(record).__name__)
def test_records_come_back_equal_without_a_fallback_coder(record: Any) -> None:
    coder = coders.registry.get_coder(type(record))
    assert isinstance(coder, RecordCoder)
    assert coder.is_deterministic()
    assert coder.decode(coder.encode(record)) == record
    assert coder.encode(record) == coders.registry.get_coder(type(record)).encode(record)


def test_record_batches_come_back_equal_with_their_schema() -> None:
    batch = pa.record_batch({"a": pa.array([1, None]), "b": pa.array([b"\xff", b""], pa.large_binary())})
    coder = coders.registry.get_coder(pa.RecordBatch)
    assert isinstance(coder, RecordBatchCoder)
    decoded = coder.decode(coder.encode(batch.slice(1)))
    assert decoded.equals(batch.slice(1))
    assert decoded.schema.equals(batch.schema)


def test_no_element_of_the_main_job_falls_back_to_pickle(tmp_path: Any, tiny_checkpoint: Any) -> None:
    from moebeam.jobs.check.preflight import check_job
    from moebeam.jobs.run.main_job import make_main_job
    from moebeam.pipelines.main_job import build
    from tests.support.jobs.jobs_for_tests import fake_job, write_parquet

    source = write_parquet(tmp_path / "in.parquet", {"id": ["a"], "text": ["x"]})
    job = fake_job(source, tmp_path / "out", tiny_checkpoint, input={"id_column": "id"})
    pipeline = beam.Pipeline()
    build(pipeline, make_main_job(check_job(job), None))
    visitor = _ElementTypes()
    pipeline.visit(visitor)
    assert set(visitor.found) == OUR_STEPS
    for step, element_type in visitor.found.items():
        coder = coders.registry.get_coder(element_type)
        assert coder.is_deterministic(), step
        assert "Pickle" not in repr(coder) and "FastPrimitives" not in repr(coder), step


OUR_STEPS = {
    "ListUnits",
    "ReadUnits",
    "RenderBatch",
    "Digest",
    "Compare",
    "WriteRuns",
    "CutRanges",
    "BuildShards",
    "WritePlan",
    "AnswerShard",
    "PublishShard",
    "WriteManifest",
}


class _ElementTypes(PipelineVisitor):
    """Element types of what our own steps give, by the step's name."""

    def __init__(self) -> None:
        self.found: dict[str, Any] = {}

    def visit_transform(self, transform_node: Any) -> None:
        for part in transform_node.full_label.split("/"):
            if part.partition("(")[0] in OUR_STEPS:
                for output in transform_node.outputs.values():
                    self.found[part.partition("(")[0]] = output.element_type
