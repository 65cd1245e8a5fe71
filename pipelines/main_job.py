"""The way of a row: read -> render -> plan -> answer -> publish."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import apache_beam as beam

from moebeam.transforms.answer.answer_shard import AnswerSpec
from moebeam.transforms.answer.step import AnswerShards
from moebeam.transforms.plan.build_shards import PlanSpec
from moebeam.transforms.plan.plan_record import PlannedShard, PlanRecord
from moebeam.transforms.plan.step import FindDuplicates, PlanShards
from moebeam.transforms.publish.publish_spec import PublishSpec
from moebeam.transforms.publish.step import PublishRun
from moebeam.transforms.read.input_rows import ReadColumns
from moebeam.transforms.read.input_scan import InputScan
from moebeam.transforms.read.step import ReadPrompts
from moebeam.transforms.render.render_rows import RenderSpec
from moebeam.transforms.render.step import RenderPrompts


@dataclass(frozen=True, slots=True)
class MainJob:
    """A checked job, cut into what each stage needs.

    Attributes:
        has_ids: whether rows bring ids of their own, which may then repeat.
        planned: the plan of an earlier attempt; the input is then not read again.
        resources: what workers need to answer, by the names of Beam's resource hints.
    """

    scan: InputScan
    columns: ReadColumns
    render: RenderSpec
    plan: PlanSpec
    answer: AnswerSpec
    publish: PublishSpec
    has_ids: bool
    planned: PlanRecord | None = None
    resources: Mapping[str, str] = field(default_factory=dict[str, str])


def build(pipeline: beam.Pipeline, job: MainJob) -> "beam.PCollection[str]":
    """Wire the whole job; the one element that comes out is the manifest's text."""
    shards: Any
    if job.planned is None:
        rows = pipeline | "Read" >> ReadPrompts(job.scan, job.columns, job.plan.layout)
        duplicates = rows | "FindDuplicates" >> FindDuplicates() if job.has_ids else None
        requests = rows | "Render" >> RenderPrompts(job.render)
        shards = requests | "Plan" >> PlanShards(job.plan, duplicates)
    else:
        planned = beam.Create(job.planned.shards, reshuffle=False)
        shards = pipeline | "ReusePlan" >> planned.with_output_types(PlannedShard)
    commits = shards | "Answer" >> AnswerShards(job.answer, job.resources)
    manifest: Any = commits | "Publish" >> PublishRun(job.publish)
    return manifest
