"""Ranges of all rows in token order, each small enough to be sorted at once: what one worker of *plan* makes shards of.

Part of *plan*, between the runs and the shards; `sorted_runs.py` draws runs by ranges. Borders are quantiles of the
bytes of all runs, as their samples tell them, so they depend on the input and the job alone.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from moebeam.schemas.arrow import list_values
from moebeam.schemas.errors import CommitError
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.transforms.durable.failure import record_failure
from moebeam.transforms.plan.plan_record import read_plan
from moebeam.transforms.plan.row_order import RowKey
from moebeam.transforms.plan.shard_cut import MAX_SHARD_BYTES
from moebeam.transforms.plan.sorted_runs import MAX_SORTED_RUN_BYTES, SHARD_WEIGHT, RunFile, read_samples

MAX_REJECT_ROWS = 65_536
"""Most rows of a shard that holds rejects only."""


@dataclass(frozen=True, slots=True)
class ShardRange:
    """Rows that one worker plans: those of `runs` that stand in `[lower, upper)`; one shard or some come of them.

    The first shard has the name `shard`, others add a number to it, so that names stand in token order. Places are in
    the form of `RowKey.text`; an empty one is the beginning or the end of all. Rejects are one shard of whole runs.
    """

    shard: str
    lower: str
    upper: str
    runs: tuple[str, ...]
    is_rejects: bool = False

    def shard_name(self, number: int) -> str:
        """The name of the range's n-th shard, from 0; a range holds fewer than 100,000 groups of rows."""
        return f"{self.shard}-{number:05d}" if number else self.shard

    def holds(self, shard: str) -> bool:
        """Whether a shard of this name is of the range; a range without runs stands for the one shard of its name."""
        return shard == self.shard or (bool(self.runs) and shard.startswith(f"{self.shard}-"))


def cut_ranges(runs: Sequence[RunFile], layout: RunLayout) -> Iterator[ShardRange]:
    """Divide all requests, in token order, into ranges that are to become shards; rejects into shards of their own.

    Rows that may be merged are never cut apart. The result does not depend on the order of `runs`. If another launcher
    has finished the same plan meanwhile, and dropped the runs that both wrote, its shards come out, without runs.
    """
    with record_failure(layout, "plan"):
        try:
            ranges = list(_ranges(runs, layout))
        except FileNotFoundError:
            ranges = None
        if (plan := read_plan(layout)) is not None:
            ranges = [ShardRange(shard.shard, "", "", ()) for shard in plan.shards]
        if ranges is None:
            raise CommitError(
                f"{layout.sorted_runs}: expected the runs that were written for the plan, found some missing"
            )
    yield from ranges


def _ranges(runs: Sequence[RunFile], layout: RunLayout) -> Iterator[ShardRange]:
    ordered = sorted(runs, key=lambda run: run.run_id)
    requests = [run for run in ordered if run.kind == "requests"]
    names = tuple(run.run_id for run in requests)
    borders = [place.text for place in _borders(requests, layout)]
    for index, (lower, upper) in enumerate(pairwise(["", *borders, ""] if requests else [])):
        yield ShardRange(f"s{index:06d}", lower, upper, names)
    for index, group in enumerate(_reject_groups([run for run in ordered if run.kind == "rejects"])):
        yield ShardRange(f"x{index:06d}", "", "", tuple(run.run_id for run in group), is_rejects=True)


def num_ranges(runs: Sequence[RunFile]) -> int:
    """How many ranges the requests of some runs make.

    At its end a range cuts a shard short, so that it should hold some: eight, as far as that takes no more memory than
    two runs; and two in any case, up to the most that a single shard may take. It is no smaller than a run.
    """
    num_bytes = sum(run.num_bytes for run in runs)
    shard_bytes = num_bytes * SHARD_WEIGHT // max(SHARD_WEIGHT, sum(run.weight for run in runs))
    several, least = min(8 * shard_bytes, 2 * MAX_SORTED_RUN_BYTES), min(2 * shard_bytes, MAX_SHARD_BYTES)
    return max(1, -(-num_bytes // max(several, least, MAX_SORTED_RUN_BYTES)))


def _borders(runs: Sequence[RunFile], layout: RunLayout) -> list[RowKey]:
    """The places between ranges, in order: quantiles of the bytes that stand before each sample of all runs.

    At its own samples a run's bytes are known; between two it is taken to be half way, so it is wrong by half of
    `SAMPLE_BYTES` at most. A range then differs from an even share by `(num_runs + 2) * SAMPLE_BYTES` at most, and as
    many times the largest group of rows that may not be cut; usually by the square root of that number, because runs
    do not sample in step.
    """
    count = num_ranges(runs)
    if count == 1:
        return []
    steps: list[tuple[RowKey, int]] = []
    for run in runs:
        samples = read_samples(layout, run.run_id)
        places = [RowKey.from_text(text) for text in list_values(samples, "place")]
        before = [0, *list_values(samples, "bytes_before"), run.num_bytes]
        # Twice what is added at a sample: half of what stands between the one before it and the one after.
        steps += [(place, before[i + 2] - before[i]) for i, place in enumerate(places)]
    steps.sort()
    doubled = np.cumsum([step for _, step in steps])
    targets = [2 * sum(run.num_bytes for run in runs) * index // count for index in range(1, count)]
    found = {steps[position][0] for position in np.searchsorted(doubled, targets).tolist() if position < len(steps)}
    return sorted(found - {steps[0][0]})


def _reject_groups(runs: Sequence[RunFile]) -> Iterator[list[RunFile]]:
    """Runs of rejects, in input order, as many together as a shard may hold."""
    group: list[RunFile] = []
    num_rows = num_bytes = 0
    for run in runs:
        num_rows, num_bytes = num_rows + run.num_rows, num_bytes + run.num_bytes
        if group and (num_rows > MAX_REJECT_ROWS or num_bytes > MAX_SHARD_BYTES):
            yield group
            group, num_rows, num_bytes = [], run.num_rows, run.num_bytes
        group.append(run)
    if group:
        yield group
