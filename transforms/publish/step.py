"""*publish*: turns committed shards into visible tables, and writes the manifest last.

Before it: *answer*. Everything here is idempotent: names derive from shards, and a file appears whole or not at all.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import apache_beam as beam
from apache_beam.pvalue import AsSingleton

from moebeam.schemas.answers import ShardCommit
from moebeam.schemas.canonical import canonical_json
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.transforms.answer.waste import record_unused
from moebeam.transforms.beam.coders import register_record
from moebeam.transforms.beam.counters import add_to_counters
from moebeam.transforms.beam.late_spec import LateSpec, call_with
from moebeam.transforms.durable.failure import record_failure
from moebeam.transforms.publish.invariants import RowSums, sum_shard
from moebeam.transforms.publish.manifest import RunAccounts, publish_shard, write_manifest
from moebeam.transforms.publish.publish_spec import PublishSpec
from moebeam.transforms.publish.rollup import (
    DEFAULT_BY,
    MAX_GROUPS,
    GroupSums,
    Rollup,
    merge_largest,
    read_committed_ledger,
    roll_up,
)

for record_type in (ShardCommit, GroupSums, RowSums):
    register_record(record_type)


class PublishRun(beam.PTransform[Any, Any]):
    """Commit records -> visible tables, with the manifest as the only output."""

    def __init__(self, spec: PublishSpec | LateSpec[PublishSpec]) -> None:
        super().__init__()
        self._spec = spec

    def expand(self, pcoll: "beam.PCollection[ShardCommit]") -> "beam.PCollection[str]":
        spec = self._spec
        published: Any = (
            pcoll
            | "SpreadCommits" >> beam.Reshuffle()
            | "PublishShard" >> beam.FlatMap(*call_with(_publish, spec)).with_output_types(ShardCommit)
        )
        journaled: Any = (
            published
            | "RecordUnused" >> beam.Map(*call_with(_record_unused, spec)).with_output_types(int)
            | "AddJournals" >> beam.CombineGlobally(sum)
        )
        ledger: Any = published | "RollUpLedger" >> RollUpLedger(spec.layout)
        rows: Any = published | "SumRows" >> SumRows(spec.layout)
        manifest: Any = (
            published
            | "GatherCommits" >> beam.combiners.ToList()
            | "WriteManifest"
            >> beam.Map(
                *call_with(_finish, spec),
                ledger=AsSingleton(ledger),
                rows=AsSingleton(rows),
                num_journal_bytes=AsSingleton(journaled),
            ).with_output_types(str)
        )
        return manifest


def _publish(commit: ShardCommit, spec: PublishSpec) -> Iterator[ShardCommit]:
    with record_failure(spec.layout, "publish"):
        publish_shard(commit, spec.layout)
    num_bytes = sum(file.num_bytes for file in commit.files)
    add_to_counters("publish", {"num_shards": 1, "num_files": len(commit.files), "num_bytes": num_bytes})
    yield commit


def _record_unused(commit: ShardCommit, spec: PublishSpec) -> int:
    with record_failure(spec.layout, "publish"):
        return record_unused(spec.layout, commit, spec.accounting) if spec.accounting is not None else 0


def _finish(
    commits: Sequence[ShardCommit], spec: PublishSpec, ledger: Rollup, rows: RowSums, num_journal_bytes: int
) -> str:
    with record_failure(spec.layout, "publish"):
        return write_manifest(commits, spec, RunAccounts(ledger, rows), num_journal_bytes=num_journal_bytes)


class RollUpLedger(beam.PTransform[Any, Any]):
    """Commits of published shards -> one `Rollup` of their ledgers."""

    def __init__(self, layout: RunLayout, by: Sequence[str] = DEFAULT_BY, max_groups: int = MAX_GROUPS) -> None:
        super().__init__()
        self._layout = layout
        self._by = tuple(by)
        self._max_groups = max_groups

    def expand(self, pcoll: "beam.PCollection[ShardCommit]") -> "beam.PCollection[Rollup]":
        sums: Any = (
            pcoll
            | "RollUpShard"
            >> beam.FlatMap(_roll_up_shard, self._layout, self._by).with_output_types(tuple[str, GroupSums])
            | "AddGroups" >> beam.CombinePerKey(_add_groups).with_output_types(tuple[str, GroupSums])
            | "LargestGroups" >> beam.CombineGlobally(_LargestGroups(self._by, self._max_groups))
        )
        return sums


def _roll_up_shard(commit: ShardCommit, layout: RunLayout, by: Sequence[str]) -> Iterator[tuple[str, GroupSums]]:
    """Groups of one shard; keys travel as canonical JSON, which has the same bytes everywhere."""
    if (ledger := read_committed_ledger(layout, commit)) is not None:
        for key, sums in roll_up(ledger, by).items():
            yield canonical_json(key), sums


def _add_groups(groups: Iterable[GroupSums]) -> GroupSums:
    return sum(groups, GroupSums())


class _LargestGroups(beam.CombineFn):
    """`largest_groups` over groups that each come once."""

    def __init__(self, by: Sequence[str], max_groups: int) -> None:
        super().__init__()
        self._by = tuple(by)
        self._max_groups = max_groups

    def create_accumulator(self) -> Rollup:
        return Rollup(self._by)

    def add_input(self, mutable_accumulator: Rollup, element: tuple[str, GroupSums]) -> Rollup:
        key, sums = element
        return self.merge_accumulators([mutable_accumulator, Rollup(self._by, ((tuple(json.loads(key)), sums),))])

    def merge_accumulators(self, accumulators: Iterable[Rollup]) -> Rollup:
        return merge_largest(accumulators, self._by, self._max_groups)

    def extract_output(self, accumulator: Rollup) -> Rollup:
        return accumulator


class SumRows(beam.PTransform[Any, Any]):
    """Commits of published shards -> one `RowSums` of their results and rejects."""

    def __init__(self, layout: RunLayout) -> None:
        super().__init__()
        self._layout = layout

    def expand(self, pcoll: "beam.PCollection[ShardCommit]") -> "beam.PCollection[RowSums]":
        sums: Any = (
            pcoll
            | "SumShard" >> beam.FlatMap(sum_shard, self._layout).with_output_types(RowSums)
            | "AddShards" >> beam.CombineGlobally(_add_rows).with_output_types(RowSums)
        )
        return sums


def _add_rows(sums: Iterable[RowSums]) -> RowSums:
    return sum(sums, RowSums())
