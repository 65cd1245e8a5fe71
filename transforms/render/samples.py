"""Samples: a row that wants several answers becomes as many planned rows, numbered in `sample`.

Part of *render*. From here on every stage sees one request an answer; they share one prompt, so that the plan has it
once in its tree.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa

MAX_REPEATED_BYTES = 8 << 20
"""Most bytes of a batch of repeated rows, unless a single row's samples have more."""


def repeat_rows(batch: pa.RecordBatch, num_samples: Sequence[int]) -> Iterator[pa.RecordBatch]:
    """Repeat each row as often as it wants answers; all samples of a row are in one batch.

    Args:
        batch: rows of `moebeam.schemas.tables.plan_schema`, `sample` 0.
        num_samples: of each row, at least 1.
    """
    if not batch.num_rows or max(num_samples) == 1:
        yield batch
        return
    most_rows = max(1, MAX_REPEATED_BYTES * batch.num_rows // max(1, batch.nbytes))
    starts, num_rows = [0], 0
    for row, count in enumerate(num_samples):
        num_rows += count
        if num_rows > most_rows and row > starts[-1]:
            starts.append(row)
            num_rows = count
    for start, stop in zip(starts, [*starts[1:], batch.num_rows], strict=True):
        counts = np.array(num_samples[start:stop], dtype=np.int64)
        rows = np.repeat(np.arange(start, stop), counts)
        samples = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        repeated = batch.take(rows)
        column = batch.schema.get_field_index("sample")
        yield repeated.set_column(column, batch.schema.field(column), pa.array(samples.astype(np.int32)))
