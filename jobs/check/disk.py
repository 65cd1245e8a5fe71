"""Estimates before the run, in bytes, whether its files fit on the output's disk.

The plan is written once as sorted runs and once as shards; answers are written once as staged files, which are
published by links. Only the length of answers is unknown before the run.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from moebeam.jobs.console.formats import format_bytes
from moebeam.schemas.errors import OutputError
from moebeam.schemas.job.sections import Job
from moebeam.schemas.store import storage
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.transforms.durable.commit import list_committed_shards
from moebeam.transforms.plan.plan_record import read_plan
from moebeam.transforms.plan.shard_cut import USUAL_OUTPUT_TOKENS
from moebeam.transforms.read.input_rows import ReadColumns
from moebeam.transforms.read.input_scan import InputScan
from moebeam.transforms.read.parquet_file import open_parquet, sum_column_bytes

_PLAN_ROW_BYTES = 64
"""Compressed identity, sampling and options of a planned row."""

_TABLES_ROW_BYTES = 256
"""Compressed numbers and names of a result and its ledger line."""

_TOKEN_BYTES = 4
_LEAST_SHARE = 0.3
"""Share of the estimate that remains if everything compresses well; with less space the run is certain to fail."""

_PLAN_COPIES = 2
_PROMPT_FORMS = 2
"""The plan holds a prompt as messages and as token ids; ids take about as many bytes as the text."""


@dataclass(frozen=True, slots=True)
class DiskEstimate:
    """Bytes that a run is expected to write."""

    plan_bytes: int
    tables_bytes: int

    @property
    def num_bytes(self) -> int:
        return self.plan_bytes + self.tables_bytes


def estimate_disk(
    *, num_rows: int, input_bytes: int, template_chars: int, max_tokens: int, is_planned: bool
) -> DiskEstimate:
    """Estimate the bytes of a run's plan and tables.

    Args:
        num_rows: rows still to be answered, each sample one; equal prompts side by side compress to one.
        input_bytes: stored bytes of the columns read, passthrough included.
        template_chars: text that every prompt repeats; counted at a tenth, because equal prefixes compress well.
        is_planned: the plan exists already.
    """
    prompt_bytes = input_bytes + num_rows * template_chars // 10
    plan_bytes = _PLAN_COPIES * (_PROMPT_FORMS * prompt_bytes + num_rows * _PLAN_ROW_BYTES)
    answer_bytes = _TOKEN_BYTES * min(max_tokens, USUAL_OUTPUT_TOKENS)
    tables_bytes = num_rows * (_TABLES_ROW_BYTES + answer_bytes) + input_bytes
    return DiskEstimate(0 if is_planned else plan_bytes, tables_bytes)


def check_disk(job: Job, scan: InputScan, columns: ReadColumns) -> str | None:
    """Compare a local output's free space with the estimate; returns a warning if it is close.

    Raises:
        OutputError: the free space is less than the run is certain to write.
    """
    output = job.output.path
    if not storage.is_local(output):
        return None
    path = Path(output.removeprefix("file://"))
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    disk = shutil.disk_usage(existing)
    if not disk.total:  # not a disk, for example /proc, which refuses files by itself
        return None
    free = disk.free
    layout = RunLayout(output)
    plan = read_plan(layout)
    is_planned = plan is not None
    num_rows = scan.num_rows * job.sampling.n
    if plan is not None:
        committed = {*list_committed_shards(layout)}
        num_rows = sum(shard.num_rows for shard in plan.shards if shard.shard not in committed)
    estimate = estimate_disk(
        num_rows=num_rows,
        input_bytes=0 if is_planned else _count_needed_bytes(scan, columns),
        template_chars=len(job.prompt.template or "") + len(job.prompt.system or ""),
        max_tokens=job.sampling.max_tokens,
        is_planned=is_planned,
    )
    counted = "rows" if job.sampling.n == 1 else "answers"
    message = (
        f"[output] path {output!r}: about {format_bytes(estimate.num_bytes)} for {num_rows:,} {counted} "
        f"(plan {format_bytes(estimate.plan_bytes)}, tables {format_bytes(estimate.tables_bytes)}), "
        f"{format_bytes(free)} free on its disk"
    )
    if free < _LEAST_SHARE * estimate.num_bytes:
        raise OutputError(f"{message}; free some, or choose another output path")
    return f"{message}: that may get close" if free < estimate.num_bytes else None


def _count_needed_bytes(scan: InputScan, columns: ReadColumns) -> int:
    """Estimate the bytes of the columns read, from their share in the first readable file."""
    num_bytes = sum(unit.num_bytes for unit in scan.units if unit.num_rows)
    first = next((unit for unit in scan.units if unit.num_rows and unit.path), None)
    if scan.format == "jsonl" or first is None:
        return num_bytes
    try:
        with open_parquet(first.path) as parquet:
            needed = sum_column_bytes(parquet, first.row_group, columns.names)
            return num_bytes * needed // max(1, sum_column_bytes(parquet, first.row_group, parquet.schema_arrow.names))
    except (pa.ArrowException, OSError, ValueError):
        # *read* reports the file.
        return num_bytes
