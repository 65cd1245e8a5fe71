"""`moebeam retry-failed`: a new run over the rejected rows of chosen kinds, in a separate output folder.

Published files stay untouched: both runs have their own rejects and ledger, and the new manifest names the first run in
`retry_of`. The rows come from the first run's plan, shard by shard; the input is not read. Of a row with several
samples only those that were rejected are asked again, under their numbers.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from moebeam.jobs.output.run_record import RetryOf, RunRecord, read_input_record, read_record
from moebeam.jobs.output.run_state import read_manifest
from moebeam.model_runner.encoding.remote_prompts import Encoder
from moebeam.schemas.answers import ShardCommit
from moebeam.schemas.arrow import list_values, replace_column
from moebeam.schemas.canonical import canonical_json
from moebeam.schemas.errors import CommitError, ContextOverflow, JobFileError, OutputError, RowError
from moebeam.schemas.job.sections import Job, SamplingSection
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.schemas.tables import RESULT_SCHEMA
from moebeam.transforms.durable.commit import open_committed, read_commit, read_commits
from moebeam.transforms.plan.build_shards import write_plan, write_shard
from moebeam.transforms.plan.plan_record import PlannedShard, PlanRecord, read_plan
from moebeam.transforms.plan.row_order import ORIGIN, list_origins
from moebeam.transforms.plan.sorted_runs import read_rows
from moebeam.transforms.read.input_scan import InputScan

_ENGINE_STAGES = ("run", "validate")
"""Stages whose rejects depend on the model; those of the others depend on input and job alone."""

_RETRY_SECTIONS = ("sampling", "repair")
_FREE_PARTS = {"[sampling]", "[repair]", "[accounting]", "retry of", "--limit", "--reuse"}
"""Parts of the identity in which a retry may differ from its source: they do not affect its rows' prompts."""

ALL_KINDS = "all"
"""Stands for every kind that occurs and that the model decided."""


@dataclass(frozen=True, slots=True)
class Retry:
    """A retry that can start.

    Attributes:
        source: the run whose rejects are retried.
        retried: the input of the retry: only those rows.
        note: which rejects `all` leaves out, and why; None if none.
    """

    source: RunRecord
    retry_of: RetryOf
    retried: InputScan
    note: str | None = None


def list_error_kinds() -> dict[str, str]:
    """Map every error type of a row to the stage that finds it."""
    kinds: dict[str, str] = {}
    waiting: list[type[RowError]] = RowError.__subclasses__()
    while waiting:
        error = waiting.pop()
        kinds[error.error_type] = error.error_stage
        waiting += error.__subclasses__()
    return dict(sorted(kinds.items()))


def parse_kinds(text: str) -> tuple[str, ...]:
    """Parse the kinds named in a command; sorted and unique."""
    return tuple(sorted({kind.strip() for kind in text.split(",") if kind.strip()}))


def prepare_retry(output: str, kinds: Sequence[str]) -> Retry:
    """Check that a finished run has rejects of these kinds, and count them.

    Raises:
        JobFileError: a kind is unknown, cannot be retried, or does not occur.
        OutputError: no such run, it is incomplete, or its plan is gone.
    """
    source = read_record(output)
    manifest = read_manifest(source.layout)
    if manifest is None or manifest["status"] != "complete":
        raise OutputError(f"{output}: expected a finished run, found one with rows left; moebeam resume {output} first")
    found: dict[str, int] = manifest["totals"]["rejects_by_type"]
    note = None
    if ALL_KINDS in kinds:
        note = _describe_left_out(found)
        kinds = [kind for kind in _list_retryable_kinds() if found.get(kind)] or kinds
    _check_kinds(kinds, found)
    record = read_input_record(source.layout)
    if record is None:
        raise OutputError(f"{source.layout.state}/input.json: expected what the run kept of its input, found nothing")
    retry_of = RetryOf(output, source.run_id, tuple(sorted(kinds)))
    return Retry(source, retry_of, record.scan(_count_rows(source.layout, retry_of.kinds, manifest["totals"])), note)


def _count_rows(layout: RunLayout, kinds: Sequence[str], totals: Mapping[str, Any]) -> int:
    """Rows of the input of which something was rejected as one of the kinds."""
    if not totals.get("num_further_samples"):
        return sum(totals["rejects_by_type"].get(kind, 0) for kind in kinds)
    try:
        chosen = [_read_chosen(layout, commit, kinds) for commit in read_commits(layout).values()]
    except OSError as error:
        raise OutputError(f"{layout.table('rejects')}: cannot be read: {error}") from error
    # All samples of a row are in one shard.
    return sum(table.group_by(["source_file", "source_row"]).aggregate([]).num_rows for table in chosen)


def _read_chosen(layout: RunLayout, commit: ShardCommit, kinds: Sequence[str]) -> pa.Table:
    """The places of a shard's rejects of the kinds.

    Raises:
        CommitError: the rejects are damaged.
        OSError: a store failed.
    """
    if (file := open_committed(layout, commit, "rejects")) is None:
        return RESULT_SCHEMA.empty_table().select([*ORIGIN, "error_type"])
    with file:
        rejects = pq.read_table(file, columns=[*ORIGIN, "error_type"])
    return rejects.filter(pc.is_in(rejects.column("error_type"), pa.array(kinds, pa.string())))


def _list_retryable_kinds() -> list[str]:
    return [kind for kind, stage in list_error_kinds().items() if stage in _ENGINE_STAGES]


def _describe_left_out(found: Mapping[str, int]) -> str | None:
    """Say which rejects never had a prompt that the model could be asked again."""
    stages = list_error_kinds()
    left_out = [
        f"{count:,} {kind} (stage {stages[kind]})"
        for kind, count in sorted(found.items())
        if count and stages.get(kind, _ENGINE_STAGES[0]) not in _ENGINE_STAGES
    ]
    if not left_out:
        return None
    return f"not asked again: {', '.join(left_out)}; they were rejected before the model was asked"


def _check_kinds(kinds: Sequence[str], found: dict[str, int]) -> None:
    known = list_error_kinds()
    can_retry = _list_retryable_kinds()
    occurring = ", ".join(f"{kind} ({count:,})" for kind, count in sorted(found.items()) if kind in can_retry)
    advice = f"this run has {occurring or 'none that can be retried'}"
    if not kinds:
        raise JobFileError(f"--kinds: expected kinds of rejects, such as --kinds engine_timeout; {advice}")
    if ALL_KINDS in kinds:
        raise JobFileError(f"--kinds {ALL_KINDS}: {_describe_left_out(found) or 'no row was rejected'}")
    for kind in kinds:
        if kind not in known:
            raise JobFileError(f"--kinds: unknown kind {kind!r}; there are {', '.join(can_retry)}; {advice}")
        if kind not in can_retry:
            raise JobFileError(
                f"--kinds: {kind} is decided in stage {known[kind]}, before the model is asked: asking again cannot "
                f"help; change the job or the input and run it anew; {advice}"
            )
    if not any(found.get(kind) for kind in kinds):
        raise JobFileError(f"--kinds: no row was rejected as {' or '.join(kinds)}; {advice}")


def why_not_retryable(place: Sequence[str], otherwise: Callable[[Sequence[str]], str | None]) -> str | None:
    """Why a retry cannot change a key; None if it can. `otherwise` decides keys outside a retry's sections."""
    if tuple(place) == ("sampling", "n"):
        return "says how many answers a row has, and a retry asks for those again that were rejected"
    if place[0] in _RETRY_SECTIONS:
        return None
    reason = otherwise(place)
    return reason and f"{reason}, {', '.join(f'{name}.*' for name in _RETRY_SECTIONS)}"


def write_retry_plan(
    layout: RunLayout, retry_of: RetryOf, job: Job, *, parts: Mapping[str, str], encoder: Encoder
) -> PlanRecord:
    """Write the plan of a retry: the rejected rows of the first run's plan, with the job's changed sampling.

    A row that with more output tokens exceeds the model's context becomes a reject.

    Args:
        parts: the retry's identity.
        encoder: checks that prompt and output fit the context.
    Raises:
        OutputError: the first run's plan is gone, or something that affects its prompts has changed.
        CommitError: plan and rejects are inconsistent.
        OSError: a store failed.
    """
    source = read_record(retry_of.output)
    names = sorted({*parts, *source.parts} - _FREE_PARTS)
    if changed := [name for name in names if parts.get(name) != source.parts.get(name)]:
        raise OutputError(
            f"{retry_of.output}: expected what its prompts and answers were made with, found changed since: "
            f"{', '.join(changed)}; run the job anew"
        )
    shards: list[PlannedShard] = []
    waiting: list[pa.Table] = []

    def write() -> None:
        name = f"s{len(shards):06d}"
        table = pa.concat_tables(waiting).replace_schema_metadata()
        shards.append(write_shard(layout, name, _apply_sampling(table, source.request.job.sampling, job, encoder)))
        waiting.clear()

    for table in read_rejected_rows(source, retry_of):
        if waiting and sum(held.num_rows for held in waiting) + table.num_rows > job.plan.max_shard_rows:
            write()
        waiting.append(table)
    if waiting:
        write()
    return PlanRecord(write_plan(shards, layout))


def read_rejected_rows(source: RunRecord, retry_of: RetryOf) -> Iterator[pa.Table]:
    """Read the planned rows rejected for one of the kinds, shard by shard, in token order.

    Raises:
        OutputError: the plan is gone.
        CommitError: plan or rejects are damaged or contradict each other.
        OSError: a store failed.
    """
    layout = source.layout
    plan = read_plan(layout)
    if plan is None:
        raise OutputError(f"{layout.plan_record}: expected the plan of a finished run, found no such file")
    for shard in plan.shards:
        if not shard.num_requests:
            continue
        path = layout.published_file("rejects", shard.shard)
        if (commit := read_commit(layout, shard.shard)) is None:
            missing = layout.shard_commit(shard.shard)
            raise CommitError(f"{missing}: expected the commit of a finished run, found no such file")
        wanted = set(list_origins(_read_chosen(layout, commit, retry_of.kinds)))
        if not wanted:
            continue
        try:
            planned = read_rows(layout.shard_plan(shard.shard))
        except FileNotFoundError as error:
            raise OutputError(
                f"{layout.shard_plan(shard.shard)}: the plan of this run was cleaned, and with it the prompts; "
                "run the job anew"
            ) from error
        kept = planned.filter(pa.array([place in wanted for place in list_origins(planned)]))
        if kept.num_rows != len(wanted):
            raise CommitError(f"{path}: expected {len(wanted)} rejected rows in the plan, found {kept.num_rows}")
        yield kept


def _apply_sampling(table: pa.Table, before: SamplingSection, job: Job, encoder: Encoder) -> pa.Table:
    """Apply the changed keys of `[sampling]`; values set by a row itself stay."""
    old, new = (section.model_dump(mode="json", exclude={"n"}) for section in (before, job.sampling))
    changed = {key: value for key, value in new.items() if value != old[key]}
    if not changed:
        return table
    texts: dict[str, str] = {}
    for text in dict.fromkeys(list_values(table, "sampling")):
        values: dict[str, Any] = json.loads(text)
        values.update({key: value for key, value in changed.items() if values.get(key) == old[key]})
        texts[text] = canonical_json(values)
    sampling = [texts[text] for text in list_values(table, "sampling")]
    table = replace_column(table, "sampling", sampling)
    if job.plan.merge != "always":
        greedy = [json.loads(text)["temperature"] == 0 for text in sampling]
        merged = list_values(table, "merged_into")
        table = replace_column(table, "merged_into", [m if g else None for m, g in zip(merged, greedy, strict=True)])
    return _reject_overflow(table, encoder)


def _reject_overflow(table: pa.Table, encoder: Encoder) -> pa.Table:
    sizes = [
        (length, json.loads(text)["max_tokens"])
        for length, text in zip(list_values(table, "num_prompt_tokens"), list_values(table, "sampling"), strict=True)
    ]
    is_over = [not encoder.fits(*size) for size in sizes]
    if not any(is_over):
        return table
    error = ContextOverflow
    message = "expected prompt and output within the model's context of {} tokens, found {}"
    limit = encoder.context_length
    columns = {
        "error_stage": [error.error_stage if over else None for over in is_over],
        "error_type": [error.error_type if over else None for over in is_over],
        "error_message": [
            message.format(limit, sum(size)) if over else None for over, size in zip(is_over, sizes, strict=True)
        ],
        "merged_into": [
            None if over else merged for over, merged in zip(is_over, list_values(table, "merged_into"), strict=True)
        ],
    }
    for name, values in columns.items():
        table = replace_column(table, name, values)
    return table


def retry_job(retry: Retry, job: Job, output: str) -> Job:
    """Build the job of a retry, with its own output.

    Raises:
        OutputError: the output is that of the source run.
    """
    if output.rstrip("/") == retry.retry_of.output.rstrip("/"):
        raise OutputError(f"--output {output}: a retry needs an output of its own; nothing published is changed")
    changed = job.model_copy(update={"output": job.output.model_copy(update={"path": output})})
    return changed if job.folder is None else changed.in_folder(job.folder)
