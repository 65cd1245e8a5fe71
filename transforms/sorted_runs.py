"""Sorted runs: rendered rows on the store, in token order, for the plan to merge.

Part of *plan*. Rows do not pass through a Beam shuffle: a run is written once, and only its small `RunFile` travels
(ADR 0002 has the measurement). Beside each run lie samples of its keys with the expected cost that follows each.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from model_runner.prefix_tree import common_prefix_lengths
from schemas import storage
from schemas.arrow import arrow_file_bytes, open_arrow_file, values_of
from schemas.job import PlanSection
from schemas.layout import RunLayout
from transforms.renderer import sampling_of

MAX_RUN_BYTES = 48 << 20
MAX_SHARD_BYTES = 256 << 20
MIN_SAMPLES = 128
SAMPLES_A_SHARD = 8
"""How fine runs are sampled: at least so many keys a run, and so many for each shard's worth of work in it."""

SHARD_WEIGHT = 1_000_000
"""A shard's worth of work, in the whole-number weights that are added up."""

EXPECTED_OUTPUT_TOKENS = 256
"""Most output tokens that a request is expected to take, whatever its `max_tokens`."""

SAMPLE_SCHEMA = pa.schema(
    [pa.field("key", pa.large_binary()), pa.field("weight", pa.int64()), pa.field("row", pa.int64())]
)
RUN_ORDER = ("prefix_key", "sampling", "options", "cost_center", "unit", "source_row")
"""Token order first; equal requests of one cost centre stand together, the first of the input ahead."""

_BATCH_ROWS = 512


@dataclass(frozen=True, slots=True)
class RunFile:
    """A run on the store: `requests` sorted by `RUN_ORDER`, or `rejects` in input order."""

    run_id: str
    kind: Literal["requests", "rejects"]
    num_rows: int
    num_bytes: int
    weight: int


def write_runs(batches: Sequence[pa.RecordBatch], layout: RunLayout, section: PlanSection) -> Iterator[RunFile]:
    """Write planned rows of neighbouring units as a run of requests and a run of rejects; an empty one is left out.

    Names follow from the rows, so that writing twice overwrites with the same bytes.
    """
    table = pa.Table.from_batches(batches)
    first = run_name(batches[0])
    is_reject = pc.is_valid(table.column("error_type"))
    rejects = table.filter(is_reject)
    if rejects.num_rows:
        run_id = f"{first}-rejects"
        _write_run(layout.run_file(run_id), rejects)
        yield RunFile(run_id, "rejects", rejects.num_rows, rejects.nbytes, 0)
    requests = table.filter(pc.invert(is_reject))
    if requests.num_rows:
        run_id = f"{first}-requests"
        requests = sort_rows(requests)
        weights = row_weights(requests, section)
        _write_run(layout.run_file(run_id), requests)
        _write_run(layout.samples_file(run_id), sample_keys(values_of(requests, "prefix_key"), weights))
        yield RunFile(run_id, "requests", requests.num_rows, requests.nbytes, int(weights.sum()))


def run_name(first: pa.RecordBatch) -> str:
    """The name of a run that begins with a batch: its input unit and first row, so that names sort in input order."""
    return f"{first.column('unit')[0].as_py():06d}-{first.column('source_row')[0].as_py():012d}"


def sort_rows(table: pa.Table) -> pa.Table:
    """Rows in `RUN_ORDER`."""
    return table.sort_by([(name, "ascending") for name in RUN_ORDER])


def row_weights(sorted_rows: pa.Table, section: PlanSection) -> npt.NDArray[np.int64]:
    """What each row is expected to add to a shard, in parts of `SHARD_WEIGHT`; shape (num_rows,).

    The largest of its shares of `max_shard_tokens` (prompt tokens not shared with the row before, and expected
    output), of `max_shard_rows`, and of `MAX_SHARD_BYTES` (with what it passes through).
    """
    keys = values_of(sorted_rows, "prefix_key")
    lengths = sorted_rows.column("num_prompt_tokens").to_numpy().astype(np.int64)
    uncached = lengths - common_prefix_lengths(keys)
    texts = values_of(sorted_rows, "sampling")
    outputs = {text: min(sampling_of(text).max_tokens, EXPECTED_OUTPUT_TOKENS) for text in set(texts)}
    tokens = uncached + np.array([outputs[text] for text in texts], dtype=np.int64)
    by_tokens = tokens * SHARD_WEIGHT // section.max_shard_tokens
    by_bytes = row_bytes(sorted_rows) * SHARD_WEIGHT // MAX_SHARD_BYTES
    return np.maximum(np.maximum(by_tokens, by_bytes), -(-SHARD_WEIGHT // section.max_shard_rows))


def row_bytes(rows: pa.Table) -> npt.NDArray[np.int64]:
    """About how many bytes each row takes: its own prompt and messages, and an even share of all other columns."""
    own = np.zeros(rows.num_rows, dtype=np.int64)
    large = 0
    for name in ("prefix_key", "messages"):
        own += np.array([len(value or b"") for value in values_of(rows, name)], dtype=np.int64)
        large += rows.column(name).nbytes
    return own + max(0, rows.nbytes - large) // max(1, rows.num_rows)


def sample_keys(keys: Sequence[bytes], weights: npt.NDArray[np.int64]) -> pa.Table:
    """Keys of a run, evenly spaced by weight, with row and weight up to the next sample."""
    ends = np.cumsum(weights)
    starts = ends - weights
    quantum = max(1, min(-(-int(ends[-1]) // MIN_SAMPLES), SHARD_WEIGHT // SAMPLES_A_SHARD))
    picked = np.unique(np.searchsorted(starts, np.arange(0, int(ends[-1]), quantum), side="left"))
    picked = picked[picked < len(weights)]
    bounds = np.append(starts[picked], ends[-1])
    picked_keys = pa.array([keys[index] for index in picked], pa.large_binary())
    return pa.table([picked_keys, pa.array(np.diff(bounds)), pa.array(picked)], schema=SAMPLE_SCHEMA)


def read_samples(layout: RunLayout, run: RunFile) -> pa.Table:
    return read_rows(layout.samples_file(run.run_id))


def read_rows(path: str) -> pa.Table:
    """All rows of an Arrow file on the store."""
    with storage.open_input(path) as source, open_arrow_file(source) as reader:
        return reader.read_all()


def read_key_range(layout: RunLayout, run_id: str, lower: bytes, upper: bytes | None) -> pa.Table:
    """The rows of a run of requests with `lower <= prefix_key < upper`; reads only the batches that hold them."""
    samples = read_rows(layout.samples_file(run_id))
    position = bisect_left(values_of(samples, "key"), lower)
    first = samples.column("row")[position - 1].as_py() // _BATCH_ROWS if position else 0
    with storage.open_input(layout.run_file(run_id)) as source, open_arrow_file(source) as reader:
        kept: list[pa.RecordBatch] = []
        for index in range(first, reader.num_record_batches):
            batch = reader.get_batch(index)
            keys = values_of(batch, "prefix_key")
            if upper is not None and keys[0] >= upper:
                break
            mask = pa.array([lower <= key and (upper is None or key < upper) for key in keys])
            kept.append(batch.filter(mask))
        return pa.Table.from_batches(kept, schema=reader.schema)


def _write_run(path: str, table: pa.Table) -> None:
    """A run lives only until the plan is complete, so it need not survive the machine."""
    storage.write_note(path, arrow_file_bytes(table, max_batch_rows=_BATCH_ROWS))


def write_rows(path: str, table: pa.Table) -> None:
    """Write rows as one Arrow file, whole or not at all."""
    storage.write_whole(path, arrow_file_bytes(table, max_batch_rows=_BATCH_ROWS))
