"""Sorted runs: rendered rows on the store, in token order, for the plan to merge.

Part of *plan*. A worker writes its rows as a run, an Arrow file; `shard_ranges.py` divides the token order of all runs
into ranges; one worker reads its range of every run, merges the parts and cuts shards of them:

                  token order ->
                  range s000000     range s000001        range s000002
                                 |                    |
    run A   [ aa ab ab ac ad     |  ba bb bb          |  ca cc          ]
    run B   [ aa ac              |  ba bc bd be be    |  cb cb cd       ]
    run C   [ ab                 |  bd                |  ca ca ca ce cf ]
    samples   ^         ^        |        ^           |  ^        ^
                                 |                    |
    merged    aa aa ab ab ab ..     ba ba bb bb bc ..    ca ca ca ca cb ..
    shards    s000000  s000000-00001   s000001             s000002 ..

A run's samples say how many of its bytes stand before a key and in which batch of the file it is, so that ranges are of
even size and `read_range` reads only the batches that it needs. Only the small `RunFile` passes through Beam, never the
rows (ADR 0002 has the measurement).
"""

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from moebeam.model_runner.prefix_tree import NUM_TENANT_BYTES, common_prefix_length
from moebeam.schemas.arrow import encode_arrow_file, list_values, open_arrow_file
from moebeam.schemas.job.sections import PlanSection
from moebeam.schemas.records import parse_sampling_json
from moebeam.schemas.store import storage
from moebeam.schemas.store.run_layout import RunLayout
from moebeam.schemas.store.sealed_file import ARROW_END, open_sealed, seal
from moebeam.transforms.plan.row_order import Places, RowKey, can_merge, sort_rows
from moebeam.transforms.plan.shard_cut import estimate_output_tokens

MAX_SORTED_RUN_BYTES = 48 << 20
SAMPLE_BYTES = MAX_SORTED_RUN_BYTES // 128
"""A run is sampled once in so many bytes; a range of rows can be wrong by as much for each run."""

ROW_BYTES = 1024
"""What a row takes while it is sorted and written, beside its columns."""

SHARD_WEIGHT = 1_000_000
"""A shard's worth of work, in the whole-number weights of runs."""

SAMPLE_SCHEMA = pa.schema(
    [
        pa.field("place", pa.large_string()),
        pa.field("bytes_before", pa.int64()),
        pa.field("batch", pa.int64()),
    ]
)
"""A place in the run's order; bytes of the run's rows that stand before it; the batch of the first that does not."""

_BATCH_ROWS = 512
_BATCH_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class RunFile:
    """A run on the store: `requests` sorted by `RUN_ORDER`, or `rejects` in input order.

    Attributes:
        num_bytes: of requests as `row_bytes` counts them.
        weight: about how many shards its requests would fill with nothing shared between runs, in `SHARD_WEIGHT`.
    """

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
        storage.write_note(layout.sorted_run_file(run_id), _encode(rejects, _BATCH_ROWS))
        yield RunFile(run_id, "rejects", rejects.num_rows, rejects.nbytes, 0)
    requests = table if not rejects.num_rows else table.filter(pc.invert(is_reject))
    if requests.num_rows:
        run_id = f"{first}-requests"
        requests = sort_rows(requests).combine_chunks()
        bytes_before = np.concatenate([[0], np.cumsum(row_bytes(requests))])
        num_bytes = int(bytes_before[-1])
        batch_rows = max(1, min(_BATCH_ROWS, requests.num_rows * _BATCH_BYTES // num_bytes))
        # A run lives only until the plan is complete, so it need not survive the machine.
        storage.write_note(layout.sorted_run_file(run_id), _encode(requests, batch_rows))
        picked = pick_sample_rows(bytes_before, offset_share=hash_share(run_id))
        samples = samples_table(sample_places(requests, picked, section), bytes_before, batch_rows=batch_rows)
        storage.write_note(layout.sorted_run_samples(run_id), _encode(samples, samples.num_rows))
        yield RunFile(run_id, "requests", requests.num_rows, num_bytes, _weight(requests, picked, section))


def run_name(first: pa.RecordBatch) -> str:
    """The name of a run that begins with a batch: its input unit and first row, so that names sort in input order."""
    return f"{first.column('unit')[0].as_py():06d}-{first.column('source_row')[0].as_py():012d}"


def row_bytes(rows: pa.Table) -> npt.NDArray[np.int64]:
    """About how many bytes each row takes: its own prompt and messages, an even share of all else, and `ROW_BYTES`."""
    own = np.zeros(rows.num_rows, dtype=np.int64)
    large = 0
    for name in ("prefix_key", "messages"):
        lengths: Any = pc.binary_length(rows.column(name))
        own += lengths.fill_null(0).to_numpy()
        large += rows.column(name).nbytes
    return own + max(0, rows.nbytes - large) // max(1, rows.num_rows) + ROW_BYTES


def pick_sample_rows(bytes_before: npt.NDArray[np.int64], *, offset_share: float) -> list[int]:
    """Rows of a run, the first of all and then one in `SAMPLE_BYTES`.

    Args:
        bytes_before: what stands before each row, and last of all in sum; shape (num_rows + 1,).
        offset_share: where the second one stands in its `SAMPLE_BYTES`; runs that differ do not sample in step.
    """
    marks = np.arange(int(SAMPLE_BYTES * offset_share), int(bytes_before[-1]), SAMPLE_BYTES)
    picked = np.unique(np.append(np.searchsorted(bytes_before[:-1], marks, side="left"), 0))
    return picked[picked < len(bytes_before) - 1].tolist()


def sample_places(rows: pa.Table, picked: Sequence[int], section: PlanSection) -> list[tuple[RowKey, int]]:
    """Places between sampled rows and those before them, where rows may be cut apart, and the first row after each.

    A place is as short as it can be: a key only up to where it differs from the one before, so that samples of long
    prompts stay small.
    """
    places = Places(rows)
    return list(dict(_sample(places, row, section) for row in picked).items())


def _sample(places: Places, row: int, section: PlanSection) -> tuple[RowKey, int]:
    key = places.key(row)
    before = places.key(row - 1) if row else key
    if key != before:
        return RowKey(key[: NUM_TENANT_BYTES + 4 * (_shared_tokens(before, key) + 1)]), row
    request = places.request(row)
    place = RowKey(key, request) if can_merge(request[0], section) else places[row]
    return place, places.first_from(place)


def _shared_tokens(before: bytes, key: bytes) -> int:
    """Tokens that a key shares with another, tenants counted."""
    words = common_prefix_length(np.frombuffer(before, np.uint32), np.frombuffer(key, np.uint32))
    return max(0, words - NUM_TENANT_BYTES // 4)


def samples_table(
    places: Sequence[tuple[RowKey, int]], bytes_before: npt.NDArray[np.int64], *, batch_rows: int
) -> pa.Table:
    """The result of `sample_places` in `SAMPLE_SCHEMA`, for a run in batches of so many rows."""
    columns = (
        [place.text for place, _ in places],
        [int(bytes_before[row]) for _, row in places],
        [row // batch_rows for _, row in places],
    )
    arrays = [pa.array(values, field.type) for values, field in zip(columns, SAMPLE_SCHEMA, strict=True)]
    return pa.Table.from_arrays(arrays, schema=SAMPLE_SCHEMA)


def _weight(rows: pa.Table, picked: Sequence[int], section: PlanSection) -> int:
    """`RunFile.weight`: outputs of all rows, and of prompts what the sampled ones do not share with the row before."""
    keys, lengths = rows.column("prefix_key"), rows.column("num_prompt_tokens")
    # The first row shares nothing because it is first, which says nothing of the others.
    num_uncached = [
        lengths[row].as_py() - (_shared_tokens(keys[row - 1].as_py(), keys[row].as_py()) if row else 0)
        for row in (picked[1:] or picked)
    ]
    num_tokens = sum(num_uncached) * rows.num_rows // len(num_uncached)
    for sampling, num_rows in Counter(list_values(rows, "sampling")).items():
        num_tokens += estimate_output_tokens(parse_sampling_json(sampling).max_tokens) * num_rows
    return max(
        num_tokens * SHARD_WEIGHT // section.max_shard_tokens, rows.num_rows * SHARD_WEIGHT // section.max_shard_rows
    )


def hash_share(run_id: str) -> float:
    """A number in [0, 1) that depends on a run's name alone."""
    return int.from_bytes(sha256(run_id.encode()).digest()[:4]) / (1 << 32)


def read_samples(layout: RunLayout, run_id: str) -> pa.Table:
    """The samples of a run, rows of `SAMPLE_SCHEMA` in the order of places."""
    return read_rows(layout.sorted_run_samples(run_id))


def read_rows(path: str, columns: Sequence[str] | None = None) -> pa.Table:
    """All rows of a sealed Arrow file on the store.

    Args:
        columns: those to read, which come in the file's order; None is all.
    Raises:
        FileDamaged: it is not what was written.
        OSError: it is missing, or the store failed.
    """
    with open_sealed(path, ARROW_END) as source, open_arrow_file(source, columns) as reader:
        return reader.read_all()


def read_range(layout: RunLayout, run_id: str, lower: RowKey, upper: RowKey | None) -> pa.Table:
    """The rows of a run of requests that stand in `[lower, upper)`; reads only the batches that hold them."""
    samples = read_samples(layout, run_id)
    places = [RowKey.from_text(text) for text in list_values(samples, "place")]
    position = bisect_right(places, lower)
    first = samples.column("batch")[position - 1].as_py() if position else 0
    position = len(places) if upper is None else bisect_left(places, upper)
    with open_sealed(layout.sorted_run_file(run_id), ARROW_END) as source, open_arrow_file(source) as reader:
        last = samples.column("batch")[position].as_py() if position < len(places) else reader.num_record_batches - 1
        kept: list[pa.RecordBatch] = []
        for index in range(first, last + 1):
            batch = reader.get_batch(index)
            found = Places(batch)
            start = found.first_from(lower)
            stop = batch.num_rows if upper is None else found.first_from(upper)
            if start < stop:
                kept.append(batch.slice(start, stop - start))
        return pa.Table.from_batches(kept, schema=reader.schema)


def write_rows(path: str, table: pa.Table) -> None:
    """Write rows as one sealed Arrow file, whole or not at all."""
    storage.write_whole(path, _encode(table, _BATCH_ROWS))


def _encode(table: pa.Table, batch_rows: int) -> bytes:
    return seal(encode_arrow_file(table, max_batch_rows=batch_rows))
