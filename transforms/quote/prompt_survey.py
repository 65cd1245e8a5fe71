"""Surveys a job's prompts: reads and renders them as a run would, and counts them; no model is asked.

The basis of a quote. Rows go through `input_rows.read_unit` and `render_rows.Renderer`, as in a run, and are sorted
into plan order. Free of Beam and torch.
"""

import random
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from moebeam.model_runner.prefix_tree import common_prefix_lengths
from moebeam.schemas.arrow import list_values
from moebeam.schemas.errors import JobFileError
from moebeam.schemas.job.sections import PlanSection
from moebeam.schemas.records import parse_sampling_json
from moebeam.transforms.plan.row_order import can_merge
from moebeam.transforms.plan.shard_cut import RowCosts, cut_rows, estimate_output_tokens
from moebeam.transforms.read.input_rows import ReadColumns, read_unit
from moebeam.transforms.read.input_scan import InputScan, InputUnit
from moebeam.transforms.render.render_rows import Renderer

MAX_SURVEY_BYTES = 1 << 30
"""Most memory for a survey's keys, four bytes a prompt token; a larger input must be sampled."""

Counts: TypeAlias = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class PromptSurvey:
    """Requests of an input, or of a sample of its rows, in plan order.

    Attributes:
        num_rows: rows of the input, sampled or not.
        num_surveyed_rows: rows read and rendered, including those of rejects and merged requests; of one with several
            samples each asked one is a request.
        rejects: surveyed rows that would be rejected before the model is asked, by error type.
        num_prompt_tokens: of each request; int64, shape (num_requests,).
        num_shared_tokens: tokens that each request shares with the previous one; same shape.
        num_nearest_tokens: tokens that it shares with whichever other row's request shares most, or all of them if an
            earlier sample of its row asks for the prompt; same shape.
        max_output_tokens: `max_tokens` of each request; same shape.
        num_group_rows: planned rows that each request answers: itself and those merged into it; same shape.
        is_single: whether all that a request answers is of one row; bool, same shape.
        row_starts: the first request of each row that has requests, the samples of which are neighbours; int64.
        starts_shard: approximately where the plan would cut; bool, same shape.
        own_terms: whether a request brings options of its own; bool, same shape.
    """

    num_rows: int
    num_surveyed_rows: int
    rejects: Mapping[str, int]
    num_prompt_tokens: Counts
    num_shared_tokens: Counts
    num_nearest_tokens: Counts
    max_output_tokens: Counts
    num_group_rows: Counts
    is_single: npt.NDArray[np.bool_]
    row_starts: Counts
    starts_shard: npt.NDArray[np.bool_]
    own_terms: npt.NDArray[np.bool_]

    @property
    def is_sample(self) -> bool:
        return self.num_surveyed_rows < self.num_rows

    @property
    def num_requests(self) -> int:
        return len(self.num_prompt_tokens)

    @property
    def num_tree_tokens(self) -> int:
        """T: tokens in the prefix tree of the surveyed requests."""
        return int(self.num_prompt_tokens.sum() - self.num_shared_tokens.sum())


@dataclass(slots=True)
class _Collected:
    """Requests of a survey as they arrive; one entry each."""

    keys: list[bytes] = field(default_factory=list[bytes])
    kinds: list[int] = field(default_factory=list[int])
    samples: list[int] = field(default_factory=list[int])
    rejects: Counter[str] = field(default_factory=Counter[str])
    num_rows: int = 0
    num_key_bytes: int = 0


class _Kinds:
    """Numbers whatever requests must have in common, beside their prompts, to be merged."""

    def __init__(self) -> None:
        self.of: dict[tuple[str, str | None, str], int] = {}

    def number(self, kind: tuple[str, str | None, str]) -> int:
        return self.of.setdefault(kind, len(self.of))


def survey_prompts(
    scan: InputScan,
    columns: ReadColumns,
    renderer: Renderer,
    plan: PlanSection,
    *,
    has_ids: bool,
    num_sample_rows: int | None = None,
) -> PromptSurvey:
    """Read, render and count an input, or a sample of its rows.

    Args:
        has_ids: whether rows bring ids, so that a repeated one is a reject; not checked in a sample.
        num_sample_rows: rows to draw, each equally likely; None reads all. The draw depends on the input alone.
    Raises:
        JobFileError: the input is too large to survey whole.
    """
    collected, kinds = _Collected(), _Kinds()
    wanted = _draw(scan, num_sample_rows)
    seen: set[str] | None = set() if has_ids and wanted is None else None
    for unit in scan.units:
        rows = wanted.get(unit.ordinal) if wanted is not None else None
        if wanted is not None and rows is None:
            continue
        for batch in read_unit(unit, columns):
            picked = batch if rows is None else _take_sample(batch, unit, rows)
            if picked.num_rows:
                for rendered in renderer.render_rows(picked):
                    _collect(collected, rendered, kinds, seen)
    return _count(collected, kinds, plan, scan.num_rows)


def _draw(scan: InputScan, num_sample_rows: int | None) -> dict[int, list[int]] | None:
    """Sampled rows of each unit, by their place in the unit; None for all rows."""
    if num_sample_rows is None or num_sample_rows >= scan.num_rows:
        return None
    # Seeded by the input, so that a quote can be repeated.
    drawn = sorted(random.Random(scan.fingerprint).sample(range(scan.num_rows), num_sample_rows))
    picked: dict[int, list[int]] = {}
    first = 0
    for unit in scan.units:
        end = first + (unit.num_rows or 0)
        low, high = bisect_left(drawn, first), bisect_left(drawn, end)
        if low < high:
            picked[unit.ordinal] = [row - first for row in drawn[low:high]]
        first = end
    return picked


def _take_sample(batch: pa.RecordBatch, unit: InputUnit, rows: Sequence[int]) -> pa.RecordBatch:
    """Sampled rows of a batch; a reject that stands for several rows is kept whole."""
    if batch.num_rows and list_values(batch, "scope")[0] != "row":
        return batch
    first = list_values(batch, "source_row")[0] - unit.first_row
    low, high = bisect_left(rows, first), bisect_left(rows, first + batch.num_rows)
    return batch.take(pa.array([row - first for row in rows[low:high]], pa.int64()))


def _collect(collected: _Collected, batch: pa.RecordBatch, kinds: _Kinds, seen: set[str] | None) -> None:
    names = ("prefix_key", "sampling", "options", "cost_center", "error_type", "custom_id", "num_rows", "sample")
    is_duplicate = False
    for key, sampling, options, cost_center, error, custom_id, num_rows, sample in zip(
        *(list_values(batch, name) for name in names), strict=True
    ):
        if sample == 0:
            collected.num_rows += num_rows or 0
            is_duplicate = error is None and seen is not None and custom_id in seen
            if error is None and seen is not None:
                seen.add(custom_id)
            if is_duplicate:
                error = "duplicate_id"
            if error is not None:
                collected.rejects[error] += num_rows or 0
        if error is not None or is_duplicate:
            continue
        # The samples of a row share one key in memory.
        collected.keys.append(collected.keys[-1] if sample else key)
        collected.kinds.append(kinds.number((sampling, options, cost_center)))
        collected.samples.append(sample)
        collected.num_key_bytes += 0 if sample else len(key)
    if collected.num_key_bytes > MAX_SURVEY_BYTES:
        raise JobFileError(
            f"--sample: the first {collected.num_rows:,} rows have {collected.num_key_bytes // 4:,} prompt tokens, "
            f"more than a quote holds in memory ({MAX_SURVEY_BYTES // 4:,}); add --sample 100000 to quote from a sample"
        )


def _count(collected: _Collected, kinds: _Kinds, plan: PlanSection, num_rows: int) -> PromptSurvey:
    """Sort requests into token order and merge equal ones, as *plan* does."""
    order = sorted(range(len(collected.keys)), key=lambda index: (collected.keys[index], collected.kinds[index]))
    sampling_texts = [sampling for sampling, _, _ in kinds.of]
    is_mergeable = [can_merge(text, plan) for text in sampling_texts]
    is_greedy = [parse_sampling_json(text).is_greedy for text in sampling_texts]
    keys: list[bytes] = []
    kept: list[int] = []
    numbers: list[int] = []
    group_rows: list[int] = []
    group_sources: list[int] = []
    firsts: dict[int, int] = {}
    for index in order:
        key, kind, sample = collected.keys[index], collected.kinds[index], collected.samples[index]
        if not (keys and is_mergeable[kind] and kind == kept[-1] and key == keys[-1]):
            firsts = {}
        # As in *plan*: copies of one answer, or of the answer of the same number.
        number = 0 if is_greedy[kind] else sample
        if is_mergeable[kind] and number in firsts:
            group_rows[firsts[number]] += 1
            group_sources[firsts[number]] += not is_greedy[kind] or sample == 0
            continue
        firsts[number] = len(keys)
        keys.append(key)
        kept.append(kind)
        numbers.append(sample)
        group_rows.append(1)
        group_sources.append(1)
    kind_of = np.array(kept, dtype=np.int64)
    max_tokens = np.array([parse_sampling_json(text).max_tokens for text in sampling_texts], dtype=np.int64)
    has_options = np.array([options is not None for _, options, _ in kinds.of], dtype=np.bool_)
    lengths = np.array([(len(key) - 8) // 4 for key in keys], dtype=np.int64)
    shared = common_prefix_lengths(keys)
    num_group_rows = np.array(group_rows, dtype=np.int64)
    starts_row = np.array(numbers, dtype=np.int64) == 0
    row_starts = np.flatnonzero(starts_row)
    nearest = lengths.copy()
    between = common_prefix_lengths([keys[start] for start in row_starts.tolist()])
    nearest[row_starts] = np.maximum(between, np.append(between[1:], 0)) if len(row_starts) else between
    outputs = max_tokens[kind_of] if len(kept) else np.zeros(0, dtype=np.int64)
    return PromptSurvey(
        num_rows=num_rows,
        num_surveyed_rows=collected.num_rows,
        rejects=dict(collected.rejects),
        num_prompt_tokens=lengths,
        num_shared_tokens=shared,
        num_nearest_tokens=nearest,
        max_output_tokens=outputs,
        num_group_rows=num_group_rows,
        is_single=np.array(group_sources, dtype=np.int64) == 1,
        row_starts=row_starts,
        starts_shard=_shard_starts(lengths - shared, shared, outputs, num_group_rows, starts_row, plan),
        own_terms=has_options[kind_of] if len(kept) else np.zeros(0, dtype=np.bool_),
    )


def _shard_starts(
    uncached: Counts,
    shared: Counts,
    max_outputs: Counts,
    group_rows: Counts,
    starts_row: npt.NDArray[np.bool_],
    plan: PlanSection,
) -> npt.NDArray[np.bool_]:
    """Approximate cuts of the plan, which also divides a large input into ranges and weighs bytes and rejects."""
    limits, places = np.unique(max_outputs, return_inverse=True)
    outputs = np.array([estimate_output_tokens(limit) for limit in limits.tolist()], dtype=np.int64)
    costs = RowCosts(
        tokens=uncached + outputs[places],
        shared_tokens=shared,
        num_rows=group_rows,
        num_bytes=np.zeros_like(uncached),
        can_begin=starts_row,
    )
    starts = np.zeros(len(uncached), dtype=np.bool_)
    starts[cut_rows(costs, plan)] = True
    return starts


def survey_columns(columns: ReadColumns) -> ReadColumns:
    """Only the columns that a quote needs: the prompts', ids, tenants and cost centres."""
    return ReadColumns(
        input_fields=columns.input_fields,
        passthrough=(),
        id_column=columns.id_column,
        tenant_column=columns.tenant_column,
        cost_center_column=columns.cost_center_column,
    )
