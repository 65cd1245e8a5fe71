"""*publish*: committed shards become the visible tables; the manifest comes last.

Before it: *answer*. Everything here can be repeated: names follow from shards, and a file appears whole or not at all.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import apache_beam as beam
from apache_beam.pvalue import AsSingleton

from moebeam.schemas.answers import ShardCommit
from moebeam.transforms.answer.waste import record_unused
from moebeam.transforms.beam.coders import register_record
from moebeam.transforms.beam.counters import add_to_counters
from moebeam.transforms.durable.failure import recorded_failure
from moebeam.transforms.publish.invariants import RowSums, SumRows
from moebeam.transforms.publish.manifest import PublishSpec, RunAccounts, publish_shard, write_manifest
from moebeam.transforms.publish.rollup import Rollup, RollUpLedger

register_record(ShardCommit)


class PublishRun(beam.PTransform[Any, Any]):
    """Commit records -> visible tables, and the manifest as the only output."""

    def __init__(self, spec: PublishSpec) -> None:
        super().__init__()
        self._spec = spec

    def expand(self, pcoll: "beam.PCollection[ShardCommit]") -> "beam.PCollection[str]":
        spec = self._spec
        published: Any = (
            pcoll
            | "SpreadCommits" >> beam.Reshuffle()
            | "PublishShard" >> beam.FlatMap(_publish, spec).with_output_types(ShardCommit)
        )
        ledger: Any = published | "RollUpLedger" >> RollUpLedger(spec.layout)
        rows: Any = published | "SumRows" >> SumRows(spec.layout)
        manifest: Any = (
            published
            | "GatherCommits" >> beam.combiners.ToList()
            | "WriteManifest"
            >> beam.Map(_finish, spec, ledger=AsSingleton(ledger), rows=AsSingleton(rows)).with_output_types(str)
        )
        return manifest


def _publish(commit: ShardCommit, spec: PublishSpec) -> Iterator[ShardCommit]:
    with recorded_failure(spec.layout, "publish"):
        publish_shard(commit, spec.layout)
        if spec.waste is not None:
            record_unused(spec.layout, commit.shard, spec.waste)
    num_bytes = sum(file.num_bytes for file in commit.files)
    add_to_counters("publish", {"num_shards": 1, "num_files": len(commit.files), "num_bytes": num_bytes})
    yield commit


def _finish(commits: Sequence[ShardCommit], spec: PublishSpec, ledger: Rollup, rows: RowSums) -> str:
    with recorded_failure(spec.layout, "publish"):
        return write_manifest(commits, spec, RunAccounts(ledger, rows))
